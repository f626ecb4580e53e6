//! What is measured: a cache of ours or a simulated one, and a sequence that runs through it.

use std::fmt;
use std::str::FromStr;

use kvquant_cache::{Cache, Prefill};
use kvquant_model::sequence::{Engine, Sequence as Run, Size as Held};
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

    /// An empty sequence on what runs the model.
    ///
    /// # Errors
    /// The model refuses the cache, or the format can't be simulated.
    pub(crate) fn sequence<'m>(
        &self,
        model: &'m Model,
        engine: &'m dyn Engine,
        prefill: Prefill,
    ) -> Result<Sequence<'m>, EvalError> {
        let how = match &self.format {
            Format::Cache(spec) => return Ok(Sequence::Own(engine.sequence(spec, self.quantizer)?)),
            Format::Simulated(how) => how,
        };
        let refused = |problem| Err(EvalError::Simulated { name: how.to_string(), problem });
        if prefill == Prefill::Exact {
            return refused("needs --prefill quantized");
        }
        if engine.is_device() {
            return refused("runs on the CPU only (--device cpu)");
        }
        let cache = model.new_cache(&Spec::Fp16, None)?;
        let kind = match *how {
            Simulation::Kivi { .. } if model.attention.iter().any(|a| a.window.is_some()) => {
                return refused("does not support models whose layers have a sliding window");
            }
            Simulation::Kivi { bits } => Kind::Kivi(*how, Box::new(Kivi::new(bits, model.config.layers))),
            how => Kind::Tokens(how, TokenFormat::new(how, model.config.head_dim)),
        };
        Ok(Sequence::Simulated(Box::new(Simulated { model, cache, kind, logits: Vec::new() })))
    }
}

#[derive(Debug)]
enum Kind {
    Tokens(Simulation, TokenFormat),
    Kivi(Simulation, Box<Kivi>),
}

/// A sequence's tokens in the cache that is measured.
pub(crate) enum Sequence<'m> {
    Own(Box<dyn Run + 'm>),
    Simulated(Box<Simulated<'m>>),
}

/// Another program's format, in an fp16 cache on this CPU.
#[derive(Debug)]
pub(crate) struct Simulated<'m> {
    model: &'m Model,
    cache: Cache,
    kind: Kind,
    logits: Vec<f32>,
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
    pub fn run(&mut self, tokens: &[u32], logits: Logits, prefill: Prefill) -> Result<&[f32], EvalError> {
        match self {
            Sequence::Own(s) => Ok(s.run(tokens, logits, prefill)?),
            Sequence::Simulated(s) => s.run(tokens, logits, prefill),
        }
    }

    /// # Errors
    /// A device fails.
    pub fn size(&self) -> Result<Size, EvalError> {
        match self {
            Sequence::Own(s) => {
                let Held { bytes, bits_per_element, bits_at_infinity } = s.size()?;
                Ok(Size { bits: bits_per_element, at_infinity: bits_at_infinity, bytes: bytes as f64 })
            }
            Sequence::Simulated(s) => Ok(s.size()),
        }
    }
}

impl Simulated<'_> {
    fn run(&mut self, tokens: &[u32], logits: Logits, prefill: Prefill) -> Result<&[f32], EvalError> {
        let (model, start) = (self.model, self.cache.len());
        let mut step = [Step { tokens, cache: &mut self.cache, logits }];
        self.logits = match &mut self.kind {
            Kind::Tokens(_, format) => model.forward_watched(&mut step, prefill, &mut |layer, k, v| {
                format.replace(model, layer, start, k, v);
            })?,
            Kind::Kivi(_, history) => history.run(model, &mut self.cache, tokens, logits)?,
        };
        Ok(&self.logits)
    }

    fn size(&self) -> Size {
        let (cache, d) = (&self.cache, self.model.config.head_dim);
        let (bits, bytes) = (cache.bits_per_element(), cache.bytes().total() as f64);
        let (Kind::Tokens(how, _) | Kind::Kivi(how, _)) = self.kind;
        let simulated = how.bits(d, cache.len());
        // As many elements as the cache holds in its stead.
        let bytes = if bits > 0.0 { bytes / bits * simulated } else { 0.0 };
        Size { bits: simulated, at_infinity: Some(how.bits_at_infinity(d)), bytes }
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
