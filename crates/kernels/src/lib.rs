//! Codes to partial attention, and weights to products. The only crate with unsafe code.
//!
//! ```text
//! weights   quantized weight matrices x activations          (projections, MLP, output head)
//! attend    queries x one block of the cache -> partial state (scores, softmax, mix)
//! rope      rotary positions by block origin
//! rowwise   norms, activations and residual sums between the products
//! linalg    dense f32 products on strided slices
//! dispatch  which instruction set this process uses
//! memory    large pages for the cache and for weights
//! threads   a pool for regions of microseconds
//! ```
//!
//! Every kernel has a scalar twin that documents the mathematics; the SIMD files list only where they depart
//! from it. Decoding codes is bit-exact between backends; only reductions have a tolerance.

pub mod attend;
pub mod dispatch;
pub mod linalg;
pub mod memory;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod rope;
pub mod rowwise;
pub mod threads;
pub mod weights;
