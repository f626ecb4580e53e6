//! How rows, heads and blocks become tasks that end at about the same time.

use std::ops::Range;

use kvquant_kernels::attend::BLOCKS;
use kvquant_kernels::threads;
use kvquant_quant::pack::BLOCK_TOKENS;
use smallvec::{SmallVec, smallvec};

use super::{History, Task, Work};

/// Runs of parts that are pieces of work.
type Runs = SmallVec<[Range<usize>; 16]>;

/// Blocks times KV heads below which threads cost more than they bring.
const SPLIT_FROM: usize = 12;
/// Calls to the kernels a thread from which pieces of all heads end at about the same time.
const CALLS_OF_ALL: usize = 8;

impl History<'_> {
    /// Heads of a task: all of them for a few tokens of a history with many calls to the kernels for each thread. A short one
    /// is evened out by heads, and rows of more tokens keep a thread busy with one.
    fn heads_each(&self, tokens: &Range<usize>) -> usize {
        let calls = (self.layer.blocks().len() + 1).div_ceil(BLOCKS);
        let all = tokens.len() < BLOCK_TOKENS / 4 && calls >= CALLS_OF_ALL * threads::count();
        if all { self.shape.kv_heads } else { 1 }
    }

    /// Whether waking other threads takes less time than they save.
    pub(super) fn is_worth_threads(&self, tokens: &Range<usize>) -> bool {
        tokens.len() > BLOCK_TOKENS || self.shape.kv_heads * (self.layer.blocks().len() + 1) >= SPLIT_FROM
    }

    /// Splits rows and parts so that all threads have work of about the same size, and puts the tasks at the front of
    /// `works`; returns how many.
    pub(super) fn plan(&self, tokens: Range<usize>, works: &mut Vec<Work>) -> usize {
        let (heads, parts) = (self.shape.kv_heads, self.layer.blocks().len() + 1);
        let heads_each = self.heads_each(&tokens);
        let threads = threads::count();
        let pieces = (4 * threads).div_ceil(heads);
        let mut rows_each = tokens.len();
        let mut runs: Runs = smallvec![0..parts];
        if tokens.len() > BLOCK_TOKENS {
            // Later tokens see more of the call's own: small pieces even that out. They end where its blocks end, so that
            // a block is seen whole or by one piece only.
            rows_each = tokens.len().div_ceil(pieces).next_multiple_of(BLOCK_TOKENS);
            if parts * BLOCK_TOKENS < 4 * tokens.len() {
                rows_each = BLOCK_TOKENS;
            }
        } else if threads > 1 && self.is_worth_threads(&tokens) {
            if tokens.len() >= BLOCK_TOKENS / 4 {
                rows_each = tokens.len().div_ceil(pieces.min(tokens.len() / 8));
            } else {
                runs = halved(parts, threads);
            }
        }
        let mut n = 0;
        for head in (0..heads).step_by(heads_each) {
            for first in tokens.clone().step_by(rows_each) {
                for parts in &runs {
                    if n == works.len() {
                        works.push(Work::default());
                    }
                    works[n].task = Task {
                        heads: head..head + heads_each,
                        tokens: first..(first + rows_each).min(tokens.end),
                        parts: parts.clone(),
                    };
                    n += 1;
                }
            }
        }
        n
    }
}

/// Runs of parts for each of some threads, one thread's after another's, as [`threads`] hands them out: first half of what is
/// the thread's, then half of what is left, to a single call to the kernels. So no thread waits long for another, however
/// unequal they are, and pieces, each of which costs a state, a merge and some blocks that nobody asked for ahead, are few.
fn halved(parts: usize, threads: usize) -> Runs {
    let calls = parts.div_ceil(BLOCKS);
    let mut runs = Runs::new();
    for thread in 0..threads {
        let (mut first, end) = (thread * calls / threads, (thread + 1) * calls / threads);
        while first < end {
            let n = (end - first).div_ceil(2);
            runs.push(first * BLOCKS..((first + n) * BLOCKS).min(parts));
            first += n;
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_cover_a_history_in_whole_calls() {
        for (parts, threads) in [(1, 2), (4, 2), (5, 2), (63, 2), (513, 2), (513, 7), (20, 64)] {
            let runs = halved(parts, threads);
            let mut end = 0;
            for run in &runs {
                assert_eq!((run.start, run.start % BLOCKS), (end, 0), "{parts} parts, {threads} threads");
                assert!(run.end > run.start && (run.end == parts || run.end % BLOCKS == 0));
                end = run.end;
            }
            assert_eq!(end, parts);
            assert!(runs.last().is_some_and(|run| run.len() <= BLOCKS), "the last is one call");
            assert!(runs.len() <= threads * (parts.ilog2() as usize + 2));
        }
    }
}
