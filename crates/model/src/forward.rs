//! The forward pass.
use std::{path::Path, sync::Arc};
use kvquant_cache::{Cache, CacheError, Prefill};
use kvquant_kernels::{rope::Rope, weights::Weight};
use kvquant_quant::{Fingerprint, Quantizer, Spec};
use crate::{Config, Gguf, gguf::GgufError};
#[derive(Debug, thiserror::Error)] pub enum ForwardError { #[error(transparent)] Cache(#[from] CacheError), #[error(transparent)] Gguf(#[from] GgufError), #[error("{0}")] Invalid(String) }
/// One layer's weights. q and k rows are in the adjacent rope pairing.
pub struct Layer { pub attn_norm: Vec<f32>, pub q: Weight, pub k: Weight, pub v: Weight, pub q_bias: Option<Vec<f32>>, pub k_bias: Option<Vec<f32>>, pub v_bias: Option<Vec<f32>>, pub o: Weight, pub ffn_norm: Vec<f32>, pub gate: Weight, pub up: Weight, pub down: Weight }
pub struct Model { pub config: Config, pub embed: Arc<Weight>, pub layers: Vec<Layer>, pub final_norm: Vec<f32>, /** the embedding again when tied */ pub head: Arc<Weight>, pub rope: Arc<Rope>, pub fingerprint: Fingerprint }
/// Which rows get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub enum Logits { None, Last, All }
/// One sequence's part in a forward pass.
pub struct Step<'a> { pub tokens: &'a [u32], pub cache: &'a mut Cache, pub logits: Logits }
impl Model {
    /// `progress(done, total)` in tensors.
    pub fn load(_path: &Path, _progress: &mut dyn FnMut(usize, usize)) -> Result<(Self, Gguf), ForwardError> { todo!() }
    pub fn new_cache(&self, _spec: &Spec, _quantizer: Option<&Quantizer>) -> Result<Cache, ForwardError> { todo!() }
    /// Runs all sequences' tokens in one pass over the weights. Returns the rows asked for, in order, [rows, vocab]. On an error every cache is as before.
    pub fn forward(&self, _steps: &mut [Step<'_>], _prefill: Prefill) -> Result<Vec<f32>, ForwardError> { todo!() }
    pub fn weight_bytes(&self) -> usize { todo!() }
}
