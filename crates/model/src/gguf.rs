//! The GGUF container, read as hostile.
use std::{path::Path, collections::BTreeMap};
use kvquant_kernels::weights::{Weight, WeightType};
#[derive(Debug, Clone, PartialEq)]
pub enum Value { U64(u64), I64(i64), F64(f64), Bool(bool), String(String), Strings(Vec<String>), Ints(Vec<i64>), Floats(Vec<f64>), Bools(Vec<bool>) }
#[derive(Debug, Clone)] pub struct TensorInfo { pub name: String, /** as GGUF stores them: innermost first */ pub dims: Vec<u64>, pub ty: u32, pub offset: u64, pub bytes: u64 }
#[derive(Debug, thiserror::Error)] pub enum GgufError { #[error("{0}")] Invalid(String), #[error(transparent)] Io(#[from] std::io::Error) }
pub struct Gguf { pub path: std::path::PathBuf, pub metadata: BTreeMap<String, Value>, pub tensors: Vec<TensorInfo> }
impl Gguf {
    pub fn open(_path: &Path) -> Result<Self, GgufError> { todo!() }
    pub fn str(&self, _key: &str) -> Result<&str, GgufError> { todo!() }
    pub fn uint(&self, _key: &str) -> Result<u64, GgufError> { todo!() }
    pub fn float(&self, _key: &str) -> Result<f64, GgufError> { todo!() }
    pub fn tensor(&self, _name: &str) -> Option<&TensorInfo> { todo!() }
    /// A 2-D tensor [rows, cols], checked against the expected shape.
    pub fn weight(&self, _name: &str, _rows: usize, _cols: usize) -> Result<Weight, GgufError> { todo!() }
    /// A 1-D tensor of f32 (F32, F16 or BF16 in the file).
    pub fn vector(&self, _name: &str, _len: usize) -> Result<Vec<f32>, GgufError> { todo!() }
}
#[allow(unused)] fn _u(_: WeightType) {}
