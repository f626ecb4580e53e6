//! AVX-512 (F, BW, DQ, VL) with VNNI: the integer form of few rows, as AVX2 has it, with these departures:
//! - a word shuffle looks up 32 signposts of 16 bits;
//! - `vpdpwssd` multiplies and adds in one instruction;
//! - where channels lie in their own order, keys go from codes to scores in registers.
//!
//! Many rows run AVX2's code: there the multipliers are the limit, which 512-bit vectors do not move.

mod mix;
mod outliers;
mod query;
mod score;
mod softmax;
pub(super) mod tile;
mod unpack;

pub(super) use mix::coded as mix;
pub(super) use outliers::place_keys;
pub(super) use query::{Sixteen, set_sides};
pub(super) use score::coded as score;
pub(super) use softmax::softmax;

use super::view::TOKENS;
use std::arch::asm;
use std::arch::x86_64::*;

/// What a thread reuses from block to block.
#[derive(Default)]
pub(super) struct Scratch {
    /// What outliers add to their scores.
    extra: [query::Sixteen; TOKENS / 16],
    pub outliers: outliers::Scratch,
    weights: mix::Room,
}

/// sums + a * b, products of 16-bit neighbours added in 32 bits.
///
/// The compiler takes the intrinsic apart into a product and a sum again, which shortens a chain that is not the limit here
/// and lengthens the program, which is.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn multiply_add(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: VNNI is enabled for this function; registers only.
    unsafe {
        asm!(
            "vpdpwssd {sums}, {a}, {b}",
            sums = inout(zmm_reg) sums,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
