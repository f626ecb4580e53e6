//! Scores from codes with static tables.
//!
//! Pass 0, once for all rows: signposts, channel by channel, whose widths and order differ. Pass 1: turned by their place
//! in the block (`vpmulhrsw`), the channels of a pair side by side. Pass 2: products with the queries' pairs (`vpmaddwd`), summed in 32 bits. Outliers, a hundredth of
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
use super::decode::{Line, Row, Scratch, Signs};
use super::unpack::{self, by_width};
use crate::rope::BlockTable;

/// Rows that are multiplied at a time: their sums stay in registers.
pub(in super::super) const ROWS: usize = 4;
/// Sum of the magnitudes of an integer query.
const QUERY_SUM: f32 = (i32::MAX as f64 / (TOP as f64 * std::f64::consts::SQRT_2 + 2.0)) as f32 - 1024.0;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn coded(s: &mut Scratch, d: usize, v: &CodedView<'_>, turn: Option<&BlockTable>) {
    let pairs = d / 2;
    s.keys.resize(4 * pairs, Line([[0; 8]; 2]));
    s.signposts.resize(d, Signs([0; TOKENS]));
    for run in v.runs() {
        by_width!(run, signposts::<_>(v, &run, &mut s.signposts));
    }
    match turn {
        Some(table) => turned::<true>(&s.signposts, table, pairs, &mut s.keys),
        None => turned::<false>(&s.signposts, &BlockTable::default(), pairs, &mut s.keys),
    }
    steps_by_channel(v, &mut s.steps);
    s.pairs.resize(s.weights.len() * pairs, 0);
    let rows_of = s.local.chunks(ROWS * d).zip(s.pairs.chunks_mut(ROWS * pairs)).zip(s.weights.chunks_mut(ROWS));
    for ((q, ints), scores) in rows_of {
        match scores.len() {
            1 => rows::<1>(q, d, v, &s.steps, turn, &s.keys, ints, scores),
            2 => rows::<2>(q, d, v, &s.steps, turn, &s.keys, ints, scores),
            3 => rows::<3>(q, d, v, &s.steps, turn, &s.keys, ints, scores),
            _ => rows::<4>(q, d, v, &s.steps, turn, &s.keys, ints, scores),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sixteen(from: &[i16; 16]) -> __m256i {
    // SAFETY: 32 readable bytes; unaligned loads are allowed.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

/// Pass 0.
#[target_feature(enable = "avx2,fma,f16c")]
fn signposts<const B: u32>(v: &CodedView<'_>, run: &Run<'_>, rows: &mut [Signs]) {
    let tables = v.lut.tables[run.units.start * UNIT_CHANNELS..].as_chunks::<UNIT_CHANNELS>().0;
    for ((u, unit), tables) in unpack::units::<B>(run).zip(tables) {
        for i in 0..UNIT_CHANNELS {
            let [low, high] = unpack::codes::<B>(unit);
            let [x, y] = unpack::look_up::<B>(&tables[i], low[i], high[i]);
            let row = rows[v.channel(u * UNIT_CHANNELS + i)].0.as_chunks_mut::<16>().0;
            for (to, x) in row.iter_mut().zip([x[0], y[0], x[1], y[1]]) {
                // SAFETY: 32 writable bytes; unaligned stores are allowed.
                unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), x) };
            }
        }
    }
}

/// Steps in the order of channels.
pub(in super::super) fn steps_by_channel(v: &CodedView<'_>, steps: &mut Vec<f32>) {
    steps.clear();
    steps.extend_from_slice(v.lut.steps);
    for (&c, &step) in v.lut.order.iter().zip(v.lut.steps) {
        steps[c as usize] = step;
    }
}

/// Pass 1.
#[target_feature(enable = "avx2,fma,f16c")]
fn turned<const TURN: bool>(rows: &[Signs], table: &BlockTable, pairs: usize, keys: &mut [Line]) {
    let (front, back) = keys.split_at_mut(2 * pairs);
    let (l0, l1) = front.split_at_mut(pairs);
    let (l2, l3) = back.split_at_mut(pairs);
    let lines = l0.iter_mut().zip(l1).zip(l2).zip(l3);
    for (c, ([x, y], (((l0, l1), l2), l3))) in rows.as_chunks::<2>().0.iter().zip(lines).enumerate() {
        let (x, y) = (x.0.as_chunks::<16>().0, y.0.as_chunks::<16>().0);
        // Halves of the tokens, then of each of their 16: the lines' order.
        for (i, line) in [(0, l0), (2, l1), (1, l2), (3, l3)] {
            let (mut a, mut b) = (sixteen(&x[i]), sixteen(&y[i]));
            if TURN {
                let (cos, sin) = (table.cos16[c].as_chunks::<16>().0, table.sin16[c].as_chunks::<16>().0);
                (a, b) = rotate(a, b, (sixteen(&cos[i]), sixteen(&sin[i])));
            }
            store(a, b, line);
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

/// An integer query: each channel times its step, scaled by the inverse of the returned
/// factor and rounded.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn integers(q: &[f32], steps: &[f32], ints: &mut [i32]) -> f32 {
    let both = || q.as_chunks::<UNIT_CHANNELS>().0.iter().zip(steps.as_chunks::<UNIT_CHANNELS>().0);
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
    steps: &[f32],
    turn: Option<&BlockTable>,
    keys: &[Line],
    ints: &mut [i32],
    scores: &mut [Row],
) {
    let pairs = d / 2;
    let scores: &mut [Row; R] = scores.first_chunk_mut().expect("called with R rows");
    let mut factors = [0.0; R];
    for ((q, ints), factor) in q.chunks_exact(d).zip(ints.chunks_exact_mut(pairs)).zip(&mut factors) {
        *factor = integers(q, steps, ints);
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
            let c = v.channel(u * UNIT_CHANNELS + i);
            let (pair, odd) = (c / 2, c % 2);
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
