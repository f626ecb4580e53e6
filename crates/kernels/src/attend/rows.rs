//! The query rows of one KV head.

use super::view::{HeadLut, TOKENS};
use super::{BlockView, State};

/// Query rows `[tokens * group, head_dim]`, token by token, the heads of the group inside.
///
/// They are rotated to their absolute positions and already scaled by 1/sqrt(head_dim).
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// `[tokens * group, head_dim]`
    pub q: &'a [f32],
    /// Query heads that share the KV head.
    pub group: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of the block that the first query token sees; each later query token sees one more, up to the
    /// block's length. For history that every row sees whole, the block's length.
    pub first_visible: usize,
}

impl Rows<'_> {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.q.len() / self.head_dim
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.q.is_empty()
    }

    /// Tokens of a block of `len` tokens that a row sees.
    pub fn visible(&self, row: usize, len: usize) -> usize {
        (self.first_visible + row / self.group).min(len)
    }

    pub(super) fn check(&self, block: &BlockView<'_>, state: &State) {
        assert_eq!(self.q.len(), self.len() * self.head_dim, "whole rows");
        assert_eq!(self.len(), state.rows(), "one state a row");
        assert_eq!(self.head_dim, state.head_dim(), "rows and state agree on head_dim");
        assert_eq!(self.head_dim, block.head_dim(), "rows and block agree on head_dim");
    }
}

/// What backends make of rows, kept so that the next rows need no memory of their own.
#[derive(Debug, Default)]
pub struct RowsRoom {
    #[cfg(target_arch = "x86_64")]
    pub(super) queries: super::avx2::query::Queries,
    /// Rows side by side, as AVX-512 has them: `[rows / 4, head_dim / 16]`, rounded up.
    #[cfg(target_arch = "x86_64")]
    pub(super) sixteens: Vec<super::avx512::Sixteen>,
}

/// Rows, and what of them is the same for all blocks whose keys the same tables decode: it is made when the first is attended to.
#[derive(Debug)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "NEON does not prepare rows"))]
pub struct PreparedRows<'a> {
    pub(super) rows: Rows<'a>,
    /// The tables that `room` is for.
    pub(super) lut: Option<&'a HeadLut<'a>>,
    pub(super) room: &'a mut RowsRoom,
}

impl<'a> PreparedRows<'a> {
    /// Rows for some blocks.
    pub fn new(rows: Rows<'a>, room: &'a mut RowsRoom) -> Self {
        PreparedRows { rows, lut: None, room }
    }
}

/// Rows that are multiplied at a time: their sums stay in registers.
pub(super) const ROWS: usize = 4;

/// One row of scores or probabilities over a block.
pub(super) type Row = [f32; TOKENS];

/// The same rows of some blocks: row r of block b at `rows[b * step + r]`.
#[derive(Clone, Copy)]
pub(super) struct ByBlock<'a> {
    pub rows: &'a [Row],
    pub step: usize,
}

impl<'a> ByBlock<'a> {
    #[inline(always)]
    pub fn row(&self, block: usize, row: usize) -> &'a Row {
        &self.rows[block * self.step + row]
    }
}
