//! fp16 blocks: AVX2's arithmetic, sixteen tokens a vector, from memory to sums in registers.

use std::arch::x86_64::*;

use super::super::avx2::decode::{ROWS, Row};
use super::super::avx2::prefetch_lines;
use super::super::avx2::unpack::by_rows;
use super::super::view::TOKENS;
use crate::rope::BlockTable;

/// Tokens of a vector.
const LANES: usize = 16;
const VECTORS: usize = TOKENS / LANES;

/// A channel of a block as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn channel(from: &[u16; TOKENS]) -> [__m512; VECTORS] {
    let lanes = from.as_chunks::<LANES>().0;
    let mut x = [_mm512_setzero_ps(); VECTORS];
    for i in 0..VECTORS {
        // SAFETY: 32 readable bytes; unaligned loads are allowed.
        x[i] = _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(lanes[i].as_ptr().cast()) });
    }
    x
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn load(from: &[f32], at: usize) -> __m512 {
    let from: &[f32; LANES] = from[at..].first_chunk().expect("whole vectors");
    // SAFETY: 64 readable bytes; unaligned loads are allowed.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

/// Asks for channels of the data that come next, as many as were just read.
#[inline(always)]
fn ask(next: Option<&[u16]>, channels: std::ops::Range<usize>) {
    if let Some(some) = next.and_then(|n| n.get(channels.start * TOKENS..channels.end * TOKENS)) {
        prefetch_lines(some);
    }
}

/// scores[r][t] = q[r] * key, the keys `[d, 64]` turned first where `turn` is given. `q` is `[rows, d]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn score(
    q: &[f32],
    d: usize,
    keys: &[u16],
    turn: Option<&BlockTable>,
    next: Option<&[u16]>,
    scores: &mut [Row],
) {
    let mut first = 0;
    while first < scores.len() {
        let count = ROWS.min(scores.len() - first);
        // What comes next is asked for once.
        let next = next.filter(|_| first == 0);
        by_rows!(count, score_rows::<_>(&q[first * d..], d, keys, turn, next, &mut scores[first..]));
        first += ROWS;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn score_rows<const R: usize>(
    q: &[f32],
    d: usize,
    keys: &[u16],
    turn: Option<&BlockTable>,
    next: Option<&[u16]>,
    scores: &mut [Row],
) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
    for (pair, [x, y]) in keys.as_chunks::<TOKENS>().0.as_chunks::<2>().0.iter().enumerate() {
        ask(next, 2 * pair..2 * pair + 2);
        let (mut x, mut y) = (channel(x), channel(y));
        if let Some(table) = turn {
            for i in 0..VECTORS {
                let at = pair * TOKENS + i * LANES;
                let (cos, sin) = (load(&table.cos, at), load(&table.sin, at));
                let (a, b) = (x[i], y[i]);
                x[i] = _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin));
                y[i] = _mm512_fmadd_ps(a, sin, _mm512_mul_ps(b, cos));
            }
        }
        for r in 0..R {
            let (a, b) = (_mm512_set1_ps(q[r * d + 2 * pair]), _mm512_set1_ps(q[r * d + 2 * pair + 1]));
            for i in 0..VECTORS {
                sums[r][i] = _mm512_fmadd_ps(y[i], b, _mm512_fmadd_ps(x[i], a, sums[r][i]));
            }
        }
    }
    for r in 0..R {
        for (to, x) in scores[r].as_chunks_mut::<LANES>().0.iter_mut().zip(sums[r]) {
            // SAFETY: 16 writable floats; unaligned stores are allowed.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) };
        }
    }
}

/// out[r][channel] += sum over tokens of weights[r][t] * value. Values are `[d, 64]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn mix(weights: &[Row], d: usize, values: &[u16], next: Option<&[u16]>, out: &mut [f32]) {
    let mut first = 0;
    while first < weights.len() {
        let count = ROWS.min(weights.len() - first);
        let next = next.filter(|_| first == 0);
        by_rows!(count, mix_rows::<_>(&weights[first..], d, values, next, &mut out[first * d..]));
        first += ROWS;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn mix_rows<const R: usize>(weights: &[Row], d: usize, values: &[u16], next: Option<&[u16]>, out: &mut [f32]) {
    let mut w = [[_mm512_setzero_ps(); VECTORS]; R];
    for r in 0..R {
        for i in 0..VECTORS {
            w[r][i] = load(&weights[r], i * LANES);
        }
    }
    for (u, four) in values.as_chunks::<TOKENS>().0.as_chunks::<4>().0.iter().enumerate() {
        ask(next, 4 * u..4 * u + 4);
        let mut sums = [[_mm256_setzero_ps(); 4]; R];
        for c in 0..4 {
            let x = channel(&four[c]);
            for r in 0..R {
                let (a, b) = (_mm512_mul_ps(x[0], w[r][0]), _mm512_mul_ps(x[1], w[r][1]));
                let (a, b) = (_mm512_fmadd_ps(x[2], w[r][2], a), _mm512_fmadd_ps(x[3], w[r][3], b));
                let x = _mm512_add_ps(a, b);
                sums[r][c] = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            }
        }
        for r in 0..R {
            let x = super::super::avx2::decode::sum_each(sums[r]);
            let to: &mut [f32; 4] = out[r * d + 4 * u..].first_chunk_mut().expect("a row has d channels");
            // SAFETY: 4 readable and writable floats; unaligned access is allowed.
            unsafe { _mm_storeu_ps(to.as_mut_ptr(), _mm_add_ps(_mm_loadu_ps(to.as_ptr()), x)) };
        }
    }
}
