//! NEON (aarch64). Departures from the scalar twin:
//! - few rows ([`decode`]): codes stay integers. A byte shuffle makes them signposts ([`unpack`]), keys are turned in 15-bit
//!   fractions, queries and probabilities become 16-bit integers under a scale that no sum can overflow, and `smlal`
//!   multiplies them;
//! - with the dot product extension and RDM (`DOT`) keys are turned in four instructions instead of six; for outputs both
//!   factors are two bytes, and `sdot` multiplies sixteen at a time, with no sum near an overflow;
//! - fp16 blocks, keys with per-token scales, and many rows ([`prefill`]) are computed in f32;
//! - exp is a polynomial (relative error below 3e-7), 0 below -87;
//! - sums run in another order.
//!
//! Chosen by counting instructions under an emulator (docs/speed.md); f32 would take 16 conversions and 40 products for 32 codes
//! of keys and three rows where `smlal` takes 32, and runs on twice as many pipes of most cores, but for the conversions, which
//! run at half rate on one. No such machine has been measured.

pub(super) mod decode;
mod float;
mod mix;
mod outliers;
mod prefill;
mod score;
mod unpack;

use std::arch::aarch64::*;

use super::view::TOKENS;
use super::{BlockView, DECODE_ROWS, PreparedRows, SideView, State};
use crate::neon::four_halves;
use crate::rope::BlockTable;

/// Floats of a vector.
const LANES: usize = 4;

/// # Safety
/// The CPU has NEON; where DOT is true, also the dot product extension and RDM.
#[target_feature(enable = "neon")]
pub(super) unsafe fn attend<const DOT: bool>(
    prepared: &mut PreparedRows<'_>,
    blocks: &[BlockView<'_>],
    next: &[BlockView<'_>],
    table: &BlockTable,
    state: &mut State,
) {
    let rows = prepared.rows;
    if rows.len() <= DECODE_ROWS {
        // SAFETY: passed on.
        unsafe { decode::attend::<DOT>(prepared, blocks, next, table, state) };
    } else {
        for (b, block) in blocks.iter().enumerate() {
            for side in next.get(b).iter().flat_map(|next| [&next.key, &next.value]) {
                super::ahead::Ahead::of(Some(side), side).rest();
            }
            prefill::attend(&rows, block, table, state);
        }
    }
}

#[target_feature(enable = "neon")]
pub(super) fn dequant(side: &SideView<'_>, len: usize, tile: &mut [f32]) {
    match side {
        SideView::Coded(v) => unpack::dequant(v, tile),
        SideView::Tile { data } => {
            for (from, to) in data.as_chunks::<LANES>().0.iter().zip(tile.as_chunks_mut::<LANES>().0) {
                store(to, halves(from));
            }
        }
        SideView::Rows { .. } => return super::scalar::dequant(side, len, tile),
    }
    if len < TOKENS {
        for channel in tile.chunks_exact_mut(TOKENS) {
            channel[len..].fill(0.0);
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load(from: &[f32; LANES]) -> float32x4_t {
    // SAFETY: 4 readable floats.
    unsafe { vld1q_f32(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(to: &mut [f32; LANES], x: float32x4_t) {
    // SAFETY: 4 writable floats.
    unsafe { vst1q_f32(to.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "neon")]
fn halves(from: &[u16; LANES]) -> float32x4_t {
    // SAFETY: 4 readable fp16 values; the CPU has NEON here.
    unsafe { four_halves(vld1_u16(from.as_ptr())) }
}

/// fp16 to f32, in place of a call that asks for the CPU's features again each time.
#[inline]
#[target_feature(enable = "neon")]
fn half(bits: u16) -> f32 {
    // SAFETY: the CPU has NEON here.
    vgetq_lane_f32::<0>(unsafe { four_halves(vdup_n_u16(bits)) })
}

/// e^x for x <= 0; 0 below -87.
#[inline]
#[target_feature(enable = "neon")]
fn exp(x: float32x4_t) -> float32x4_t {
    let keep = vcgtq_f32(x, vdupq_n_f32(-87.0));
    let x = vmaxnmq_f32(x, vdupq_n_f32(-87.0));
    let n = vrndnq_f32(vmulq_n_f32(x, std::f32::consts::LOG2_E));
    // r = x - n ln 2, with ln 2 in two parts so that the difference is exact.
    let r = vfmsq_f32(x, n, vdupq_n_f32(0.693_359_4));
    let r = vfmsq_f32(r, n, vdupq_n_f32(-2.121_944_4e-4));
    let mut p = vdupq_n_f32(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = vfmaq_f32(vdupq_n_f32(c), p, r);
    }
    let power = vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)));
    let y = vmulq_f32(p, vreinterpretq_f32_s32(power));
    vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(y), keep))
}

/// Sums of four vectors, one a lane.
#[inline]
#[target_feature(enable = "neon")]
fn sum_each([a, b, c, d]: [float32x4_t; 4]) -> float32x4_t {
    vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))
}

/// Turns the scores of row `row`, every `step`-th of `all`, into probabilities under the row's running maximum.
#[inline]
#[target_feature(enable = "neon")]
fn softmax(all: &mut [[f32; TOKENS]], row: usize, step: usize, state: &mut State) {
    let mut top = [vdupq_n_f32(f32::NEG_INFINITY); 4];
    for i in (0..all.len()).step_by(step) {
        for four in all[i].as_chunks::<LANES>().0.as_chunks::<4>().0 {
            for (top, x) in top.iter_mut().zip(four) {
                *top = vmaxnmq_f32(*top, load(x));
            }
        }
    }
    let top = vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(top[0], top[1]), vmaxnmq_f32(top[2], top[3])));
    if top == f32::NEG_INFINITY {
        // Nothing is visible.
        all.iter_mut().step_by(step).for_each(|scores| scores.fill(0.0));
        return;
    }
    let max = vdupq_n_f32(state.raise(row, top));
    let mut total = [vdupq_n_f32(0.0); 4];
    for i in (0..all.len()).step_by(step) {
        for four in all[i].as_chunks_mut::<LANES>().0.as_chunks_mut::<4>().0 {
            for (total, x) in total.iter_mut().zip(four) {
                let p = exp(vsubq_f32(load(x), max));
                *total = vaddq_f32(*total, p);
                store(x, p);
            }
        }
    }
    state.sum[row] += vaddvq_f32(sum_each(total));
}
