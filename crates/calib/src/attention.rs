//! Causal softmax attention over a window and its gradient, in tiles of queries.
//!
//! Per query head, with S = Q Kᵀ/√D, P = softmax(S), O = P V and delta_i = Σ dO_i O_i:
//! dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P (dP - delta),  dQ = dS K/√D,  dK = dSᵀ Q/√D.
//! P is never kept: the backward pass forms it again from S and the log-sum-exp of its row. A task holds two
//! tiles of `[TILE, tokens]`.

use kvquant_kernels::linalg::gemm;
use rayon::prelude::*;

use kvquant_kernels::rowwise::exp;

/// Queries in a tile: 128 x 2048 scores are 1 MiB.
const TILE: usize = 128;

/// The heads of a layer: q is `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Tokens that a query sees, itself included; `None` for all.
    pub window: Option<usize>,
}

/// What the backward pass needs of a forward one.
pub(crate) struct Attended {
    /// `[tokens, heads, head_dim]`
    pub out: Vec<f32>,
    /// log-sum-exp of every row of scores, `[heads, tokens]`
    pub lse: Vec<f32>,
}

/// Gradients with respect to the rotated queries and keys and to the values, shaped as they are.
pub(crate) struct AttentionGrads {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Heads {
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// The first token that the query at `row` sees.
    fn first(&self, row: usize) -> usize {
        self.window.map_or(0, |w| (row + 1).saturating_sub(w))
    }

    /// Offset of a query head's keys in a row.
    fn kv_offset(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads) * self.head_dim
    }

    /// Tasks (head, rows): heads are cut into runs of about equal work, so that all threads are busy to the end.
    fn tasks(&self, tokens: usize) -> Vec<(usize, usize, usize)> {
        let cuts = (8 * rayon::current_num_threads()).div_ceil(self.heads).clamp(1, tokens.div_ceil(TILE));
        let edge = |i: usize| match i {
            i if i == cuts => tokens,
            i => ((tokens as f64 * (i as f64 / cuts as f64).sqrt()) as usize).next_multiple_of(TILE).min(tokens),
        };
        (0..cuts)
            .rev()
            .flat_map(|i| (0..self.heads).map(move |h| (h, i)))
            .map(|(h, i)| (h, edge(i), edge(i + 1)))
            .filter(|(_, from, to)| from < to)
            .collect()
    }

    /// scores `[rows, to]` = a Bᵀ * scale, a and b being one head of wider rows.
    fn scores(&self, rows: usize, to: usize, scale: f32, a: &[f32], a_width: usize, b: &[f32], out: &mut [f32]) {
        gemm(rows, to, self.head_dim, scale, a, a_width, 1, b, 1, self.kv_width(), 0.0, out, to, 1);
    }

    /// Attends every query to the keys up to its own position.
    pub(crate) fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Attended {
        let tokens = k.len() / self.kv_width();
        let (d, width) = (self.head_dim, self.q_width());
        let tasks = self.tasks(tokens);
        let parts: Vec<(Vec<f32>, Vec<f32>)> = tasks
            .par_iter()
            .map(|&(head, from, to)| {
                let kv = self.kv_offset(head);
                let mut out = vec![0.0; (to - from) * d];
                let mut lse = vec![0.0; to - from];
                let mut tile = vec![0.0; TILE * to];
                for start in (from..to).step_by(TILE) {
                    let end = (start + TILE).min(to);
                    let s = &mut tile[..(end - start) * end];
                    self.scores(end - start, end, self.scale(), &q[start * width + head * d..], width, &k[kv..], s);
                    for (row, lse) in
                        s.chunks_exact_mut(end).zip(&mut lse[start - from..]).zip(start..).map(|((r, l), t)| {
                            let (seen, rest) = r.split_at_mut(t + 1);
                            rest.fill(0.0);
                            let (before, seen) = seen.split_at_mut(self.first(t));
                            before.fill(0.0);
                            (seen, l)
                        })
                    {
                        *lse = softmax(row);
                    }
                    let o = &mut out[(start - from) * d..(end - from) * d];
                    gemm(end - start, d, end, 1.0, s, end, 1, &v[kv..], self.kv_width(), 1, 0.0, o, d, 1);
                }
                (out, lse)
            })
            .collect();
        let mut attended = Attended { out: vec![0.0; tokens * width], lse: vec![0.0; self.heads * tokens] };
        for (&(head, from, to), (out, lse)) in tasks.iter().zip(&parts) {
            attended.lse[head * tokens + from..head * tokens + to].copy_from_slice(lse);
            for (t, row) in (from..to).zip(out.chunks_exact(d)) {
                attended.out[t * width + head * d..][..d].copy_from_slice(row);
            }
        }
        attended
    }

    /// Gradients for the output gradient `d_out` `[tokens, heads, head_dim]`.
    pub(crate) fn backward(
        &self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        attended: &Attended,
        d_out: &[f32],
    ) -> AttentionGrads {
        let (d, width, kv_width) = (self.head_dim, self.q_width(), self.kv_width());
        let tokens = k.len() / kv_width;
        let tasks = self.tasks(tokens);
        let parts: Vec<AttentionGrads> = tasks
            .par_iter()
            .map(|&(head, from, to)| {
                let kv = self.kv_offset(head);
                let mut part =
                    AttentionGrads { q: vec![0.0; (to - from) * d], k: vec![0.0; to * d], v: vec![0.0; to * d] };
                let mut p_tile = vec![0.0; TILE * to];
                let mut ds_tile = vec![0.0; TILE * to];
                for start in (from..to).step_by(TILE) {
                    let end = (start + TILE).min(to);
                    let rows = end - start;
                    let p = &mut p_tile[..rows * end];
                    let ds = &mut ds_tile[..rows * end];
                    let at = start * width + head * d;
                    self.scores(rows, end, self.scale(), &q[at..], width, &k[kv..], p);
                    self.scores(rows, end, 1.0, &d_out[at..], width, &v[kv..], ds);
                    for (i, (p, ds)) in p.chunks_exact_mut(end).zip(ds.chunks_exact_mut(end)).enumerate() {
                        let row = start + i;
                        let o = &attended.out[row * width + head * d..][..d];
                        let delta: f32 = o.iter().zip(&d_out[row * width + head * d..][..d]).map(|(a, b)| a * b).sum();
                        let lse = attended.lse[head * tokens + row];
                        let first = self.first(row);
                        for (p, ds) in p[first..=row].iter_mut().zip(&mut ds[first..=row]) {
                            *p = exp(*p - lse);
                            *ds = *p * (*ds - delta);
                        }
                        p[..first].fill(0.0);
                        ds[..first].fill(0.0);
                        p[row + 1..].fill(0.0);
                        ds[row + 1..].fill(0.0);
                    }
                    let dq = &mut part.q[(start - from) * d..(end - from) * d];
                    gemm(rows, d, end, self.scale(), ds, end, 1, &k[kv..], kv_width, 1, 0.0, dq, d, 1);
                    gemm(end, d, rows, self.scale(), ds, 1, end, &q[at..], width, 1, 1.0, &mut part.k, d, 1);
                    gemm(end, d, rows, 1.0, p, 1, end, &d_out[at..], width, 1, 1.0, &mut part.v, d, 1);
                }
                part
            })
            .collect();
        let mut grads =
            AttentionGrads { q: vec![0.0; q.len()], k: vec![0.0; tokens * kv_width], v: vec![0.0; tokens * kv_width] };
        for (&(head, from, to), part) in tasks.iter().zip(&parts) {
            for (t, row) in (from..to).zip(part.q.chunks_exact(d)) {
                grads.q[t * width + head * d..][..d].copy_from_slice(row);
            }
            let kv = self.kv_offset(head);
            for (all, part) in [(&mut grads.k, &part.k), (&mut grads.v, &part.v)] {
                for (t, row) in part.chunks_exact(d).enumerate() {
                    all[t * kv_width + kv..][..d].iter_mut().zip(row).for_each(|(a, b)| *a += b);
                }
            }
        }
        grads
    }
}

/// Softmax in place; returns the log-sum-exp.
fn softmax(row: &mut [f32]) -> f32 {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m });
    row.iter_mut().for_each(|x| *x = exp(*x - max));
    // Lanes of partial sums: a single running f32 sum is neither fast nor exact enough.
    let mut lanes = [0f32; 16];
    let chunks = row.chunks_exact(16);
    let tail: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(l, x)| *l += x);
    }
    let sum = lanes.iter().sum::<f32>() + tail;
    let scale = 1.0 / sum;
    row.iter_mut().for_each(|x| *x *= scale);
    max + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, slope};

    /// The definition, in f64.
    fn direct(h: Heads, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f64> {
        let (d, qw, kw) = (h.head_dim, h.q_width(), h.kv_width());
        let mut out = vec![0.0; q.len()];
        for t in 0..k.len() / kw {
            for head in 0..h.heads {
                let kv = h.kv_offset(head);
                let scores: Vec<f64> = (h.first(t)..=t)
                    .map(|s| {
                        (0..d).map(|i| f64::from(q[t * qw + head * d + i]) * f64::from(k[s * kw + kv + i])).sum::<f64>()
                    })
                    .map(|s| (s / (d as f64).sqrt()).exp())
                    .collect();
                let sum: f64 = scores.iter().sum();
                for i in 0..d {
                    out[t * qw + head * d + i] =
                        scores.iter().zip(h.first(t)..).map(|(p, s)| p / sum * f64::from(v[s * kw + kv + i])).sum();
                }
            }
        }
        out
    }

    #[test]
    fn forward_is_the_definition_over_several_tiles() {
        let shapes = [1, 5, TILE, TILE + 1, 3 * TILE + 7].map(|n| [(n, None), (n, Some(3)), (n, Some(TILE + 2))]);
        for (tokens, window) in shapes.into_iter().flatten() {
            let h = Heads { heads: 6, kv_heads: 2, head_dim: 4, window };
            let (q, k, v) = (noise(tokens * 24, 1), noise(tokens * 8, 2), noise(tokens * 8, 3));
            let got = h.forward(&q, &k, &v);
            for (i, want) in direct(h, &q, &k, &v).iter().enumerate() {
                assert!((f64::from(got.out[i]) - want).abs() < 1e-5, "{tokens} tokens, {i}: {} {want}", got.out[i]);
            }
        }
    }

    #[test]
    fn backward_is_the_slope() {
        for (tokens, step, window) in [(7, 1, None), (TILE + 9, 97, None), (7, 1, Some(3)), (TILE + 9, 97, Some(50))] {
            let h = Heads { heads: 4, kv_heads: 2, head_dim: 4, window };
            let (q, k, v) = (noise(tokens * 16, 1), noise(tokens * 8, 2), noise(tokens * 8, 3));
            let probe = noise(tokens * 16, 4);
            let loss = |q: &[f32], k: &[f32], v: &[f32]| -> f64 {
                direct(h, q, k, v).iter().zip(&probe).map(|(o, p)| o * f64::from(*p)).sum()
            };
            let grads = h.backward(&q, &k, &v, &h.forward(&q, &k, &v), &probe);
            let near = |name: &str, i: usize, got: f32, want: f64| {
                assert!(
                    (f64::from(got) - want).abs() < 1e-3 * want.abs().max(0.1),
                    "{tokens} tokens, {name} {i}: {got} {want}"
                );
            };
            for i in (0..q.len()).step_by(step) {
                near("q", i, grads.q[i], slope(&q, i, 1e-3, |q| loss(q, &k, &v)));
            }
            for i in (0..k.len()).step_by(step) {
                near("k", i, grads.k[i], slope(&k, i, 1e-3, |k| loss(&q, k, &v)));
                near("v", i, grads.v[i], slope(&v, i, 1e-3, |v| loss(&q, &k, v)));
            }
        }
    }
}
