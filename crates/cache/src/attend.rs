//! From a layer's queries to its blocks: positions, work split, merge.

use std::ops::Range;

use kvquant_kernels::attend::{BlockView, Kernels, Rows as QueryRows, State, ViewError};
use kvquant_kernels::rope::{BlockTable, Rope, Rotation};
use kvquant_quant::pack::BLOCK_TOKENS;
use rayon::prelude::*;

use crate::block::Rows;
use crate::error::CacheError;
use crate::layer::Layer;
use crate::sequence::CacheShape;

/// Blocks times KV heads below which threads cost more than they bring.
const SPLIT_FROM: usize = 12;

/// Rotations of the positions of one forward pass, computed once for all layers.
#[derive(Debug, Default)]
pub(crate) struct Angles {
    start: usize,
    rotations: Vec<Rotation>,
    count: usize,
}

/// Queries by KV head, turned to their positions and scaled: `[kv_heads, tokens * group, head_dim]`.
pub(crate) struct Queries {
    data: Vec<f32>,
    tokens: usize,
    group: usize,
    head_dim: usize,
}

impl Angles {
    /// Makes ready for positions `start .. start + n`.
    pub fn cover(&mut self, rope: &Rope, start: usize, n: usize) {
        if self.start != start || self.count != n {
            self.rotations.clear();
            self.rotations.extend((start..start + n).map(|p| rope.rotation(p)));
            (self.start, self.count) = (start, n);
        }
    }

    /// Keys `[tokens, kv_heads, head_dim]`, turned.
    pub fn turn(&self, k: &[f32], channels: usize, head_dim: usize) -> Vec<f32> {
        let mut turned = k.to_vec();
        for (token, rotation) in turned.chunks_exact_mut(channels).zip(&self.rotations) {
            token.chunks_exact_mut(head_dim).for_each(|head| rotation.apply(head));
        }
        turned
    }

    /// Queries from `[tokens, heads, head_dim]`.
    pub fn queries(&self, q: &[f32], heads: usize, kv_heads: usize, head_dim: usize) -> Queries {
        let (tokens, group) = (self.rotations.len(), heads / kv_heads);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut data = vec![0.0; q.len()];
        for (h, of_head) in data.chunks_exact_mut(tokens * group * head_dim).enumerate() {
            for (t, of_token) in of_head.chunks_exact_mut(group * head_dim).enumerate() {
                of_token.copy_from_slice(&q[(t * heads + h * group) * head_dim..][..group * head_dim]);
                of_token.iter_mut().for_each(|x| *x *= scale);
                of_token.chunks_exact_mut(head_dim).for_each(|head| self.rotations[t].apply(head));
            }
        }
        Queries { data, tokens, group, head_dim }
    }
}

impl Queries {
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
    /// Rotations of the blocks' first positions; `None` where keys are kept turned.
    pub origins: Option<&'a [Rotation]>,
    pub sinks: usize,
}

/// One piece of work: a KV head, some query tokens, a run of the layer's parts (part 0 is the sinks).
#[derive(Debug, Clone)]
struct Task {
    head: usize,
    tokens: Range<usize>,
    parts: Range<usize>,
}

impl History<'_> {
    /// Attends with a task's rows, the first at `position`, to its parts.
    fn attend(&self, queries: &Queries, task: &Task, position: usize, state: &mut State) -> Result<(), ViewError> {
        let d = self.shape.head_dim;
        let rows = |visible: usize| QueryRows {
            q: queries.of(task.head, task.tokens.clone()),
            group: queries.group,
            head_dim: d,
            first_visible: visible.min(BLOCK_TOKENS),
        };
        let cx = self.layer.context();
        for part in task.parts.clone() {
            if part == 0 {
                let sink = self.layer.sink();
                let len = sink.len(cx.channels);
                if len > 0 {
                    let (k, v) = sink.views(cx.channels, d, task.head);
                    let block = BlockView::new(k, v, len, self.start)?;
                    self.kernels.attend(&rows(position + 1), &block, self.table, state);
                }
                continue;
            }
            let b = part - 1;
            let first = self.sinks + b * BLOCK_TOKENS;
            let block = &self.layer.blocks()[b];
            let (k, v) = block.views(&cx, task.head)?;
            let view = BlockView::new(k, v, block.len(cx.channels), self.origins.map(|o| &o[b]))?;
            // A run never starts before an open block does, so the first row sees at least one of its tokens.
            self.kernels.attend(&rows((position + 1).saturating_sub(first)), &view, self.table, state);
        }
        Ok(())
    }

    /// Splits rows and parts so that all threads have work of about the same size.
    fn tasks(&self, tokens: Range<usize>) -> Vec<Task> {
        let (heads, parts) = (self.shape.kv_heads, self.layer.blocks().len() + 1);
        let threads = rayon::current_num_threads();
        let (mut row_splits, mut part_splits) = (1, 1);
        if threads > 1 && heads * parts >= SPLIT_FROM {
            let pieces = (4 * threads).div_ceil(heads);
            if tokens.len() >= BLOCK_TOKENS / 4 {
                row_splits = pieces.min(tokens.len() / 8);
            } else {
                part_splits = pieces.min(parts.div_ceil(4));
            }
        }
        let (rows_each, parts_each) = (tokens.len().div_ceil(row_splits), parts.div_ceil(part_splits));
        let mut tasks = Vec::new();
        for head in 0..heads {
            for first in tokens.clone().step_by(rows_each) {
                for part in (0..parts).step_by(parts_each) {
                    tasks.push(Task {
                        head,
                        tokens: first..(first + rows_each).min(tokens.end),
                        parts: part..(part + parts_each).min(parts),
                    });
                }
            }
        }
        tasks
    }

    /// Runs the tasks, `extra` after each, and writes the merged outputs `[tokens, heads, head_dim]`, where
    /// `tokens.start` is the first token of `out`.
    fn run(
        &self,
        queries: &Queries,
        tokens: Range<usize>,
        position: usize,
        out: &mut [f32],
        extra: impl Fn(&Task, &mut State) -> Result<(), ViewError> + Sync,
    ) -> Result<(), CacheError> {
        let (d, group, heads) = (self.shape.head_dim, queries.group, self.shape.heads);
        let tasks = self.tasks(tokens.clone());
        let work = |task: &Task| {
            let mut state = State::empty(task.tokens.len() * group, d);
            self.attend(queries, task, position + task.tokens.start - tokens.start, &mut state)?;
            if task.parts.start == 0 {
                extra(task, &mut state)?;
            }
            Ok(state)
        };
        let states: Vec<State> = if tasks.len() <= self.shape.kv_heads {
            tasks.iter().map(work).collect::<Result<_, ViewError>>()?
        } else {
            tasks.par_iter().with_max_len(1).map(work).collect::<Result<_, ViewError>>()?
        };
        let mut done = tasks.iter().zip(states).peekable();
        while let Some((task, mut state)) = done.next() {
            while let Some((_, other)) = done.next_if(|(t, _)| t.head == task.head && t.tokens == task.tokens) {
                state.merge(&other);
            }
            for row in 0..state.rows() {
                let (t, head) = (task.tokens.start - tokens.start + row / group, task.head * group + row % group);
                state.finish(row, &mut out[(t * heads + head) * d..][..d]);
            }
        }
        Ok(())
    }
}

/// Queries `tokens` of the call, the first at `position`, against everything stored, their own tokens included.
pub(crate) fn quantized(
    history: &History<'_>,
    queries: &Queries,
    tokens: Range<usize>,
    position: usize,
    out: &mut [f32],
) -> Result<(), CacheError> {
    history.run(queries, tokens, position, out, |_, _| Ok(()))
}

/// All queries of the call, the first at `position`, against the stored history and their own exact tokens,
/// which `own` holds in blocks whose first positions have the given `rotations`.
pub(crate) fn exact(
    history: &History<'_>,
    own: &[Rows],
    rotations: &[Rotation],
    queries: &Queries,
    position: usize,
    out: &mut [f32],
) -> Result<(), CacheError> {
    let cx = history.layer.context();
    history.run(queries, 0..queries.tokens, position, out, |task, state| {
        for (b, rows) in own.iter().enumerate() {
            let first = b * BLOCK_TOKENS;
            if first >= task.tokens.end {
                break;
            }
            let (k, v) = rows.views(cx.channels, cx.head_dim, task.head);
            let view = BlockView::new(k, v, rows.len(cx.channels), history.origins.map(|_| &rotations[b]))?;
            // Rows before this block see none of it: leave them out, so that the count of visible tokens of
            // the first row is right.
            let from = first.max(task.tokens.start);
            let query = QueryRows {
                q: queries.of(task.head, from..task.tokens.end),
                group: queries.group,
                head_dim: cx.head_dim,
                first_visible: (from + 1 - first).min(BLOCK_TOKENS),
            };
            let skipped = (from - task.tokens.start) * queries.group;
            if skipped == 0 {
                history.kernels.attend(&query, &view, history.table, state);
            } else {
                let mut part = State::empty(state.rows() - skipped, cx.head_dim);
                history.kernels.attend(&query, &view, history.table, &mut part);
                state.merge_from(skipped, &part);
            }
        }
        Ok(())
    })
}
