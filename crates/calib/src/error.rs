//! What can go wrong, and what to do.

use kvquant_model::ForwardError;
use kvquant_model::sampling::SamplingError;
use kvquant_quant::{FileError, QuantError, Side, Spec};

/// Why a model could not be calibrated.
#[derive(Debug, thiserror::Error)]
pub enum CalibError {
    /// The forward pass or the cache failed while windows were sampled.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// A token could not be sampled.
    #[error("sampling a calibration window: {0}")]
    Sampling(#[from] SamplingError),
    /// The quantizer to be tuned is of another model, or has no fit for the spec.
    #[error(transparent)]
    File(#[from] FileError),
    /// Only fits with learned signposts that are decoded as they are encoded.
    #[error("{spec} cannot be tuned; supported: mixB and nuq2..4, keys before RoPE, without +qnorm and +online")]
    NotTunable {
        /// The spec.
        spec: Spec,
    },
    /// Windows to tune on and windows to measure on.
    #[error("tuning needs at least {needed} windows, some of them held out, got {windows}; use more --windows")]
    TuneWindows {
        /// Windows given.
        windows: usize,
        /// The least number.
        needed: usize,
    },
    /// No window was given, or one of no use.
    #[error("calibration needs at least one window of two tokens, got {windows} of {ctx}; give a longer text")]
    NoWindows {
        /// Windows given.
        windows: usize,
        /// Tokens of the first.
        ctx: usize,
    },
    /// Windows must be of one length.
    #[error("calibration window {window} has {got} tokens, expected {expected} as the first has")]
    WindowLength {
        /// Index of the window.
        window: usize,
        /// Tokens of the first window.
        expected: usize,
        /// Tokens of this one.
        got: usize,
    },
    /// A window is longer than the model's context.
    #[error(
        "calibration windows of {ctx} tokens do not fit the model's context of {context}; use --ctx {context} or less"
    )]
    Context {
        /// Tokens of a window.
        ctx: usize,
        /// Positions that the model was trained for.
        context: usize,
    },
    /// A token id that the model has no embedding for.
    #[error(
        "calibration window {window}, position {position}: token {id} is not in the vocabulary of {vocab}; \
         encode the text with this model's tokenizer"
    )]
    Token {
        /// Index of the window.
        window: usize,
        /// Position in it.
        position: usize,
        /// The id.
        id: u32,
        /// Tokens of the vocabulary.
        vocab: usize,
    },
    /// A spec keeps so many sinks that nothing is left.
    #[error("{spec} keeps {} sinks, windows have {ctx} tokens: nothing is left to calibrate; use longer windows", .spec.sinks())]
    Sinks {
        /// The spec.
        spec: Spec,
        /// Tokens of a window.
        ctx: usize,
    },
    /// None of the specs has anything to fit.
    #[error(
        "none of the specs needs calibration ({specs}); give one with a nuq codebook or per-channel keys, e.g. nuq3-1%"
    )]
    NothingToFit {
        /// The specs, as given.
        specs: String,
    },
    /// Calibration would need more memory than it may take.
    #[error(
        "calibration on {windows} windows of {ctx} tokens needs about {need_mib} MiB, the limit is {limit_mib} MiB; \
         use fewer or shorter windows, or raise the limit"
    )]
    Memory {
        /// Estimated peak.
        need_mib: usize,
        /// The limit given.
        limit_mib: usize,
        /// Windows given.
        windows: usize,
        /// Tokens of a window.
        ctx: usize,
    },
    /// The loss of a window is not a number.
    #[error("calibration window {window}: the loss is {loss}; the weights or the file are damaged")]
    Loss {
        /// Index of the window.
        window: usize,
        /// The mean cross entropy.
        loss: f64,
    },
    /// A key, value or gradient is infinite, not a number, or beyond fp16.
    #[error("layer {layer}: {} or their gradients are not finite fp16 numbers{}; this model cannot be calibrated on this text",
        name(.side), .window.map(|w| format!(" in window {w}")).unwrap_or_default())]
    NotFinite {
        /// Index of the layer.
        layer: usize,
        /// Keys or values.
        side: Side,
        /// The window, where it is known.
        window: Option<usize>,
    },
    /// Every gradient of a window is zero: the backward pass did not reach the layer.
    #[error("layer {layer}, window {window}: every gradient of the {} is zero; the text may be one repeated token", name(.side))]
    NoGradient {
        /// Index of the layer.
        layer: usize,
        /// Keys or values.
        side: Side,
        /// Index of the window.
        window: usize,
    },
    /// After sinks and outliers nothing of any weight is left.
    #[error("layer {layer}: no {} of any weight are left to fit {spec}; use more text, or weights that are not Fisher's", name(.side))]
    NoWeight {
        /// Index of the layer.
        layer: usize,
        /// Keys or values.
        side: Side,
        /// The spec.
        spec: Spec,
    },
    /// The cache's quantizer refused a token, or the spec.
    #[error("layer {layer}, {}: {source}", name(.side))]
    Quantizer {
        /// Index of the layer.
        layer: usize,
        /// Keys or values.
        side: Side,
        /// Its reason.
        source: QuantError,
    },
}

fn name(side: &Side) -> &'static str {
    match side {
        Side::Key => "keys",
        Side::Value => "values",
    }
}
