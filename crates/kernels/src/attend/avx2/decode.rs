//! Few rows: every unit is dequantized into 1 KB of stack and used for all rows at once.
//!
//! Cost per 8 elements and R rows, keys: unpack 2-5 instructions, store and load, rotation 2, R products.
//! Values: unpack, store, R products; the per-token scale is folded into the probabilities.

use std::arch::x86_64::*;

use half::f16;
use kvquant_quant::pack::{LANES, UNIT_CHANNELS};

use super::super::view::{CodedView, TOKENS, UNIT};
use super::super::{BlockView, DECODE_ROWS, Rows, SideView, State};
use super::{TokenScales, add_outliers, halves, load, scale_unit, signposts, softmax, store};
use crate::rope::BlockTable;

/// One row of scores or probabilities over a block.
type Weights = [[f32; TOKENS]; DECODE_ROWS];

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend(rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, state: &mut State) {
    let (d, n) = (rows.head_dim, rows.len());
    let mut local = vec![0.0f32; n * d];
    match block.origin {
        Some(origin) => {
            for (q, to) in rows.q.chunks_exact(d).zip(local.chunks_exact_mut(d)) {
                origin.undo(q, to);
            }
        }
        None => local.copy_from_slice(rows.q),
    }
    let mut weights: Weights = [[0.0; TOKENS]; DECODE_ROWS];
    let turn = block.origin.map(|_| table);
    each_unit(&block.key, block.len, Scaling::Applied, |u, keys, _| {
        score_unit(&local, d, u, keys, turn, &mut weights[..n]);
    });
    for (r, w) in weights[..n].iter_mut().enumerate() {
        let visible = rows.visible(r, block.len);
        if visible == 0 {
            w.fill(0.0);
        } else {
            softmax(w, visible, r, state);
        }
    }
    let weights = &weights[..n];
    let SideView::Coded(coded) = &block.value else {
        each_unit(&block.value, block.len, Scaling::Applied, |u, values, _| {
            mix_unit(weights, d, u, values, &mut state.out)
        });
        return;
    };
    if coded.per_channel {
        each_unit(&block.value, block.len, Scaling::Applied, |u, values, _| {
            mix_unit(weights, d, u, values, &mut state.out)
        });
    } else {
        mix_scaled(coded, weights, d, block.len, &mut state.out);
    }
}

/// Whether a unit arrives with its per-token scales, zero points and outliers, or as bare signposts.
#[derive(Clone, Copy, PartialEq)]
enum Scaling {
    Applied,
    Bare,
}

/// Calls `then(unit, dense values [4][64], number of the unit's first outlier)`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn each_unit(side: &SideView<'_>, len: usize, scaling: Scaling, mut then: impl FnMut(usize, &[f32; UNIT], usize)) {
    let mut unit = [0.0f32; UNIT];
    match side {
        SideView::Coded(v) => {
            let scales = if scaling == Scaling::Applied {
                TokenScales::load(v)
            } else {
                TokenScales { scale: vec![], zero: vec![] }
            };
            let mut first = 0;
            for u in 0..v.head_dim / UNIT_CHANNELS {
                signposts(v, u, &mut unit);
                let next = if scaling == Scaling::Applied {
                    scale_unit(v, u, &scales, &mut unit);
                    add_outliers(v, u, first, &mut unit)
                } else {
                    first + v.counts[u] as usize
                };
                then(u, &unit, first);
                first = next;
            }
        }
        SideView::Tile { data } => {
            for (u, from) in data.as_chunks::<UNIT>().0.iter().enumerate() {
                for (from, to) in from.as_chunks::<LANES>().0.iter().zip(unit.as_chunks_mut::<LANES>().0) {
                    store(to, halves(from));
                }
                then(u, &unit, 0);
            }
        }
        SideView::Rows { data, stride, head_dim } => {
            for u in 0..head_dim / UNIT_CHANNELS {
                for t in 0..len {
                    for i in 0..UNIT_CHANNELS {
                        unit[i * TOKENS + t] = f16::from_bits(data[t * stride + u * UNIT_CHANNELS + i]).to_f32();
                    }
                }
                then(u, &unit, 0);
            }
        }
    }
}

/// scores[r][t] += sum over the unit's 4 channels of q[r] * key, the keys turned first where `turn` is given.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn score_unit(
    q: &[f32],
    d: usize,
    u: usize,
    keys: &[f32; UNIT],
    turn: Option<&BlockTable>,
    scores: &mut [[f32; TOKENS]],
) {
    const VECTORS: usize = TOKENS / LANES;
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

/// Sums of four vectors, one a lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_each(a: [__m256; 4]) -> __m128 {
    let ab = _mm256_hadd_ps(a[0], a[1]);
    let cd = _mm256_hadd_ps(a[2], a[3]);
    let x = _mm256_hadd_ps(ab, cd);
    _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
}

/// out[r][channel] += sum over tokens of weights[r][t] * value, for the unit's 4 channels.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mix_unit(weights: &[[f32; TOKENS]], d: usize, u: usize, values: &[f32; UNIT], out: &mut [f32]) {
    const VECTORS: usize = TOKENS / LANES;
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

/// Values with per-token scales: p (s u + z) + p r = (p s) u + p z + p r. The scale goes into the weights once a
/// group, the zero point is one sum a group, and outliers are added one by one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mix_scaled(v: &CodedView<'_>, weights: &[[f32; TOKENS]], d: usize, len: usize, out: &mut [f32]) {
    let scales = TokenScales::load(v);
    let n = weights.len();
    let mut scaled: Weights = [[0.0; TOKENS]; DECODE_ROWS];
    let mut group = usize::MAX;
    each_unit(&SideView::Coded(*v), len, Scaling::Bare, |u, values, first| {
        let g = u * UNIT_CHANNELS / v.group_channels;
        if g != group {
            group = g;
            let scale = &scales.scale[g * TOKENS..(g + 1) * TOKENS];
            for (r, (to, w)) in scaled.iter_mut().zip(weights).enumerate() {
                for ((to, w), s) in to.iter_mut().zip(w).zip(scale) {
                    *to = w * s;
                }
                if !scales.zero.is_empty() {
                    let zero = &scales.zero[g * TOKENS..(g + 1) * TOKENS];
                    let shift: f32 = w.iter().zip(zero).map(|(w, z)| w * z).sum();
                    for o in &mut out[r * d + g * v.group_channels..][..v.group_channels] {
                        *o += shift;
                    }
                }
            }
        }
        mix_unit(&scaled[..n], d, u, values, out);
        let end = first + v.counts[u] as usize;
        for (place, residual) in v.outliers(first, end) {
            let (channel, token) = (u * UNIT_CHANNELS + place / TOKENS, place % TOKENS);
            for (r, w) in weights.iter().enumerate() {
                out[r * d + channel] += w[token] * residual;
            }
        }
    });
}
