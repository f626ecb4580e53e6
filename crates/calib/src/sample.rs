//! Calibration text from the model itself, for when no text is at hand.

use kvquant_cache::{Cache, Prefill};
use kvquant_model::sampling::{Sampler, SamplingParams};
use kvquant_model::{Logits, Model, Step};
use kvquant_quant::Spec;
use rand::{Rng, SeedableRng};

use crate::{CalibError, Progress};

/// Nucleus kept when sampling: at temperature 1 alone, a few tokens in a hundred come from a tail in which a small
/// model's probabilities mean little, and each of them derails the text that follows.
const TOP_P: f32 = 0.95;

/// `windows` sequences of `ctx` tokens sampled from the model at temperature 1, top-p 0.95, each from a random
/// token of the vocabulary; see [`sample_windows_from`].
///
/// # Errors
/// As [`sample_windows_from`].
pub fn sample_windows(
    model: &Model,
    windows: usize,
    ctx: usize,
    seed: u64,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Vec<u32>>, CalibError> {
    sample_windows_from(model, None, windows, ctx, seed, progress)
}

/// `windows` sequences of `ctx` tokens sampled from the model at temperature 1, top-p 0.95, in one batch with fp16
/// caches. Each begins with `start` (the token that begins a document, where the model has one) or else with a
/// random token of the vocabulary, and has its own seed. A sequence that emits the end of its text simply goes on:
/// what follows is a new document. Equal arguments give equal windows.
///
/// # Errors
/// No windows, more tokens than the model's context, or a failure of the forward pass.
pub fn sample_windows_from(
    model: &Model,
    start: Option<u32>,
    windows: usize,
    ctx: usize,
    seed: u64,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Vec<u32>>, CalibError> {
    if windows == 0 || ctx < 2 {
        return Err(CalibError::NoWindows { windows, ctx });
    }
    if ctx > model.config.context {
        return Err(CalibError::Context { ctx, context: model.config.context });
    }
    let vocab = model.config.vocab;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut caches = (0..windows).map(|_| model.new_cache(&Spec::Fp16, None)).collect::<Result<Vec<Cache>, _>>()?;
    let mut samplers = (0..windows)
        .map(|_| {
            Sampler::new(SamplingParams {
                temperature: 1.0,
                top_k: 0,
                top_p: TOP_P,
                min_p: 0.0,
                seed: rng.random(),
                ..Default::default()
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut ids: Vec<Vec<u32>> = (0..windows)
        .map(|_| {
            let mut sequence = Vec::with_capacity(ctx);
            sequence.push(start.unwrap_or_else(|| rng.random_range(0..vocab as u32)));
            sequence
        })
        .collect();
    for done in 1..ctx {
        progress(Progress { stage: "sampling, token", done, total: ctx });
        let mut steps: Vec<Step<'_>> = ids
            .iter()
            .zip(&mut caches)
            .map(|(sequence, cache)| Step { tokens: &sequence[done - 1..], cache, logits: Logits::Last })
            .collect();
        let logits = model.forward(&mut steps, Prefill::Exact)?;
        for ((sequence, sampler), row) in ids.iter_mut().zip(&mut samplers).zip(logits.chunks_exact(vocab)) {
            sequence.push(sampler.sample(row)?);
        }
    }
    progress(Progress { stage: "sampling, token", done: ctx, total: ctx });
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_model;

    #[test]
    fn sequences_differ_and_can_be_repeated() {
        let model = tiny_model(false);
        let run = |start, seed| sample_windows_from(&model, start, 3, 12, seed, &mut |_| {}).unwrap();
        let a = run(Some(4), 7);
        assert!(a.iter().all(|w| w.len() == 12 && w[0] == 4 && w.iter().all(|id| *id < 19)));
        assert!(a[0] != a[1] && a[1] != a[2]);
        assert_eq!(a, run(Some(4), 7));
        assert_ne!(a, run(Some(4), 8));
        assert_ne!(run(None, 7)[0], a[0]);
    }

    #[test]
    fn bad_sizes_are_named() {
        let model = tiny_model(false);
        let run = |n, ctx| sample_windows(&model, n, ctx, 0, &mut |_| {}).unwrap_err();
        assert!(matches!(run(0, 8), CalibError::NoWindows { .. }));
        assert!(matches!(run(1, 1), CalibError::NoWindows { .. }));
        assert!(matches!(run(1, 513), CalibError::Context { .. }));
    }
}
