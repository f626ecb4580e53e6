//! Scores and outputs in f32, a unit of 4 channels at a time: fp16 blocks, and keys with per-token scales.

use std::arch::x86_64::*;

use super::super::SideView;
use super::super::view::{TOKENS, UNIT};
use super::decode::{Row, Scratch, sum_each};
use super::{LANES, halves, load, prefetch_lines, store, unpack};
use crate::rope::BlockTable;
use kvquant_quant::pack::UNIT_CHANNELS;

/// Vectors of a channel.
const VECTORS: usize = TOKENS / LANES;

/// Calls `then(unit, dense values [4][64])`; fp16 data that come `next` are asked for meanwhile, where the side is such.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn each_unit(
    tile: &mut Vec<f32>,
    d: usize,
    side: &SideView<'_>,
    len: usize,
    next: Option<&[u16]>,
    mut then: impl FnMut(usize, &[f32; UNIT]),
) {
    match side {
        SideView::Coded(v) => {
            tile.resize(d * TOKENS, 0.0);
            unpack::dequant(v, tile);
            tile.as_chunks::<UNIT>().0.iter().enumerate().for_each(|(u, unit)| then(u, unit));
        }
        SideView::Tile { data } => {
            let mut unit = [0.0f32; UNIT];
            for (u, from) in data.as_chunks::<UNIT>().0.iter().enumerate() {
                for (from, to) in from.as_chunks::<LANES>().0.iter().zip(unit.as_chunks_mut::<LANES>().0) {
                    store(to, halves(from));
                }
                // As much of what comes next as was just read.
                if let Some(some) = next.and_then(|n| n.get(u * UNIT..(u + 1) * UNIT)) {
                    prefetch_lines(some);
                }
                then(u, &unit);
            }
        }
        SideView::Rows { data, stride, head_dim } => {
            let mut unit = [0.0f32; UNIT];
            for u in 0..head_dim / UNIT_CHANNELS {
                for t in 0..len {
                    let at = t * stride + u * UNIT_CHANNELS;
                    for (i, bits) in data[at..at + UNIT_CHANNELS].iter().enumerate() {
                        unit[i * TOKENS + t] = unpack::half(*bits);
                    }
                }
                then(u, &unit);
            }
        }
    }
}

/// scores[r][t] = q[r] * key, the keys turned first where `turn` is given.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn score(
    s: &mut Scratch,
    d: usize,
    side: &SideView<'_>,
    len: usize,
    turn: Option<&BlockTable>,
    next: Option<&[u16]>,
    scores: &mut [Row],
) {
    let q = &s.local;
    scores.fill([0.0; TOKENS]);
    each_unit(&mut s.tile, d, side, len, next, |u, keys| score_unit(q, d, u, keys, turn, scores));
}

/// out[r] += sum over tokens of weights[r][t] * value.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn mix(
    weights: &[Row],
    tile: &mut Vec<f32>,
    d: usize,
    side: &SideView<'_>,
    len: usize,
    next: Option<&[u16]>,
    out: &mut [f32],
) {
    each_unit(tile, d, side, len, next, |u, values| mix_unit(weights, d, u, values, out));
}

/// scores[r][t] += sum over the unit's 4 channels of q[r] * key, the keys turned first where `turn` is given.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn score_unit(q: &[f32], d: usize, u: usize, keys: &[f32; UNIT], turn: Option<&BlockTable>, scores: &mut [Row]) {
    let x = keys.as_chunks::<LANES>().0;
    // Two vectors of tokens at a time, so that a broadcast of q serves two products.
    for m in (0..VECTORS).step_by(2) {
        let mut k = [[_mm256_setzero_ps(); 2]; UNIT_CHANNELS];
        for (i, k) in k.iter_mut().enumerate() {
            *k = [load(&x[i * VECTORS + m]), load(&x[i * VECTORS + m + 1])];
        }
        if let Some(table) = turn {
            for pair in 0..UNIT_CHANNELS / 2 {
                let at = (u * UNIT_CHANNELS / 2 + pair) * TOKENS;
                let cos = table.cos[at..at + TOKENS].as_chunks::<LANES>().0;
                let sin = table.sin[at..at + TOKENS].as_chunks::<LANES>().0;
                for j in 0..2 {
                    let (c, s) = (load(&cos[m + j]), load(&sin[m + j]));
                    let (a, b) = (k[2 * pair][j], k[2 * pair + 1][j]);
                    k[2 * pair][j] = _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s));
                    k[2 * pair + 1][j] = _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c));
                }
            }
        }
        for (r, row) in scores.iter_mut().enumerate() {
            let q: &[f32; UNIT_CHANNELS] =
                q[r * d + u * UNIT_CHANNELS..].first_chunk().expect("a row has head_dim channels");
            let lanes = row.as_chunks_mut::<LANES>().0;
            let (mut s0, mut s1) = (load(&lanes[m]), load(&lanes[m + 1]));
            for i in 0..UNIT_CHANNELS {
                let qi = _mm256_set1_ps(q[i]);
                s0 = _mm256_fmadd_ps(qi, k[i][0], s0);
                s1 = _mm256_fmadd_ps(qi, k[i][1], s1);
            }
            store(&mut lanes[m], s0);
            store(&mut lanes[m + 1], s1);
        }
    }
}

/// out[r][channel] += sum over tokens of weights[r][t] * value, for the unit's 4 channels.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mix_unit(weights: &[Row], d: usize, u: usize, values: &[f32; UNIT], out: &mut [f32]) {
    let x = values.as_chunks::<LANES>().0;
    for (r, row) in weights.iter().enumerate() {
        let w = row.as_chunks::<LANES>().0;
        let mut total = [_mm256_setzero_ps(); UNIT_CHANNELS];
        for m in 0..VECTORS {
            let p = load(&w[m]);
            for (i, t) in total.iter_mut().enumerate() {
                *t = _mm256_fmadd_ps(p, load(&x[i * VECTORS + m]), *t);
            }
        }
        let to: &mut [f32; UNIT_CHANNELS] =
            out[r * d + u * UNIT_CHANNELS..].first_chunk_mut().expect("a row has head_dim channels");
        // SAFETY: 4 readable and writable floats; unaligned access is allowed.
        unsafe { _mm_storeu_ps(to.as_mut_ptr(), _mm_add_ps(_mm_loadu_ps(to.as_ptr()), sum_each(total))) };
    }
}
