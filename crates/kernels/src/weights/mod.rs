//! Quantized weight matrices of GGUF types, and their products with f32 activations.
//!
//! Weights stay as the file has them; activations are never quantized. Few rows (decode): codes are decoded in
//! registers and multiplied at once, so that memory is read once and only the packed bytes. Many rows (prefill):
//! panels of weight rows are dequantized once and go through a register-tiled dense product.
//!
//! `blocks` has the formats and their plain loops, the twin that every backend is tested against; `product` cuts
//! products into tasks; `avx2` and `avx512` say where they depart from the twin. NEON has no kernels of its own: few
//! rows take the plain loops, which the compiler vectorizes, and many the dense product of `linalg`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod product;

pub use blocks::WeightType;
pub use product::matmul_fused;

use rayon::prelude::*;

use crate::dispatch::{self, DispatchError, Isa};

/// A weight matrix can't be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WeightError {
    /// A row is not a whole number of blocks.
    #[error("{cols} columns are not a multiple of the {block} weights of a {ty} block")]
    Columns {
        /// Columns.
        cols: usize,
        /// Weights of a block.
        block: usize,
        /// Type name.
        ty: &'static str,
    },
    /// The data's length does not follow from shape and type.
    #[error("{rows} x {cols} weights of {ty} take {expected} bytes, got {got}")]
    Length {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Type name.
        ty: &'static str,
        /// Bytes that shape and type ask for.
        expected: usize,
        /// Bytes that came.
        got: usize,
    },
    /// `KVQUANT_KERNEL` can't be followed.
    #[error(transparent)]
    Dispatch(#[from] DispatchError),
}

/// A matrix `[rows = outputs, cols = inputs]`, rows contiguous.
#[derive(Debug, Clone)]
pub struct Weight {
    rows: usize,
    cols: usize,
    ty: WeightType,
    data: Vec<u8>,
    // Only ever one that this CPU has: what calls of its kernels rely on.
    isa: Isa,
}

impl Weight {
    /// Takes a tensor's bytes as GGUF stores them.
    ///
    /// # Errors
    /// The length does not follow from shape and type, or `KVQUANT_KERNEL` can't be followed.
    pub fn from_gguf(ty: WeightType, rows: usize, cols: usize, data: Vec<u8>) -> Result<Self, WeightError> {
        let (weights, bytes) = ty.block();
        if cols == 0 || !cols.is_multiple_of(weights) {
            return Err(WeightError::Columns { cols, block: weights, ty: ty.name() });
        }
        let expected = (cols / weights).checked_mul(bytes).and_then(|b| b.checked_mul(rows)).unwrap_or(usize::MAX);
        if data.len() != expected {
            return Err(WeightError::Length { rows, cols, ty: ty.name(), expected, got: data.len() });
        }
        Ok(Weight { rows, cols, ty, data, isa: dispatch::isa()? })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the weights are stored.
    pub fn ty(&self) -> WeightType {
        self.ty
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    fn row(&self, row: usize) -> &[u8] {
        let n = self.data.len() / self.rows;
        &self.data[row * n..(row + 1) * n]
    }

    /// The same rows in another order: row i of the result is row `order[i]`.
    pub fn permute_rows(&self, order: &[usize]) -> Self {
        let data = order.iter().flat_map(|&r| self.row(r)).copied().collect();
        Weight { rows: order.len(), data, ..*self }
    }

    /// One row as f32, `out` of `cols` entries.
    pub fn dequant_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has `cols` weights");
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a Weight's instruction set is one that the CPU has.
            Isa::Avx2 | Isa::Avx512 => unsafe { avx2::dequant(self.ty, self.row(row), out) },
            _ => blocks::dequant(self.ty, self.row(row), out),
        }
    }

    /// All weights as f32 `[rows, cols]`.
    pub fn dequant(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.rows * self.cols];
        all.par_chunks_mut(self.cols).enumerate().for_each(|(r, out)| self.dequant_row(r, out));
        all
    }

    /// y = x W^T: x `[m, cols]`, y `[m, rows]`.
    pub fn matmul(&self, x: &[f32], m: usize, y: &mut [f32]) {
        matmul_fused(&[self], x, m, &mut [y]);
    }
}

#[cfg(test)]
mod tests;
