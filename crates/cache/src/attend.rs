//! From a layer's queries to its blocks: positions, tasks, merge.

mod plan;

use std::ops::Range;
use std::sync::OnceLock;

use kvquant_kernels::attend::{
    BLOCKS, BlockView, Kernels, PreparedRows, Rows as QueryRows, RowsRoom, SideView, State, ViewError,
};
use kvquant_kernels::rope::{BlockTable, Rope, Rotation};
use kvquant_kernels::threads;
use kvquant_quant::pack::BLOCK_TOKENS;
use smallvec::SmallVec;

use crate::block::Block;
use crate::edge::{Edge, EdgeRoom};
use crate::error::CacheError;
use crate::layer::Layer;
use crate::sequence::CacheShape;

/// Views of the blocks of one call to the kernels.
type Views<'a> = SmallVec<[BlockView<'a>; BLOCKS]>;
/// KV heads of a task that need no memory of their own.
const HEADS: usize = 8;
/// Something of each head.
type ByHead<T> = SmallVec<[T; HEADS]>;

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

/// One piece of work: some KV heads, some query tokens, a run of the layer's parts (part 0 is the sinks).
///
/// A block is read front to back where one piece has all its heads: the memory sees what comes next, and where a head's
/// outliers begin is where those of the head before end.
#[derive(Debug, Clone, Default, PartialEq)]
struct Task {
    heads: Range<usize>,
    tokens: Range<usize>,
    parts: Range<usize>,
}

/// A task and what comes of it.
#[derive(Debug, Default)]
pub(crate) struct Work {
    task: Task,
    /// One a head; more is room.
    states: Vec<State>,
    /// Likewise.
    rows: Vec<RowsRoom>,
    edge: EdgeRoom,
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
    /// Attends with a task's rows, the first at `position`, to its parts.
    fn attend(&self, queries: &Queries<'_>, work: &mut Work, position: usize) -> Result<(), ViewError> {
        let mut parts = work.task.parts.clone();
        while !parts.is_empty() {
            let end = self.layer.next_tables(parts.start.saturating_sub(1)).saturating_add(1).min(parts.end);
            self.attend_run(queries, work, position, parts.start..end)?;
            parts.start = end;
        }
        Ok(())
    }

    /// Attends to parts that the same tables decode.
    fn attend_run(
        &self,
        queries: &Queries<'_>,
        work: &mut Work,
        position: usize,
        parts: Range<usize>,
    ) -> Result<(), ViewError> {
        let Work { task, states, rows: rooms, edge } = work;
        let cx = self.layer.context(parts.start.saturating_sub(1));
        let heads = task.heads.clone().map(|head| cx.head(head)).collect::<Result<ByHead<_>, _>>()?;
        let n = task.tokens.len();
        let rows = |head: usize| QueryRows {
            q: queries.of(head, task.tokens.clone()),
            group: queries.group,
            head_dim: queries.head_dim,
            first_visible: BLOCK_TOKENS,
        };
        // Blocks that every row sees whole wait in one list a head: the next are asked for while those before them, in the
        // other, are attended to.
        let mut lists: ByHead<[Views<'_>; 2]> = heads.iter().map(|_| Default::default()).collect();
        let mut next = 0;
        let prepared = task.heads.clone().zip(rooms).map(|(head, room)| PreparedRows::new(rows(head), room));
        let mut prepared: ByHead<PreparedRows<'_>> = prepared.collect();
        let blocks = self.layer.blocks();
        // Nobody may have asked for what the first calls read.
        let first = parts.start.saturating_sub(1);
        let of_calls = blocks[first.min(blocks.len())..].iter().take(BLOCKS);
        of_calls.for_each(|block| block.prefetch(self.kernels));
        for part in parts.clone() {
            let (block, first, len, origin) = if part == 0 {
                let sink = self.layer.sink();
                (None, 0, sink.len(cx.channels), self.start)
            } else {
                let b = part - 1;
                if let Some(near) = blocks.get(b + BLOCKS) {
                    near.prefetch_index(&cx, self.kernels);
                    if let Some(origin) = self.origins.map(|o| &o[b + BLOCKS]) {
                        self.kernels.prefetch_bytes(&origin.cos);
                        self.kernels.prefetch_bytes(&origin.sin);
                    }
                }
                let first = self.sinks + (self.layer.dropped() + b) * BLOCK_TOKENS;
                (Some(&blocks[b]), first, blocks[b].len(cx.channels), self.origins.map(|o| &o[b]))
            };
            if len == 0 {
                continue;
            }
            let in_window = |w: usize| first.saturating_add(w) >= position + n;
            let whole = self.layer.window().is_none_or(in_window) && first + len <= position + 1;
            let mut starts = None;
            for (i, of) in heads.iter().enumerate() {
                let sides = match block {
                    Some(block) => block.views(of, &mut starts)?,
                    None => self.layer.sink().views(of),
                };
                if whole {
                    lists[i][next].push(BlockView::new(sides.0, sides.1, len, origin)?);
                } else {
                    let asking = Asking { head: task.heads.start + i, tokens: task.tokens.clone(), position, row: 0 };
                    self.fold(queries, &asking, Place { sides, first, len, origin }, &mut states[i], edge)?;
                }
            }
            if lists[0][next].len() == BLOCKS {
                self.attend_lists(&mut prepared, &lists, 1 - next, states);
                next = 1 - next;
                lists.iter_mut().for_each(|lists| lists[next].clear());
            }
        }
        self.attend_lists(&mut prepared, &lists, 1 - next, states);
        lists.iter_mut().for_each(|lists| lists[1 - next].clear());
        // This thread's next piece most often begins where this one ends.
        let same_tables = self.layer.next_tables(first).min(blocks.len());
        for block in &blocks[(parts.end - 1).min(same_tables)..(parts.end - 1 + BLOCKS).min(same_tables)] {
            if block.len(cx.channels) < BLOCK_TOKENS {
                break;
            }
            let mut starts = None;
            for (of, lists) in heads.iter().zip(&mut lists) {
                let (key, value) = block.views(of, &mut starts)?;
                lists[1 - next].push(BlockView::new(key, value, BLOCK_TOKENS, None)?);
            }
        }
        self.attend_lists(&mut prepared, &lists, next, states);
        Ok(())
    }

    /// Attends with each head's rows to what waits in one of its lists, while the other is asked for.
    fn attend_lists<'a>(
        &self,
        heads: &mut [PreparedRows<'a>],
        lists: &[[Views<'a>; 2]],
        now: usize,
        states: &mut [State],
    ) {
        for ((rows, lists), state) in heads.iter_mut().zip(lists).zip(states) {
            self.kernels.attend_all(rows, &lists[now], &lists[1 - now], self.table, state);
        }
    }

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

    /// Runs the tasks, `extra` after each, and writes the merged outputs `[tokens, heads, head_dim]`, where
    /// `tokens.start` is the first token of `out`.
    fn run(
        &self,
        queries: &Queries<'_>,
        tokens: Range<usize>,
        position: usize,
        works: &mut Vec<Work>,
        out: &mut [f32],
        extra: impl Fn(&mut Work) -> Result<(), ViewError> + Sync,
    ) -> Result<(), CacheError> {
        let (d, group, heads) = (self.shape.head_dim, queries.group, self.shape.heads);
        let n = self.plan(tokens.clone(), works);
        let works = &mut works[..n];
        let run = |work: &mut Work| {
            let Task { heads, tokens: of, .. } = &work.task;
            if work.states.len() < heads.len() {
                work.states.resize_with(heads.len(), State::default);
                work.rows.resize_with(heads.len(), RowsRoom::default);
            }
            work.states[..heads.len()].iter_mut().for_each(|state| state.reset(of.len() * group, d));
            self.attend(queries, work, position + work.task.tokens.start - tokens.start)?;
            if work.task.parts.start == 0 { extra(work) } else { Ok(()) }
        };
        if n == 1 || !self.is_worth_threads(&tokens) {
            works.iter_mut().try_for_each(run)?;
        } else {
            let failed = OnceLock::new();
            threads::for_each_mut(works, |_, work| {
                if let Err(e) = run(work) {
                    // The first is enough.
                    let _ = failed.set(e);
                }
            });
            failed.into_inner().map_or(Ok(()), Err)?;
        }
        for same in works.chunk_by_mut(|a, b| a.task.heads == b.task.heads && a.task.tokens == b.task.tokens) {
            let (Work { task, states, .. }, others) = same.split_first_mut().expect("a chunk is not empty");
            for (i, (head, state)) in task.heads.clone().zip(states).enumerate() {
                others.iter().for_each(|other| state.merge(&other.states[i]));
                for row in 0..state.rows() {
                    let (t, head) = (task.tokens.start - tokens.start + row / group, head * group + row % group);
                    state.finish(row, &mut out[(t * heads + head) * d..][..d]);
                }
            }
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
    works: &mut Vec<Work>,
    out: &mut [f32],
) -> Result<(), CacheError> {
    history.run(queries, tokens, position, works, out, |_| Ok(()))
}

/// All queries of the call, the first at `position`, against the stored history and their own exact tokens,
/// which `own` holds in blocks whose first positions have the given `rotations`.
pub(crate) fn exact(
    history: &History<'_>,
    own: &[Block],
    rotations: &[Rotation],
    queries: &Queries<'_>,
    position: usize,
    works: &mut Vec<Work>,
    out: &mut [f32],
) -> Result<(), CacheError> {
    let cx = history.layer.context(0);
    history.run(queries, 0..queries.tokens, position, works, out, |Work { task, states, edge, .. }| {
        for (head, state) in task.heads.clone().zip(states) {
            let of = cx.head(head)?;
            for (b, block) in own.iter().enumerate() {
                let first = b * BLOCK_TOKENS;
                if first >= task.tokens.end {
                    break;
                }
                // Rows before this block see none of it: leave them out, so that the count of visible tokens of
                // the first row is right.
                let from = first.max(task.tokens.start);
                let row = (from - task.tokens.start) * queries.group;
                let asking = Asking { head, tokens: from..task.tokens.end, position: position + from, row };
                let place = Place {
                    sides: block.views(&of, &mut None)?,
                    first: position + first,
                    len: block.len(cx.channels),
                    origin: history.origins.map(|_| &rotations[b]),
                };
                history.fold(queries, &asking, place, state, edge)?;
            }
        }
        Ok(())
    })
}
