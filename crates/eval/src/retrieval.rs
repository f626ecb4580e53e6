//! Whether a fact is found again in a long prompt: the same question on filler text of several lengths, the fact at several
//! depths, with one cache after the other.
//!
//! ```text
//! passkey   one number hidden in the text
//! multikey  four numbers under four names, scattered; one of them is asked for (as in RULER, arXiv 2404.06654)
//! ```
//!
//! The prompt is the model's chat template around text and question, with the beginning of the answer. Two scores: the
//! share of greedy answers that contain the number, and the mean loss of the number's tokens under teacher forcing, which
//! tells caches apart even where a small model finds all or nothing.

mod case;
mod report;

pub use case::Task;
pub use report::{Cell, RetrievalReport, RetrievalResult};

use case::{Builder, Case};
use kvquant_cache::{Cache, Prefill};
use kvquant_model::{ChatTemplate, ForwardError, Logits, Model, Step, Tokenizer};
use kvquant_quant::{Quantizer, Spec};

use crate::score::score;

/// Tokens of a forward pass; with quantized prefill results do not depend on it.
const CHUNK: usize = 256;
/// New tokens of a greedy answer at most.
const ANSWER: usize = 16;

/// Retrieval can't be measured.
#[derive(Debug, thiserror::Error)]
pub enum RetrievalError {
    /// The model or a cache refused.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The tokenizer refused.
    #[error(transparent)]
    Tokenizer(#[from] kvquant_model::tokenizer::TokenizerError),
    /// The model has no chat template, or it refused.
    #[error(transparent)]
    Template(#[from] kvquant_model::template::TemplateError),
    /// A number is out of range.
    #[error("--{what} {got}: {problem}")]
    Option {
        /// Which.
        what: &'static str,
        /// Its value.
        got: usize,
        /// What would do.
        problem: String,
    },
    /// No sentence to hide a fact between.
    #[error("the filler text has no sentences")]
    NoFiller,
    /// The heat map can't be drawn.
    #[error("cannot draw the plot: {0}")]
    Plot(String),
}

/// What to ask.
#[derive(Debug, Clone)]
pub struct RetrievalOptions {
    /// What is hidden.
    pub task: Task,
    /// Tokens of a prompt, at most; as many sentences of filler as fit.
    pub lengths: Vec<usize>,
    /// Where the fact is, in percent of the text.
    pub depths: Vec<usize>,
    /// Questions for each length and depth; each has numbers and a place in the filler of its own.
    pub trials: usize,
    /// The same seed asks the same questions.
    pub seed: u64,
    /// What the tokens of a prompt see of each other.
    pub prefill: Prefill,
}

/// The text side of a model.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// Text to ids.
    pub tokenizer: &'a Tokenizer,
    /// Chat to text.
    pub template: &'a ChatTemplate,
    /// Where the model expects it and its template does not write it.
    pub bos: Option<u32>,
    /// What facts are hidden in; repeated where it is too short.
    pub filler: &'a str,
}

/// A cache to be judged: its name, spec and quantizer.
pub type Kept<'a> = (String, Spec, Option<&'a Quantizer>);

/// Asks every question with every cache. `progress(done, total)` counts tokens.
///
/// # Errors
/// An option is out of range, or the model, its template or a cache refused.
pub fn retrieve(
    model: &Model,
    model_name: &str,
    text: &Text<'_>,
    caches: &[Kept<'_>],
    options: &RetrievalOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<RetrievalReport, RetrievalError> {
    check(options, model.config.context)?;
    let builder = Builder::new(text, options.task)?;
    let of_all = options.depths.len() * options.trials * caches.len();
    let total: usize = options.lengths.iter().sum::<usize>() * of_all;
    let mut done = 0;
    let mut results: Vec<_> = caches
        .iter()
        .map(|(kv, ..)| RetrievalResult { kv: kv.clone(), found: 0.0, nll: 0.0, bits_per_element: 0.0, cells: vec![] })
        .collect();
    for &length in &options.lengths {
        for &depth in &options.depths {
            let cases = (0..options.trials)
                .map(|trial| builder.case(length, depth, options.seed.wrapping_add(trial as u64)))
                .collect::<Result<Vec<_>, _>>()?;
            let prompt_tokens = cases.iter().map(|c| c.prompt.len()).sum::<usize>() / options.trials;
            for ((_, spec, quantizer), result) in caches.iter().zip(&mut results) {
                let mut cell = Cell { length, depth, prompt_tokens, found: 0.0, nll: 0.0 };
                for case in &cases {
                    let mut cache = model.new_cache(spec, *quantizer)?;
                    let (found, nll) = ask(model, text.tokenizer, &mut cache, case, options.prefill)?;
                    cell.found += f64::from(u8::from(found)) / options.trials as f64;
                    cell.nll += nll / options.trials as f64;
                    result.bits_per_element = cache.bits_per_element();
                    done += length;
                    progress(done, total);
                }
                result.cells.push(cell);
            }
        }
    }
    for result in &mut results {
        let n = result.cells.len() as f64;
        result.found = result.cells.iter().map(|c| c.found).sum::<f64>() / n;
        result.nll = result.cells.iter().map(|c| c.nll).sum::<f64>() / n;
    }
    Ok(RetrievalReport {
        model: model_name.into(),
        task: options.task,
        trials: options.trials,
        seed: options.seed,
        prefill: if options.prefill == Prefill::Exact { "exact" } else { "quantized" }.into(),
        results,
    })
}

fn check(o: &RetrievalOptions, context: usize) -> Result<(), RetrievalError> {
    let refused = |what, got, problem: &str| Err(RetrievalError::Option { what, got, problem: problem.into() });
    if o.trials == 0 {
        return refused("trials", 0, "at least one is needed");
    }
    if let Some(&depth) = o.depths.iter().find(|d| **d > 100) {
        return refused("depths", depth, "percent of the text, 0 to 100");
    }
    // The answer needs places too.
    let most = context.saturating_sub(ANSWER + 16);
    if let Some(&length) = o.lengths.iter().find(|l| **l > most) {
        return refused("lengths", length, &format!("prompts of the model have {most} tokens at most"));
    }
    if o.lengths.is_empty() || o.depths.is_empty() {
        return refused(if o.lengths.is_empty() { "lengths" } else { "depths" }, 0, "at least one is needed");
    }
    Ok(())
}

/// Whether the greedy answer has the number, and the mean loss of the number's tokens.
fn ask(
    model: &Model,
    tokenizer: &Tokenizer,
    cache: &mut Cache,
    case: &Case,
    prefill: Prefill,
) -> Result<(bool, f64), ForwardError> {
    let mut run = |tokens: &[u32], logits| model.forward(&mut [Step { tokens, cache: &mut *cache, logits }], prefill);
    let mut after = Vec::new();
    let chunks = case.prompt.len().div_ceil(CHUNK);
    for (i, chunk) in case.prompt.chunks(CHUNK).enumerate() {
        after = run(chunk, if i + 1 == chunks { Logits::Last } else { Logits::None })?;
    }
    // Each token of the number is predicted by what comes before it.
    let (vocab, mut logits, mut loss) = (model.config.vocab, after.clone(), 0.0);
    for (i, &id) in case.number.iter().enumerate() {
        loss += score(&logits, &logits, vocab, &[Some(id)])[0].nll;
        if i + 1 < case.number.len() {
            logits = run(&[id], Logits::Last)?;
        }
    }
    cache.truncate(case.prompt.len())?;
    let (mut answer, mut logits) = (Vec::new(), after);
    for i in 0..ANSWER {
        let id = crate::score::best(&logits) as u32;
        if tokenizer.end_of_turn().contains(&id) {
            break;
        }
        answer.extend_from_slice(tokenizer.token_bytes(id));
        if i + 1 < ANSWER {
            logits = model.forward(&mut [Step { tokens: &[id], cache, logits: Logits::Last }], prefill)?;
        }
    }
    let found = String::from_utf8_lossy(&answer).contains(&case.digits);
    Ok((found, loss / case.number.len() as f64))
}
