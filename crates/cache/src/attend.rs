//! From a layer's queries to its blocks: positions, tasks ([`plan`]), calls to the kernels ([`stream`]), merge.

mod plan;
mod stream;

use std::ops::Range;
use std::sync::OnceLock;

use kvquant_kernels::attend::{BlockView, Kernels, Rows as QueryRows, RowsRoom, SideView, State, ViewError};
use kvquant_kernels::rope::{BlockTable, Rope, Rotation};
use kvquant_kernels::threads;
use kvquant_quant::pack::BLOCK_TOKENS;

use crate::block::Block;
use crate::edge::{Edge, EdgeRoom};
use crate::error::CacheError;
use crate::layer::Layer;
use crate::sequence::CacheShape;

/// Rotations of the positions of one forward pass, computed once for all layers.
#[derive(Debug, Default)]
pub(crate) struct Angles {
    start: usize,
    /// The first `count` of them; the others are room.
    rotations: Vec<Rotation>,
    count: usize,
}

/// Queries by KV head, turned to their positions and scaled: `[kv_heads, tokens * group, head_dim]`.
pub(crate) struct Queries<'a> {
    data: &'a [f32],
    tokens: usize,
    group: usize,
    head_dim: usize,
}

impl Angles {
    /// Makes ready for positions `start .. start + n`.
    pub fn cover(&mut self, rope: &Rope, start: usize, n: usize) {
        if self.start != start || self.count != n {
            if self.rotations.len() < n {
                self.rotations.resize_with(n, Rotation::default);
            }
            self.rotations.iter_mut().zip(start..start + n).for_each(|(r, p)| rope.rotate_to(p, r));
            (self.start, self.count) = (start, n);
        }
    }

    /// Keys `[tokens, kv_heads, head_dim]`, turned.
    pub fn turn(&self, k: &[f32], channels: usize, head_dim: usize, turned: &mut Vec<f32>) {
        turned.clear();
        turned.extend_from_slice(k);
        for (token, rotation) in turned.chunks_exact_mut(channels).zip(&self.rotations) {
            token.chunks_exact_mut(head_dim).for_each(|head| rotation.apply(head));
        }
    }

    /// Queries from `[tokens, heads, head_dim]`, written to `data`.
    pub fn queries<'a>(
        &self,
        q: &[f32],
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        data: &'a mut Vec<f32>,
    ) -> Queries<'a> {
        let (tokens, group) = (self.count, heads / kv_heads);
        let scale = 1.0 / (head_dim as f32).sqrt();
        // Every entry is written below.
        data.resize(q.len(), 0.0);
        let head = |h: usize, of_head: &mut [f32]| {
            for (t, of_token) in of_head.chunks_exact_mut(group * head_dim).enumerate() {
                of_token.copy_from_slice(&q[(t * heads + h * group) * head_dim..][..group * head_dim]);
                of_token.iter_mut().for_each(|x| *x *= scale);
                of_token.chunks_exact_mut(head_dim).for_each(|head| self.rotations[t].apply(head));
            }
        };
        let part = tokens * group * head_dim;
        if tokens >= BLOCK_TOKENS {
            threads::pieces_mut(data, part, head);
        } else {
            data.chunks_exact_mut(part).enumerate().for_each(|(h, of_head)| head(h, of_head));
        }
        Queries { data, tokens, group, head_dim }
    }
}

impl Queries<'_> {
    fn of(&self, head: usize, tokens: Range<usize>) -> &[f32] {
        let a_token = self.group * self.head_dim;
        let first = head * self.tokens * a_token;
        &self.data[first + tokens.start * a_token..first + tokens.end * a_token]
    }
}

/// A layer's stored tokens and what is needed to read them.
pub(crate) struct History<'a> {
    pub layer: &'a Layer,
    pub shape: CacheShape,
    pub kernels: Kernels,
    pub table: &'a BlockTable,
    /// Rotation of position 0; `None` where keys are kept turned.
    pub start: Option<&'a Rotation>,
    /// Rotations of the first positions of the layer's blocks; `None` where keys are kept turned.
    pub origins: Option<&'a [Rotation]>,
    pub sinks: usize,
}

/// Query tokens of some KV heads: what one thread attends with.
#[derive(Debug, Clone, Default)]
struct Task {
    heads: Range<usize>,
    tokens: Range<usize>,
}

/// What a thread takes at a time: some KV heads of a run of the layer's parts (part 0 is the sinks), and what comes of it.
///
/// A block is read front to back where one piece has all its heads: the memory sees what comes next, and where a head's
/// outliers begin is where those of the head before end.
#[derive(Debug, Default)]
struct Piece {
    heads: Range<usize>,
    parts: Range<usize>,
    /// One a head; more is room.
    states: Vec<State>,
}

/// A task and what it works in.
#[derive(Debug, Default)]
struct Work {
    task: Task,
    /// One a head; more is room.
    rows: Vec<RowsRoom>,
    edge: EdgeRoom,
}

/// What attention to a layer works in, left over from the one before.
#[derive(Debug, Default)]
pub(crate) struct Room {
    works: Vec<Work>,
    /// The first `count` of them; the others are room.
    pieces: Vec<Piece>,
    count: usize,
    /// Which pieces which thread begins with.
    queues: threads::Queues,
    /// One a KV head.
    merged: Vec<State>,
}

impl Room {
    fn add_piece(&mut self, heads: Range<usize>, parts: Range<usize>) {
        if self.count == self.pieces.len() {
            self.pieces.push(Piece::default());
        }
        let states = std::mem::take(&mut self.pieces[self.count].states);
        self.pieces[self.count] = Piece { heads, parts, states };
        self.count += 1;
    }
}

/// Query rows of a KV head: those of the call's tokens `tokens`, the first at `position`, from row `row` of a state on.
#[derive(Debug, Clone)]
struct Asking {
    head: usize,
    tokens: Range<usize>,
    position: usize,
    row: usize,
}

/// A block's sides, the position of its first token, its length and the rotation of that position.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    sides: (SideView<'a>, SideView<'a>),
    first: usize,
    len: usize,
    origin: Option<&'a Rotation>,
}

impl History<'_> {
    /// Attends with some rows to one block, none of which begins after the first row's position.
    fn fold(
        &self,
        queries: &Queries<'_>,
        asking: &Asking,
        place: Place<'_>,
        state: &mut State,
        room: &mut EdgeRoom,
    ) -> Result<(), ViewError> {
        let Place { sides: (key, value), first, len, origin } = place;
        let Asking { head, ref tokens, position, row } = *asking;
        if len == 0 {
            return Ok(());
        }
        // The first tokens see all of the block up to themselves, those up to `some` its end, the others nothing.
        let n = tokens.len();
        let (all, some) = match self.layer.window() {
            None => (n, n),
            Some(w) => (
                (first.saturating_add(w)).saturating_sub(position).min(n),
                (first + len - 1).saturating_add(w).saturating_sub(position).min(n),
            ),
        };
        if all > 0 {
            let rows = QueryRows {
                q: queries.of(head, tokens.start..tokens.start + all),
                group: queries.group,
                head_dim: queries.head_dim,
                first_visible: (position + 1 - first.min(position + 1)).min(BLOCK_TOKENS),
            };
            let view = BlockView::new(key, value, len, origin)?;
            if row == 0 && rows.len() == state.rows() {
                self.kernels.attend(&rows, &view, self.table, state);
            } else {
                let mut part = State::empty(rows.len(), queries.head_dim);
                self.kernels.attend(&rows, &view, self.table, &mut part);
                state.merge_from(row, &part);
            }
        }
        if let Some(window) = self.layer.window()
            && all < some
        {
            let edge = Edge { key, value, len, origin, table: self.table };
            let q = queries.of(head, tokens.start + all..tokens.start + some);
            let part = edge.attend(self.kernels, q, room, |r| {
                let seen = position + all + r / queries.group + 1;
                seen.saturating_sub(window + first)..(seen - first).min(len)
            });
            state.merge_from(row + all * queries.group, part);
        }
        Ok(())
    }

    /// Attends to everything stored, and with each head of a task to its `own` as well; writes the merged outputs
    /// `[tokens, heads, head_dim]`, where `tokens.start` is the first token of `out`.
    fn run(
        &self,
        queries: &Queries<'_>,
        tokens: Range<usize>,
        position: usize,
        room: &mut Room,
        out: &mut [f32],
        own: impl Fn(usize, &Range<usize>, &mut State, &mut EdgeRoom) -> Result<(), ViewError> + Sync,
    ) -> Result<(), CacheError> {
        let (d, group, heads) = (self.shape.head_dim, queries.group, self.shape.heads);
        let (tasks, shared) = self.plan(tokens.clone(), room);
        let Room { works, pieces, count, queues, merged } = room;
        let (works, pieces) = (&mut works[..tasks], &mut pieces[..*count]);
        let mut finish = |head: usize, of: &Range<usize>, state: &State| {
            for row in 0..state.rows() {
                let (t, head) = (of.start - tokens.start + row / group, head * group + row % group);
                state.finish(row, &mut out[(t * heads + head) * d..][..d]);
            }
        };
        let failed = OnceLock::new();
        let keep = |result| {
            if let Err(e) = result {
                // The first is enough.
                let _ = failed.set(e);
            }
        };
        if shared {
            let shares = queues.share(pieces);
            threads::for_each_mut(works, |i, work| {
                keep(self.attend(queries, work, position, || shares.take(i), &own));
            });
            failed.into_inner().map_or(Ok(()), Err)?;
            merged.resize_with(self.shape.kv_heads, State::default);
            merged.iter_mut().for_each(|state| state.reset(tokens.len() * group, d));
            // In the order of pieces, whoever had them.
            for piece in &*pieces {
                for (head, state) in piece.heads.clone().zip(&piece.states) {
                    merged[head].merge(state);
                }
            }
            merged.iter().enumerate().for_each(|(head, state)| finish(head, &tokens, state));
            return Ok(());
        }
        let run = |work: &mut Work, piece: &mut Piece| {
            let position = position + work.task.tokens.start - tokens.start;
            let mut all = Some(piece);
            keep(self.attend(queries, work, position, || all.take(), &own));
        };
        if self.is_worth_threads(&tokens) {
            threads::pieces_of_two_mut((works, 1), (pieces, 1), |_, work, piece| run(&mut work[0], &mut piece[0]));
        } else {
            works.iter_mut().zip(&mut *pieces).for_each(|(work, piece)| run(work, piece));
        }
        failed.into_inner().map_or(Ok(()), Err)?;
        for (Work { task, .. }, piece) in works.iter().zip(&*pieces) {
            finish(task.heads.start, &task.tokens, &piece.states[0]);
        }
        Ok(())
    }
}

/// Queries `tokens` of the call, the first at `position`, against everything stored, their own tokens included.
pub(crate) fn quantized(
    history: &History<'_>,
    queries: &Queries<'_>,
    tokens: Range<usize>,
    position: usize,
    room: &mut Room,
    out: &mut [f32],
) -> Result<(), CacheError> {
    history.run(queries, tokens, position, room, out, |_, _, _, _| Ok(()))
}

/// All queries of the call, the first at `position`, against the stored history and their own exact tokens,
/// which `own` holds in blocks whose first positions have the given `rotations`.
pub(crate) fn exact(
    history: &History<'_>,
    own: &[Block],
    rotations: &[Rotation],
    queries: &Queries<'_>,
    position: usize,
    room: &mut Room,
    out: &mut [f32],
) -> Result<(), CacheError> {
    let cx = history.layer.context(0);
    history.run(queries, 0..queries.tokens, position, room, out, |head, tokens, state, edge| {
        let of = cx.head(head)?;
        for (b, block) in own.iter().enumerate() {
            let first = b * BLOCK_TOKENS;
            if first >= tokens.end {
                break;
            }
            // Rows before this block see none of it: leave them out, so that the count of visible tokens of
            // the first row is right.
            let from = first.max(tokens.start);
            let row = (from - tokens.start) * queries.group;
            let asking = Asking { head, tokens: from..tokens.end, position: position + from, row };
            let place = Place {
                sides: block.views(&of, &mut None)?,
                first: position + first,
                len: block.len(cx.channels),
                origin: history.origins.map(|_| &rotations[b]),
            };
            history.fold(queries, &asking, place, state, edge)?;
        }
        Ok(())
    })
}
