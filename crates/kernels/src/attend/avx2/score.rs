//! Scores from codes with static tables.
//!
//! Pass 1, once for all rows: a unit's signposts, turned by their place in the block (`vpmulhrsw`), the channels of a
//! pair side by side. Pass 2: products with the queries' pairs (`vpmaddwd`), summed in 32 bits. Outliers, a hundredth of
//! the entries, are added in f32.
//!
//! ```text
//! keys   [4 lines][head_dim / 2 pairs][2 vectors][8 tokens] (x', y') 16 bits each
//!        vector v of line 2h + v/2: tokens 32 h + 4 v + (0..4), then 16 more + (0..4)
//! ```
//!
//! Overflow: a turned channel is at most sqrt(2) * 8191 + 1 steps; queries are scaled so that the sum of their
//! magnitudes times that stays below 2^31.

use std::arch::x86_64::*;

use kvquant_quant::pack::UNIT_CHANNELS;
use kvquant_quant::{TOP, Table};

use super::super::view::{CodedView, Run, TOKENS};
use super::decode::{Line, Row, Scratch};
use super::unpack::{self, by_width};
use crate::rope::BlockTable;

/// Rows that are multiplied at a time: their sums stay in registers.
pub(in super::super) const ROWS: usize = 4;
/// Channels of the widest head that a cache supports.
const MAX_HEAD_DIM: usize = 512;
/// Sum of the magnitudes of an integer query.
const QUERY_SUM: f32 = (i32::MAX as f64 / (TOP as f64 * std::f64::consts::SQRT_2 + 2.0)) as f32 - 1024.0;

/// R queries at the block's origin: `[pair of places][row]`, so that what belongs together is read together.
pub(in super::super) type FloatPair<const R: usize> = [[f32; 2]; R];

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn coded(s: &mut Scratch, d: usize, v: &CodedView<'_>, turn: Option<&BlockTable>) {
    let pairs = d / 2;
    s.keys.resize(4 * pairs, Line([[0; 8]; 2]));
    for run in v.runs() {
        match turn {
            Some(table) => by_width!(run, turned::<_, true>(v, &run, Some(table), pairs, &mut s.keys)),
            None => by_width!(run, turned::<_, false>(v, &run, None, pairs, &mut s.keys)),
        }
    }
    for (q, scores) in s.local.chunks(ROWS * d).zip(s.weights.chunks_mut(ROWS)) {
        let (keys, pairs, floats) = (&s.keys, &mut s.pairs, &mut s.floats);
        match scores.len() {
            1 => rows::<1>(q, d, v, turn, keys, pairs, floats, scores),
            2 => rows::<2>(q, d, v, turn, keys, pairs, floats, scores),
            3 => rows::<3>(q, d, v, turn, keys, pairs, floats, scores),
            _ => rows::<4>(q, d, v, turn, keys, pairs, floats, scores),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sixteen(from: &[i16; 16]) -> __m256i {
    // SAFETY: 32 readable bytes; unaligned loads are allowed.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

/// Pass 1.
#[target_feature(enable = "avx2,fma,f16c")]
fn turned<const B: u32, const TURN: bool>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    table: Option<&BlockTable>,
    pairs: usize,
    keys: &mut [Line],
) {
    let (front, back) = keys.split_at_mut(2 * pairs);
    let (l0, l1) = front.split_at_mut(pairs);
    let (l2, l3) = back.split_at_mut(pairs);
    for (u, unit) in unpack::units::<B>(run) {
        let tables: &[Table; UNIT_CHANNELS] =
            v.lut.tables[u * UNIT_CHANNELS..].first_chunk().expect("static sides have a table a place");
        let [low, high] = unpack::codes::<B>(unit);
        for p in 0..UNIT_CHANNELS / 2 {
            let pair = u * UNIT_CHANNELS / 2 + p;
            let x = unpack::look_up::<B>(&tables[2 * p], low[2 * p], high[2 * p]);
            let y = unpack::look_up::<B>(&tables[2 * p + 1], low[2 * p + 1], high[2 * p + 1]);
            let [mut x0, mut x1] = x;
            let [mut y0, mut y1] = y;
            if TURN && let Some(table) = table {
                let c = v.channel(2 * pair) / 2;
                let (cos, sin) = (table.cos16[c].as_chunks::<16>().0, table.sin16[c].as_chunks::<16>().0);
                let at = |i: usize| (sixteen(&cos[i]), sixteen(&sin[i]));
                (x0[0], y0[0]) = rotate(x0[0], y0[0], at(0));
                (x1[0], y1[0]) = rotate(x1[0], y1[0], at(1));
                (x0[1], y0[1]) = rotate(x0[1], y0[1], at(2));
                (x1[1], y1[1]) = rotate(x1[1], y1[1], at(3));
            }
            store(x0[0], y0[0], &mut l0[pair]);
            store(x0[1], y0[1], &mut l1[pair]);
            store(x1[0], y1[0], &mut l2[pair]);
            store(x1[1], y1[1], &mut l3[pair]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rotate(x: __m256i, y: __m256i, (cos, sin): (__m256i, __m256i)) -> (__m256i, __m256i) {
    (
        _mm256_sub_epi16(_mm256_mulhrs_epi16(x, cos), _mm256_mulhrs_epi16(y, sin)),
        _mm256_add_epi16(_mm256_mulhrs_epi16(x, sin), _mm256_mulhrs_epi16(y, cos)),
    )
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(x: __m256i, y: __m256i, Line([first, second]): &mut Line) {
    // SAFETY: 32 writable bytes each; unaligned stores are allowed.
    unsafe {
        _mm256_storeu_si256(first.as_mut_ptr().cast(), _mm256_unpacklo_epi16(x, y));
        _mm256_storeu_si256(second.as_mut_ptr().cast(), _mm256_unpackhi_epi16(x, y));
    }
}

/// Queries of R rows by place, as they are and as integers: each channel times its step, scaled by the inverse of the
/// returned factor and rounded.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn integers<const R: usize>(
    q: &[f32],
    d: usize,
    v: &CodedView<'_>,
    pairs: &mut [[i32; R]],
    floats: &mut [FloatPair<R>],
) -> [f32; R] {
    let mut factors = [0.0; R];
    let steps = v.lut.steps.as_chunks::<UNIT_CHANNELS>().0;
    for (r, q) in q.chunks_exact(d).enumerate() {
        let mut ordered = [0.0f32; MAX_HEAD_DIM];
        let q = if v.lut.order.is_empty() {
            q
        } else {
            for (to, c) in ordered.iter_mut().zip(v.lut.order) {
                *to = q[*c as usize];
            }
            &ordered[..d]
        };
        let q = q.as_chunks::<UNIT_CHANNELS>().0;
        let stepped = |i: usize| {
            // SAFETY: 4 readable floats each; unaligned loads are allowed.
            unsafe { _mm_mul_ps(_mm_loadu_ps(q[i].as_ptr()), _mm_loadu_ps(steps[i].as_ptr())) }
        };
        let sign = _mm_set1_ps(-0.0);
        let (mut most, mut total) = (_mm_setzero_ps(), _mm_setzero_ps());
        for (i, pairs) in floats.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let x = _mm_andnot_ps(sign, stepped(i));
            most = _mm_max_ps(most, x);
            total = _mm_add_ps(total, x);
            pairs[0][r] = [q[i][0], q[i][1]];
            pairs[1][r] = [q[i][2], q[i][3]];
        }
        let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
        let most = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
        let total = _mm_add_ps(total, _mm_movehl_ps(total, total));
        let total = _mm_cvtss_f32(_mm_add_ss(total, _mm_movehdup_ps(total)));
        let factor = if total > 0.0 { (32767.0 / most).min(QUERY_SUM / total) } else { 0.0 };
        // A query of zeros, or one too small to scale, scores 0.
        let factor = if factor.is_finite() { factor } else { 0.0 };
        factors[r] = if factor > 0.0 { 1.0 / factor } else { 0.0 };
        let scale = _mm_set1_ps(factor);
        for (i, to) in pairs.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let x = _mm_cvtps_epi32(_mm_mul_ps(stepped(i), scale));
            let x = _mm_packs_epi32(x, x);
            to[0][r] = _mm_cvtsi128_si32(x);
            to[1][r] = _mm_extract_epi32::<1>(x);
        }
    }
    factors
}

/// Pass 2: scores of R rows.
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(clippy::too_many_arguments)]
fn rows<const R: usize>(
    q: &[f32],
    d: usize,
    v: &CodedView<'_>,
    turn: Option<&BlockTable>,
    keys: &[Line],
    pairs: &mut Vec<i32>,
    floats: &mut Vec<f32>,
    scores: &mut [Row],
) {
    pairs.resize(R * d / 2, 0);
    floats.resize(R * d, 0.0);
    let queries = pairs.as_chunks_mut::<R>().0;
    let floats = floats.as_chunks_mut::<2>().0.as_chunks_mut::<R>().0;
    let scores: &mut [Row; R] = scores.first_chunk_mut().expect("called with R rows");
    let factors = integers::<R>(q, d, v, queries, floats);
    for (l, line) in keys.chunks_exact(d / 2).enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for (Line(k), q) in line.iter().zip(&*queries) {
            // SAFETY: 32 readable bytes each; unaligned loads are allowed.
            let k = unsafe { [_mm256_loadu_si256(k[0].as_ptr().cast()), _mm256_loadu_si256(k[1].as_ptr().cast())] };
            for r in 0..R {
                let q = _mm256_set1_epi32(q[r]);
                sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(k[0], q));
                sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(k[1], q));
            }
        }
        for r in 0..R {
            for j in 0..2 {
                let x = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][j]), _mm256_set1_ps(factors[r]));
                let at = l / 2 * 32 + l % 2 * 8 + j * 4;
                let (first, second) = (_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let to: &mut [f32; 20] = scores[r][at..].first_chunk_mut().expect("tokens 0, 4, 8, 12 of a half");
                // SAFETY: places 0..4 and 16..20 of 20 floats; unaligned stores are allowed.
                unsafe {
                    _mm_storeu_ps(to.as_mut_ptr(), first);
                    _mm_storeu_ps(to.as_mut_ptr().add(16), second);
                }
            }
        }
    }
    outliers::<R>(v, turn, floats, scores);
}

/// scores[r][t] += residual * (the query's share of the channel at the token).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn outliers<const R: usize>(
    v: &CodedView<'_>,
    turn: Option<&BlockTable>,
    queries: &[FloatPair<R>],
    scores: &mut [Row; R],
) {
    for (u, places, residuals) in v.outliers_by_unit() {
        let queries: &[FloatPair<R>; 2] = queries[2 * u..].first_chunk().expect("two pairs a unit");
        for (&place, &residual) in places.iter().zip(residuals) {
            let residual = unpack::half(u16::from_le_bytes(residual));
            let (t, i) = (place as usize % TOKENS, place as usize / TOKENS);
            // x turns to (x cos, x sin), y to (-y sin, y cos).
            let (mut a, mut b) = if i % 2 == 0 { (residual, 0.0) } else { (0.0, residual) };
            if let Some(table) = turn {
                let at = v.channel(u * UNIT_CHANNELS + i) / 2 * TOKENS + t;
                let (cos, sin) = (table.cos[at], table.sin[at]);
                (a, b) = (a * cos - b * sin, a * sin + b * cos);
            }
            for r in 0..R {
                let [x, y] = queries[i / 2][r];
                scores[r][t] += x * a + y * b;
            }
        }
    }
}
