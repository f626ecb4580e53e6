//! Quantized weight matrices of GGUF types, and their products with activations.
//!
//! ```text
//! file         a tensor's blocks as GGUF has them
//!   pack       once, at load: panels of 16 rows            layout (drawn there)
//! activations  f32 -> int8, 32 to a scale
//!   product    tasks: panels x strips of tokens
//!     integers 8-bit dot products                          integers (with the twin), avx2, avx512, neon
//!     floats   panels dequantized, f32 tiles               floats (with the twin), avx2, avx512
//! ```
//!
//! Packing changes no value. Integer activations are what products normally take; f32 ones are for weights that are floats,
//! and for who asks for them ([`Activations`]). aarch64 has no f32 kernels of its own: plain loops, which the compiler
//! vectorizes.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod file;
mod floats;
mod integers;
mod layout;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod product;
mod types;

pub use file::FileWeight;
pub use product::matmul_fused;
pub use types::WeightType;

use std::sync::Arc;

use rayon::prelude::*;

use crate::dispatch::{DispatchError, Isa};

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

/// What a product makes of its activations. Weights that are floats (F32, F16, BF16) always meet f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// 8 bits, each 32 with a scale of their own: the fastest, off by at most 1/254 of the largest of the 32.
    Int8,
    /// 15 bits, likewise: off by at most 1/32,512 of the largest, twice the work of 8 bits.
    #[default]
    Int15,
    /// As they are.
    F32,
}

impl Activations {
    /// All of them.
    pub const ALL: [Activations; 3] = [Activations::Int8, Activations::Int15, Activations::F32];

    /// What the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Activations::Int8 => "int8",
            Activations::Int15 => "int15",
            Activations::F32 => "f32",
        }
    }

    /// Bytes of an integer.
    fn parts(self) -> usize {
        if self == Activations::Int15 { 2 } else { 1 }
    }
}

/// A matrix `[rows = outputs, cols = inputs]` as kernels take it.
#[derive(Debug, Clone)]
pub struct Weight {
    rows: usize,
    cols: usize,
    ty: WeightType,
    packed: Arc<pack::Packed>,
    // Only ever one that this CPU has: what calls of its kernels rely on.
    isa: Isa,
}

impl Weight {
    /// Takes a tensor's bytes as GGUF stores them, and packs them.
    ///
    /// # Errors
    /// The length does not follow from shape and type, or `KVQUANT_KERNEL` can't be followed.
    pub fn from_gguf(ty: WeightType, rows: usize, cols: usize, data: Vec<u8>) -> Result<Self, WeightError> {
        Ok(FileWeight::new(ty, rows, cols, data)?.pack()?)
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the file stores the weights.
    pub fn ty(&self) -> WeightType {
        self.ty
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.packed.bytes()
    }

    /// One row as f32, `out` of `cols` entries: the file's values, bit for bit.
    pub fn dequant_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has `cols` weights");
        assert!(row < self.rows, "row {row} of {}", self.rows);
        pack::dequant_row(self, row, out);
    }

    /// All weights as f32 `[rows, cols]`.
    pub fn dequant(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.rows * self.cols];
        all.par_chunks_mut(self.cols).enumerate().for_each(|(r, out)| self.dequant_row(r, out));
        all
    }

    /// y = x W^T: x `[m, cols]`, y `[m, rows]`.
    pub fn matmul(&self, activations: Activations, x: &[f32], m: usize, y: &mut [f32]) {
        matmul_fused(activations, &[self], x, m, &mut [y]);
    }
}

#[cfg(test)]
mod tests;
