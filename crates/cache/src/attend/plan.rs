//! How rows, heads and blocks are shared out, so that all threads end at about the same time.
//!
//! Who has a piece may differ from run to run, what a piece is does not: each has states of its own, which are merged in order.
//! So the same history and queries give the same bits.

use std::ops::Range;

use kvquant_kernels::attend::BLOCKS;
use kvquant_kernels::threads;
use kvquant_quant::pack::BLOCK_TOKENS;

use super::{History, Room, Task, Work};

/// Blocks times KV heads below which threads cost more than they bring.
const SPLIT_FROM: usize = 12;
/// Query tokens from which each task has rows of its own, instead of all tasks all rows.
const SPLIT_ROWS: usize = BLOCK_TOKENS / 4;
/// Pieces that the last calls of a thread are split into, as far as there are heads.
const LAST: usize = 4;

impl History<'_> {
    /// Whether waking other threads takes less time than they save.
    pub(super) fn is_worth_threads(&self, tokens: &Range<usize>) -> bool {
        tokens.len() > BLOCK_TOKENS || self.shape.kv_heads * (self.layer.blocks().len() + 1) >= SPLIT_FROM
    }

    /// Puts tasks and pieces at the front of a room's; returns how many tasks, and whether they share the pieces: for a few tokens a
    /// task a thread, and pieces in queues; else tasks with rows of one head, which have a piece with all parts each.
    pub(super) fn plan(&self, tokens: Range<usize>, room: &mut Room) -> (usize, bool) {
        let (kv_heads, parts) = (self.shape.kv_heads, self.layer.blocks().len() + 1);
        let threads = if self.is_worth_threads(&tokens) { threads::count() } else { 1 };
        let mut tasks = 0;
        let mut add = |room: &mut Room, heads, tokens| {
            if tasks == room.works.len() {
                room.works.push(Work::default());
            }
            room.works[tasks].task = Task { heads, tokens };
            tasks += 1;
        };
        room.count = 0;
        if tokens.len() < SPLIT_ROWS {
            (0..threads).for_each(|_| add(room, 0..kv_heads, tokens.clone()));
            shrinking(parts, kv_heads, threads, room);
            return (tasks, true);
        }
        let pieces = (4 * threads).div_ceil(kv_heads);
        let rows_each = match tokens.len() {
            // Later tokens see more of the call's own: small pieces even that out. They end where its blocks end, so that
            // a block is seen whole or by one piece only.
            n if n > BLOCK_TOKENS && parts * BLOCK_TOKENS < 4 * n => BLOCK_TOKENS,
            n if n > BLOCK_TOKENS => n.div_ceil(pieces).next_multiple_of(BLOCK_TOKENS),
            n if threads > 1 => n.div_ceil(pieces.min(n / 8)),
            n => n,
        };
        for head in 0..kv_heads {
            for first in tokens.clone().step_by(rows_each) {
                add(room, head..head + 1, first..(first + rows_each).min(tokens.end));
                room.add_piece(head..head + 1, 0..parts);
            }
        }
        (tasks, false)
    }
}

/// Pieces for each of some threads, in the order of parts: first most of what is the thread's, then most of what is left, at last a
/// few heads of a single call to the kernels. So no thread waits long for another, however unequal they are, and pieces, each
/// of which has states to merge, are few.
fn shrinking(parts: usize, kv_heads: usize, threads: usize, room: &mut Room) {
    let calls = parts.div_ceil(BLOCKS);
    let mut queues = std::mem::take(&mut room.queues);
    queues.set((0..threads).map(|thread| {
        let (mut first, end) = (thread * calls / threads, (thread + 1) * calls / threads);
        while first < end {
            let n = if threads == 1 { end } else { (2 * (end - first) / 3).max(1) };
            let heads_each = if n > 1 { kv_heads } else { kv_heads.div_ceil(LAST) };
            for head in (0..kv_heads).step_by(heads_each) {
                let heads = head..(head + heads_each).min(kv_heads);
                room.add_piece(heads, first * BLOCKS..((first + n) * BLOCKS).min(parts));
            }
            first += n;
        }
        room.count
    }));
    room.queues = queues;
}

#[cfg(test)]
mod tests {
    use super::super::Piece;
    use super::*;

    #[test]
    fn pieces_cover_a_history_in_whole_calls() {
        for (parts, kv_heads, threads) in [(1, 1, 1), (2, 3, 2), (5, 2, 2), (63, 8, 2), (513, 3, 2), (513, 32, 7)] {
            let mut room = Room::default();
            // What is left of a greater plan is not part of the next.
            shrinking(2 * parts, kv_heads, threads, &mut room);
            room.count = 0;
            shrinking(parts, kv_heads, threads, &mut room);
            let pieces = &mut room.pieces[..room.count];
            let mut seen = vec![0; kv_heads];
            for Piece { heads, parts, .. } in &*pieces {
                assert!(parts.start < parts.end && parts.start.is_multiple_of(BLOCKS));
                for head in heads.clone() {
                    assert_eq!(parts.start, std::mem::replace(&mut seen[head], parts.end), "{kv_heads} {threads}");
                }
            }
            assert!(seen.iter().all(|end| *end == parts));
            assert!(pieces.len() <= threads * (parts.ilog2() as usize + 2 * LAST));
            let (n, shares) = (pieces.len(), room.queues.share(pieces));
            assert_eq!(std::iter::from_fn(|| shares.take(threads - 1)).count(), n);
        }
    }
}
