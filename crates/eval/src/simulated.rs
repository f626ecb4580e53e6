//! Cache formats of other programs, simulated: what they would give back takes the place of keys and values on their way
//! into an fp16 cache. Bits are counted by formula. No speed can be measured this way.
//!
//! | name | after | what is done to the keys (after RoPE) and values of a head |
//! |---|---|---|
//! | `sim:q8_0`, `sim:q4_0` | llama.cpp | groups of 32 channels, symmetric, an fp16 scale each |
//! | `sim:q4_0-rot` | llama.cpp since 2026 | the same between a normalized Hadamard transform and its inverse |
//! | `sim:kivi2-g32`, `sim:kivi4-g32` | KIVI (arXiv 2402.02750) | keys per channel in groups of 32 tokens, values per token in groups of 32 channels, a scale and a zero point in fp16 each; keys become codes 128 at a time, so that 0 to 127 are exact, and the last 128 values are exact |
//! | `sim:turbo3`, `sim:turbo4` | TurboQuant (arXiv 2504.19874) | norm of the head in fp16, signs drawn at random and a Hadamard transform, each coordinate by the Lloyd-Max codebook of a normal distribution |
//!
//! Simplified: what is decoded is rounded to fp16 once more, since the cache that holds it is fp16. llama.cpp also rounds
//! queries to 8 bits. KIVI's window of values moves 32 tokens at a time in a prompt (128 to 159 are exact, which is in its
//! favour), and its prompts see codes as an answer would. TurboQuant's second stage (a sign of each residual coordinate,
//! for products without bias) and its channels of more bits are left out. Where 32 does not divide a head, the last group
//! is short; where a head is no power of two, the Hadamard transform takes the largest power of two that divides it.

mod formats;
mod history;

use std::fmt;
use std::str::FromStr;

use formats::{Hadamard, asymmetric, gaussian_book, q4_0, q8_0, turbo};
pub(crate) use history::Kivi;
use kvquant_model::Model;
use rayon::prelude::*;

/// Channels, or tokens, that share a scale.
const GROUP: usize = 32;
/// Tokens that KIVI keeps exactly at most (keys) and always (values).
const RESIDUAL: usize = 128;

/// A format of another program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Simulation {
    /// llama.cpp's 8 bits.
    Q8,
    /// llama.cpp's 4 bits.
    Q4 {
        /// Between Hadamard transforms.
        rotated: bool,
    },
    /// KIVI.
    Kivi {
        /// Of a code.
        bits: u32,
    },
    /// TurboQuant without its second stage.
    Turbo {
        /// Of a code.
        bits: u32,
    },
}

/// A simulated format that is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("simulated cache `{0}` is unknown; there are {all}", all = Simulation::ALL.map(|(name, _)| name).join(", "))]
pub struct SimulationError(String);

impl Simulation {
    /// All, by name.
    pub const ALL: [(&'static str, Simulation); 7] = [
        ("sim:q8_0", Simulation::Q8),
        ("sim:q4_0", Simulation::Q4 { rotated: false }),
        ("sim:q4_0-rot", Simulation::Q4 { rotated: true }),
        ("sim:kivi4-g32", Simulation::Kivi { bits: 4 }),
        ("sim:kivi2-g32", Simulation::Kivi { bits: 2 }),
        ("sim:turbo4", Simulation::Turbo { bits: 4 }),
        ("sim:turbo3", Simulation::Turbo { bits: 3 }),
    ];

    /// Bits per element of an endless context.
    pub(crate) fn bits_at_infinity(self, head_dim: usize) -> f64 {
        let scales = |bits: f64| bits * head_dim.div_ceil(GROUP) as f64 / head_dim as f64;
        match self {
            Simulation::Q8 => 8.0 + scales(16.0),
            Simulation::Q4 { .. } => 4.0 + scales(16.0),
            Simulation::Kivi { bits } => f64::from(bits) + (32.0 / GROUP as f64 + scales(32.0)) / 2.0,
            Simulation::Turbo { bits } => f64::from(bits) + 16.0 / head_dim as f64,
        }
    }

    /// Bits per element of `tokens` tokens.
    pub(crate) fn bits(self, head_dim: usize, tokens: usize) -> f64 {
        let coded = self.bits_at_infinity(head_dim);
        let Simulation::Kivi { bits } = self else { return coded };
        let keys = f64::from(bits) + 32.0 / GROUP as f64;
        let share = |codes: usize| codes as f64 / tokens.max(1) as f64;
        let side = |bits: f64, codes: f64| bits * codes + 16.0 * (1.0 - codes);
        (side(keys, share(kivi_keys(tokens))) + side(2.0 * coded - keys, share(kivi_values(tokens)))) / 2.0
    }
}

/// Keys that are codes for a query at a position.
fn kivi_keys(position: usize) -> usize {
    position / RESIDUAL * RESIDUAL
}

/// Values that are codes for a query at a position.
fn kivi_values(position: usize) -> usize {
    position.saturating_sub(RESIDUAL)
}

impl FromStr for Simulation {
    type Err = SimulationError;

    fn from_str(s: &str) -> Result<Self, SimulationError> {
        let known = Simulation::ALL.iter().find(|(name, _)| *name == s);
        known.map(|(_, simulation)| *simulation).ok_or_else(|| SimulationError(s.to_string()))
    }
}

impl fmt::Display for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Simulation::ALL.iter().find(|(_, simulation)| simulation == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

/// A format that treats every token by itself, ready for the heads of a model.
#[derive(Debug)]
pub(crate) struct TokenFormat {
    how: Simulation,
    hadamard: Hadamard,
    /// Only for TurboQuant.
    book: Vec<f32>,
}

impl TokenFormat {
    pub fn new(how: Simulation, head_dim: usize) -> Self {
        let (signs, book) = match how {
            Simulation::Turbo { bits } => (true, gaussian_book(bits)),
            _ => (false, Vec::new()),
        };
        TokenFormat { how, hadamard: Hadamard::new(head_dim, signs), book }
    }

    /// What keys and values `[tokens, kv_heads, head_dim]` from position `start` on come back as; keys before RoPE, as a
    /// layer hands them over.
    pub fn replace(&self, model: &Model, layer: usize, start: usize, k: &mut [f32], v: &mut [f32]) {
        let (rope, c) = (&model.attention[layer].rope, model.cache_shape().channels());
        let d = model.config.head_dim;
        k.par_chunks_exact_mut(c).zip(v.par_chunks_exact_mut(c)).enumerate().for_each(|(i, (k, v))| {
            let turn = rope.rotation(start + i);
            let mut turned = vec![0.0; d];
            for head in k.chunks_exact_mut(d) {
                turned.copy_from_slice(head);
                turn.apply(&mut turned);
                self.head(&mut turned);
                turn.undo(&turned, head);
            }
            v.chunks_exact_mut(d).for_each(|head| self.head(head));
        });
    }

    fn head(&self, x: &mut [f32]) {
        match self.how {
            Simulation::Q8 => x.chunks_mut(GROUP).for_each(q8_0),
            Simulation::Q4 { rotated: false } => x.chunks_mut(GROUP).for_each(q4_0),
            Simulation::Q4 { rotated: true } => {
                self.hadamard.forward(x);
                x.chunks_mut(GROUP).for_each(q4_0);
                self.hadamard.back(x);
            }
            Simulation::Turbo { .. } => {
                self.hadamard.forward(x);
                turbo(x, &self.book);
                self.hadamard.back(x);
            }
            Simulation::Kivi { bits } => x.chunks_mut(GROUP).for_each(|group| asymmetric(group, bits)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_refused_with_all() {
        for (name, simulation) in Simulation::ALL {
            assert_eq!(name.parse(), Ok(simulation));
            assert_eq!(simulation.to_string(), name);
        }
        let e = "sim:q5_0".parse::<Simulation>().unwrap_err().to_string();
        assert!(e.contains("`sim:q5_0`") && e.contains("sim:turbo3"), "{e}");
    }

    #[test]
    fn bits_follow_the_layouts() {
        let of = |name: &str| name.parse::<Simulation>().unwrap();
        // 34 and 18 bytes for 32 numbers, as llama.cpp's blocks have.
        assert_eq!(of("sim:q8_0").bits(64, 2048), 8.5);
        assert_eq!(of("sim:q4_0-rot").bits(128, 1), 4.5);
        assert_eq!(of("sim:turbo3").bits(64, 2048), 3.25);
        assert_eq!(of("sim:kivi2-g32").bits_at_infinity(64), 3.0);
        assert_eq!(of("sim:kivi4-g32").bits_at_infinity(80), 4.0 + (1.0 + 32.0 * 3.0 / 80.0) / 2.0);
        // All exact; then 256 keys and 172 values of 300 tokens as codes.
        assert_eq!(of("sim:kivi2-g32").bits(64, 100), 16.0);
        let want = (2 * 300 * 16 - (256 + 172) * 13) as f64 / (2 * 300) as f64;
        assert!((of("sim:kivi2-g32").bits(64, 300) - want).abs() < 1e-12);
    }
}
