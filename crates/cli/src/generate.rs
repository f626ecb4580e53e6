//! `kvquant generate`, and what it shares with `chat`.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use kvquant_cache::Cache;
use kvquant_cuda::model::OnGpu;
use kvquant_model::Sequence;
use kvquant_model::generate::{Event, GenerateOptions, Outcome, generate_on};
use kvquant_model::sampling::{Sampler, SamplingParams};
use kvquant_model::sequence::OnCpu;
use kvquant_model::template::Message;
use kvquant_quant::Spec;

use crate::device;
use crate::eval::PrefillArg;
use crate::failure::Input;
use crate::models::{self, Loaded};
use crate::output::{bytes, read_text, say};
use crate::progress::Progress;
use crate::quantizers;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kvquant generate smollm2-135m -p \"Name three rivers.\" --kv mix3+sink1\n  kvquant generate model.gguf -f question.txt --kv mix4+sink1 --quantizer model.safetensors --temperature 0.7 --top-p 0.9\n\nCtrl-C ends the answer and keeps what is there."
)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// The prompt
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file", required_unless_present = "file")]
    prompt: Option<String>,
    /// Read the prompt from a file, `-` for standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// No chat template: continue the text
    #[arg(long)]
    raw: bool,
    /// Print answer and figures as JSON when done, instead of streaming
    #[arg(long)]
    json: bool,
}

/// Options of everything that generates.
#[derive(clap::Args)]
pub struct Common {
    /// Known model, GGUF file or Hugging Face folder
    pub model: String,
    /// How the cache is stored [default: mix4+sink1, or nuq4-1%+sink1+online where no quantizer fits the model]
    #[arg(long, value_name = "SPEC")]
    pub kv: Option<String>,
    /// Quantizer file [default: the built-in one, if it fits the model]
    #[arg(long, value_name = "FILE")]
    pub quantizer: Option<PathBuf>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// 0: always the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Only the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Only this many most likely tokens; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// Only tokens at least this likely, relative to the most likely
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// The same seed gives the same answer
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// New tokens at most
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// Positions at most [default: the model's context]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// How a prompt's tokens see each other
    #[arg(long, value_enum, default_value = "exact")]
    prefill: PrefillArg,
    #[command(flatten)]
    on: device::Choice,
}

/// A history and what runs tokens after it.
enum Place {
    Cpu(Box<Cache>),
    Gpu(Box<OnGpu>),
}

/// A model, its cache and how to sample.
pub struct Session {
    pub loaded: Loaded,
    pub spec: Spec,
    place: Place,
    sampler: Sampler,
    options: GenerateOptions,
}

impl Common {
    pub fn session(&self) -> Result<Session> {
        if let Some(kv) = &self.kv {
            kv.parse::<Spec>()?;
        }
        let sampler = Sampler::new(SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            ..SamplingParams::default()
        })?;
        let loaded = models::load(&self.model, self.ctx)?;
        let choose = |on_gpu, kv| quantizers::choose(self.quantizer.as_deref(), &loaded.model, kv, on_gpu);
        let (mut spec, mut quantizer) = choose(self.on.wants_gpu(), self.kv.as_deref())?;
        let place = match self.on.place(&loaded.model, &[&spec])? {
            Some(gpu) => Place::Gpu(Box::new(gpu.start(&spec, quantizer.as_ref())?)),
            None => {
                if self.on.wants_gpu() {
                    (spec, quantizer) = choose(false, self.kv.as_deref())?;
                }
                Place::Cpu(Box::new(loaded.model.new_cache(&spec, quantizer.as_ref())?))
            }
        };
        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            prefill: self.prefill.into(),
            context: self.ctx.unwrap_or(usize::MAX),
            ..GenerateOptions::default()
        };
        Ok(Session { loaded, spec, place, sampler, options })
    }

    /// The messages that open a chat.
    pub fn opening(&self) -> Vec<Message> {
        self.system.iter().map(|s| Message { role: "system".into(), content: s.clone() }).collect()
    }
}

impl Session {
    /// Prompt ids, with the beginning-of-text token where the model wants one.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoded = self.loaded.tokenizer.encode(text, special)?;
        // Some chat templates write it themselves.
        let bos = self.loaded.bos().filter(|bos| encoded.first() != Some(bos));
        Ok(bos.into_iter().chain(encoded).collect())
    }

    /// The sequence, on whatever it runs.
    pub fn sequence(&mut self) -> Box<dyn Sequence + '_> {
        sequence(&self.loaded, &mut self.place)
    }

    /// Runs a prompt after what the cache holds, streaming the answer to `show`.
    pub fn answer(&mut self, prompt: &[u32], show: &mut dyn FnMut(&str) -> Result<()>) -> Result<Outcome> {
        let interrupted = interrupted()?;
        interrupted.store(false, Ordering::Relaxed);
        let mut progress = Progress::new();
        let mut failed = None;
        let outcome = generate_on(
            &mut *sequence(&self.loaded, &mut self.place),
            &self.loaded.tokenizer,
            prompt,
            &mut self.sampler,
            &self.options,
            &mut |event| {
                match event {
                    Event::Prefill { done, total } if done == total => progress.clear(),
                    Event::Prefill { done, total } => progress.update("reading the prompt", done as u64, total as u64),
                    Event::Text(text) => {
                        if let Err(e) = show(text) {
                            failed = Some(e);
                        }
                    }
                }
                failed.is_none() && !interrupted.load(Ordering::Relaxed)
            },
        )?;
        progress.clear();
        match failed {
            Some(e) => Err(e),
            None => Ok(outcome),
        }
    }

    /// One line of figures.
    pub fn figures(&mut self, o: &Outcome) -> Result<String> {
        let size = self.sequence().size()?;
        let rate = |n: usize, s: f64| if s > 0.0 { n as f64 / s } else { 0.0 };
        Ok(format!(
            "{} + {} tokens, prefill {:.0}/s, decode {:.1}/s, cache {} ({}, {:.2} bits)",
            o.prompt_tokens,
            o.tokens.len(),
            rate(o.prompt_tokens, o.prefill_seconds),
            rate(o.tokens.len().saturating_sub(1), o.decode_seconds),
            bytes(size.bytes as f64),
            self.spec,
            size.bits_per_element
        ))
    }

    /// Bytes by part, where the cache counts them.
    pub fn parts(&self) -> Option<kvquant_cache::Bytes> {
        match &self.place {
            Place::Cpu(cache) => Some(cache.bytes()),
            Place::Gpu(_) => None,
        }
    }
}

fn sequence<'a>(loaded: &'a Loaded, place: &'a mut Place) -> Box<dyn Sequence + 'a> {
    match place {
        Place::Cpu(cache) => Box::new(OnCpu::new(&loaded.model, &mut **cache)),
        Place::Gpu(on_gpu) => Box::new(&mut **on_gpu),
    }
}

/// Set by Ctrl-C while an answer runs; at a prompt, Ctrl-C ends the program.
pub fn interrupted() -> Result<&'static AtomicBool> {
    static FLAG: AtomicBool = AtomicBool::new(false);
    static HANDLER: OnceLock<()> = OnceLock::new();
    if HANDLER.set(()).is_ok() {
        ctrlc::set_handler(|| {
            if AT_PROMPT.load(Ordering::Relaxed) || FLAG.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        })
        .context("cannot watch for Ctrl-C")?;
    }
    Ok(&FLAG)
}

/// Whether the program waits for the user to type.
pub static AT_PROMPT: AtomicBool = AtomicBool::new(false);

/// Writes to standard output at once.
pub fn to_stdout(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

pub fn run(args: Args) -> Result<()> {
    let prompt = match (&args.prompt, &args.file) {
        (Some(p), _) => p.clone(),
        (None, Some(path)) if path.as_os_str() == "-" => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|e| Input(format!("standard input: cannot read the prompt: {e}")))?;
            text
        }
        (None, Some(path)) => read_text(path)?,
        (None, None) => String::new(),
    };
    if prompt.trim().is_empty() {
        return Err(Input("the prompt is empty; give text with -p or -f".into()).into());
    }
    let mut session = args.common.session()?;
    let ids = if args.raw {
        session.encode(&prompt, false)?
    } else {
        let mut messages = args.common.opening();
        messages.push(Message { role: "user".into(), content: prompt });
        let text = session.loaded.template()?.render(&messages, true)?;
        session.encode(&text, true)?
    };
    if args.json {
        let o = session.answer(&ids, &mut |_| Ok(()))?;
        let size = session.sequence().size()?;
        let report = serde_json::json!({
            "text": o.text, "tokens": o.tokens, "stop": o.stop, "prompt_tokens": o.prompt_tokens,
            "prefill_seconds": o.prefill_seconds, "decode_seconds": o.decode_seconds, "kv": session.spec.to_string(),
            "cache_bytes": size.bytes, "bits_per_element": size.bits_per_element, "device": args.common.on.device.to_string(),
        });
        say!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let o = session.answer(&ids, &mut to_stdout)?;
    to_stdout("\n")?;
    eprintln!("[{}]", session.figures(&o)?);
    Ok(())
}
