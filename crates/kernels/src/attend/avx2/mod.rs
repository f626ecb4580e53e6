//! AVX2, FMA and F16C. Departures from the scalar twin:
//! - few rows ([`decode`]): codes stay integers. A byte shuffle makes them 16-bit signposts ([`unpack`]), keys are
//!   turned in 15-bit fractions, queries and probabilities become 16-bit integers that no sum can overflow, and
//!   `vpmaddwd` multiplies and adds. Against f32 this halves the work of the multipliers and costs the same for every
//!   width. What it adds to the error is stated in the test suite's tolerance;
//! - fp16 blocks, keys with per-token scales, and many rows ([`prefill`]) are computed in f32;
//! - exp is a polynomial of degree 5, 0 from -87.7 on;
//! - sums run in another order.

pub(super) mod decode;
mod float;
pub(super) mod mix;
pub(super) mod outliers;
mod prefill;
pub(super) mod query;
pub(super) mod score;
pub(super) mod unpack;

use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};

pub(super) use super::ahead::{self, prefetch_lines};
use super::view::TOKENS;
use super::{BlockView, DECODE_ROWS, PreparedRows, SideView, State};
use crate::rope::BlockTable;

/// Floats of a vector.
pub(super) const LANES: usize = 8;

/// # Safety
/// The CPU has AVX2, FMA and F16C; where WIDE is true, also AVX-512 F, BW, DQ, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn attend<'a, const WIDE: bool>(
    prepared: &mut PreparedRows<'a>,
    blocks: &[BlockView<'a>],
    next: &[BlockView<'_>],
    table: &BlockTable,
    state: &mut State,
) {
    let rows = prepared.rows;
    if rows.len() <= DECODE_ROWS {
        // SAFETY: passed on.
        unsafe { decode::attend::<WIDE>(prepared, blocks, next, table, state) };
    } else {
        for (b, block) in blocks.iter().enumerate() {
            for side in next.get(b).iter().flat_map(|next| [&next.key, &next.value]) {
                ahead::Ahead::of(Some(side), side).rest();
            }
            prefill::attend(&rows, block, table, state);
        }
    }
}

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dequant(side: &SideView<'_>, len: usize, tile: &mut [f32]) {
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
#[target_feature(enable = "avx2,fma,f16c")]
fn load(from: &[f32; LANES]) -> __m256 {
    // SAFETY: 8 readable floats; unaligned loads are allowed.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut [f32; LANES], x: __m256) {
    // SAFETY: 8 writable floats; unaligned stores are allowed.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(from: &[u16; LANES]) -> __m256 {
    // SAFETY: 8 readable fp16 values; unaligned loads are allowed.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())) }
}

/// 2^x from -1/2 to 1/2, the highest power first: the least relative error of those that are exact at 0 to the first order.
pub(super) const EXP2: [f32; 6] = [0.001_330_06, 0.009_669_692, 0.055_505_585, 0.240_222_83, LN_2, 1.0];
/// -127 ln 2: a power of two whose exponent's bits are 0 is 0.
pub(super) const LEAST: f32 = -88.03;
/// A number of this size has no fraction, and in its low bits what is added to it and 127.
pub(super) const WHOLE: f32 = 12_582_912.0 + 127.0;

/// e^x for x <= 0, to 2e-7 near 0 and 2e-6 at -87; 0 from -87.7 on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exp(x: __m256) -> __m256 {
    let x = _mm256_max_ps(x, _mm256_set1_ps(LEAST));
    let log2 = _mm256_set1_ps(LOG2_E);
    // x / ln 2 in whole ones, with the exponent's offset, in the low bits; then the rest.
    let whole = _mm256_fmadd_ps(x, log2, _mm256_set1_ps(WHOLE));
    let rest = _mm256_fmsub_ps(x, log2, _mm256_sub_ps(whole, _mm256_set1_ps(WHOLE)));
    let mut p = _mm256_set1_ps(EXP2[0]);
    for c in &EXP2[1..] {
        p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(*c));
    }
    let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(whole));
    _mm256_mul_ps(p, _mm256_castsi256_ps(power))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// Turns the scores of row `row`, every `step`-th of `all`, into probabilities under the row's running maximum.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn softmax(all: &mut [[f32; TOKENS]], row: usize, step: usize, state: &mut State) {
    let mut top = _mm256_set1_ps(f32::NEG_INFINITY);
    for i in (0..all.len()).step_by(step) {
        for x in all[i].as_chunks().0 {
            top = _mm256_max_ps(top, load(x));
        }
    }
    let top = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps::<1>(top));
    let top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    let top = _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
    if top == f32::NEG_INFINITY {
        // Nothing is visible.
        all.iter_mut().step_by(step).for_each(|scores| scores.fill(0.0));
        return;
    }
    let max = _mm256_set1_ps(state.raise(row, top));
    let mut total = _mm256_setzero_ps();
    for i in (0..all.len()).step_by(step) {
        for x in all[i].as_chunks_mut().0 {
            let p = exp(_mm256_sub_ps(load(x), max));
            total = _mm256_add_ps(total, p);
            store(x, p);
        }
    }
    state.sum[row] += sum(total);
}
