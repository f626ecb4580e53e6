//! What is measured: a cache of ours or a simulated one, and a sequence that runs through it.

use std::fmt;
use std::str::FromStr;

use kvquant_cache::{Cache, Prefill};
use kvquant_model::{Logits, Model, Step};
use kvquant_quant::{Fit, Quantizer, Spec, SpecError};

use crate::evaluate::EvalError;
use crate::simulated::{Kivi, Simulation, SimulationError, TokenFormat};

/// How keys and values are kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Format {
    /// In a cache of ours.
    Cache(Spec),
    /// In fp16, after another program's format has been through them.
    Simulated(Simulation),
}

/// A format that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not a cache spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Not a simulated cache.
    #[error(transparent)]
    Simulated(#[from] SimulationError),
}

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(s: &str) -> Result<Self, FormatError> {
        Ok(if s.starts_with("sim:") { Format::Simulated(s.parse()?) } else { Format::Cache(s.parse()?) })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Cache(spec) => spec.fmt(f),
            Format::Simulated(simulation) => simulation.fmt(f),
        }
    }
}

impl Format {
    /// The spec, where the cache is one of ours.
    pub fn spec(&self) -> Option<&Spec> {
        match self {
            Format::Cache(spec) => Some(spec),
            Format::Simulated(_) => None,
        }
    }
}

/// A cache to be judged.
#[derive(Debug, Clone)]
pub struct Candidate<'a> {
    /// As the user wrote it.
    pub name: String,
    /// What it is.
    pub format: Format,
    /// What its codes need.
    pub quantizer: Option<&'a Quantizer>,
}

impl Candidate<'_> {
    pub(crate) fn is_reference(&self) -> bool {
        self.format == Format::Cache(Spec::Fp16)
    }

    /// Bytes of its fit in a quantizer file.
    pub(crate) fn quantizer_bytes(&self) -> usize {
        let fit = |spec: &Spec| self.quantizer.filter(|_| spec.needs_fit())?.fit(spec).ok();
        self.format.spec().and_then(fit).map_or(0, Fit::file_bytes)
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// The model refuses the cache, or the format can't be simulated.
    pub(crate) fn sequence<'m>(&self, model: &'m Model, prefill: Prefill) -> Result<Sequence<'m>, EvalError> {
        let (cache, kind) = match &self.format {
            Format::Cache(spec) => (model.new_cache(spec, self.quantizer)?, Kind::Cache),
            Format::Simulated(how) => {
                let refused = |problem| Err(EvalError::Simulated { name: how.to_string(), problem });
                if prefill == Prefill::Exact {
                    return refused("needs --prefill quantized");
                }
                let cache = model.new_cache(&Spec::Fp16, None)?;
                match *how {
                    Simulation::Kivi { .. } if model.attention.iter().any(|a| a.window.is_some()) => {
                        return refused("does not support models whose layers have a sliding window");
                    }
                    Simulation::Kivi { bits } => {
                        (cache, Kind::Kivi(*how, Box::new(Kivi::new(bits, model.config.layers))))
                    }
                    how => (cache, Kind::Tokens(how, TokenFormat::new(how, model.config.head_dim))),
                }
            }
        };
        Ok(Sequence { model, cache, kind })
    }
}

#[derive(Debug)]
enum Kind {
    Cache,
    Tokens(Simulation, TokenFormat),
    Kivi(Simulation, Box<Kivi>),
}

/// A sequence's tokens in the cache that is measured.
#[derive(Debug)]
pub(crate) struct Sequence<'m> {
    model: &'m Model,
    cache: Cache,
    kind: Kind,
}

/// What a sequence takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub bits: f64,
    pub at_infinity: Option<f64>,
    pub bytes: f64,
}

impl Sequence<'_> {
    /// Runs tokens; logits as asked for, `[rows, vocab]`.
    ///
    /// # Errors
    /// The model or the cache refused.
    pub fn run(&mut self, tokens: &[u32], logits: Logits, prefill: Prefill) -> Result<Vec<f32>, EvalError> {
        let (model, start) = (self.model, self.cache.len());
        let mut step = [Step { tokens, cache: &mut self.cache, logits }];
        Ok(match &mut self.kind {
            Kind::Cache => model.forward(&mut step, prefill)?,
            Kind::Tokens(_, format) => model.forward_watched(&mut step, prefill, &mut |layer, k, v| {
                format.replace(model, layer, start, k, v);
            })?,
            Kind::Kivi(_, history) => history.run(model, &mut self.cache, tokens, logits)?,
        })
    }

    pub fn size(&self) -> Size {
        let (cache, d) = (&self.cache, self.model.config.head_dim);
        let (bits, bytes) = (cache.bits_per_element(), cache.bytes().total() as f64);
        match self.kind {
            Kind::Cache => Size { bits, at_infinity: cache.bits_at_infinity(), bytes },
            Kind::Tokens(how, _) | Kind::Kivi(how, _) => {
                let simulated = how.bits(d, cache.len());
                // As many elements as the cache holds in its stead.
                let bytes = if bits > 0.0 { bytes / bits * simulated } else { 0.0 };
                Size { bits: simulated, at_infinity: Some(how.bits_at_infinity(d)), bytes }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_whether_a_cache_is_simulated() {
        assert_eq!("mix3+sink1".parse::<Format>().unwrap().spec().unwrap().to_string(), "mix3+sink1");
        let simulated: Format = "sim:kivi2-g32".parse().unwrap();
        assert_eq!((simulated.spec(), simulated.to_string().as_str()), (None, "sim:kivi2-g32"));
        assert!("sim:nuq3".parse::<Format>().unwrap_err().to_string().contains("sim:turbo4"));
        assert!("nuq9".parse::<Format>().unwrap_err().to_string().contains("nuq3-1%+sink1"));
    }
}
