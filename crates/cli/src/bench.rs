//! `kvquant bench`: decode, attention, prefill and append by depth, beside what memory allows and beside a peer.

mod bandwidth;
mod peer;
mod report;

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvquant_cache::{Cache, Prefill};
use kvquant_model::{Logits, Model, Step, Workspace};
use kvquant_quant::{Quantizer, Spec};

use crate::failure::Input;
use crate::models;
use crate::output::{peak_memory, say};
use crate::progress::Progress;
use crate::quantizers;
use report::{Batch, Report, Result as Line, Stages};

/// A text of the project's own, whose keys and values fill the caches.
const TEXT: &str = include_str!("../assets/station.txt");
/// Tokens of the text that are computed; deeper caches repeat their blocks.
const SEED_TOKENS: usize = 512;
/// Tokens of a prefill chunk.
const CHUNK: usize = 512;
/// Tokens that are decoded before the cache is cut back to the depth.
const RUN: usize = 32;

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kvquant bench smollm2-135m --kv fp16,mix3+sink1 --depths 0,4096,32768\n\nA depth is reached by repeating the cache's blocks of a real text, so no long prefill is needed and positions beyond the model's context can be timed. Attention includes storing the step's own token in all layers. With one cache at one depth, the report says what the process held at most beside the weights. The fp16 floor is the time to read an fp16 cache of that depth once at the read bandwidth: the middle of what is measured before each cache of that depth and after the last.\n--peer llama-cpp-python runs that package (with the interpreter `python3`, or KVQUANT_PYTHON) on the same GGUF file at the same depths, in turns with ours."
)]
pub struct Args {
    /// Known model, GGUF file or Hugging Face folder
    model: String,
    /// Caches, separated by commas
    #[arg(
        long,
        value_name = "SPECS",
        default_value = "fp16,mix4+sink1,mix3+sink1,nuq4-1%+sink1,nuq3-1%+sink1,nuq2-1%+sink1"
    )]
    kv: String,
    /// Tokens already in the cache, separated by commas
    #[arg(long, value_name = "LIST", default_value = "0,4096,16384,32768")]
    depths: String,
    /// Seconds to repeat a decode step, at least three times
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    seconds: f64,
    /// Leave out the prefill of 512 tokens at each depth
    #[arg(long)]
    no_prefill: bool,
    /// Compare with this package in the same run: llama-cpp-python
    #[arg(long, value_name = "PACKAGE", value_parser = ["llama-cpp-python"])]
    peer: Option<String>,
    /// Caches of the peer, separated by commas
    #[arg(long, value_name = "TYPES", default_value = "f16,q8_0,q4_0", requires = "peer")]
    peer_kv: String,
    /// Quantizer file [default: the built-in one, if it fits the model]
    #[arg(long, value_name = "FILE")]
    quantizer: Option<std::path::PathBuf>,
    /// Sequences that are decoded together, separated by commas, besides one alone
    #[arg(long, value_name = "LIST", default_value = "")]
    batch: String,
    /// Show where the time of a step goes
    #[arg(long)]
    profile: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Keys and values of one token of the text, layer by layer.
struct Token {
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

pub fn run(args: Args) -> Result<()> {
    let kvs = models::specs(&args.kv)?;
    let mut depths = depths(&args.depths)?;
    depths.sort_unstable();
    depths.dedup();
    let batches = batches(&args.batch)?;
    let deepest = *depths.last().expect("at least one depth was parsed");
    let mut loaded = models::load(&args.model, None)?;
    loaded.model.allow_context(deepest + 2 * CHUNK + SEED_TOKENS);
    let specs: Vec<&Spec> = kvs.iter().map(|(_, s)| s).collect();
    let quantizer = quantizers::find(args.quantizer.as_deref(), &loaded.model, &specs)?;
    let mut peer = match &args.peer {
        Some(_) => Some(peer::Peer::start(&loaded.path, &args.peer_kv)?),
        None => None,
    };
    let mut progress = Progress::new();
    let ids = loaded.tokenizer.encode(TEXT, true)?;
    let ids: Vec<u32> = ids.iter().copied().cycle().take(SEED_TOKENS.max(CHUNK)).collect();
    let seconds = Duration::from_secs_f64(args.seconds.clamp(0.0, 600.0));
    let work = RefCell::new(if args.profile { Workspace::with_clock() } else { Workspace::new() });
    let bench = Bench {
        model: &loaded.model,
        ids: &ids,
        seconds,
        prefill: !args.no_prefill,
        profile: args.profile,
        batches,
        work,
    };
    let token = bench.token()?;
    let total = depths.len() * (kvs.len() + peer.as_ref().map_or(0, |p| p.types().len()));
    let mut done = 0;
    let (mut results, mut theirs) = (Vec::new(), Vec::new());
    let (mut all_rates, mut peak_bytes) = (Vec::new(), None);
    for &depth in &depths {
        // Before each cache and after the last: other users of a machine's memory come and go. The buffer would count as memory of
        // a cache that is there.
        let (first, mut rates) = (results.len(), Vec::new());
        for (name, spec) in &kvs {
            progress.update(&format!("{name} at {depth}"), done, total as u64);
            rates.push(bandwidth::read_gbps());
            let mut cache = bench.filled(spec, quantizer.as_ref(), depth)?;
            results.push(bench.measure(name, depth, &mut cache, &token)?);
            peak_bytes = peak_memory();
            done += 1;
        }
        rates.push(bandwidth::read_gbps());
        all_rates.extend_from_slice(&rates);
        let floor_ms = bench.fp16_bytes(depth) as f64 / median(rates) / 1e6;
        results[first..].iter_mut().for_each(|r| r.fp16_floor_ms = floor_ms);
        if let Some(peer) = &mut peer {
            for kv in peer.types().to_vec() {
                progress.update(&format!("llama-cpp-python {kv} at {depth}"), done, total as u64);
                theirs.push(peer.measure(&kv, depth, seconds, !args.no_prefill)?);
                done += 1;
            }
        }
    }
    progress.clear();
    all_rates.sort_by(f64::total_cmp);
    let report = Report {
        model: loaded.name.clone(),
        cpu: bandwidth::cpu_name(),
        kernels: kvquant_kernels::attend::Kernels::detect()?.name(),
        activations: loaded.model.activations.name(),
        threads: kvquant_kernels::threads::count(),
        read_gbps: all_rates[all_rates.len() / 2],
        read_gbps_range: [all_rates[0], all_rates[all_rates.len() - 1]],
        weight_bytes: loaded.model.weight_bytes(),
        peak_bytes,
        results,
        peer: theirs,
    };
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(())
}

fn depths(list: &str) -> Result<Vec<usize>> {
    let bad = || Input(format!("--depths {list}: expected numbers of tokens up to 10000000, as in 0,4096,32768"));
    let all: Vec<usize> = list.split(',').map(|d| d.trim().parse().map_err(|_| bad())).collect::<Result<_, _>>()?;
    if all.is_empty() || all.iter().any(|d| *d > 10_000_000) {
        return Err(bad().into());
    }
    Ok(all)
}

fn batches(list: &str) -> Result<Vec<usize>> {
    let bad = || Input(format!("--batch {list}: expected numbers of sequences from 2 to 1024, as in 4,8"));
    let parts = list.split(',').map(str::trim).filter(|b| !b.is_empty());
    let all: Vec<usize> = parts.map(|b| b.parse().map_err(|_| bad())).collect::<Result<_, _>>()?;
    if all.iter().any(|b| !(2..=1024).contains(b)) {
        return Err(bad().into());
    }
    Ok(all)
}

/// The middle of some times.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

struct Bench<'a> {
    model: &'a Model,
    ids: &'a [u32],
    seconds: Duration,
    prefill: bool,
    profile: bool,
    batches: Vec<usize>,
    work: RefCell<Workspace>,
}

impl Bench<'_> {
    fn step(&self, cache: &mut Cache, tokens: &[u32], logits: Logits) -> Result<f64> {
        let start = Instant::now();
        self.model.forward_in(&mut self.work.borrow_mut(), &mut [Step { cache, tokens, logits }], Prefill::Exact)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Keys and values of the text's last token, from an fp16 cache.
    fn token(&self) -> Result<Token> {
        let mut cache = self.model.new_cache(&Spec::Fp16, None)?;
        let (mut ks, mut vs) = (Vec::new(), Vec::new());
        let c = self.model.cache_shape().channels();
        let mut step = [Step { cache: &mut cache, tokens: &self.ids[..64], logits: Logits::None }];
        self.model.forward_watched(&mut step, Prefill::Exact, &mut |_, k, v| {
            ks.push(k[k.len() - c..].to_vec());
            vs.push(v[v.len() - c..].to_vec());
        })?;
        Ok(Token { k: ks, v: vs })
    }

    fn fp16_bytes(&self, depth: usize) -> usize {
        let shape = self.model.cache_shape();
        4 * shape.channels() * shape.layers * depth
    }

    /// A cache with at least `depth` tokens: a text's, then copies of their blocks.
    fn filled(&self, spec: &Spec, quantizer: Option<&Quantizer>, depth: usize) -> Result<Cache> {
        let mut cache = self.model.new_cache(spec, quantizer)?;
        if depth > 0 {
            let seed = SEED_TOKENS.min(depth.max(128));
            self.step(&mut cache, &self.ids[..seed], Logits::None)?;
            cache.repeat_to(depth)?;
        }
        Ok(cache)
    }

    /// Repeats a step that leaves the cache as it was, until the time is over.
    fn repeat(&self, step: impl FnMut() -> Result<f64>) -> Result<f64> {
        self.repeat_from(3, step)
    }

    /// [`repeat`](Bench::repeat), at least `least` times.
    fn repeat_from(&self, least: usize, mut step: impl FnMut() -> Result<f64>) -> Result<f64> {
        let (start, mut times) = (Instant::now(), Vec::new());
        while times.len() < least || start.elapsed() < self.seconds {
            times.push(step()?);
        }
        Ok(median(times))
    }

    /// Steps of one token after each other; the cache is cut back to its length from time to time, and at the end.
    fn decode(&self, cache: &mut Cache) -> Result<f64> {
        let len = cache.len();
        let step = self.repeat(|| {
            if cache.len() >= len + RUN {
                cache.truncate(len)?;
            }
            self.step(cache, &self.ids[..1], Logits::Last)
        })?;
        cache.truncate(len)?;
        Ok(step)
    }

    /// Tokens a second of `n` sequences that are decoded together.
    fn batch(&self, cache: &Cache, n: usize) -> Result<Batch> {
        let mut caches: Vec<Cache> = (0..n).map(|_| cache.fork()).collect();
        let len = cache.len();
        let step = self.repeat(|| {
            if caches[0].len() >= len + RUN {
                caches.iter_mut().try_for_each(|c| c.truncate(len))?;
            }
            let tokens = &self.ids[..1];
            let mut steps: Vec<Step<'_>> =
                caches.iter_mut().map(|cache| Step { cache, tokens, logits: Logits::Last }).collect();
            let start = Instant::now();
            self.model.forward_in(&mut self.work.borrow_mut(), &mut steps, Prefill::Exact)?;
            Ok(start.elapsed().as_secs_f64())
        })?;
        Ok(Batch { sequences: n, decode_tok_s: n as f64 / step })
    }

    /// Forgets what the clock has measured.
    fn reset_clock(&self) {
        self.work.borrow_mut().take_times();
    }

    /// Stages of what ran since the clock was reset; none without one.
    fn stages(&self, step: &'static str) -> Option<Stages> {
        let times = self.work.borrow_mut().take_times();
        let total: f64 = times.iter().map(|(_, t)| t.as_secs_f64()).sum();
        let shares = times.iter().map(|(stage, t)| (stage.name(), t.as_secs_f64() / total)).collect();
        self.profile.then_some(Stages { step, shares })
    }

    fn measure(&self, kv: &str, depth: usize, cache: &mut Cache, token: &Token) -> Result<Line> {
        let len = cache.len();
        let cache_bytes = cache.bytes().total();
        self.reset_clock();
        let decode = self.decode(cache)?;
        let mut stages: Vec<Stages> = self.stages("decode").into_iter().collect();
        let batch = self.batches.iter().map(|&n| self.batch(cache, n)).collect::<Result<Vec<_>>>()?;
        let shape = self.model.cache_shape();
        let group = shape.heads / shape.kv_heads;
        let queries: Vec<Vec<f32>> = token.k.iter().map(|k| spread(k, shape.head_dim, group)).collect();
        let mut out = vec![0.0; shape.heads * shape.head_dim];
        let attend = self.repeat(|| {
            let start = Instant::now();
            for (layer, q) in queries.iter().enumerate() {
                cache.extend(layer, q, &token.k[layer], &token.v[layer], Prefill::Exact, &mut out)?;
            }
            let t = start.elapsed().as_secs_f64();
            cache.rollback();
            Ok(t)
        })?;
        let chunk = &self.ids[..CHUNK];
        self.reset_clock();
        let prefill = match self.prefill {
            true => Some(
                CHUNK as f64
                    / self.repeat_from(1, || {
                        let t = self.step(cache, chunk, Logits::Last)?;
                        cache.truncate(len)?;
                        Ok(t)
                    })?,
            ),
            false => None,
        };
        stages.extend(self.stages("prefill").filter(|_| self.prefill));
        let (k, v) = (token.k.iter(), token.v.iter());
        let rows: Vec<(Vec<f32>, Vec<f32>)> = k.zip(v).map(|(k, v)| (k.repeat(CHUNK), v.repeat(CHUNK))).collect();
        let append = self.repeat(|| {
            let start = Instant::now();
            for (layer, (k, v)) in rows.iter().enumerate() {
                cache.append(layer, k, v)?;
            }
            let t = start.elapsed().as_secs_f64();
            cache.rollback();
            Ok(t)
        })?;
        Ok(Line {
            kv: kv.to_string(),
            depth,
            decode_tok_s: 1.0 / decode,
            attend_ms: 1e3 * attend,
            fp16_floor_ms: 0.0,
            prefill_tok_s: prefill,
            append_tok_s: CHUNK as f64 / append,
            cache_bytes,
            cache_gbps: cache_bytes as f64 / attend / 1e9,
            batch,
            stages,
        })
    }
}

/// Keys `[kv_heads, head_dim]` as queries of all heads.
fn spread(k: &[f32], head_dim: usize, group: usize) -> Vec<f32> {
    k.chunks_exact(head_dim).flat_map(|head| head.repeat(group)).collect()
}
