//! Scores from codes with static tables.
//!
//! Pass 1, once for all rows: signposts, turned by their place in the block (`vpmulhrsw`), the channels of a pair side by side.
//! Pass 2: products with the queries' pairs (`vpmaddwd`), summed in 32 bits. Outliers, a hundredth of the entries, are added
//! in f32.
//!
//! ```text
//! keys   [4 lines][head_dim / 2 pairs][2 vectors][8 tokens] (x', y') 16 bits each
//!        vector v of line 2 h + l: tokens 32 h + 8 l + 4 v + (0..4), then 16 more + (0..4)
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
use super::outliers::score as outliers_of;
use super::query::{Pair, Queries, turn as turn_queries};
use super::unpack::{self, Signposts, by_rows, by_width};
use crate::rope::{BlockTable, Rotation, Turns16};

/// Sum of the magnitudes of an integer query.
pub(in super::super) const QUERY_SUM: f32 =
    (i32::MAX as f64 / (TOP as f64 * std::f64::consts::SQRT_2 + 2.0)) as f32 - 1024.0;

/// Keys, line by line, of which each is `[head_dim / 2]`.
type Lines<'a> = [&'a mut [Line]; 4];

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn coded(
    s: &mut Scratch,
    queries: &Queries,
    block: usize,
    v: &CodedView<'_>,
    origin: Option<&Rotation>,
    table: &BlockTable,
    ahead: &mut Ahead<'_>,
    scores: &mut [Row],
) {
    let d = v.head_dim();
    let pairs = d / 2;
    s.keys.resize(4 * pairs, Line([[0; 8]; 2]));
    match origin {
        Some(_) => turned::<true>(v, &table.shuffled16[..pairs], ahead, &mut s.signposts, &mut s.keys),
        None => turned::<false>(v, &[], ahead, &mut s.signposts, &mut s.keys),
    }
    let vectors = Queries::vectors(d);
    s.ints.resize(vectors, Default::default());
    for (first, scores) in (0..).step_by(ROWS).zip(scores.chunks_mut(ROWS)) {
        let row_ints = &queries.ints[first * vectors..];
        by_rows!(scores.len(), turn_queries::<_>(row_ints, vectors, origin, &mut s.ints));
        let ints = &s.ints.as_flattened()[..pairs];
        let units = &queries.units[first..];
        by_rows!(scores.len(), rows::<_>(&s.keys, ints, units, scores));
        let sides = &queries.sides[first / ROWS * d..][..d];
        let turn = origin.map(|origin| (table, origin));
        by_rows!(scores.len(), outliers_of::<_>(&mut s.outliers, block, sides, v, turn, scores));
    }
}

/// Pass 1. Keys are turned where TURN is true.
#[target_feature(enable = "avx2,fma,f16c")]
fn turned<const TURN: bool>(
    v: &CodedView<'_>,
    turns: &[Turns16],
    ahead: &mut Ahead<'_>,
    room: &mut Vec<Signs>,
    keys: &mut [Line],
) {
    let (front, back) = keys.split_at_mut(v.head_dim());
    let ((l0, l1), (l2, l3)) = (front.split_at_mut(v.head_dim() / 2), back.split_at_mut(v.head_dim() / 2));
    let mut lines = [l0, l1, l2, l3];
    if v.lut.order.is_empty() {
        for run in v.runs() {
            by_width!(run, turn_run::<_, TURN>(v, &run, turns, ahead, &mut lines));
        }
        return;
    }
    room.resize(v.head_dim(), Signs([0; TOKENS]));
    for run in v.runs() {
        by_width!(run, turn_ordered::<_, TURN>(v, &run, turns, ahead, room, &mut lines));
    }
    for &pair in v.apart() {
        let pair = pair as usize;
        let [x, y] = &room.as_chunks::<2>().0[pair];
        let turn = if TURN { Some(&turns[pair]) } else { None };
        put_pair::<TURN>(get(x), get(y), turn, lines.each_mut().map(|line| &mut line[pair]));
    }
}

/// Pairs of a run, whose places are the channels.
#[target_feature(enable = "avx2,fma,f16c")]
fn turn_run<const B: u32, const TURN: bool>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    turns: &[Turns16],
    ahead: &mut Ahead<'_>,
    lines: &mut Lines<'_>,
) {
    let (from, n, bits) = (run.units.start, run.units.len(), B as usize);
    let tables = &v.lut.tables.as_chunks::<UNIT_CHANNELS>().0[from..][..n];
    let turns = if TURN { &turns.as_chunks::<2>().0[from..][..n] } else { &[] };
    let [l0, l1, l2, l3] = lines.each_mut().map(|line| &mut line.as_chunks_mut::<2>().0[from..][..n]);
    let vectors = &run.vectors[..n * bits];
    for i in 0..n {
        ahead.unit::<B>(i);
        // SAFETY: `n` units of as many vectors lie in the slice.
        let [low, high] = unpack::codes::<B>(unsafe { vectors.get_unchecked(i * bits..(i + 1) * bits) });
        for j in 0..2 {
            let x = unpack::look_up::<B>(&tables[i][2 * j], low[2 * j], high[2 * j]);
            let y = unpack::look_up::<B>(&tables[i][2 * j + 1], low[2 * j + 1], high[2 * j + 1]);
            let turn = if TURN { Some(&turns[i][j]) } else { None };
            put_pair::<TURN>(x, y, turn, [&mut l0[i][j], &mut l1[i][j], &mut l2[i][j], &mut l3[i][j]]);
        }
    }
    ahead.skip_units::<B>(n);
}

/// Where places have another order: pairs of which a unit of a run holds both channels; signposts of the others are stored.
#[target_feature(enable = "avx2,fma,f16c")]
fn turn_ordered<const B: u32, const TURN: bool>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    turns: &[Turns16],
    ahead: &mut Ahead<'_>,
    room: &mut [Signs],
    lines: &mut Lines<'_>,
) {
    let (n, bits) = (run.units.len(), B as usize);
    let (tables, order, whole) = v.ordered_units(run);
    let vectors = &run.vectors[..n * bits];
    let pairs = v.head_dim() / 2;
    assert!((!TURN || turns.len() >= pairs) && room.len() >= 2 * pairs && lines.iter().all(|l| l.len() >= pairs));
    for i in 0..n {
        ahead.unit::<B>(i);
        // SAFETY: `n` units of as many vectors lie in the slice.
        let [low, high] = unpack::codes::<B>(unsafe { vectors.get_unchecked(i * bits..(i + 1) * bits) });
        let channels = order[i].map(usize::from);
        if whole[i] {
            for j in 0..2 {
                let x = unpack::look_up::<B>(&tables[i][2 * j], low[2 * j], high[2 * j]);
                let y = unpack::look_up::<B>(&tables[i][2 * j + 1], low[2 * j + 1], high[2 * j + 1]);
                let pair = channels[2 * j] / 2;
                let [l0, l1, l2, l3] = lines;
                // SAFETY: an order's channels are below head_dim (`HeadLut::new`): each slice has the pair, as checked above.
                unsafe {
                    let turn = if TURN { Some(turns.get_unchecked(pair)) } else { None };
                    let to = [
                        l0.get_unchecked_mut(pair),
                        l1.get_unchecked_mut(pair),
                        l2.get_unchecked_mut(pair),
                        l3.get_unchecked_mut(pair),
                    ];
                    put_pair::<TURN>(x, y, turn, to);
                }
            }
        } else {
            for c in 0..UNIT_CHANNELS {
                // SAFETY: likewise.
                let to = unsafe { room.get_unchecked_mut(channels[c]) };
                put(to, unpack::look_up::<B>(&tables[i][c], low[c], high[c]));
            }
        }
    }
    ahead.skip_units::<B>(n);
}

/// Turns a pair of channels and stores it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put_pair<const TURN: bool>(x: Signposts, y: Signposts, turn: Option<&Turns16>, lines: [&mut Line; 4]) {
    let [l0, l1, l2, l3] = lines;
    put_part::<TURN>(x[0][0], y[0][0], turn, 0, l0);
    put_part::<TURN>(x[0][1], y[0][1], turn, 1, l1);
    put_part::<TURN>(x[1][0], y[1][0], turn, 2, l2);
    put_part::<TURN>(x[1][1], y[1][1], turn, 3, l3);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put_part<const TURN: bool>(x: __m256i, y: __m256i, turn: Option<&Turns16>, l: usize, Line(to): &mut Line) {
    let (x, y) = match turn {
        Some(Turns16([cos, sin])) if TURN => {
            rotate(x, y, (sixteen(&cos.as_chunks().0[l]), sixteen(&sin.as_chunks().0[l])))
        }
        _ => (x, y),
    };
    // SAFETY: 32 writable bytes each; unaligned stores are allowed.
    unsafe {
        _mm256_storeu_si256(to[0].as_mut_ptr().cast(), _mm256_unpacklo_epi16(x, y));
        _mm256_storeu_si256(to[1].as_mut_ptr().cast(), _mm256_unpackhi_epi16(x, y));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn get(from: &Signs) -> Signposts {
    let parts = from.0.as_chunks::<16>().0;
    [[sixteen(&parts[0]), sixteen(&parts[1])], [sixteen(&parts[2]), sixteen(&parts[3])]]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put(to: &mut Signs, signposts: Signposts) {
    for (to, x) in to.0.as_chunks_mut::<16>().0.iter_mut().zip(signposts.as_flattened()) {
        // SAFETY: 32 writable bytes; unaligned stores are allowed.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), *x) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sixteen(from: &[i16; 16]) -> __m256i {
    // SAFETY: 32 readable bytes; unaligned loads are allowed.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rotate(x: __m256i, y: __m256i, (cos, sin): (__m256i, __m256i)) -> (__m256i, __m256i) {
    (
        _mm256_sub_epi16(_mm256_mulhrs_epi16(x, cos), _mm256_mulhrs_epi16(y, sin)),
        _mm256_add_epi16(_mm256_mulhrs_epi16(x, sin), _mm256_mulhrs_epi16(y, cos)),
    )
}

/// Steps in the order of channels; `room` is for those whose places have another.
pub(super) fn steps_of<'a>(v: &CodedView<'a>, room: &'a mut Vec<f32>) -> &'a [f32] {
    if v.lut.order.is_empty() {
        return v.lut.steps;
    }
    room.resize(v.lut.order.len(), 0.0);
    for (&c, &step) in v.lut.order.iter().zip(v.lut.steps) {
        room[c as usize] = step;
    }
    room
}

/// Pass 2: scores of R rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const R: usize>(keys: &[Line], ints: &[Pair], units: &[f32], scores: &mut [Row]) {
    let scores: &mut [Row; R] = scores.first_chunk_mut().expect("called with R rows");
    let units: &[f32; R] = units.first_chunk().expect("a unit a row");
    for (l, keys) in keys.chunks_exact(ints.len()).enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for (Line(key), ints) in keys.iter().zip(ints) {
            // SAFETY: 32 readable bytes each; unaligned loads are allowed.
            let [x, y] =
                unsafe { [_mm256_loadu_si256(key[0].as_ptr().cast()), _mm256_loadu_si256(key[1].as_ptr().cast())] };
            for r in 0..R {
                let q = _mm256_set1_epi32(ints[r]);
                sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(x, q));
                sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(y, q));
            }
        }
        for r in 0..R {
            let unit = _mm256_set1_ps(units[r]);
            let x = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][0]), unit);
            let y = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][1]), unit);
            // Tokens 0-3 and 16-19, 4-7 and 20-23: to 0-7 and 16-23.
            let row = scores[r].as_chunks_mut::<8>().0;
            let at = l / 2 * 4 + l % 2;
            super::store(&mut row[at], _mm256_permute2f128_ps::<0x20>(x, y));
            super::store(&mut row[at + 2], _mm256_permute2f128_ps::<0x31>(x, y));
        }
    }
}
