//! A task's way through its pieces: blocks go to the kernels some at a time, and those that come next are asked for meanwhile,
//! also from one piece to the next.

use std::cell::OnceCell;
use std::ops::Range;

use kvquant_kernels::attend::{BLOCKS, BlockView, PreparedRows, Rows as QueryRows, RowsRoom, State, ViewError};
use kvquant_quant::pack::BLOCK_TOKENS;
use smallvec::SmallVec;

use super::{Asking, History, Piece, Place, Queries, Work};
use crate::block::Head;
use crate::edge::EdgeRoom;

/// Views of the blocks of one call to the kernels.
type Views<'a> = SmallVec<[BlockView<'a>; BLOCKS]>;
/// KV heads of a task that need no memory of their own.
const HEADS: usize = 8;
/// Something of each head.
type ByHead<T> = SmallVec<[T; HEADS]>;

/// As much of a piece as the kernels take at once.
#[derive(Debug)]
struct Call {
    heads: Range<usize>,
    parts: Range<usize>,
    /// Where the states of the piece are in the task's, and whether they are those of earlier ones still.
    states: Range<usize>,
    begins: bool,
}

/// The calls of the pieces whose numbers come `next`.
struct Calls<'a, N> {
    next: N,
    pieces: &'a [Piece],
    /// Numbers of those that came.
    taken: &'a mut Vec<usize>,
    /// What is left of the last one.
    heads: Range<usize>,
    parts: Range<usize>,
    states: Range<usize>,
}

impl<N: FnMut() -> Option<usize>> Iterator for Calls<'_, N> {
    type Item = Call;

    #[inline]
    fn next(&mut self) -> Option<Call> {
        let begins = self.parts.is_empty();
        if begins {
            let number = (self.next)()?;
            self.taken.push(number);
            let Piece { heads, parts } = self.pieces[number].clone();
            self.states = self.states.end..self.states.end + heads.len();
            (self.heads, self.parts) = (heads, parts);
        }
        let parts = self.parts.start..(self.parts.start + BLOCKS).min(self.parts.end);
        self.parts.start = parts.end;
        Some(Call { heads: self.heads.clone(), parts, states: self.states.clone(), begins })
    }
}

impl History<'_> {
    /// Attends with a task's rows, the first at `position`, to the pieces whose numbers come `next`, and with each head of which
    /// the first part was among them to its `own`.
    pub(super) fn attend(
        &self,
        queries: &Queries<'_>,
        work: &mut Work,
        position: usize,
        pieces: &[Piece],
        next: impl FnMut() -> Option<usize>,
        own: impl Fn(usize, &Range<usize>, &mut State, &mut EdgeRoom) -> Result<(), ViewError>,
    ) -> Result<(), ViewError> {
        let mut taken = std::mem::take(&mut work.pieces);
        taken.clear();
        if work.rows.len() < work.task.heads.len() {
            work.rows.resize_with(work.task.heads.len(), RowsRoom::default);
        }
        let mut calls = Calls { next, pieces, taken: &mut taken, heads: 0..0, parts: 0..0, states: 0..0 };
        let mut first = calls.next();
        while let Some(call) = first {
            first = self.attend_run(queries, work, position, call, &mut calls)?;
        }
        let mut states = work.states.iter_mut();
        for &piece in &taken {
            let Piece { heads, parts } = &pieces[piece];
            for (head, state) in heads.clone().zip(&mut states) {
                if parts.start == 0 {
                    own(head, &work.task.tokens, state, &mut work.edge)?;
                }
            }
        }
        work.pieces = taken;
        Ok(())
    }

    /// Makes a call and those that come `next`, while the same tables decode their blocks; returns the first with others.
    fn attend_run(
        &self,
        queries: &Queries<'_>,
        work: &mut Work,
        position: usize,
        first: Call,
        next: &mut impl Iterator<Item = Call>,
    ) -> Result<Option<Call>, ViewError> {
        let Work { task, states, rows: rooms, edge, .. } = work;
        let blocks = self.layer.blocks();
        let block_of = |part: usize| part.saturating_sub(1);
        let same_tables = self.layer.same_tables(block_of(first.parts.start));
        let cx = self.layer.context(block_of(first.parts.start));
        // Made when a head's first call comes.
        let mut of_heads = ByHead::<OnceCell<Head<'_>>>::new();
        of_heads.resize_with(task.heads.len(), OnceCell::new);
        let (n, group) = (task.tokens.len(), queries.group);
        let rows = |head: usize| QueryRows {
            q: queries.of(head, task.tokens.clone()),
            group,
            head_dim: queries.head_dim,
            first_visible: BLOCK_TOKENS,
        };
        let prepared = task.heads.clone().zip(rooms).map(|(head, room)| PreparedRows::new(rows(head), room));
        let mut prepared: ByHead<PreparedRows<'_>> = prepared.collect();
        // Nobody may have asked for what the first call reads.
        let of_first = block_of(first.parts.start).min(blocks.len())..block_of(first.parts.end).min(blocks.len());
        blocks[of_first].iter().for_each(|block| block.prefetch(self.kernels));
        // Blocks that every row sees whole wait in one list a head of a call: the next are asked for while those before them, in
        // the other, are attended to.
        let mut lists = ByHead::<[Views<'_>; 2]>::new();
        lists.resize_with(task.heads.len(), Default::default);
        let (mut waiting, mut of_waiting, mut now) = (0..0, 0..0, 0);
        let mut call = Some(first);
        while let Some(Call { heads, parts, states: of_call, begins }) = call.take() {
            if !same_tables.contains(&block_of(parts.start)) {
                call = Some(Call { heads, parts, states: of_call, begins });
                break;
            }
            if begins {
                if states.len() < of_call.end {
                    states.resize_with(of_call.end, State::default);
                }
                states[of_call.clone()].iter_mut().for_each(|state| state.reset(n * group, queries.head_dim));
            }
            let places = heads.start - task.heads.start..heads.end - task.heads.start;
            for (of, head) in of_heads[places.clone()].iter().zip(heads.clone()) {
                if of.get().is_none() {
                    let _ = of.set(cx.head(head)?);
                }
            }
            let end = same_tables.end.saturating_add(1).min(parts.end);
            for part in parts.start..end {
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
                for (i, of) in of_heads[places.clone()].iter().enumerate() {
                    let of = of.get().expect("made above");
                    let sides = match block {
                        Some(block) => block.views(of, &mut starts)?,
                        None => self.layer.sink().views(of),
                    };
                    if whole {
                        lists[i][1 - now].push(BlockView::new(sides.0, sides.1, len, origin)?);
                    } else {
                        let asking = Asking { head: heads.start + i, tokens: task.tokens.clone(), position, row: 0 };
                        let place = Place { sides, first, len, origin };
                        self.fold(queries, &asking, place, &mut states[of_call.start + i], edge)?;
                    }
                }
            }
            self.attend_lists(&mut prepared[waiting], &lists, now, &mut states[of_waiting]);
            lists.iter_mut().for_each(|lists| lists[now].clear());
            (waiting, of_waiting, now) = (places, of_call.clone(), 1 - now);
            call = if end < parts.end {
                Some(Call { heads, parts: end..parts.end, states: of_call, begins: false })
            } else {
                next.next()
            };
        }
        self.attend_lists(&mut prepared[waiting], &lists, now, &mut states[of_waiting]);
        Ok(call)
    }

    /// Attends with some heads' rows to what waits in one list each, while the other is asked for.
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
}
