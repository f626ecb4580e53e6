//! A model's forward pass on a card against the same model on this CPU: logits of a prompt and of single tokens, and
//! greedy text.

use anyhow::Result;
use kvquant_cache::Prefill;
use kvquant_cuda::check::Outcome;
use kvquant_cuda::model::{GpuModel, supports};
use kvquant_model::{Engine, Logits, Model};
use kvquant_quant::{Quantizer, Spec};

use crate::models::{self, Loaded};
use crate::quantizers;

/// A text of the project's own.
const TEXT: &str = include_str!("../../assets/station.txt");
/// Tokens that run as one chunk, then as another, then one by one.
const CHUNKS: [usize; 2] = [150, 70];
const SINGLE: usize = 60;
/// Tokens of a greedy text.
const GREEDY: usize = 128;
/// Mean KL divergence between card and CPU, in nats, where no code is read: rounding alone.
const EXACT: f64 = 1e-3;
/// How much more than on the CPU a coded cache may lose against fp16. Codes that a rounding moves to the next signpost make
/// the two differ by about what both lose, so they are not compared with each other.
const LOSS: f64 = 0.35;
/// How far below the CPU's choice the card's may lie in the CPU's own logits, where they differ.
const TIE: f64 = 0.05;

/// KL(a || b) of two rows of logits, and whether both have the same greatest entry.
fn divergence(a: &[f32], b: &[f32]) -> (f64, bool) {
    let top = |x: &[f32]| x.iter().enumerate().max_by(|p, q| p.1.total_cmp(q.1)).map_or(0, |(i, _)| i);
    let sum = |x: &[f32]| {
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        most + x.iter().map(|v| (*v as f64 - most).exp()).sum::<f64>().ln()
    };
    let (sa, sb) = (sum(a), sum(b));
    let kl = a.iter().zip(b).map(|(a, b)| {
        let (p, q) = (*a as f64 - sa, *b as f64 - sb);
        p.exp() * (p - q)
    });
    (kl.sum(), top(a) == top(b))
}

/// All logits of a text in chunks, then token by token.
fn logits(
    engine: &dyn Engine,
    spec: &Spec,
    quantizer: Option<&Quantizer>,
    ids: &[u32],
    prefill: Prefill,
) -> Result<Vec<f32>> {
    let mut sequence = engine.sequence(spec, quantizer)?;
    let mut all = Vec::new();
    let (mut at, ends) = (0, CHUNKS.iter().copied().chain([1; SINGLE]));
    for n in ends {
        all.extend_from_slice(sequence.run(&ids[at..at + n], Logits::All, prefill)?);
        at += n;
    }
    Ok(all)
}

/// Greedy text of the CPU, and how often the card chooses the same after the same text; the worst of its other choices, by the CPU's
/// logits.
fn greedy(cpu: &dyn Engine, gpu: &dyn Engine, prompt: &[u32]) -> Result<(usize, f64)> {
    let top = |x: &[f32]| x.iter().enumerate().max_by(|p, q| p.1.total_cmp(q.1)).map_or(0, |(i, _)| i);
    let (mut a, mut b) = (cpu.sequence(&Spec::Fp16, None)?, gpu.sequence(&Spec::Fp16, None)?);
    let (mut next, mut same, mut worst) = (prompt.to_vec(), 0, 0.0f64);
    for _ in 0..GREEDY {
        let want = a.run(&next, Logits::Last, Prefill::Exact)?;
        let got = top(b.run(&next, Logits::Last, Prefill::Exact)?);
        let best = top(want);
        same += (best == got) as usize;
        worst = worst.max((want[best] - want[got]) as f64);
        next = vec![best as u32];
    }
    Ok((same, worst))
}

/// Compares with every cache that both can have; `seen` hears of each outcome.
pub fn run(loaded: &Loaded, gpu: &GpuModel, seen: &mut dyn FnMut(&Outcome)) -> Result<Vec<Outcome>> {
    let (model, vocab): (&Model, usize) = (&loaded.model, loaded.model.config.vocab);
    let text = loaded.tokenizer.encode(TEXT, false)?;
    let ids: Vec<u32> = loaded.bos().into_iter().chain(text).take(CHUNKS.iter().sum::<usize>() + SINGLE).collect();
    let (mut outcomes, mut fp16) = (Vec::new(), Vec::new());
    let mut tell = |kernel, case: String, error, tolerance| {
        let o = Outcome { kernel, case, error, tolerance };
        seen(&o);
        outcomes.push(o);
    };
    for (name, spec) in models::specs("fp16,nuq4-1%+sink1,nuq3-1%+sink1,nuq2-1%+sink1")? {
        let quantizer = match quantizers::find(None, model, &[&spec]) {
            Ok(q) => q,
            Err(e) => {
                eprintln!("left out: {name}: {e}");
                continue;
            }
        };
        supports(model, Some(&spec))?;
        for (way, prefill) in [("quantized", Prefill::Quantized), ("exact", Prefill::Exact)] {
            let want = logits(model, &spec, quantizer.as_ref(), &ids, prefill)?;
            let got = logits(gpu, &spec, quantizer.as_ref(), &ids, prefill)?;
            if spec == Spec::Fp16 {
                fp16.clone_from(&want);
            }
            let mut part = |what: &str, from: usize, n: usize| {
                let mean = |a: &[f32], b: &[f32]| {
                    let rows = a.chunks_exact(vocab).zip(b.chunks_exact(vocab)).skip(from).take(n);
                    let all: Vec<(f64, bool)> = rows.map(|(a, b)| divergence(a, b)).collect();
                    (all.iter().map(|r| r.0).sum::<f64>() / n as f64, all.iter().filter(|r| r.1).count())
                };
                let (direct, same) = mean(&want, &got);
                let reads_codes =
                    spec != Spec::Fp16 && (prefill == Prefill::Quantized || from + n > CHUNKS.iter().sum());
                let (error, tolerance, how) = if reads_codes {
                    let (on_cpu, on_gpu) = (mean(&fp16, &want).0, mean(&fp16, &got).0);
                    (on_gpu / on_cpu - 1.0, LOSS, format!("loses {on_gpu:.4} where the CPU loses {on_cpu:.4}"))
                } else {
                    (direct, EXACT, format!("top-1 {same} of {n}"))
                };
                let error = if error.is_nan() { f64::INFINITY } else { error.max(0.0) };
                tell("model", format!("{name}, {way}, {what}: {how}"), error, tolerance);
            };
            part("prompt", 0, CHUNKS[0]);
            part("more of it", CHUNKS[0], CHUNKS[1]);
            part("single tokens", CHUNKS[0] + CHUNKS[1], SINGLE);
        }
    }
    let (same, worst) = greedy(model, gpu, &ids[..40])?;
    tell("model, greedy", format!("fp16, {same} of {GREEDY} choices equal, the others near ties"), worst, TIE);
    Ok(outcomes)
}
