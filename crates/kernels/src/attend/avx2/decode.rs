//! Few rows: a block's part of the attention of one token, or of a few.

use std::arch::x86_64::*;
use std::cell::RefCell;

pub(in super::super) use super::super::rows::{ByBlock, ROWS, Row};
use super::super::view::{CodedView, TOKENS};
use super::super::{BLOCKS, BlockView, PreparedRows, RowsRoom, SideView, State, avx512};
use super::ahead::Ahead;
use super::query::Pair;
use super::{float, mix, outliers, score, softmax};
use crate::rope::{BlockTable, Rotation};

/// A pair of channels of a quarter of a block's keys (see [`score`]).
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [[i32; 8]; 2]);

/// Signposts of a channel in the order of [`crate::rope::shuffled`].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in super::super) struct Signs(pub [i16; TOKENS]);

/// What a thread reuses from block to block.
#[derive(Default)]
pub(in super::super) struct Scratch {
    /// Queries at the block's origin `[rows, head_dim]`, of sides that have no integer form.
    pub local: Vec<f32>,
    /// Integer queries at the block's origin, as many rows as are multiplied at a time side by side.
    pub ints: Vec<[Pair; 16]>,
    /// Keys as signposts `[head_dim]`, where a unit does not hold both channels of a pair.
    pub signposts: Vec<Signs>,
    /// Steps of keys by channel, where the blocks' places have another order.
    pub steps: Vec<f32>,
    /// Turned keys.
    pub(super) keys: Vec<Line>,
    /// Scores, then probabilities.
    pub weights: Vec<Row>,
    pub(super) mix: mix::Room,
    pub(super) outliers: outliers::Scratch,
    /// AVX-512's own.
    pub wide: avx512::Scratch,
    /// A side as f32, where it has no integer form.
    pub tile: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// # Safety
/// Where WIDE is true, the CPU has AVX-512 F, BW, DQ, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn attend<'a, const WIDE: bool>(
    prepared: &mut PreparedRows<'a>,
    blocks: &[BlockView<'a>],
    next: &[BlockView<'_>],
    table: &BlockTable,
    state: &mut State,
) {
    // SAFETY: passed on.
    SCRATCH.with_borrow_mut(|scratch| unsafe { with::<WIDE>(scratch, prepared, blocks, next, table, state) });
}

/// Scores of all blocks, then their probabilities, then their outputs: what one block waits for, another has.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn with<'a, const WIDE: bool>(
    s: &mut Scratch,
    prepared: &mut PreparedRows<'a>,
    blocks: &[BlockView<'a>],
    next: &[BlockView<'_>],
    table: &BlockTable,
    state: &mut State,
) {
    let (d, n) = (prepared.rows.head_dim, prepared.rows.len());
    let mut weights = std::mem::take(&mut s.weights);
    weights.resize(blocks.len() * n, [0.0; TOKENS]);
    // SAFETY: passed on.
    unsafe {
        scores::<WIDE>(s, prepared, blocks, next, table, &mut weights);
        for r in 0..n {
            if WIDE {
                avx512::softmax(&mut weights[r..], r, n, state);
            } else {
                softmax(&mut weights[r..], r, n, state);
            }
        }
        outputs::<WIDE>(s, blocks, next, &weights, d, &mut state.out);
    }
    s.weights = weights;
}

/// Scores `[blocks, rows, 64]`, -inf where a row does not see a token.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn scores<'a, const WIDE: bool>(
    s: &mut Scratch,
    prepared: &mut PreparedRows<'a>,
    blocks: &[BlockView<'a>],
    next: &[BlockView<'_>],
    table: &BlockTable,
    weights: &mut [Row],
) {
    let PreparedRows { rows, lut, room } = prepared;
    let (d, n) = (rows.head_dim, rows.len());
    s.local.resize(n * d, 0.0);
    for (b, block) in blocks.iter().enumerate() {
        let units = if WIDE { &mut s.wide.outliers.units } else { &mut s.outliers.units };
        if let Some(v) = integer(block) {
            units.find(b, v);
        }
    }
    for (b, block) in blocks.iter().enumerate() {
        match integer(block) {
            // SAFETY: passed on.
            Some(v) if WIDE => unsafe {
                avx512::place_keys(&mut s.wide.outliers, b, v, block.origin.map(|origin| (table, origin)))
            },
            Some(v) => outliers::place_keys(&mut s.outliers, b, v),
            None => {}
        }
    }
    for (b, (block, scores)) in blocks.iter().zip(weights.chunks_exact_mut(n)).enumerate() {
        let mut ahead = Ahead::of(next.get(b).map(|next| &next.key), &block.key);
        if let Some(v) = integer(block) {
            let RowsRoom { queries, sixteens } = &mut **room;
            if !lut.is_some_and(|lut| std::ptr::eq(lut, v.lut)) {
                queries.set(rows.q, score::steps_of(v, &mut s.steps));
                if WIDE {
                    // SAFETY: passed on.
                    unsafe { avx512::set_sides(sixteens, rows.q, d) };
                } else {
                    queries.set_sides(rows.q, d);
                }
                *lut = Some(v.lut);
            }
            if WIDE {
                // SAFETY: passed on.
                unsafe { avx512::score(s, queries, sixteens, b, v, block.origin, table, &mut ahead, scores) };
            } else {
                score::coded(s, queries, b, v, block.origin, table, &mut ahead, scores);
            }
        } else {
            match block.origin {
                Some(origin) => {
                    for (q, to) in rows.q.chunks_exact(d).zip(s.local.chunks_exact_mut(d)) {
                        undo(origin, q, to);
                    }
                }
                None => s.local.copy_from_slice(rows.q),
            }
            let turn = block.origin.map(|_| table);
            let behind = tile_of(blocks.get(b + 1).map_or(&blocks[0].value, |behind| &behind.key));
            match &block.key {
                SideView::Tile { data } if WIDE => {
                    // SAFETY: passed on.
                    unsafe { avx512::tile::score(&s.local, d, data, turn, behind, scores) };
                }
                side => float::score(s, d, side, block.len, turn, behind, scores),
            }
        }
        ahead.rest();
        let all = rows.first_visible >= block.len;
        for (r, row) in scores.iter_mut().enumerate() {
            let visible = if all { block.len } else { rows.visible(r, block.len) };
            if visible < TOKENS {
                row[visible..].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// A block's keys, where they have an integer form.
fn integer<'a, 'b>(block: &'b BlockView<'a>) -> Option<&'b CodedView<'a>> {
    match &block.key {
        SideView::Coded(v) if v.scales.is_none() => Some(v),
        _ => None,
    }
}

/// Adds the outputs of probabilities `[blocks, rows, 64]` to `out` `[rows, head_dim]`.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn outputs<const WIDE: bool>(
    s: &mut Scratch,
    blocks: &[BlockView<'_>],
    next: &[BlockView<'_>],
    weights: &[Row],
    d: usize,
    out: &mut [f32],
) {
    let n = weights.len() / blocks.len();
    let mut rest = (blocks, weights);
    while let ([first, ..], _) = rest {
        // As many coded blocks at a time as share their tables.
        let mut coded = [None; BLOCKS];
        let mut together = 0;
        while let Some(SideView::Coded(v)) = rest.0.get(together).map(|block| &block.value)
            && together < BLOCKS
            && coded[0].is_none_or(|first: &CodedView<'_>| first.decodes_as(v))
        {
            coded[together] = Some(v);
            together += 1;
        }
        let (now, later) = rest.1.split_at(together.max(1) * n);
        let done = blocks.len() - rest.0.len();
        let mut ahead: [_; BLOCKS] = std::array::from_fn(|i| match rest.0.get(i) {
            Some(block) if i < together.max(1) => Ahead::of(next.get(done + i).map(|next| &next.value), &block.value),
            _ => Ahead::default(),
        });
        match coded {
            [None, ..] => {
                let behind = rest.0.get(1).and_then(|behind| tile_of(&behind.value));
                match &first.value {
                    SideView::Tile { data } if WIDE => {
                        // SAFETY: passed on.
                        unsafe { avx512::tile::mix(now, d, data, behind, out) };
                    }
                    side => float::mix(now, &mut s.tile, d, side, first.len, behind, out),
                }
            }
            [Some(v), ..] => {
                let views: [&CodedView<'_>; BLOCKS] = coded.map(|each| each.unwrap_or(v));
                let views = &views[..together];
                if WIDE {
                    // SAFETY: passed on.
                    unsafe { avx512::mix(s, views, now, d, &mut ahead, out) };
                } else {
                    mix::coded(s, views, now, d, &mut ahead, out);
                }
            }
        }
        ahead.iter_mut().for_each(Ahead::rest);
        rest = (&rest.0[together.max(1)..], later);
    }
}

/// A side's fp16 data, where that is all it is.
fn tile_of<'a>(side: &SideView<'a>) -> Option<&'a [u16]> {
    match side {
        SideView::Tile { data } => Some(data),
        _ => None,
    }
}

/// [`Rotation::undo`], eight channels at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn undo(origin: &Rotation, q: &[f32], to: &mut [f32]) {
    let twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    let odd = _mm256_setr_ps(0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0);
    let (eights, rest) = q.as_chunks::<8>();
    let (to, to_rest) = to.as_chunks_mut::<8>();
    let turns = origin.cos.as_chunks::<4>().0.iter().zip(origin.sin.as_chunks::<4>().0);
    for ((q, to), (cos, sin)) in eights.iter().zip(to).zip(turns) {
        let both = |four: &[f32; 4]| {
            // SAFETY: 4 readable floats; unaligned loads are allowed.
            let four = unsafe { _mm_loadu_ps(four.as_ptr()) };
            _mm256_permutevar8x32_ps(_mm256_castps128_ps256(four), twice)
        };
        let q = super::load(q);
        let other = _mm256_mul_ps(_mm256_permute_ps::<0b10_11_00_01>(q), _mm256_xor_ps(both(sin), odd));
        super::store(to, _mm256_fmadd_ps(q, both(cos), other));
    }
    let done = eights.len() * 4;
    for ((pair, to), (c, s)) in
        rest.chunks_exact(2).zip(to_rest.chunks_exact_mut(2)).zip(origin.cos[done..].iter().zip(&origin.sin[done..]))
    {
        to[0] = pair[0] * c + pair[1] * s;
        to[1] = pair[1] * c - pair[0] * s;
    }
}

/// Sums of four vectors, one a lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn sum_each(a: [__m256; 4]) -> __m128 {
    let ab = _mm256_hadd_ps(a[0], a[1]);
    let cd = _mm256_hadd_ps(a[2], a[3]);
    let x = _mm256_hadd_ps(ab, cd);
    _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
}
