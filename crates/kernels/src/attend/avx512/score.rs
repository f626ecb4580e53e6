//! Scores from codes with static tables: see AVX2's file of this name.
//!
//! ```text
//! keys   [4 vectors][head_dim / 2 pairs][16 tokens] (x', y') 16 bits each
//!        vector v: tokens 4 v + (0..4), and the same 16, 32 and 48 further
//! ```

use std::arch::x86_64::*;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::avx2::decode::{Line, Row, Scratch, Signs};
use super::super::avx2::score::{ROWS, integers, outliers, steps_by_channel};
use super::super::avx2::unpack::{by_width, units};
use super::super::view::{CodedView, Run, TOKENS};
use super::unpack;
use crate::rope::BlockTable;

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in super::super) fn coded(s: &mut Scratch, d: usize, v: &CodedView<'_>, turn: Option<&BlockTable>) {
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

/// Pass 0: signposts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn signposts<const B: u32>(v: &CodedView<'_>, run: &Run<'_>, rows: &mut [Signs]) {
    let tables = v.lut.tables[run.units.start * UNIT_CHANNELS..].as_chunks::<UNIT_CHANNELS>().0;
    for ((u, unit), tables) in units::<B>(run).zip(tables) {
        let [low, high] = unpack::codes::<B>(unit);
        for i in 0..UNIT_CHANNELS {
            let row = rows[v.channel(u * UNIT_CHANNELS + i)].0.as_chunks_mut::<32>().0;
            for (to, x) in row.iter_mut().zip(unpack::look_up::<B>(&tables[i], low[i], high[i])) {
                // SAFETY: 64 writable bytes; unaligned stores are allowed.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) };
            }
        }
    }
}

/// Pass 1: turned, the channels of a pair side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn turned<const TURN: bool>(rows: &[Signs], table: &BlockTable, pairs: usize, keys: &mut [Line]) {
    let (front, back) = keys.split_at_mut(2 * pairs);
    let (l0, l1) = front.split_at_mut(pairs);
    let (l2, l3) = back.split_at_mut(pairs);
    let lines = l0.iter_mut().zip(l1).zip(l2).zip(l3);
    for (c, ([x, y], (((l0, l1), l2), l3))) in rows.as_chunks::<2>().0.iter().zip(lines).enumerate() {
        let (x, y) = (x.0.as_chunks::<32>().0, y.0.as_chunks::<32>().0);
        for (i, (first, second)) in [(l0, l1), (l2, l3)].into_iter().enumerate() {
            let (mut a, mut b) = (load(&x[i]), load(&y[i]));
            if TURN {
                let (cos, sin) = (table.cos16[c].as_chunks::<32>().0, table.sin16[c].as_chunks::<32>().0);
                (a, b) = rotate(a, b, load(&cos[i]), load(&sin[i]));
            }
            store(_mm512_unpacklo_epi16(a, b), first);
            store(_mm512_unpackhi_epi16(a, b), second);
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
    let mut sums = [[_mm512_setzero_si512(); 4]; R];
    let (front, back) = keys.split_at(d);
    let (l0, l1) = front.split_at(pairs);
    let (l2, l3) = back.split_at(pairs);
    for (p, (((k0, k1), k2), k3)) in l0.iter().zip(l1).zip(l2).zip(l3).enumerate() {
        // SAFETY: a line is 64 readable bytes; unaligned loads are allowed.
        let k = unsafe { [k0, k1, k2, k3].map(|k| _mm512_loadu_si512(k.0.as_ptr().cast())) };
        for r in 0..R {
            // SAFETY: every query holds `pairs` pairs, as many as there are lines.
            let q = _mm512_set1_epi32(unsafe { *queries[r].get_unchecked(p) });
            for i in 0..4 {
                sums[r][i] = _mm512_dpwssd_epi32(sums[r][i], k[i], q);
            }
        }
    }
    for r in 0..R {
        let x = sums[r].map(|x| _mm512_mul_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(factors[r])));
        // Lane j of vector i holds tokens 16 j + 4 i and three more: a transpose of lanes.
        let (a, b) = (_mm512_shuffle_f32x4::<0x44>(x[0], x[1]), _mm512_shuffle_f32x4::<0xee>(x[0], x[1]));
        let (c, e) = (_mm512_shuffle_f32x4::<0x44>(x[2], x[3]), _mm512_shuffle_f32x4::<0xee>(x[2], x[3]));
        let sorted = [
            _mm512_shuffle_f32x4::<0x88>(a, c),
            _mm512_shuffle_f32x4::<0xdd>(a, c),
            _mm512_shuffle_f32x4::<0x88>(b, e),
            _mm512_shuffle_f32x4::<0xdd>(b, e),
        ];
        for (to, x) in scores[r].as_chunks_mut::<16>().0.iter_mut().zip(sorted) {
            // SAFETY: 16 writable floats; unaligned stores are allowed.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) };
        }
    }
    outliers::<R>(q, d, v, turn, scores);
}
