//! The block in which a row's window begins.
//!
//! A kernel masks the end of a block and never its beginning. So the one block per row whose first tokens lie before
//! the window is dequantized by the kernels and attended here, in plain loops along the tokens.

use std::ops::Range;

use kvquant_kernels::attend::{Kernels, SideView, State};
use kvquant_kernels::rope::{BlockTable, Rotation};
use kvquant_quant::pack::BLOCK_TOKENS;

/// What attending to a block's edge works in.
#[derive(Debug, Default)]
pub(crate) struct EdgeRoom {
    keys: Vec<f32>,
    values: Vec<f32>,
    local: Vec<f32>,
    part: State,
}

/// A block as the rows at its edge see it.
pub(crate) struct Edge<'a> {
    pub key: SideView<'a>,
    pub value: SideView<'a>,
    pub len: usize,
    /// The rotation of the block's first position; `None` where keys are kept turned.
    pub origin: Option<&'a Rotation>,
    pub table: &'a BlockTable,
}

impl Edge<'_> {
    /// Attends with rows `[rows, head_dim]`, each to the tokens of the block that `seen` gives for it.
    pub fn attend<'r>(
        &self,
        kernels: Kernels,
        q: &[f32],
        room: &'r mut EdgeRoom,
        seen: impl Fn(usize) -> Range<usize>,
    ) -> &'r State {
        let d = self.key.head_dim();
        let EdgeRoom { keys, values, local, part: state } = room;
        keys.resize(d * BLOCK_TOKENS, 0.0);
        values.resize(d * BLOCK_TOKENS, 0.0);
        local.resize(d, 0.0);
        kernels.dequant(&self.key, self.len, keys);
        kernels.dequant(&self.value, self.len, values);
        if self.origin.is_some() {
            turn(keys, self.table);
        }
        state.reset(q.len() / d, d);
        for (row, q) in q.chunks_exact(d).enumerate() {
            let seen = seen(row);
            if seen.is_empty() {
                continue;
            }
            match self.origin {
                Some(origin) => origin.undo(q, local),
                None => local.copy_from_slice(q),
            }
            let mut scores = [0.0f32; BLOCK_TOKENS];
            for (x, k) in local.iter().zip(keys.chunks_exact(BLOCK_TOKENS)) {
                scores.iter_mut().zip(k).for_each(|(s, k)| *s += x * k);
            }
            let max = scores[seen.clone()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut weights = [0.0f32; BLOCK_TOKENS];
            for t in seen {
                weights[t] = (scores[t] - max).exp();
            }
            state.max[row] = max;
            state.sum[row] = weights.iter().sum();
            for (o, v) in state.out[row * d..(row + 1) * d].iter_mut().zip(values.chunks_exact(BLOCK_TOKENS)) {
                *o = weights.iter().zip(v).map(|(w, v)| w * v).sum();
            }
        }
        state
    }
}

/// Turns the keys of a tile `[head_dim, 64]` by their places in the block.
fn turn(tile: &mut [f32], table: &BlockTable) {
    let angles = table.cos.chunks_exact(BLOCK_TOKENS).zip(table.sin.chunks_exact(BLOCK_TOKENS));
    for (pair, (cos, sin)) in tile.chunks_exact_mut(2 * BLOCK_TOKENS).zip(angles) {
        let (xs, ys) = pair.split_at_mut(BLOCK_TOKENS);
        for (((x, y), c), s) in xs.iter_mut().zip(ys).zip(cos).zip(sin) {
            (*x, *y) = (*x * c - *y * s, *x * s + *y * c);
        }
    }
}
