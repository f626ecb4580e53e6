//! A sequence of tokens and the model that runs on it, wherever both are.

use std::borrow::BorrowMut;

use kvquant_cache::{Cache, Prefill};
use kvquant_quant::{Quantizer, Spec};

use crate::forward::{ForwardError, Logits, Model, Step};
use crate::workspace::Workspace;

/// What a sequence's history takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Size {
    /// Bytes that hold keys and values, with all that belongs to them.
    pub bytes: usize,
    /// 8 * bytes / elements; 0 when empty.
    pub bits_per_element: f64,
    /// What an endless context would come to; `None` before the first full block.
    pub bits_at_infinity: Option<f64>,
}

/// One sequence's history, and what runs more tokens after it.
pub trait Sequence {
    /// Tokens that are stored.
    fn len(&self) -> usize;

    /// Whether no token is stored.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions that the model has.
    fn context(&self) -> usize;

    /// Runs new tokens after those that are stored, and returns the logits that are asked for, `[rows, vocab]`. After an
    /// error [`len`](Sequence::len) says what is still there.
    ///
    /// # Errors
    /// No tokens, unknown tokens, a full context, numbers that are not finite, or a device that fails.
    fn run(&mut self, tokens: &[u32], logits: Logits, prefill: Prefill) -> Result<&[f32], ForwardError>;

    /// The logits of the last run: `[rows asked for, vocab]`.
    fn logits(&self) -> &[f32];

    /// How many of the first `len` tokens [`truncate`](Sequence::truncate) can keep.
    fn keepable(&self, len: usize) -> usize;

    /// Keeps the first `len` tokens.
    ///
    /// # Errors
    /// `len` is not what [`keepable`](Sequence::keepable) gives for it.
    fn truncate(&mut self, len: usize) -> Result<(), ForwardError>;

    /// What the history takes.
    ///
    /// # Errors
    /// A device fails.
    fn size(&self) -> Result<Size, ForwardError>;
}

impl<S: Sequence + ?Sized> Sequence for &mut S {
    fn len(&self) -> usize {
        (**self).len()
    }
    fn context(&self) -> usize {
        (**self).context()
    }
    fn run(&mut self, tokens: &[u32], logits: Logits, prefill: Prefill) -> Result<&[f32], ForwardError> {
        (**self).run(tokens, logits, prefill)
    }
    fn logits(&self) -> &[f32] {
        (**self).logits()
    }
    fn keepable(&self, len: usize) -> usize {
        (**self).keepable(len)
    }
    fn truncate(&mut self, len: usize) -> Result<(), ForwardError> {
        (**self).truncate(len)
    }
    fn size(&self) -> Result<Size, ForwardError> {
        (**self).size()
    }
}

/// What makes sequences: a model on this CPU, or on a device.
pub trait Engine {
    /// An empty sequence with a cache of this kind.
    ///
    /// # Errors
    /// The quantizer is missing, of another model, or lacks a fit for the spec; a device does not support the spec.
    fn sequence(&self, spec: &Spec, quantizer: Option<&Quantizer>) -> Result<Box<dyn Sequence + '_>, ForwardError>;

    /// Whether sequences run elsewhere than on this CPU.
    fn is_device(&self) -> bool {
        true
    }
}

impl Engine for Model {
    fn sequence(&self, spec: &Spec, quantizer: Option<&Quantizer>) -> Result<Box<dyn Sequence + '_>, ForwardError> {
        Ok(Box::new(OnCpu::new(self, self.new_cache(spec, quantizer)?)))
    }

    fn is_device(&self) -> bool {
        false
    }
}

/// A sequence on this CPU; `C` is its cache, or a reference to it.
#[derive(Debug)]
pub struct OnCpu<'m, C> {
    model: &'m Model,
    cache: C,
    work: Workspace,
}

impl<'m, C: BorrowMut<Cache>> OnCpu<'m, C> {
    /// Goes on with a cache of this model.
    pub fn new(model: &'m Model, cache: C) -> Self {
        OnCpu { model, cache, work: Workspace::new() }
    }
}

/// Bytes and bits of a cache.
pub fn size_of_cache(cache: &Cache) -> Size {
    Size {
        bytes: cache.bytes().total(),
        bits_per_element: cache.bits_per_element(),
        bits_at_infinity: cache.bits_at_infinity(),
    }
}

impl<C: BorrowMut<Cache>> Sequence for OnCpu<'_, C> {
    fn len(&self) -> usize {
        self.cache.borrow().len()
    }

    fn context(&self) -> usize {
        self.model.config.context
    }

    fn run(&mut self, tokens: &[u32], logits: Logits, prefill: Prefill) -> Result<&[f32], ForwardError> {
        let step = Step { tokens, cache: self.cache.borrow_mut(), logits };
        self.model.forward_in(&mut self.work, &mut [step], prefill)
    }

    fn logits(&self) -> &[f32] {
        self.work.logits()
    }

    fn keepable(&self, len: usize) -> usize {
        self.cache.borrow().keepable(len)
    }

    fn truncate(&mut self, len: usize) -> Result<(), ForwardError> {
        Ok(self.cache.borrow_mut().truncate(len)?)
    }

    fn size(&self) -> Result<Size, ForwardError> {
        Ok(size_of_cache(self.cache.borrow()))
    }
}
