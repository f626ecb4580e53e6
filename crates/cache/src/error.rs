//! What can go wrong in a cache.

use kvquant_kernels::attend::ViewError;
use kvquant_kernels::dispatch::DispatchError;
use kvquant_quant::{FileError, QuantError, Side};

/// An operation on a cache failed; the cache holds what it held before, up to `rollback`.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The model's shape is not one that the kernels take.
    #[error("cache: {what} is {got}; supported: {supported}")]
    Unsupported {
        /// Which part of the shape or spec.
        what: &'static str,
        /// Its value.
        got: usize,
        /// What would do.
        supported: &'static str,
    },
    /// The spec needs calibrated thresholds or codebooks and no quantizer file was given.
    #[error(
        "cache spec {spec} needs a quantizer file; make one with `kvquant calibrate MODEL --self --kv {spec} -o FILE` and pass it with --quantizer FILE, or do without by `+online` (nuq, int, nf)"
    )]
    NeedsQuantizer {
        /// The spec as asked for.
        spec: String,
    },
    /// What only one cache can read can't be stored.
    #[error(
        "a {spec} cache takes its tables from its own tokens and cannot be stored; stored sessions need a quantizer file (`kvquant calibrate MODEL --self -o FILE`), or a spec without thresholds, such as int4-g32"
    )]
    Online {
        /// The spec.
        spec: String,
    },
    /// The quantizer file has no fit for the spec, or is of another model.
    #[error(transparent)]
    Quantizer(#[from] FileError),
    /// The quantizer's data do not fit the layer.
    #[error("quantizer of layer {layer}: {source}")]
    Fit {
        /// Layer from 0.
        layer: usize,
        /// Why.
        source: QuantError,
    },
    /// A key or value can't be stored: not finite, or beyond fp16.
    #[error(
        "layer {layer}, position {position}, {side:?}: {source}; the model's activations are broken or beyond fp16"
    )]
    Token {
        /// Layer from 0.
        layer: usize,
        /// Position in the sequence.
        position: usize,
        /// Key or value.
        side: Side,
        /// Why.
        source: QuantError,
    },
    /// A slice has the wrong length.
    #[error("{what} has {got} entries, expected {expected}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Entries it should have.
        expected: usize,
        /// Entries it has.
        got: usize,
    },
    /// Layers were extended by different numbers of tokens.
    #[error("layer {layer} holds {got} tokens, expected {expected}: every layer is extended before a commit")]
    Uneven {
        /// Layer from 0.
        layer: usize,
        /// Tokens it should hold.
        expected: usize,
        /// Tokens it holds.
        got: usize,
    },
    /// A layer with a window has let go of tokens that a shorter history would need.
    #[error(
        "the cache cannot be cut to {len} tokens: layer {layer} sees a window and holds positions from {first} on; clear the cache and run the text again"
    )]
    Window {
        /// Layer from 0.
        layer: usize,
        /// Tokens that were to be kept.
        len: usize,
        /// The first position that the layer holds.
        first: usize,
    },
    /// A block's parts do not fit each other.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The kernel override asks for what this CPU lacks.
    #[error(transparent)]
    Dispatch(#[from] DispatchError),
}
