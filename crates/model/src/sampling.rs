//! Logits to the next id.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen. Filters apply in the order top-k, top-p, min-p, to probabilities at `temperature`.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0: always the most likely token.
    pub temperature: f32,
    /// Keep this many most likely tokens; 0: all.
    pub top_k: usize,
    /// Keep the most likely tokens that together reach this probability; 1: all.
    pub top_p: f32,
    /// Keep tokens at least this likely, relative to the most likely one; 0: all.
    pub min_p: f32,
    /// Taken from a token's logit for each time it was drawn.
    pub frequency_penalty: f32,
    /// Taken from the logit of every token that was drawn.
    pub presence_penalty: f32,
    /// The same seed gives the same answer.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

/// A token can't be sampled.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A parameter is out of range.
    #[error("{name} is {value}; it must be {range}")]
    Parameter {
        /// Which.
        name: &'static str,
        /// Its value.
        value: f32,
        /// What would do.
        range: &'static str,
    },
    /// The model gave no usable scores.
    #[error("the model's scores are not numbers: its weights or its cache are broken")]
    NotFinite,
}

/// Draws tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    candidates: Vec<(f32, u32)>,
    /// How often each token was drawn, where a penalty asks for it.
    drawn: HashMap<u32, u32>,
    penalized: Vec<f32>,
}

/// Log probabilities at temperature 1, before penalties and filters.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token that was drawn.
    pub chosen: f32,
    /// The most likely tokens, descending.
    pub top: Vec<(u32, f32)>,
}

/// What stands for the log of 0, which JSON can't hold.
const LOG_ZERO: f32 = -9999.0;

/// Log probabilities of the token that was drawn and of the `n` most likely ones.
pub fn logprobs(logits: &[f32], chosen: u32, n: usize) -> Logprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| ((x - max) as f64).exp()).sum();
    let log = |x: f32| ((x as f64 - max as f64 - sum.ln()) as f32).max(LOG_ZERO);
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let heavier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let n = n.min(order.len());
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, heavier);
    }
    order.truncate(n);
    order.sort_unstable_by(heavier);
    Logprobs {
        chosen: logits.get(chosen as usize).map_or(LOG_ZERO, |x| log(*x)),
        top: order.into_iter().map(|i| (i, log(logits[i as usize]))).collect(),
    }
}

/// The largest logit; none where one is NaN, or there are none.
fn largest(logits: &[f32]) -> Option<f32> {
    // Lanes, so that comparisons do not wait for each other.
    let (mut most, mut nan) = ([f32::NEG_INFINITY; 16], [false; 16]);
    let (chunks, rest) = logits.as_chunks::<16>();
    for chunk in chunks {
        for i in 0..16 {
            most[i] = if chunk[i] > most[i] { chunk[i] } else { most[i] };
            nan[i] |= chunk[i].is_nan();
        }
    }
    if nan.contains(&true) || rest.iter().any(|x| x.is_nan()) {
        return None;
    }
    most.iter().chain(rest).copied().reduce(f32::max)
}

impl Sampler {
    /// A sampler with checked parameters.
    ///
    /// # Errors
    /// A parameter is out of range.
    pub fn new(params: SamplingParams) -> Result<Self, SamplingError> {
        let check =
            |ok, name, value, range| if ok { Ok(()) } else { Err(SamplingError::Parameter { name, value, range }) };
        let p = &params;
        check((0.0..=100.0).contains(&p.temperature), "temperature", p.temperature, "0 to 100")?;
        check(p.top_p > 0.0 && p.top_p <= 1.0, "top-p", p.top_p, "above 0, at most 1")?;
        check((0.0..=1.0).contains(&p.min_p), "min-p", p.min_p, "0 to 1")?;
        for (name, x) in [("frequency penalty", p.frequency_penalty), ("presence penalty", p.presence_penalty)] {
            check((-2.0..=2.0).contains(&x), name, x, "-2 to 2")?;
        }
        Ok(Sampler {
            rng: ChaCha8Rng::seed_from_u64(params.seed),
            params,
            candidates: Vec::new(),
            drawn: HashMap::new(),
            penalized: Vec::new(),
        })
    }

    /// The next token for logits `[vocab]`.
    ///
    /// # Errors
    /// No logit is a number, or one is NaN.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SamplingError> {
        let (frequency, presence) = (self.params.frequency_penalty, self.params.presence_penalty);
        if frequency == 0.0 && presence == 0.0 {
            return self.draw(logits);
        }
        let mut penalized = std::mem::take(&mut self.penalized);
        penalized.clear();
        penalized.extend_from_slice(logits);
        for (&id, &n) in &self.drawn {
            if let Some(x) = penalized.get_mut(id as usize) {
                *x -= n as f32 * frequency + presence;
            }
        }
        let id = self.draw(&penalized);
        self.penalized = penalized;
        id.inspect(|&id| *self.drawn.entry(id).or_default() += 1)
    }

    fn draw(&mut self, logits: &[f32]) -> Result<u32, SamplingError> {
        let top = largest(logits).filter(|x| x.is_finite()).ok_or(SamplingError::NotFinite)?;
        let first = logits.iter().position(|x| *x == top).ok_or(SamplingError::NotFinite)? as u32;
        let p = &self.params;
        if p.temperature == 0.0 {
            return Ok(first);
        }
        // Probabilities relative to the most likely token.
        let candidates = &mut self.candidates;
        candidates.clear();
        let floor = p.min_p.max(1e-12);
        // Most are far below: one comparison each, with room for rounding.
        let near = top + p.temperature * (floor.ln() - 1e-3);
        candidates.extend(
            logits
                .iter()
                .enumerate()
                .filter(|(_, x)| **x >= near)
                .map(|(i, x)| (((x - top) / p.temperature).exp(), i as u32))
                .filter(|(w, _)| *w >= floor),
        );
        let heavier = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if p.top_k > 0 && p.top_k < candidates.len() {
            candidates.select_nth_unstable_by(p.top_k - 1, heavier);
            candidates.truncate(p.top_k);
        }
        if p.top_p < 1.0 {
            candidates.sort_unstable_by(heavier);
            let goal = p.top_p as f64 * candidates.iter().map(|c| c.0 as f64).sum::<f64>();
            let mut sum = 0.0;
            let kept = candidates.iter().position(|c| {
                sum += c.0 as f64;
                sum >= goal
            });
            candidates.truncate(kept.map_or(candidates.len(), |k| k + 1));
        }
        let total: f64 = candidates.iter().map(|c| c.0 as f64).sum();
        let mut left = self.rng.random::<f64>() * total;
        for &(w, id) in candidates.iter() {
            left -= w as f64;
            if left < 0.0 {
                return Ok(id);
            }
        }
        Ok(candidates.last().map_or(first, |c| c.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(params: SamplingParams, logits: &[f32]) -> Vec<usize> {
        let mut s = Sampler::new(params).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..20_000 {
            counts[s.sample(logits).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let probabilities = [0.5f32, 0.25, 0.15, 0.1];
        let logits = probabilities.map(f32::ln);
        let hot = SamplingParams { temperature: 1.0, ..Default::default() };
        let close =
            |got: &[usize], want: &[f32]| got.iter().zip(want).all(|(g, w)| (*g as f32 / 20_000.0 - w).abs() < 0.015);
        assert!(close(&draws(hot.clone(), &logits), &probabilities));
        assert!(close(&draws(SamplingParams { top_k: 2, ..hot.clone() }, &logits), &[0.667, 0.333, 0.0, 0.0]));
        assert!(close(&draws(SamplingParams { top_p: 0.8, ..hot.clone() }, &logits), &[0.556, 0.278, 0.167, 0.0]));
        assert!(close(&draws(SamplingParams { min_p: 0.4, ..hot.clone() }, &logits), &[0.667, 0.333, 0.0, 0.0]));
        let cold = SamplingParams { temperature: 0.5, ..hot };
        assert!(close(&draws(cold, &logits), &[0.725, 0.181, 0.065, 0.029]));
        assert_eq!(draws(SamplingParams::default(), &logits), [20_000, 0, 0, 0]);
    }

    #[test]
    fn penalties_turn_to_other_tokens() {
        let logits = [1.0f32, 0.9, 0.0];
        let mut s = Sampler::new(SamplingParams { presence_penalty: 0.5, ..Default::default() }).unwrap();
        let ids: Vec<u32> = (0..5).map(|_| s.sample(&logits).unwrap()).collect();
        assert_eq!(ids, [0, 1, 0, 0, 0], "a presence counts once");
        let mut s = Sampler::new(SamplingParams { frequency_penalty: 0.5, ..Default::default() }).unwrap();
        let ids: Vec<u32> = (0..5).map(|_| s.sample(&logits).unwrap()).collect();
        assert_eq!(ids, [0, 1, 0, 1, 0]);
        let wild = SamplingParams { frequency_penalty: 2.5, ..Default::default() };
        assert!(matches!(Sampler::new(wild), Err(SamplingError::Parameter { name: "frequency penalty", .. })));
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = [0.5f32, 0.25, 0.15, 0.1].map(f32::ln);
        let l = logprobs(&logits, 2, 2);
        assert!((l.chosen - 0.15f32.ln()).abs() < 1e-6);
        assert_eq!(l.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
        assert!((l.top[1].1 - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(logprobs(&logits, 0, 9).top.len(), 4);
        assert_eq!(logprobs(&[0.0, f32::NEG_INFINITY], 1, 0).chosen, LOG_ZERO);
    }

    #[test]
    fn seeds_repeat_and_bad_input_is_named() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32).collect();
        let run = |seed| {
            let mut s = Sampler::new(SamplingParams { temperature: 1.0, seed, ..Default::default() }).unwrap();
            (0..20).map(|_| s.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
        let mut s = Sampler::new(SamplingParams::default()).unwrap();
        assert_eq!(s.sample(&[1.0, f32::NAN]), Err(SamplingError::NotFinite));
        assert_eq!(s.sample(&[f32::NEG_INFINITY]), Err(SamplingError::NotFinite));
        assert_eq!(s.sample(&[]), Err(SamplingError::NotFinite));
        for bad in [
            SamplingParams { temperature: -1.0, ..Default::default() },
            SamplingParams { temperature: f32::NAN, ..Default::default() },
            SamplingParams { top_p: 0.0, ..Default::default() },
            SamplingParams { min_p: 1.5, ..Default::default() },
        ] {
            assert!(matches!(Sampler::new(bad), Err(SamplingError::Parameter { .. })));
        }
    }
}
