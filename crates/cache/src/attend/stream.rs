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

/// How many blocks ahead is asked for what a view of one is made from: two calls.
const INDEX_AHEAD: usize = 2 * BLOCKS;
/// Pieces of a thread that need no memory of their own.
const PIECES: usize = 24;

/// As much of a piece as the kernels take at once.
#[derive(Debug)]
struct Call {
    /// Which of the thread's pieces, and whether this is the first of it.
    piece: usize,
    begins: bool,
    heads: Range<usize>,
    parts: Range<usize>,
}

/// The pieces that come `next`, call by call.
struct Calls<'a, N> {
    next: N,
    taken: SmallVec<[&'a mut Piece; PIECES]>,
    /// What is left of the last one.
    left: Range<usize>,
}

impl<'a, N: FnMut() -> Option<&'a mut Piece>> Calls<'a, N> {
    fn next(&mut self) -> Option<Call> {
        let begins = self.left.is_empty();
        if begins {
            let piece = (self.next)()?;
            self.left = piece.parts.clone();
            self.taken.push(piece);
        }
        let parts = self.left.start..(self.left.start + BLOCKS).min(self.left.end);
        self.left.start = parts.end;
        let piece = self.taken.len() - 1;
        Some(Call { piece, begins, heads: self.taken[piece].heads.clone(), parts })
    }
}

impl History<'_> {
    /// Attends with a task's rows, the first at `position`, to the pieces that come `next`, and with each head of which the first
    /// part was among them to its `own`.
    pub(super) fn attend<'p>(
        &self,
        queries: &Queries<'_>,
        work: &mut Work,
        position: usize,
        next: impl FnMut() -> Option<&'p mut Piece>,
        own: impl Fn(usize, &Range<usize>, &mut State, &mut EdgeRoom) -> Result<(), ViewError>,
    ) -> Result<(), ViewError> {
        if work.rows.len() < work.task.heads.len() {
            work.rows.resize_with(work.task.heads.len(), RowsRoom::default);
        }
        let mut calls = Calls { next, taken: SmallVec::new(), left: 0..0 };
        let mut first = calls.next();
        while let Some(call) = first {
            first = self.attend_run(queries, work, position, call, &mut calls)?;
        }
        for piece in calls.taken.into_iter().filter(|piece| piece.parts.start == 0) {
            for (head, state) in piece.heads.clone().zip(&mut piece.states) {
                own(head, &work.task.tokens, state, &mut work.edge)?;
            }
        }
        Ok(())
    }

    /// Makes a call and those that follow, while the same tables decode their blocks; returns the first with others.
    fn attend_run<'p>(
        &self,
        queries: &Queries<'_>,
        work: &mut Work,
        position: usize,
        first: Call,
        calls: &mut Calls<'p, impl FnMut() -> Option<&'p mut Piece>>,
    ) -> Result<Option<Call>, ViewError> {
        let Work { task, rows: rooms, edge } = work;
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
        let (mut waiting, mut of_waiting, mut now) = (0..0, first.piece, 0);
        let mut call = Some(first);
        while let Some(Call { piece, begins, heads, parts }) = call.take() {
            if !same_tables.contains(&block_of(parts.start)) {
                call = Some(Call { piece, begins, heads, parts });
                break;
            }
            if begins {
                let states = &mut calls.taken[piece].states;
                states.resize_with(heads.len().max(states.len()), State::default);
                states[..heads.len()].iter_mut().for_each(|state| state.reset(n * group, queries.head_dim));
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
                    if let Some(near) = blocks.get(b + INDEX_AHEAD) {
                        near.prefetch_index(&cx, self.kernels);
                        if let Some(origin) = self.origins.map(|o| &o[b + INDEX_AHEAD]) {
                            self.kernels.prefetch_few(&origin.cos);
                            self.kernels.prefetch_few(&origin.sin);
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
                        self.fold(queries, &asking, place, &mut calls.taken[piece].states[i], edge)?;
                    }
                }
            }
            self.attend_lists(&mut prepared[waiting], &lists, now, &mut calls.taken[of_waiting].states);
            lists.iter_mut().for_each(|lists| lists[now].clear());
            (waiting, of_waiting, now) = (places, piece, 1 - now);
            call = if end < parts.end {
                Some(Call { piece, begins: false, heads, parts: end..parts.end })
            } else {
                calls.next()
            };
        }
        self.attend_lists(&mut prepared[waiting], &lists, now, &mut calls.taken[of_waiting].states);
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
