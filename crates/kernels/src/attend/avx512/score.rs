//! Scores from codes with static tables: see AVX2's file of this name.
//!
//! Here a pair of channels goes from codes to sums without leaving registers where a unit holds both; where it doesn't, or
//! where several groups of rows need them, signposts are stored first.

use std::arch::x86_64::*;

use kvquant_quant::Table;
use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::avx2::ahead::Ahead;
use super::super::avx2::decode::{ROWS, Row, Scratch, Signs};
use super::super::avx2::query::{Pair, Queries};
use super::super::avx2::unpack::{by_rows, by_width, units};
use super::super::view::{CodedView, Run, TOKENS};
use super::query::{self, Sixteen};
use super::unpack::{self, Codes, Signposts};
use super::{multiply_add, outliers};
use crate::rope::{BlockTable, Rotation, Turns16};

/// Scores of R rows in 32 bits. Sums `[2 h]` and `[2 h + 1]` hold half h of the tokens, by lanes of four: 0, 2, 4, 6 and
/// 16, 18, 20, 22, then the odd ones above them; and the same 8 further.
type Sums<const R: usize> = [[__m512i; 4]; R];

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn coded(
    s: &mut Scratch,
    queries: &Queries,
    sides: &[Sixteen],
    block: usize,
    v: &CodedView<'_>,
    origin: Option<&Rotation>,
    table: &BlockTable,
    ahead: &mut Ahead<'_>,
    scores: &mut [Row],
) {
    let d = v.head_dim();
    let turn = origin.map(|_| table);
    let stored = scores.len() > ROWS;
    if stored || !v.lut.order.is_empty() {
        s.signposts.resize(d, Signs([0; TOKENS]));
    }
    if stored {
        for run in v.runs() {
            by_width!(run, signposts::<_>(v, &run, ahead, &mut s.signposts));
        }
    }
    let vectors = Queries::vectors(d);
    s.ints.resize(vectors, Default::default());
    let keys = Keys { v, turn, stored };
    let Queries { units, ints, .. } = queries;
    let (to, outliers, room) = (&mut s.ints[..], &s.wide.outliers, &mut s.signposts[..]);
    let extra = &mut s.wide.extra;
    let (sides_each, n) = (d.div_ceil(16), scores.len());
    let mut first = 0;
    while first < n {
        let (scores, units) = (&mut scores[first..n.min(first + ROWS)], &units[first..]);
        query::turn(scores.len(), &ints[first * vectors..], vectors, origin, to);
        let extra = (!v.outliers.places.is_empty()).then(|| {
            outliers::score(outliers, block, &sides[first / ROWS * sides_each..], v, extra);
            &*extra
        });
        by_rows!(scores.len(), rows::<_>(&keys, units, ahead, room, to, extra, scores));
        first += ROWS;
    }
}

/// A block's keys.
struct Keys<'a> {
    v: &'a CodedView<'a>,
    /// None: they are stored turned.
    turn: Option<&'a BlockTable>,
    /// Whether all signposts are stored.
    stored: bool,
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn load(from: &[i16; 32]) -> __m512i {
    // SAFETY: 64 readable bytes; unaligned loads are allowed.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn get(from: &Signs) -> Signposts {
    let halves = from.0.as_chunks::<32>().0;
    [load(&halves[0]), load(&halves[1])]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn put(to: &mut Signs, signposts: Signposts) {
    for (to, x) in to.0.as_chunks_mut::<32>().0.iter_mut().zip(signposts) {
        // SAFETY: 64 writable bytes; unaligned stores are allowed.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) };
    }
}

/// Signposts of a run, channel by channel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn signposts<const B: u32>(v: &CodedView<'_>, run: &Run<'_>, ahead: &mut Ahead<'_>, rows: &mut [Signs]) {
    let tables = v.lut.tables[run.units.start * UNIT_CHANNELS..].as_chunks::<UNIT_CHANNELS>().0;
    for (n, ((u, unit), tables)) in units::<B>(run).zip(tables).enumerate() {
        ahead.unit::<B>(n);
        let [low, high] = unpack::codes::<B>(unit);
        for i in 0..UNIT_CHANNELS {
            put(&mut rows[v.channel(u * UNIT_CHANNELS + i)], unpack::look_up::<B>(&tables[i], low[i], high[i]));
        }
    }
    ahead.skip_units::<B>(run.units.len());
}

/// sums += a pair of channels times the queries. Keys are turned first where TURN is true.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_pair<const R: usize, const TURN: bool>(
    sums: &mut Sums<R>,
    queries: &Pair,
    turn: Option<&Turns16>,
    x: Signposts,
    y: Signposts,
) {
    for h in 0..2 {
        let (mut a, mut b) = (x[h], y[h]);
        if TURN && let Some(Turns16([cos, sin])) = turn {
            (a, b) = rotate(a, b, load(&cos.as_chunks().0[h]), load(&sin.as_chunks().0[h]));
        }
        let (low, high) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
        for r in 0..R {
            let q = _mm512_set1_epi32(queries[r]);
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

/// sums += a pair of channels of a unit of B-bit codes, the first in `place`, times the queries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_codes<const B: u32, const R: usize, const TURN: bool>(
    sums: &mut Sums<R>,
    queries: &Pair,
    turn: Option<&Turns16>,
    tables: &[Table; UNIT_CHANNELS],
    [low, high]: &[[Codes; UNIT_CHANNELS]; 2],
    place: usize,
) {
    let x = unpack::look_up::<B>(&tables[place], low[place], high[place]);
    let y = unpack::look_up::<B>(&tables[place + 1], low[place + 1], high[place + 1]);
    add_pair::<R, TURN>(sums, queries, turn, x, y);
}

/// sums += the pairs of a run, straight from the codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_run<const B: u32, const R: usize, const TURN: bool>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    ints: &[Pair],
    turns: &[Turns16],
    ahead: &mut Ahead<'_>,
    all: &mut Sums<R>,
) {
    let (first, n, bits) = (run.units.start, run.units.len(), B as usize);
    let tables = &v.lut.tables.as_chunks::<UNIT_CHANNELS>().0[first..][..n];
    let ints = &ints.as_chunks::<2>().0[first..][..n];
    let turns = if TURN { &turns.as_chunks::<2>().0[first..][..n] } else { &[] };
    let vectors = &run.vectors[..n * bits];
    let mut sums = *all;
    for i in 0..n {
        ahead.unit::<B>(i);
        // SAFETY: `n` units of as many vectors lie in the slice.
        let codes = unpack::codes::<B>(unsafe { vectors.get_unchecked(i * bits..(i + 1) * bits) });
        for j in 0..2 {
            let turn = if TURN { Some(&turns[i][j]) } else { None };
            add_codes::<B, R, TURN>(&mut sums, &ints[i][j], turn, &tables[i], &codes, 2 * j);
        }
    }
    ahead.skip_units::<B>(n);
    *all = sums;
}

/// Where places have another order: sums += the pairs of which a unit of a run holds both channels; signposts of the others
/// are stored.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_ordered<const B: u32, const R: usize, const TURN: bool>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    ints: &[Pair],
    turns: &[Turns16],
    ahead: &mut Ahead<'_>,
    room: &mut [Signs],
    all: &mut Sums<R>,
) {
    let (n, bits) = (run.units.len(), B as usize);
    let (tables, order, whole) = v.ordered_units(run);
    let vectors = &run.vectors[..n * bits];
    let pairs = v.head_dim() / 2;
    assert!(ints.len() >= pairs && (!TURN || turns.len() >= pairs) && room.len() >= 2 * pairs);
    let mut sums = *all;
    for i in 0..n {
        ahead.unit::<B>(i);
        // SAFETY: `n` units of as many vectors lie in the slice.
        let codes = unpack::codes::<B>(unsafe { vectors.get_unchecked(i * bits..(i + 1) * bits) });
        let channels = order[i].map(usize::from);
        if whole[i] {
            for j in 0..2 {
                let pair = channels[2 * j] / 2;
                // SAFETY: an order's channels are below head_dim (`HeadLut::new`): each slice has the pair, as checked above.
                let (ints, turn) =
                    unsafe { (ints.get_unchecked(pair), if TURN { Some(turns.get_unchecked(pair)) } else { None }) };
                add_codes::<B, R, TURN>(&mut sums, ints, turn, &tables[i], &codes, 2 * j);
            }
        } else {
            let [low, high] = codes;
            for c in 0..UNIT_CHANNELS {
                // SAFETY: likewise.
                let to = unsafe { room.get_unchecked_mut(channels[c]) };
                put(to, unpack::look_up::<B>(&tables[i][c], low[c], high[c]));
            }
        }
    }
    ahead.skip_units::<B>(n);
    *all = sums;
}

/// sums += some pairs, from stored signposts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_stored<const R: usize, const TURN: bool>(
    pairs: impl Iterator<Item = usize>,
    keys: &[Signs],
    ints: &[Pair],
    turns: &[Turns16],
    all: &mut Sums<R>,
) {
    let mut sums = *all;
    let keys = keys.as_chunks::<2>().0;
    let ints = &ints[..keys.len()];
    let turns = if TURN { &turns[..keys.len()] } else { &[] };
    for pair in pairs {
        let [x, y] = &keys[pair];
        let turn = if TURN { Some(&turns[pair]) } else { None };
        add_pair::<R, TURN>(&mut sums, &ints[pair], turn, get(x), get(y));
    }
    *all = sums;
}

/// sums += all pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn all_pairs<const R: usize, const TURN: bool>(
    keys: &Keys<'_>,
    ints: &[Pair],
    turns: &[Turns16],
    ahead: &mut Ahead<'_>,
    room: &mut [Signs],
    sums: &mut Sums<R>,
) {
    let v = keys.v;
    if keys.stored {
        return add_stored::<R, TURN>(0..v.head_dim() / 2, room, ints, turns, sums);
    }
    for run in v.runs() {
        if v.lut.order.is_empty() {
            by_width!(run, add_run::<_, R, TURN>(v, &run, ints, turns, ahead, sums));
        } else {
            by_width!(run, add_ordered::<_, R, TURN>(v, &run, ints, turns, ahead, room, sums));
        }
    }
    if !v.apart().is_empty() {
        add_stored::<R, TURN>(v.apart().iter().map(|&pair| pair as usize), room, ints, turns, sums);
    }
}

/// Scores of R rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows<const R: usize>(
    keys: &Keys<'_>,
    units: &[f32],
    ahead: &mut Ahead<'_>,
    room: &mut [Signs],
    ints: &[[Pair; 16]],
    outliers: Option<&[Sixteen; TOKENS / 16]>,
    scores: &mut [Row],
) {
    let (v, turn) = (keys.v, keys.turn);
    let scores: &mut [Row; R] = scores.first_chunk_mut().expect("called with R rows");
    let units: &[f32; R] = units.first_chunk().expect("a unit a row");
    let mut sums = [[_mm512_setzero_si512(); 4]; R];
    // As many turns as there are pairs, or none where keys are stored turned.
    let turns = turn.map_or(&[][..], |t| &t.wide16[..v.head_dim() / 2]);
    if turn.is_some() {
        all_pairs::<R, true>(keys, ints.as_flattened(), turns, ahead, room, &mut sums);
    } else {
        all_pairs::<R, false>(keys, ints.as_flattened(), turns, ahead, room, &mut sums);
    }
    // Sixteen tokens of a half from its two sums: even and odd ones lie two lanes apart.
    const PLACES: [[i32; 16]; 2] = {
        let (mut places, mut t) = ([[0; 16]; 2], 0);
        while t < 32 {
            places[t / 16][t % 16] = (t % 2 * 8 + t / 16 % 2 * 4 + t % 8 / 2 + t / 8 % 2 * 16) as i32;
            t += 1;
        }
        places
    };
    for i in 0..TOKENS / 16 {
        let extra = outliers.map(|o| o[i].rows());
        // SAFETY: 64 readable bytes; unaligned loads are allowed.
        let places = unsafe { _mm512_loadu_si512(PLACES[i % 2].as_ptr().cast()) };
        for r in 0..R {
            let x = _mm512_permutex2var_epi32(sums[r][i / 2 * 2], places, sums[r][i / 2 * 2 + 1]);
            let extra = extra.map_or(_mm512_setzero_ps(), |e| e[r]);
            let x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(units[r]), extra);
            // SAFETY: 16 writable floats; unaligned stores are allowed.
            unsafe { _mm512_storeu_ps(scores[r][16 * i..][..16].as_mut_ptr(), x) };
        }
    }
}
