//! Few rows: a block's part of the attention of one token, or of a few.

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::super::view::TOKENS;
use super::super::{BlockView, Rows, SideView, State, avx512};
use super::{float, mix, score, softmax};
use crate::rope::BlockTable;

/// One row of scores or probabilities over a block.
pub(in super::super) type Row = [f32; TOKENS];

/// Two vectors of a tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in super::super) struct Line(pub [[i32; 8]; 2]);

/// Signposts of a channel in the order of [`crate::rope::shuffled`].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in super::super) struct Signs(pub [i16; TOKENS]);

/// What a thread reuses from block to block.
#[derive(Default)]
pub(in super::super) struct Scratch {
    /// Queries at the block's origin `[rows, head_dim]`.
    pub local: Vec<f32>,
    /// Integer queries `[rows, head_dim / 2]`, a pair of 16-bit channels each.
    pub pairs: Vec<i32>,
    /// Keys as signposts `[head_dim]`, and their steps.
    pub signposts: Vec<Signs>,
    pub steps: Vec<f32>,
    /// Turned keys (see [`score`]).
    pub keys: Vec<Line>,
    /// Scores, then probabilities.
    pub weights: Vec<Row>,
    /// A side as f32, where it has no integer form.
    pub tile: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// # Safety
/// Where WIDE is true, the CPU has AVX-512 F, BW, DQ, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn attend<const WIDE: bool>(
    rows: &Rows<'_>,
    block: &BlockView<'_>,
    table: &BlockTable,
    state: &mut State,
) {
    // SAFETY: passed on.
    SCRATCH.with_borrow_mut(|scratch| unsafe { with::<WIDE>(scratch, rows, block, table, state) });
}

/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn with<const WIDE: bool>(
    s: &mut Scratch,
    rows: &Rows<'_>,
    block: &BlockView<'_>,
    table: &BlockTable,
    state: &mut State,
) {
    let (d, n) = (rows.head_dim, rows.len());
    s.local.resize(n * d, 0.0);
    match block.origin {
        Some(origin) => {
            for (q, to) in rows.q.chunks_exact(d).zip(s.local.chunks_exact_mut(d)) {
                origin.undo(q, to);
            }
        }
        None => s.local.copy_from_slice(rows.q),
    }
    let turn = block.origin.map(|_| table);
    s.weights.resize(n, [0.0; TOKENS]);
    match &block.key {
        // SAFETY: passed on.
        SideView::Coded(v) if v.scales.is_none() && WIDE => unsafe { avx512::score(s, d, v, turn) },
        SideView::Coded(v) if v.scales.is_none() => score::coded(s, d, v, turn),
        side => float::score(s, d, side, block.len, turn),
    }
    for (r, w) in s.weights.iter_mut().enumerate() {
        let visible = rows.visible(r, block.len);
        if visible == 0 {
            w.fill(0.0);
        } else {
            softmax(w, visible, r, state);
        }
    }
    match &block.value {
        // SAFETY: passed on.
        SideView::Coded(v) if WIDE => unsafe { avx512::mix(v, &s.weights, d, &mut state.out) },
        SideView::Coded(v) => mix::coded(v, &s.weights, d, &mut state.out),
        side => float::mix(&s.weights, &mut s.tile, d, side, block.len, &mut state.out),
    }
}

/// Sums of four vectors, one a lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum_each(a: [__m256; 4]) -> __m128 {
    let ab = _mm256_hadd_ps(a[0], a[1]);
    let cd = _mm256_hadd_ps(a[2], a[3]);
    let x = _mm256_hadd_ps(ab, cd);
    _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
}
