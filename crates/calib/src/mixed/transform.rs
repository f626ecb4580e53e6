//! What decorrelates the channels of a head.
//!
//! Keys: each RoPE pair is turned to its principal axes. A rotation of a pair commutes with RoPE, so queries are turned
//! by the same angle and scores stay. Values: the principal axes of a head; the inverse is applied once to the output of
//! attention, which is linear in the values.

use nalgebra::{DMatrix, SymmetricEigen};
use rayon::prelude::*;

/// Sums of products of the centred channels of `x` `[tokens, width]` from `first` on, `n` of them.
fn covariance(x: &[f32], width: usize, first: usize, n: usize) -> DMatrix<f64> {
    let mut mean = vec![0.0f64; n];
    let tokens = (x.len() / width).max(1) as f64;
    for token in x.chunks_exact(width) {
        mean.iter_mut().zip(&token[first..first + n]).for_each(|(m, x)| *m += f64::from(*x) / tokens);
    }
    let mut sums = DMatrix::zeros(n, n);
    let mut centred = vec![0.0f64; n];
    for token in x.chunks_exact(width) {
        for ((c, x), m) in centred.iter_mut().zip(&token[first..first + n]).zip(&mean) {
            *c = f64::from(*x) - m;
        }
        for i in 0..n {
            for j in 0..=i {
                sums[(i, j)] += centred[i] * centred[j];
            }
        }
    }
    for i in 0..n {
        for j in 0..i {
            sums[(j, i)] = sums[(i, j)];
        }
    }
    sums
}

/// The angle of every pair of keys `[tokens, width]` that turns its principal axis onto its first channel.
pub(super) fn key_angles(x: &[f32], width: usize) -> Vec<f32> {
    (0..width / 2)
        .into_par_iter()
        .map(|pair| {
            let c = covariance(x, width, 2 * pair, 2);
            // The main axis lies at this angle; turning back by it brings it to the first channel.
            (-0.5 * (2.0 * c[(0, 1)]).atan2(c[(0, 0)] - c[(1, 1)])) as f32
        })
        .collect()
}

/// Turns pairs in place by `angles`.
pub(crate) fn turn(x: &mut [f32], angles: &[f32]) {
    let turns: Vec<(f32, f32)> = angles.iter().map(|a| a.sin_cos()).collect();
    x.par_chunks_exact_mut(2 * angles.len()).for_each(|token| {
        for (pair, (s, c)) in token.as_chunks_mut::<2>().0.iter_mut().zip(&turns) {
            *pair = [pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c];
        }
    });
}

/// Principal axes of every head of values `[tokens, heads, head_dim]`, as rows, the largest first.
pub(super) fn value_bases(x: &[f32], width: usize, head_dim: usize) -> Vec<f32> {
    let heads: Vec<Vec<f32>> = (0..width / head_dim)
        .into_par_iter()
        .map(|head| {
            let eigen = SymmetricEigen::new(covariance(x, width, head * head_dim, head_dim));
            let mut order: Vec<usize> = (0..head_dim).collect();
            order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]));
            let axis = |i: usize| eigen.eigenvectors.column(i).iter().map(|x| *x as f32).collect::<Vec<_>>();
            order.into_iter().flat_map(axis).collect()
        })
        .collect();
    heads.concat()
}

/// Applies each head's basis to `x` `[tokens, heads, head_dim]`, in place.
pub(crate) fn project(x: &mut [f32], bases: &[f32], head_dim: usize) {
    each_head(x, bases, head_dim, |head, basis, out| {
        for (o, row) in out.iter_mut().zip(basis.chunks_exact(head_dim)) {
            *o = row.iter().zip(head).map(|(a, b)| a * b).sum();
        }
    });
}

/// Takes each head back from its basis, in place.
pub(crate) fn restore(x: &mut [f32], bases: &[f32], head_dim: usize) {
    each_head(x, bases, head_dim, |head, basis, out| {
        out.fill(0.0);
        for (h, row) in head.iter().zip(basis.chunks_exact(head_dim)) {
            out.iter_mut().zip(row).for_each(|(o, b)| *o += h * b);
        }
    });
}

fn each_head(x: &mut [f32], bases: &[f32], head_dim: usize, turn: impl Fn(&[f32], &[f32], &mut [f32]) + Sync) {
    let width = bases.len() / head_dim;
    x.par_chunks_exact_mut(width).for_each(|token| {
        let mut out = vec![0.0f32; head_dim];
        for (head, basis) in token.chunks_exact_mut(head_dim).zip(bases.chunks_exact(head_dim * head_dim)) {
            turn(head, basis, &mut out);
            head.copy_from_slice(&out);
        }
    });
}
