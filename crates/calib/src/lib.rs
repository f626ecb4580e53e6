//! Text to quantizer file.
use kvquant_model::{Model, ForwardError};
use kvquant_quant::{Quantizer, Spec};
#[derive(Debug, thiserror::Error)] pub enum CalibError { #[error(transparent)] Forward(#[from] ForwardError), #[error("{0}")] Invalid(String) }
pub struct Progress<'a> { pub stage: &'a str, pub done: usize, pub total: usize }
/// windows: token ids, each of the same length. Specs may differ in bits, codebook, stage, outliers, weights, sinks.
pub fn calibrate(_model: &Model, _windows: &[Vec<u32>], _specs: &[Spec], _text_name: &str, _progress: &mut dyn FnMut(Progress<'_>)) -> Result<Quantizer, CalibError> { todo!() }
/// `windows` sequences of `ctx` tokens sampled from the model itself, in one batch.
pub fn sample_windows(_model: &Model, _windows: usize, _ctx: usize, _seed: u64, _progress: &mut dyn FnMut(Progress<'_>)) -> Result<Vec<Vec<u32>>, CalibError> { todo!() }
