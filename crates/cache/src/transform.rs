//! What a layer with mixed widths does to its heads before they are stored, and undoes afterwards.
//!
//! Keys are turned pair by pair, which commutes with RoPE; queries by the same angles, so that scores stay. Values are
//! written in an orthogonal basis; attention is linear in them, so its output is turned back, once a token and query head.

use kvquant_kernels::linalg::gemm;
use kvquant_kernels::rope::Rotation;
use kvquant_kernels::rowwise::vec_mat;
use kvquant_kernels::threads;
use kvquant_quant::MixedFit;

use crate::sequence::CacheShape;

#[derive(Debug)]
pub(crate) struct Transform {
    /// One a KV head.
    turns: Vec<Rotation>,
    /// `[kv_heads, head_dim, head_dim]`, axes as rows.
    bases: Vec<f32>,
    /// The same, axes as columns.
    transposed: Vec<f32>,
}

/// Tokens up to which heads are turned one by one, on all threads: bases come from memory, which weights push them out to
/// between two steps, faster for two threads than for one.
const FEW: usize = 7;

impl Transform {
    pub fn new(keys: &MixedFit, values: &MixedFit, shape: &CacheShape) -> Self {
        let turns = keys.transform.chunks_exact(shape.head_dim / 2).map(|angles| {
            let (sin, cos) = angles.iter().map(|a| a.sin_cos()).unzip();
            Rotation { cos, sin }
        });
        let (bases, d) = (values.transform.clone(), shape.head_dim);
        let column = |of_head: &[f32], c: usize| -> Vec<f32> { of_head[c..].iter().step_by(d).copied().collect() };
        let transposed = bases.chunks_exact(d * d).flat_map(|h| (0..d).flat_map(move |c| column(h, c))).collect();
        Transform { turns: turns.collect(), bases, transposed }
    }

    /// Keys `[tokens, kv_heads, head_dim]` or queries `[tokens, heads, head_dim]`, turned.
    pub fn turn(&self, x: &[f32], heads: usize, head_dim: usize, out: &mut Vec<f32>) {
        copy(x, out);
        let group = heads / self.turns.len();
        for token in out.chunks_exact_mut(heads * head_dim) {
            for (of_head, turn) in token.chunks_exact_mut(group * head_dim).zip(&self.turns) {
                of_head.chunks_exact_mut(head_dim).for_each(|head| turn.apply(head));
            }
        }
    }

    /// Values `[tokens, kv_heads, head_dim]` in each head's basis.
    pub fn project(&self, v: &[f32], d: usize, out: &mut Vec<f32>) {
        // Every entry is written below.
        out.resize(v.len(), 0.0);
        let width = self.turns.len() * d;
        if v.len() <= FEW * width {
            let heads = self.turns.len();
            threads::pieces_mut(out, d, |i, to| {
                vec_mat(&v[i * d..][..d], &self.transposed[i % heads * d * d..][..d * d], to);
            });
            return;
        }
        for (h, basis) in self.bases.chunks_exact(d * d).enumerate() {
            // out[t] = basis v[t]: the basis is read by columns.
            let (from, to) = (&v[h * d..], &mut out[h * d..]);
            gemm(v.len() / width, d, d, 1.0, from, width, 1, basis, 1, d, 0.0, to, width, 1);
        }
    }

    /// Attention outputs `[tokens, heads, head_dim]`, back from the bases; `turned` is room for a copy.
    pub fn restore(&self, out: &mut [f32], heads: usize, d: usize, turned: &mut Vec<f32>) {
        copy(out, turned);
        let (width, group) = (heads * d, heads / self.turns.len());
        if out.len() <= FEW * width {
            threads::pieces_mut(out, d, |i, to| {
                vec_mat(&turned[i * d..][..d], &self.bases[i % heads / group * d * d..][..d * d], to);
            });
            return;
        }
        for h in 0..heads {
            let basis = &self.bases[h / group * d * d..][..d * d];
            gemm(
                out.len() / width,
                d,
                d,
                1.0,
                &turned[h * d..],
                width,
                1,
                basis,
                d,
                1,
                0.0,
                &mut out[h * d..],
                width,
                1,
            );
        }
    }
}

fn copy(x: &[f32], to: &mut Vec<f32>) {
    to.clear();
    to.extend_from_slice(x);
}
