//! Scores from codes with static tables: see AVX2's file of this name.
//!
//! ```text
//! keys   [4 vectors][head_dim / 2 pairs][16 tokens] (x', y') 16 bits each
//!        vector v: tokens 4 v + (0..4), and the same 16, 32 and 48 further
//! ```

use std::arch::x86_64::*;

use kvquant_quant::Table;
use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::avx2::decode::{Line, Row, Scratch};
use super::super::avx2::score::{ROWS, integers, outliers};
use super::super::avx2::unpack::{by_width, units};
use super::super::view::{CodedView, Run};
use super::unpack;
use crate::rope::BlockTable;

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in super::super) fn coded(s: &mut Scratch, d: usize, v: &CodedView<'_>, turn: Option<&BlockTable>) {
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn load(from: &[i16; 32]) -> __m512i {
    // SAFETY: 64 readable bytes; unaligned loads are allowed.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn store(x: __m512i, to: &mut Line) {
    // SAFETY: a line is 64 writable bytes; unaligned stores are allowed.
    unsafe { _mm512_storeu_si512(to.0.as_mut_ptr().cast(), x) }
}

/// Pass 1: signposts, turned, the channels of a pair side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
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
    for (u, unit) in units::<B>(run) {
        let tables: &[Table; UNIT_CHANNELS] =
            v.lut.tables[u * UNIT_CHANNELS..].first_chunk().expect("static sides have a table a place");
        let [low, high] = unpack::codes::<B>(unit);
        for p in 0..UNIT_CHANNELS / 2 {
            let pair = u * UNIT_CHANNELS / 2 + p;
            let [mut x0, mut x1] = unpack::look_up::<B>(&tables[2 * p], low[2 * p], high[2 * p]);
            let [mut y0, mut y1] = unpack::look_up::<B>(&tables[2 * p + 1], low[2 * p + 1], high[2 * p + 1]);
            if TURN && let Some(table) = table {
                let c = v.channel(2 * pair) / 2;
                let (cos, sin) = (table.cos16[c].as_chunks::<32>().0, table.sin16[c].as_chunks::<32>().0);
                (x0, y0) = rotate(x0, y0, load(&cos[0]), load(&sin[0]));
                (x1, y1) = rotate(x1, y1, load(&cos[1]), load(&sin[1]));
            }
            store(_mm512_unpacklo_epi16(x0, y0), &mut l0[pair]);
            store(_mm512_unpackhi_epi16(x0, y0), &mut l1[pair]);
            store(_mm512_unpacklo_epi16(x1, y1), &mut l2[pair]);
            store(_mm512_unpackhi_epi16(x1, y1), &mut l3[pair]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rotate(x: __m512i, y: __m512i, cos: __m512i, sin: __m512i) -> (__m512i, __m512i) {
    (
        _mm512_sub_epi16(_mm512_mulhrs_epi16(x, cos), _mm512_mulhrs_epi16(y, sin)),
        _mm512_add_epi16(_mm512_mulhrs_epi16(x, sin), _mm512_mulhrs_epi16(y, cos)),
    )
}

/// Pass 2: scores of R rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
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
    let mut sums = [[_mm512_setzero_si512(); 4]; R];
    let (front, back) = keys.split_at(d);
    let (l0, l1) = front.split_at(d / 2);
    let (l2, l3) = back.split_at(d / 2);
    for ((((k0, k1), k2), k3), q) in l0.iter().zip(l1).zip(l2).zip(l3).zip(&*queries) {
        // SAFETY: a line is 64 readable bytes; unaligned loads are allowed.
        let k = unsafe { [k0, k1, k2, k3].map(|k| _mm512_loadu_si512(k.0.as_ptr().cast())) };
        for r in 0..R {
            let q = _mm512_set1_epi32(q[r]);
            for i in 0..4 {
                sums[r][i] = _mm512_dpwssd_epi32(sums[r][i], k[i], q);
            }
        }
    }
    for r in 0..R {
        let row = scores[r].as_chunks_mut::<4>().0;
        for i in 0..4 {
            let x = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][i]), _mm512_set1_ps(factors[r]));
            let fours = [
                _mm512_extractf32x4_ps::<0>(x),
                _mm512_extractf32x4_ps::<1>(x),
                _mm512_extractf32x4_ps::<2>(x),
                _mm512_extractf32x4_ps::<3>(x),
            ];
            for (j, four) in fours.into_iter().enumerate() {
                // SAFETY: 4 writable floats; unaligned stores are allowed.
                unsafe { _mm_storeu_ps(row[4 * j + i].as_mut_ptr(), four) };
            }
        }
    }
    outliers::<R>(v, turn, floats, scores);
}
