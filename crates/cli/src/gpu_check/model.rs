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
/// Mean KL divergence between card and CPU, in nats: of fp16 caches rounding alone, of codes also those that a rounding
/// moves to the next signpost.
const TOLERANCE: [f64; 2] = [1e-3, 1e-2];

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

fn greedy(engine: &dyn Engine, prompt: &[u32]) -> Result<Vec<u32>> {
    let mut sequence = engine.sequence(&Spec::Fp16, None)?;
    let top = |x: &[f32]| x.iter().enumerate().max_by(|p, q| p.1.total_cmp(q.1)).map_or(0, |(i, _)| i as u32);
    let mut all = vec![top(sequence.run(prompt, Logits::Last, Prefill::Exact)?)];
    while all.len() < GREEDY {
        let last = all[all.len() - 1];
        all.push(top(sequence.run(&[last], Logits::Last, Prefill::Exact)?));
    }
    Ok(all)
}

/// Compares with every cache that both can have; `seen` hears of each outcome.
pub fn run(loaded: &Loaded, gpu: &GpuModel, seen: &mut dyn FnMut(&Outcome)) -> Result<Vec<Outcome>> {
    let (model, vocab): (&Model, usize) = (&loaded.model, loaded.model.config.vocab);
    let text = loaded.tokenizer.encode(TEXT, false)?;
    let ids: Vec<u32> = loaded.bos().into_iter().chain(text).take(CHUNKS.iter().sum::<usize>() + SINGLE).collect();
    let mut outcomes = Vec::new();
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
            let rows = || want.chunks_exact(vocab).zip(got.chunks_exact(vocab)).map(|(a, b)| divergence(a, b));
            let tolerance = TOLERANCE[(spec != Spec::Fp16) as usize];
            let mut part = |what: &str, from: usize, n: usize| {
                let of = || rows().skip(from).take(n);
                let (kl, same) = (of().map(|r| r.0).sum::<f64>() / n as f64, of().filter(|r| r.1).count());
                let kl = if kl.is_nan() { f64::INFINITY } else { kl.max(0.0) };
                tell("model", format!("{name}, {way}, {what}: top-1 {same} of {n}"), kl, tolerance);
            };
            part("prompt", 0, CHUNKS[0]);
            part("more of it", CHUNKS[0], CHUNKS[1]);
            part("single tokens", CHUNKS[0] + CHUNKS[1], SINGLE);
        }
    }
    let (want, got) = (greedy(model, &ids[..40])?, greedy(gpu, &ids[..40])?);
    let same = want.iter().zip(&got).take_while(|(a, b)| a == b).count();
    tell("model, greedy", format!("fp16, {same} of {GREEDY} tokens equal"), 1.0 - same as f64 / GREEDY as f64, 0.0);
    Ok(outcomes)
}
