//! Quantized weight matrices of GGUF types and their products with f32 activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType { F32, F16, Bf16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K }
#[derive(Debug, thiserror::Error)] pub enum WeightError { #[error("{0}")] Invalid(String) }
impl WeightType {
    /// ggml type id -> type
    pub fn from_ggml(_id: u32) -> Option<Self> { todo!() }
    pub fn name(self) -> &'static str { todo!() }
    /// (elements, bytes) of a block
    pub fn block(self) -> (usize, usize) { todo!() }
}
/// A matrix [rows = outputs, cols = inputs], rows contiguous.
#[derive(Debug, Clone)]
pub struct Weight { rows: usize, cols: usize, ty: WeightType, data: Vec<u8> }
impl Weight {
    pub fn from_gguf(_ty: WeightType, _rows: usize, _cols: usize, _data: Vec<u8>) -> Result<Self, WeightError> { todo!() }
    pub fn rows(&self) -> usize { self.rows }
    pub fn cols(&self) -> usize { self.cols }
    pub fn ty(&self) -> WeightType { self.ty }
    pub fn bytes(&self) -> usize { self.data.len() }
    /// row i of the result is row perm[i] of self
    pub fn permute_rows(&self, _perm: &[usize]) -> Self { todo!() }
    pub fn dequant_row(&self, _row: usize, _out: &mut [f32]) { todo!() }
    /// all rows, [rows, cols], threaded
    pub fn dequant(&self) -> Vec<f32> { todo!() }
    /// y[m, rows] = x[m, cols] * W^T
    pub fn matmul(&self, _x: &[f32], _m: usize, _y: &mut [f32]) { todo!() }
}
/// Several weights that share the input: y_i = x W_i^T, in one parallel region when m is small.
pub fn matmul_fused(_weights: &[&Weight], _x: &[f32], _m: usize, _ys: &mut [&mut [f32]]) { todo!() }
