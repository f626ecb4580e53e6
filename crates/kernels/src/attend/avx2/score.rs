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

use kvquant_quant::TOP;
use kvquant_quant::pack::UNIT_CHANNELS;

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
    s.pairs.resize(s.weights.len() * pairs, 0);
    let rows_of = s.local.chunks(ROWS * d).zip(s.pairs.chunks_mut(ROWS * pairs)).zip(s.weights.chunks_mut(ROWS));
    for ((q, ints), scores) in rows_of {
        match scores.len() {
            1 => rows::<1>(q, d, v, turn, &s.keys, ints, scores),
            2 => rows::<2>(q, d, v, turn, &s.keys, ints, scores),
            3 => rows::<3>(q, d, v, turn, &s.keys, ints, scores),
            _ => rows::<4>(q, d, v, turn, &s.keys, ints, scores),
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
    let of_run = run.units.start * 2..run.units.end * 2;
    let tables = v.lut.tables[run.units.start * UNIT_CHANNELS..].as_chunks::<UNIT_CHANNELS>().0;
    let lines = l0[of_run.clone()].as_chunks_mut::<2>().0.iter_mut().zip(l1[of_run.clone()].as_chunks_mut::<2>().0);
    let lines = lines.zip(l2[of_run.clone()].as_chunks_mut::<2>().0).zip(l3[of_run].as_chunks_mut::<2>().0);
    for (((u, unit), tables), (((l0, l1), l2), l3)) in unpack::units::<B>(run).zip(tables).zip(lines) {
        for p in 0..UNIT_CHANNELS / 2 {
            let [low, high] = unpack::codes::<B>(unit);
            let [mut x0, mut x1] = unpack::look_up::<B>(&tables[2 * p], low[2 * p], high[2 * p]);
            let [mut y0, mut y1] = unpack::look_up::<B>(&tables[2 * p + 1], low[2 * p + 1], high[2 * p + 1]);
            if TURN && let Some(table) = table {
                let c = v.channel(u * UNIT_CHANNELS + 2 * p) / 2;
                let (cos, sin) = (table.cos16[c].as_chunks::<16>().0, table.sin16[c].as_chunks::<16>().0);
                let at = |i: usize| (sixteen(&cos[i]), sixteen(&sin[i]));
                (x0[0], y0[0]) = rotate(x0[0], y0[0], at(0));
                (x1[0], y1[0]) = rotate(x1[0], y1[0], at(1));
                (x0[1], y0[1]) = rotate(x0[1], y0[1], at(2));
                (x1[1], y1[1]) = rotate(x1[1], y1[1], at(3));
            }
            store(x0[0], y0[0], &mut l0[p]);
            store(x0[1], y0[1], &mut l1[p]);
            store(x1[0], y1[0], &mut l2[p]);
            store(x1[1], y1[1], &mut l3[p]);
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

/// An integer query: each channel, in the order of places, times its step, scaled by the inverse of the returned
/// factor and rounded.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn integers(q: &[f32], v: &CodedView<'_>, ints: &mut [i32]) -> f32 {
    let mut ordered = [0.0f32; MAX_HEAD_DIM];
    let q = if v.lut.order.is_empty() {
        q
    } else {
        for (to, c) in ordered.iter_mut().zip(v.lut.order) {
            *to = q[*c as usize];
        }
        &ordered[..q.len()]
    };
    let both = || q.as_chunks::<UNIT_CHANNELS>().0.iter().zip(v.lut.steps.as_chunks::<UNIT_CHANNELS>().0);
    let stepped = |(q, step): (&[f32; UNIT_CHANNELS], &[f32; UNIT_CHANNELS])| {
        // SAFETY: 4 readable floats each; unaligned loads are allowed.
        unsafe { _mm_mul_ps(_mm_loadu_ps(q.as_ptr()), _mm_loadu_ps(step.as_ptr())) }
    };
    let sign = _mm_set1_ps(-0.0);
    let (mut most, mut total) = (_mm_setzero_ps(), _mm_setzero_ps());
    for four in both() {
        let x = _mm_andnot_ps(sign, stepped(four));
        most = _mm_max_ps(most, x);
        total = _mm_add_ps(total, x);
    }
    let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    let most = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
    let total = _mm_add_ps(total, _mm_movehl_ps(total, total));
    let total = _mm_cvtss_f32(_mm_add_ss(total, _mm_movehdup_ps(total)));
    let factor = if total > 0.0 { (32767.0 / most).min(QUERY_SUM / total) } else { 0.0 };
    // A query of zeros, or one too small to scale, scores 0.
    let factor = if factor.is_finite() { factor } else { 0.0 };
    let scale = _mm_set1_ps(factor);
    for (four, to) in both().zip(ints.as_chunks_mut::<2>().0) {
        let x = _mm_cvtps_epi32(_mm_mul_ps(stepped(four), scale));
        // SAFETY: 8 writable bytes; unaligned stores are allowed.
        unsafe { _mm_storel_epi64(to.as_mut_ptr().cast(), _mm_packs_epi32(x, x)) };
    }
    if factor > 0.0 { 1.0 / factor } else { 0.0 }
}

/// Pass 2: scores of R rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const R: usize>(
    q: &[f32],
    d: usize,
    v: &CodedView<'_>,
    turn: Option<&BlockTable>,
    keys: &[Line],
    ints: &mut [i32],
    scores: &mut [Row],
) {
    let pairs = d / 2;
    let scores: &mut [Row; R] = scores.first_chunk_mut().expect("called with R rows");
    let mut factors = [0.0; R];
    for ((q, ints), factor) in q.chunks_exact(d).zip(ints.chunks_exact_mut(pairs)).zip(&mut factors) {
        *factor = integers(q, v, ints);
    }
    let queries: [&[i32]; R] = std::array::from_fn(|r| &ints[r * pairs..(r + 1) * pairs]);
    for (l, lines) in keys.chunks_exact(pairs).enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for (p, Line(k)) in lines.iter().enumerate() {
            // SAFETY: 32 readable bytes each; unaligned loads are allowed.
            let k = unsafe { [_mm256_loadu_si256(k[0].as_ptr().cast()), _mm256_loadu_si256(k[1].as_ptr().cast())] };
            for r in 0..R {
                // SAFETY: every query holds `pairs` pairs, as many as there are lines.
                let q = _mm256_set1_epi32(unsafe { *queries[r].get_unchecked(p) });
                sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(k[0], q));
                sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(k[1], q));
            }
        }
        for r in 0..R {
            let factor = _mm256_set1_ps(factors[r]);
            let x = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][0]), factor);
            let y = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][1]), factor);
            // Tokens 0-3 and 16-19, 4-7 and 20-23: to 0-7 and 16-23.
            let row = scores[r].as_chunks_mut::<8>().0;
            let at = l / 2 * 4 + l % 2;
            super::store(&mut row[at], _mm256_permute2f128_ps::<0x20>(x, y));
            super::store(&mut row[at + 2], _mm256_permute2f128_ps::<0x31>(x, y));
        }
    }
    outliers::<R>(q, d, v, turn, scores);
}

/// scores[r][t] += residual * (the query's share of the channel at the token).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn outliers<const R: usize>(
    q: &[f32],
    d: usize,
    v: &CodedView<'_>,
    turn: Option<&BlockTable>,
    scores: &mut [Row; R],
) {
    let queries: [&[[f32; 2]]; R] = std::array::from_fn(|r| q[r * d..(r + 1) * d].as_chunks::<2>().0);
    for (u, places, residuals) in v.outliers_by_unit() {
        for (&place, &residual) in places.iter().zip(residuals) {
            let residual = unpack::half(u16::from_le_bytes(residual));
            let (t, i) = (place as usize % TOKENS, place as usize / TOKENS);
            let pair = v.channel(u * UNIT_CHANNELS + i) / 2;
            let odd = i % 2;
            let (a, b) = match turn {
                Some(table) => {
                    let turns = table.turns[pair].as_flattened();
                    (turns[(1 - odd) * TOKENS + t] * residual, turns[(2 - odd) * TOKENS + t] * residual)
                }
                None => ([residual, 0.0][odd], [0.0, residual][odd]),
            };
            for r in 0..R {
                let [x, y] = queries[r][pair];
                scores[r][t] += x * a + y * b;
            }
        }
    }
}
