//! Vectors to codes: cache specs, codebooks, key and value quantizers, packing, the quantizer file.
//!
//! ```text
//! spec      what a cache is asked to be: `nuq3-1%+sink1`
//! codebook  signposts in normalised units: uniform, normal-float; learned ones come from a fit
//! count     values -> codes
//! side      one token's keys or values of a layer -> codes, scales, outliers (TokenCodes)
//! pack      256 codes -> a unit of bytes
//! lut       codes -> signposts
//! mixed     a side whose channels differ in width
//! running   thresholds that follow the tokens, where there is no file
//! file      fits of a model, in a safetensors file
//! ```
//!
//! Method: KVQuant (arXiv 2401.18079). No unsafe code, no tensors.

mod codebook;
mod count;
mod file;
mod lut;
mod mixed;
pub mod pack;
mod running;
mod side;
mod spec;
mod whole;

pub use codebook::{normal_float, uniform, universal};
pub use file::{FileError, Fingerprint, Fit, LayerFit, Provenance, Quantizer, SideFit};
pub use lut::{Lut, TOP, Table};
pub use mixed::MixedFit;
pub use running::RunningRanges;
pub use side::{Outlier, QuantError, Rule, Side, SideQuantizer, TokenCodes, fits_half};
pub use spec::{CodebookKind, CodedSpec, FisherWeights, KeyStage, Scope, Spec, SpecError};
pub use whole::{write_whole, write_whole_with};
