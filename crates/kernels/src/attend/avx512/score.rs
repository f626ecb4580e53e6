//! Scores from codes with static tables: see AVX2's file of this name.
//!
//! Here a pair of channels goes from codes to sums without leaving registers, where the channels lie in their own order;
//! where they don't, or where several groups of rows need them, signposts are stored first.

use std::arch::x86_64::*;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::avx2::ahead::{Ahead, lines_a_unit};
use super::super::avx2::decode::{ROWS, Row, Scratch, Signs};
use super::super::avx2::outliers;
use super::super::avx2::score::{integers, steps_of};
use super::super::avx2::unpack::{by_rows, by_width, units};
use super::super::view::{CodedView, Run, TOKENS};
use super::multiply_add;
use super::unpack::{self, Signposts};
use crate::rope::{BlockTable, Turns16};

/// Scores of R rows in 32 bits. Sums `[2 h]` and `[2 h + 1]` hold half h of the tokens, by lanes of four: 0, 2, 4, 6 and
/// 16, 18, 20, 22, then the odd ones above them; and the same 8 further.
type Sums<const R: usize> = [[__m512i; 4]; R];

/// The integer queries of R rows, and what turns keys.
struct Pass<'a, const R: usize> {
    queries: [&'a [i32]; R],
    /// None: keys are stored turned.
    turn: Option<&'a BlockTable>,
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn coded(
    s: &mut Scratch,
    d: usize,
    v: &CodedView<'_>,
    turn: Option<&BlockTable>,
    ahead: &mut Ahead<'_>,
    scores: &mut [Row],
) {
    let steps = steps_of(v, &s.steps);
    s.pairs.resize(scores.len() * d / 2, 0);
    let stored = !v.lut.order.is_empty() || scores.len() > ROWS;
    if stored {
        s.signposts.resize(d, Signs([0; TOKENS]));
        for run in v.runs() {
            by_width!(run, signposts::<_>(v, &run, ahead, &mut s.signposts));
        }
    }
    let keys = stored.then_some(&s.signposts[..]);
    let rows_of = s.local.chunks(ROWS * d).zip(s.pairs.chunks_mut(ROWS * d / 2)).zip(scores.chunks_mut(ROWS));
    for ((q, ints), scores) in rows_of {
        by_rows!(scores.len(), rows::<_>(q, d, v, steps, turn, keys, ahead, ints, &mut s.outliers, scores));
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn load(from: &[i16; 32]) -> __m512i {
    // SAFETY: 64 readable bytes; unaligned loads are allowed.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// Signposts of a run, channel by channel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn signposts<const B: u32>(v: &CodedView<'_>, run: &Run<'_>, ahead: &mut Ahead<'_>, rows: &mut [Signs]) {
    let tables = v.lut.tables[run.units.start * UNIT_CHANNELS..].as_chunks::<UNIT_CHANNELS>().0;
    for ((u, unit), tables) in units::<B>(run).zip(tables) {
        ahead.lines(lines_a_unit(B));
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

/// sums += a pair of channels, turned, times the queries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_pair<const R: usize>(sums: &mut Sums<R>, pass: &Pass<'_, R>, pair: usize, x: Signposts, y: Signposts) {
    for h in 0..2 {
        let (mut a, mut b) = (x[h], y[h]);
        if let Some(table) = pass.turn {
            let Turns16([cos, sin]) = &table.wide16[pair];
            (a, b) = rotate(a, b, load(&cos.as_chunks().0[h]), load(&sin.as_chunks().0[h]));
        }
        let (low, high) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
        for r in 0..R {
            // SAFETY: every query holds all pairs of the head.
            let q = _mm512_set1_epi32(unsafe { *pass.queries[r].get_unchecked(pair) });
            sums[r][2 * h] = multiply_add(sums[r][2 * h], low, q);
            sums[r][2 * h + 1] = multiply_add(sums[r][2 * h + 1], high, q);
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

/// sums += the pairs of a run, straight from the codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_run<const B: u32, const R: usize>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    pass: &Pass<'_, R>,
    ahead: &mut Ahead<'_>,
    all: &mut Sums<R>,
) {
    let mut sums = [[_mm512_setzero_si512(); 4]; R];
    let tables = v.lut.tables[run.units.start * UNIT_CHANNELS..].as_chunks::<UNIT_CHANNELS>().0;
    for ((u, unit), tables) in units::<B>(run).zip(tables) {
        ahead.lines(lines_a_unit(B));
        let [low, high] = unpack::codes::<B>(unit);
        for p in [0, 1] {
            let [x, y] = [2 * p, 2 * p + 1].map(|i| unpack::look_up::<B>(&tables[i], low[i], high[i]));
            add_pair(&mut sums, pass, u * UNIT_CHANNELS / 2 + p, x, y);
        }
    }
    for r in 0..R {
        for i in 0..4 {
            all[r][i] = _mm512_add_epi32(all[r][i], sums[r][i]);
        }
    }
}

/// sums += all pairs, from stored signposts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_stored<const R: usize>(keys: &[Signs], pass: &Pass<'_, R>, all: &mut Sums<R>) {
    let mut sums = [[_mm512_setzero_si512(); 4]; R];
    for (pair, [x, y]) in keys.as_chunks::<2>().0.iter().enumerate() {
        let [x, y] = [x, y].map(|of| {
            let halves = of.0.as_chunks::<32>().0;
            [load(&halves[0]), load(&halves[1])]
        });
        add_pair(&mut sums, pass, pair, x, y);
    }
    for r in 0..R {
        for i in 0..4 {
            all[r][i] = _mm512_add_epi32(all[r][i], sums[r][i]);
        }
    }
}

/// Scores of R rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows<const R: usize>(
    q: &[f32],
    d: usize,
    v: &CodedView<'_>,
    steps: &[f32],
    turn: Option<&BlockTable>,
    keys: Option<&[Signs]>,
    ahead: &mut Ahead<'_>,
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
    let pass = Pass { queries: std::array::from_fn(|r| &ints[r * pairs..(r + 1) * pairs]), turn };
    let mut sums = [[_mm512_setzero_si512(); 4]; R];
    match keys {
        Some(keys) => add_stored::<R>(keys, &pass, &mut sums),
        None => {
            for run in v.runs() {
                by_width!(run, add_run::<_, R>(v, &run, &pass, ahead, &mut sums));
            }
        }
    }
    // Sixteen tokens of a half from its two sums: even and odd ones lie two lanes apart.
    let at = |token: i32| token % 2 * 8 + token / 16 % 2 * 4 + token % 8 / 2 + token / 8 % 2 * 16;
    let places: [[i32; 16]; 2] = std::array::from_fn(|i| std::array::from_fn(|t| at((16 * i + t) as i32)));
    for r in 0..R {
        let factor = _mm512_set1_ps(factors[r]);
        for (i, to) in scores[r].as_chunks_mut::<16>().0.iter_mut().enumerate() {
            // SAFETY: 64 readable bytes; unaligned loads are allowed.
            let places = unsafe { _mm512_loadu_si512(places[i % 2].as_ptr().cast()) };
            let x = _mm512_permutex2var_epi32(sums[r][i / 2 * 2], places, sums[r][i / 2 * 2 + 1]);
            // SAFETY: 16 writable floats; unaligned stores are allowed.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(_mm512_cvtepi32_ps(x), factor)) };
        }
    }
    outliers::score::<R>(extra, q, d, v, turn, scores);
}
