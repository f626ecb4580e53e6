//! Windows of a text through several caches at once.

use kvquant_cache::Prefill;
use kvquant_model::{Engine, ForwardError, Logits, Model};
use kvquant_quant::Spec;

use crate::candidate::{Candidate, Format};
use crate::report::{EvalResult, Report};
use crate::score::{Score, score};

/// Tokens of a forward pass with quantized prefill; results do not depend on it.
pub(crate) const CHUNK: usize = 128;
/// Tokens of a prefill chunk with exact prefill: each chunk sees itself exactly and its history through the codes.
const EXACT_CHUNK: usize = 512;

/// A text can't be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The model or a cache refused.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Not enough tokens.
    #[error(
        "the text has {got} tokens; {windows} windows of {ctx} from window {first} on need {need}: use a longer text, fewer windows or a smaller --ctx"
    )]
    TextTooShort {
        /// Tokens of the text.
        got: usize,
        /// Tokens asked for.
        need: usize,
        /// Windows asked for.
        windows: usize,
        /// Tokens of a window.
        ctx: usize,
        /// The first window.
        first: usize,
    },
    /// A window must predict something, within the model's context.
    #[error("--ctx is {ctx}; it must be 2 to {context}, the model's context")]
    Context {
        /// Asked for.
        ctx: usize,
        /// What the model has.
        context: usize,
    },
    /// No windows.
    #[error("--windows is 0; at least one is needed")]
    NoWindows,
    /// Another program's format does not work this way.
    #[error("{name}, which is simulated, {problem}")]
    Simulated {
        /// The format.
        name: String,
        /// What is in the way.
        problem: &'static str,
    },
    /// Answers of no tokens, or beyond the context.
    #[error(
        "--generate {tokens}; it must be 1 to {most}: prompts are half of --ctx, and the model's context is limited"
    )]
    Generate {
        /// Asked for.
        tokens: usize,
        /// What fits.
        most: usize,
    },
    /// The plot can't be drawn.
    #[error("cannot draw the plot: {0}")]
    Plot(String),
}

/// What to run.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// Tokens of a window.
    pub ctx: usize,
    /// Windows.
    pub windows: usize,
    /// The first window, from 0.
    pub first_window: usize,
    /// What the tokens of a window see of each other.
    pub prefill: Prefill,
    /// Takes the place of the first token of a window, for models that expect a beginning-of-text token.
    pub bos: Option<u32>,
}

/// Runs windows of `ids` through every cache and an fp16 one. `progress(done, total)` counts tokens.
///
/// # Errors
/// The text is too short, the window does not fit the model, or the model or a cache refused.
pub fn evaluate(
    model: &Model,
    model_name: &str,
    ids: &[u32],
    text_name: &str,
    candidates: &[Candidate<'_>],
    options: &EvalOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report, EvalError> {
    evaluate_on(model, model, model_name, ids, text_name, candidates, options, progress)
}

/// [`evaluate`] with sequences on what `engine` is, a device that holds the same model.
///
/// # Errors
/// As [`evaluate`]; the device does not support a cache.
pub fn evaluate_on(
    engine: &dyn Engine,
    model: &Model,
    model_name: &str,
    ids: &[u32],
    text_name: &str,
    candidates: &[Candidate<'_>],
    options: &EvalOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report, EvalError> {
    let EvalOptions { ctx, windows, prefill, .. } = *options;
    let chunk = if prefill == Prefill::Exact { EXACT_CHUNK } else { CHUNK };
    let vocab = model.config.vocab;
    let mut scores: Vec<Vec<Score>> = vec![Vec::new(); candidates.len()];
    let mut reference_scores = Vec::new();
    let mut sizes = vec![Sizes::default(); candidates.len()];
    let fp16 = Candidate { name: String::new(), format: Format::Cache(Spec::Fp16), quantizer: None };
    let mut done = 0;
    for window in self::windows(model, ids, options)? {
        let mut reference = fp16.sequence(model, engine, prefill)?;
        let mut sequences =
            candidates.iter().map(|c| c.sequence(model, engine, prefill)).collect::<Result<Vec<_>, _>>()?;
        let mut at = 0;
        for tokens in window.chunks(chunk) {
            let exact = reference.run(tokens, Logits::All, prefill)?;
            let next: Vec<Option<u32>> = (at + 1..=at + tokens.len()).map(|i| window.get(i).copied()).collect();
            let own = score(exact, exact, vocab, &next);
            for ((sequence, scores), candidate) in sequences.iter_mut().zip(&mut scores).zip(candidates) {
                if candidate.is_reference() {
                    // It is the reference itself: KL divergence 0, not a second run's rounding.
                    scores.extend_from_slice(&own);
                    continue;
                }
                let logits = sequence.run(tokens, Logits::All, prefill)?;
                scores.extend(score(logits, exact, vocab, &next));
            }
            reference_scores.extend(own);
            at += tokens.len();
            done += tokens.len();
            progress(done, windows * ctx);
        }
        for ((size, sequence), candidate) in sizes.iter_mut().zip(&sequences).zip(candidates) {
            let of = if candidate.is_reference() { reference.size()? } else { sequence.size()? };
            size.bits += of.bits / windows as f64;
            size.at_infinity.extend(of.at_infinity);
            size.bytes_per_token += of.bytes / ctx as f64 / windows as f64;
        }
    }
    let (exact, exact_late) = (perplexity(&reference_scores), perplexity(&late(&reference_scores, ctx)));
    let results = candidates
        .iter()
        .zip(&scores)
        .zip(&sizes)
        .map(|((candidate, scores), size)| {
            let late = late(scores, ctx);
            let (ppl, late_ppl) = (perplexity(scores), perplexity(&late));
            let whole = !size.at_infinity.is_empty();
            EvalResult {
                kv: candidate.name.clone(),
                simulated: candidate.format.spec().is_none(),
                bits_per_element: size.bits,
                bits_at_infinity: whole.then(|| mean(size.at_infinity.iter().copied())),
                quantizer_bytes: candidate.quantizer_bytes(),
                cache_bytes_per_token: size.bytes_per_token,
                ppl,
                ppl_delta: ppl / exact - 1.0,
                kld_mean: mean(scores.iter().map(|s| s.kld)),
                kld_p999: percentile(scores.iter().map(|s| s.kld).collect(), 0.999),
                late_ppl,
                late_ppl_delta: late_ppl / exact_late - 1.0,
                late_kld_mean: mean(late.iter().map(|s| s.kld)),
                top1_agreement: mean(scores.iter().map(|s| s.agrees as u8 as f64)),
            }
        })
        .collect();
    Ok(Report {
        model: model_name.into(),
        text: text_name.into(),
        ctx,
        windows,
        prefill: if prefill == Prefill::Exact { "exact" } else { "quantized" }.into(),
        results,
        generation: None,
    })
}

/// The windows that are evaluated, with a beginning-of-text token where there is one.
///
/// # Errors
/// The text is too short, or a window does not fit the model.
pub(crate) fn windows<'a>(
    model: &Model,
    ids: &'a [u32],
    options: &EvalOptions,
) -> Result<impl Iterator<Item = Vec<u32>> + use<'a>, EvalError> {
    let EvalOptions { ctx, windows, first_window, bos, .. } = *options;
    if ctx < 2 || ctx > model.config.context {
        return Err(EvalError::Context { ctx, context: model.config.context });
    }
    if windows == 0 {
        return Err(EvalError::NoWindows);
    }
    let need = first_window.saturating_add(windows).saturating_mul(ctx);
    if ids.len() < need {
        return Err(EvalError::TextTooShort { got: ids.len(), need, windows, ctx, first: first_window });
    }
    Ok(ids[first_window * ctx..need].chunks_exact(ctx).map(move |window| {
        let mut window = window.to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        window
    }))
}

/// What a cache took, averaged over windows.
#[derive(Clone, Default)]
struct Sizes {
    bits: f64,
    /// One entry a window that has a full block.
    at_infinity: Vec<f64>,
    bytes_per_token: f64,
}

/// Scores of the tokens from place `ctx / 2` of their window on; a window has `ctx - 1` scores, since its first token has
/// none.
fn late(scores: &[Score], ctx: usize) -> Vec<Score> {
    scores.chunks(ctx - 1).flat_map(|window| &window[ctx / 2 - 1..]).copied().collect()
}

fn mean(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len().max(1) as f64;
    x.sum::<f64>() / n
}

fn perplexity(scores: &[Score]) -> f64 {
    mean(scores.iter().map(|s| s.nll)).exp()
}

/// The smallest value that at least this share of all values does not exceed.
fn percentile(mut x: Vec<f64>, share: f64) -> f64 {
    if x.is_empty() {
        return 0.0;
    }
    x.sort_by(f64::total_cmp);
    x[((x.len() as f64 * share).ceil() as usize).clamp(1, x.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_ranks() {
        let x: Vec<f64> = (1..=1000).map(f64::from).collect();
        assert_eq!(percentile(x.clone(), 0.999), 999.0);
        assert_eq!(percentile(x, 1.0), 1000.0);
        assert_eq!(percentile(vec![3.0, 1.0], 0.5), 1.0);
        assert_eq!(percentile(vec![], 0.5), 0.0);
    }

    #[test]
    fn the_late_half_is_that_of_every_window() {
        // Two windows: a score is the place of the token that is predicted.
        let of = |ctx: usize| -> Vec<Score> {
            let window = (1..ctx).map(|place| Score { nll: place as f64, kld: 0.0, agrees: true });
            window.clone().chain(window).collect()
        };
        let places = |ctx| late(&of(ctx), ctx).iter().map(|s| s.nll as usize).collect::<Vec<_>>();
        assert_eq!(places(2), [1, 1]);
        assert_eq!(places(5), [2, 3, 4, 2, 3, 4]);
        assert_eq!(places(8), [4, 5, 6, 7, 4, 5, 6, 7]);
    }

    #[test]
    fn perplexity_is_the_exponential_of_the_mean_loss() {
        let s = |nll| Score { nll, kld: 0.0, agrees: true };
        assert!((perplexity(&[s(1.0), s(3.0)]) - 2f64.exp()).abs() < 1e-12);
    }
}
