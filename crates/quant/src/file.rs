use std::path::Path;
use crate::{QuantError, Spec, Side};
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fingerprint { pub architecture: String, pub layers: usize, pub kv_heads: usize, pub head_dim: usize, /** hex SHA-256 over all layers' attention norm weights as little-endian f32 */ pub norms_sha256: String }
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Provenance { pub text: String, pub windows: usize, pub ctx: usize, pub tool: String }
/// One layer's and side's fit.
#[derive(Debug, Clone, PartialEq)]
pub struct SideFit { /** [C], empty when the scope is not Channel */ pub lower: Vec<f32>, pub upper: Vec<f32>, /** sorted signposts to encode with [2^b] (normalised) */ pub encode: Vec<f32>, /** signposts to decode with (differ by Q-Norm) */ pub decode: Vec<f32> }
#[derive(Debug, Clone, PartialEq)] pub struct LayerFit { pub keys: SideFit, pub values: SideFit }
/// The calibration of one spec (its `recent` does not matter).
#[derive(Debug, Clone)] pub struct Fit { pub spec: Spec, pub layers: Vec<LayerFit> }
/// A quantizer file: safetensors with JSON metadata.
#[derive(Debug, Clone)] pub struct Quantizer { pub model: Fingerprint, pub provenance: Provenance, pub fits: Vec<Fit> }
#[derive(Debug, thiserror::Error)] pub enum FileError { #[error("{0}")] Invalid(String), #[error(transparent)] Io(#[from] std::io::Error) }
impl Quantizer {
    pub fn load(_path: &Path) -> Result<Self, FileError> { todo!() }
    pub fn from_bytes(_bytes: &[u8], _name: &str) -> Result<Self, FileError> { todo!() }
    /// Temporary file, then rename.
    pub fn save(&self, _path: &Path) -> Result<(), FileError> { todo!() }
    /// The fit for a spec: same sinks first, otherwise any sinks; the error lists what the file has.
    pub fn fit(&self, _spec: &Spec) -> Result<&Fit, FileError> { todo!() }
    pub fn check_model(&self, _model: &Fingerprint) -> Result<(), FileError> { todo!() }
}
#[allow(unused)] fn _u(_: Side, _: QuantError) {}
