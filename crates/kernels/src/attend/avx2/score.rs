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
use super::ahead::Ahead;
use super::decode::{Line, ROWS, Row, Scratch, Signs};
use super::outliers;
use super::unpack::{self, by_rows, by_width};
use crate::rope::BlockTable;

/// Sum of the magnitudes of an integer query.
pub(in super::super) const QUERY_SUM: f32 =
    (i32::MAX as f64 / (TOP as f64 * std::f64::consts::SQRT_2 + 2.0)) as f32 - 1024.0;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn coded(
    s: &mut Scratch,
    d: usize,
    v: &CodedView<'_>,
    turn: Option<&BlockTable>,
    ahead: &mut Ahead<'_>,
    scores: &mut [Row],
) {
    let pairs = d / 2;
    s.keys.resize(4 * pairs, Line([[0; 8]; 2]));
    s.signposts.resize(d, Signs([0; TOKENS]));
    for run in v.runs() {
        by_width!(run, signposts::<_>(v, &run, ahead, &mut s.signposts));
    }
    match turn {
        Some(table) => turned::<true>(&s.signposts, table, pairs, &mut s.keys),
        None => turned::<false>(&s.signposts, &BlockTable::default(), pairs, &mut s.keys),
    }
    let steps = steps_of(v, &s.steps);
    s.pairs.resize(scores.len() * pairs, 0);
    let rows_of = s.local.chunks(ROWS * d).zip(s.pairs.chunks_mut(ROWS * pairs)).zip(scores.chunks_mut(ROWS));
    for ((q, ints), scores) in rows_of {
        by_rows!(scores.len(), rows::<_>(q, d, v, steps, turn, &s.keys, ints, &mut s.outliers, scores));
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
fn signposts<const B: u32>(v: &CodedView<'_>, run: &Run<'_>, ahead: &mut Ahead<'_>, rows: &mut [Signs]) {
    let tables = v.lut.tables[run.units.start * UNIT_CHANNELS..].as_chunks::<UNIT_CHANNELS>().0;
    for (n, ((u, unit), tables)) in unpack::units::<B>(run).zip(tables).enumerate() {
        ahead.unit::<B>(n);
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
    ahead.skip_units::<B>(run.units.len());
}

/// Puts steps in the order of channels, where that is not the order of places.
pub(super) fn steps_by_channel(v: &CodedView<'_>, to: &mut Vec<f32>) {
    to.resize(v.lut.order.len(), 0.0);
    for (&c, &step) in v.lut.order.iter().zip(v.lut.steps) {
        to[c as usize] = step;
    }
}

/// Steps in the order of channels; `ordered` is what [`steps_by_channel`] made.
pub(in super::super) fn steps_of<'a>(v: &CodedView<'a>, ordered: &'a [f32]) -> &'a [f32] {
    if v.lut.order.is_empty() { v.lut.steps } else { ordered }
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

/// An integer query: each channel times its step, scaled by the inverse of the returned factor and rounded.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn integers(q: &[f32], steps: &[f32], ints: &mut [i32]) -> f32 {
    let (eights, rest) = q.as_chunks::<8>();
    let (of_eights, of_rest) = steps.as_chunks::<8>();
    let both = || eights.iter().zip(of_eights);
    let stepped = |(q, step): (&[f32; 8], &[f32; 8])| _mm256_mul_ps(super::load(q), super::load(step));
    let sign = _mm256_set1_ps(-0.0);
    let (mut most, mut total) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for eight in both() {
        let x = _mm256_andnot_ps(sign, stepped(eight));
        most = _mm256_max_ps(most, x);
        total = _mm256_add_ps(total, x);
    }
    let most = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps::<1>(most));
    let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    let mut most = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
    let mut total = super::sum(total);
    for (q, step) in rest.iter().zip(of_rest) {
        most = most.max((q * step).abs());
        total += (q * step).abs();
    }
    let factor = if total > 0.0 { (32767.0 / most).min(QUERY_SUM / total) } else { 0.0 };
    // A query of zeros, or one too small to scale, scores 0.
    let factor = if factor.is_finite() { factor } else { 0.0 };
    let scale = _mm256_set1_ps(factor);
    let (to, to_rest) = ints.as_chunks_mut::<4>();
    for (eight, to) in both().zip(to) {
        let x = _mm256_cvtps_epi32(_mm256_mul_ps(stepped(eight), scale));
        let x = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        // SAFETY: 16 writable bytes; unaligned stores are allowed.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), x) };
    }
    for ((q, step), to) in rest.as_chunks::<2>().0.iter().zip(of_rest.as_chunks::<2>().0).zip(to_rest) {
        let int = |i: usize| (q[i] * step[i] * factor).round_ties_even() as i32;
        *to = int(0) & 0xffff | int(1) << 16;
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
    extra: &mut outliers::Scratch,
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
    outliers::score::<R>(extra, q, d, v, turn, scores);
}
