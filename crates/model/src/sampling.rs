//! Logits to the next id.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams { pub temperature: f32, pub top_k: usize, pub top_p: f32, pub min_p: f32, pub seed: u64 }
#[derive(Debug, thiserror::Error)] pub enum SamplingError { #[error("{0}")] Invalid(String) }
pub struct Sampler { }
impl Sampler {
    pub fn new(_p: SamplingParams) -> Result<Self, SamplingError> { todo!() }
    pub fn sample(&mut self, _logits: &[f32]) -> Result<u32, SamplingError> { todo!() }
}
