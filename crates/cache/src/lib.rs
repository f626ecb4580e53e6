//! The compressed history.
use std::sync::Arc;
use kvquant_quant::{Spec, Quantizer};
use kvquant_kernels::rope::Rope;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape { pub layers: usize, pub heads: usize, pub kv_heads: usize, pub head_dim: usize }
/// What the tokens of one call see of each other: the codes, or exact keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub enum Prefill { Quantized, Exact }
#[derive(Debug, thiserror::Error)] pub enum CacheError { #[error("{0}")] Invalid(String) }
/// Bytes held, by part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes { pub codes: usize, pub scales: usize, pub outliers: usize, pub exact: usize, pub index: usize }
impl Bytes { pub fn total(&self) -> usize { self.codes + self.scales + self.outliers + self.exact + self.index } }
/// One sequence's keys and values, all layers.
pub struct Cache { len: usize }
impl Cache {
    pub fn new(_shape: CacheShape, _spec: &Spec, _quantizer: Option<&Quantizer>, _rope: Arc<Rope>) -> Result<Self, CacheError> { todo!() }
    /// Tokens stored in every layer (those of a forward pass under way do not count before `commit`).
    pub fn len(&self) -> usize { self.len }
    pub fn is_empty(&self) -> bool { self.len == 0 }
    /// Appends `k`, `v` [n, kv_heads, head_dim] (k before RoPE) to `layer` and attends with `q` [n, heads, head_dim] (before RoPE) to all up to and including each token; `out` as q. Scores are scaled by 1/sqrt(head_dim). Positions follow len().
    pub fn extend(&mut self, _layer: usize, _q: &[f32], _k: &[f32], _v: &[f32], _prefill: Prefill, _out: &mut [f32]) -> Result<(), CacheError> { todo!() }
    /// All layers have been extended by `n` tokens.
    pub fn commit(&mut self, _n: usize) -> Result<(), CacheError> { todo!() }
    /// Undoes a forward pass that failed halfway: every layer back to len().
    pub fn rollback(&mut self) { todo!() }
    pub fn truncate(&mut self, _len: usize) -> Result<(), CacheError> { todo!() }
    pub fn bytes(&self) -> Bytes { todo!() }
    /// 8 * bytes / stored elements (2 * layers * kv_heads * head_dim * len)
    pub fn bits_per_element(&self) -> f64 { todo!() }
    pub fn spec(&self) -> &Spec { todo!() }
}
