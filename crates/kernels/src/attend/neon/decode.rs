//! Few rows: a block's part of the attention of one token, or of a few.

use std::cell::RefCell;

use super::super::ahead::Ahead;
use super::super::rows::Row;
use super::super::view::{CodedView, TOKENS};
use super::super::{BLOCKS, BlockView, PreparedRows, SideView, State};
use super::{float, mix, outliers, score, softmax};
use crate::rope::BlockTable;

/// Keys of a unit, 8 tokens (see [`score`]).
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in super::super) struct Line(pub [[i16; 8]; 4]);

/// What a thread reuses from block to block.
#[derive(Default)]
pub(in super::super) struct Scratch {
    /// Queries at the block's origin `[rows, head_dim]`.
    pub local: Vec<f32>,
    /// Integer queries `[4, head_dim]`.
    pub ints: Vec<i16>,
    /// Keys as signposts `[head_dim]`, where the blocks' places have another order.
    pub signposts: Vec<[i16; TOKENS]>,
    /// Steps of keys by channel, likewise.
    pub steps: Vec<f32>,
    /// Turned keys (see [`score`]).
    pub keys: Vec<Line>,
    /// Scores, then probabilities.
    pub weights: Vec<Row>,
    /// Sums of weights times signposts `[4, head_dim]`.
    pub sums: Vec<f32>,
    pub outliers: outliers::Scratch,
    /// A side as f32, where it has no form of its own.
    pub tile: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// # Safety
/// Where DOT is true, the CPU has the dot product extension and RDM.
#[target_feature(enable = "neon")]
pub(super) unsafe fn attend<const DOT: bool>(
    prepared: &mut PreparedRows<'_>,
    blocks: &[BlockView<'_>],
    next: &[BlockView<'_>],
    table: &BlockTable,
    state: &mut State,
) {
    // SAFETY: passed on.
    SCRATCH.with_borrow_mut(|scratch| unsafe { with::<DOT>(scratch, prepared, blocks, next, table, state) });
}

/// Scores of all blocks, then their probabilities, then their outputs: what one block waits for, another has.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "neon")]
unsafe fn with<const DOT: bool>(
    s: &mut Scratch,
    prepared: &mut PreparedRows<'_>,
    blocks: &[BlockView<'_>],
    next: &[BlockView<'_>],
    table: &BlockTable,
    state: &mut State,
) {
    let (d, n) = (prepared.rows.head_dim, prepared.rows.len());
    let mut weights = std::mem::take(&mut s.weights);
    weights.resize(blocks.len() * n, [0.0; TOKENS]);
    // SAFETY: passed on.
    unsafe {
        scores::<DOT>(s, prepared, blocks, next, table, &mut weights);
        for r in 0..n {
            softmax(&mut weights[r..], r, n, state);
        }
        outputs::<DOT>(s, blocks, next, &weights, d, &mut state.out);
    }
    s.weights = weights;
}

/// Scores `[blocks, rows, 64]`, -inf where a row does not see a token.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "neon")]
pub(in super::super) unsafe fn scores<const DOT: bool>(
    s: &mut Scratch,
    prepared: &mut PreparedRows<'_>,
    blocks: &[BlockView<'_>],
    next: &[BlockView<'_>],
    table: &BlockTable,
    weights: &mut [Row],
) {
    let rows = &prepared.rows;
    let (d, n) = (rows.head_dim, rows.len());
    s.local.resize(n * d, 0.0);
    let mut before = None;
    for (b, (block, scores)) in blocks.iter().zip(weights.chunks_exact_mut(n)).enumerate() {
        match block.origin {
            Some(origin) => {
                for (q, to) in rows.q.chunks_exact(d).zip(s.local.chunks_exact_mut(d)) {
                    origin.undo(q, to);
                }
            }
            None => s.local.copy_from_slice(rows.q),
        }
        let turn = block.origin.map(|_| table);
        if let SideView::Coded(v) = &block.key
            && !before.is_some_and(|before: &CodedView<'_>| before.decodes_as(v))
        {
            score::steps_by_channel(v, &mut s.steps);
            before = Some(v);
        }
        let mut ahead = Ahead::of(next.get(b).map(|next| &next.key), &block.key);
        match &block.key {
            // SAFETY: passed on.
            SideView::Coded(v) if v.scales.is_none() => unsafe {
                score::coded::<DOT>(s, d, v, turn, &mut ahead, scores)
            },
            side => float::score(s, d, side, block.len, turn, scores),
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

/// Adds the outputs of probabilities `[blocks, rows, 64]` to `out` `[rows, head_dim]`.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "neon")]
pub(in super::super) unsafe fn outputs<const DOT: bool>(
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
            [None, ..] => float::mix(now, &mut s.tile, d, &first.value, first.len, out),
            [Some(v), ..] => {
                let views: [&CodedView<'_>; BLOCKS] = coded.map(|each| each.unwrap_or(v));
                // SAFETY: passed on.
                unsafe { mix::coded::<DOT>(s, &views[..together], now, d, &mut ahead, out) };
            }
        }
        ahead.iter_mut().for_each(Ahead::rest);
        rest = (&rest.0[together.max(1)..], later);
    }
}
