//! How long a greedy answer stays that of an fp16 cache, and how alike both are in the end.
//!
//! Prompts are the first halves of the windows that are evaluated. Both caches continue them token by token; the first
//! token that differs changes all that follows, however good the cache is, so the similarity of the whole is reported
//! beside it: the longest common subsequence of tokens, in any places but in order, which needs no judge. Texts of a small
//! model repeat themselves, which raises it; compare caches, not models.

use kvquant_cache::Prefill;
use kvquant_model::{Engine, Logits, Model};
use kvquant_quant::Spec;
use serde::{Deserialize, Serialize};

use crate::candidate::{Candidate, Format};
use crate::evaluate::{CHUNK, EvalError, EvalOptions, windows};
use crate::report::table;
use crate::score::best;

/// What one cache wrote, against fp16, averaged over prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// The spec as given.
    pub kv: String,
    /// Tokens before the first that differs.
    pub first_divergence: f64,
    /// Share of the reference's tokens that come before it.
    pub equal_share: f64,
    /// Twice the longest common subsequence over the tokens of both.
    pub similarity: f64,
}

/// Greedy continuations of all caches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// Prompts.
    pub prompts: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens of a continuation at most; it may end a turn before.
    pub tokens: usize,
    /// One entry a cache.
    pub results: Vec<Agreement>,
}

impl Generation {
    /// A Markdown table that also reads well in a terminal.
    pub fn table(&self) -> String {
        let mut rows = vec![["cache", "equal tokens", "equal share", "similarity"].map(String::from)];
        rows.extend(self.results.iter().map(|r| {
            [
                r.kv.clone(),
                format!("{:.1}", r.first_divergence),
                format!("{:.1} %", 100.0 * r.equal_share),
                format!("{:.1} %", 100.0 * r.similarity),
            ]
        }));
        table(&rows)
    }
}

/// Continues the first half of every window by up to `tokens` tokens; `ends` end a turn. `progress(done, total)` counts
/// continuations.
///
/// # Errors
/// As [`evaluate`](crate::evaluate); the continuation does not fit the model's context.
pub fn agree(
    model: &Model,
    ids: &[u32],
    candidates: &[Candidate<'_>],
    options: &EvalOptions,
    tokens: usize,
    ends: &[u32],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Generation, EvalError> {
    agree_on(model, model, ids, candidates, options, tokens, ends, progress)
}

/// [`agree`] with sequences on what `engine` is, a device that holds the same model.
///
/// # Errors
/// As [`agree`]; the device does not support a cache.
pub fn agree_on(
    engine: &dyn Engine,
    model: &Model,
    ids: &[u32],
    candidates: &[Candidate<'_>],
    options: &EvalOptions,
    tokens: usize,
    ends: &[u32],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Generation, EvalError> {
    let prompt_tokens = options.ctx / 2;
    let context = model.config.context;
    if tokens == 0 || prompt_tokens.saturating_add(tokens) > context {
        return Err(EvalError::Generate { tokens, most: context.saturating_sub(prompt_tokens) });
    }
    let prompts: Vec<Vec<u32>> = windows(model, ids, options)?.map(|w| w[..prompt_tokens].to_vec()).collect();
    let (n, total) = (prompts.len() as f64, prompts.len() * (candidates.len() + 1));
    let fp16 = Candidate { name: String::new(), format: Format::Cache(Spec::Fp16), quantizer: None };
    let empty =
        |c: &Candidate<'_>| Agreement { kv: c.name.clone(), first_divergence: 0.0, equal_share: 0.0, similarity: 0.0 };
    let mut results: Vec<Agreement> = candidates.iter().map(empty).collect();
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, total);
    };
    for prompt in &prompts {
        let want = greedy(engine, model, &fp16, prompt, tokens, ends, options.prefill)?;
        step();
        for (candidate, result) in candidates.iter().zip(&mut results) {
            let got = if candidate.is_reference() {
                want.clone()
            } else {
                greedy(engine, model, candidate, prompt, tokens, ends, options.prefill)?
            };
            let equal = want.iter().zip(&got).take_while(|(a, b)| a == b).count() as f64;
            result.first_divergence += equal / n;
            result.equal_share += equal / want.len() as f64 / n;
            result.similarity += similarity(&want, &got) / n;
            step();
        }
    }
    Ok(Generation { prompts: prompts.len(), prompt_tokens, tokens, results })
}

/// The most likely tokens after a prompt, at least one, the last one that of an end where it came to one.
fn greedy(
    engine: &dyn Engine,
    model: &Model,
    candidate: &Candidate<'_>,
    prompt: &[u32],
    tokens: usize,
    ends: &[u32],
    prefill: Prefill,
) -> Result<Vec<u32>, EvalError> {
    let mut sequence = candidate.sequence(model, engine, prefill)?;
    let mut next = 0;
    for chunk in prompt.chunks(CHUNK) {
        next = best(sequence.run(chunk, Logits::Last, prefill)?) as u32;
    }
    let mut all = vec![next];
    while all.len() < tokens && !ends.contains(&next) {
        next = best(sequence.run(&[next], Logits::Last, prefill)?) as u32;
        all.push(next);
    }
    Ok(all)
}

/// 2 |longest common subsequence| / (|a| + |b|); 1 for equal texts, 0 for texts without a common token.
fn similarity(a: &[u32], b: &[u32]) -> f64 {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    let tokens = a.len() + b.len();
    if tokens == 0 { 1.0 } else { 2.0 * row[b.len()] as f64 / tokens as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarity_is_that_of_common_subsequences() {
        assert_eq!(similarity(&[1, 2, 3], &[1, 2, 3]), 1.0);
        assert_eq!(similarity(&[1, 2, 3], &[4, 5]), 0.0);
        // 1 3 5 of five and four tokens.
        assert_eq!(similarity(&[1, 2, 3, 4, 5], &[1, 3, 9, 5]), 6.0 / 9.0);
        // Order counts.
        assert_eq!(similarity(&[1, 2], &[2, 1]), 0.5);
        assert_eq!(similarity(&[], &[]), 1.0);
    }
}
