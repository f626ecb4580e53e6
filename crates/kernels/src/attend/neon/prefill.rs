//! Many rows: the block becomes two f32 tiles, and scores and outputs are small matrix products.

use std::arch::aarch64::*;
use std::cell::RefCell;

use super::super::view::TOKENS;
use super::super::{BlockView, Rows, State};
use super::{LANES, dequant, load, softmax, store};
use crate::rope::BlockTable;

/// Rows that are multiplied at a time, so that their scores stay in L1.
const ROW_TILE: usize = 48;

#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    turned: Vec<f32>,
    local: Vec<f32>,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[target_feature(enable = "neon")]
pub(super) fn attend(rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, state: &mut State) {
    SCRATCH.with_borrow_mut(|scratch| with(scratch, rows, block, table, state));
}

#[target_feature(enable = "neon")]
fn with(s: &mut Scratch, rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, state: &mut State) {
    let d = rows.head_dim;
    for tile in [&mut s.keys, &mut s.values, &mut s.turned] {
        tile.resize(d * TOKENS, 0.0);
    }
    s.local.resize(ROW_TILE * d, 0.0);
    s.scores.resize(ROW_TILE * TOKENS, 0.0);
    dequant(&block.key, block.len, &mut s.keys);
    dequant(&block.value, block.len, &mut s.values);
    if block.origin.is_some() {
        rotate(&mut s.keys, table);
    }
    // [channel][token] -> [token][channel]: the second product sums over tokens.
    for (c, four) in s.values.as_chunks::<TOKENS>().0.as_chunks::<LANES>().0.iter().enumerate() {
        for t in 0..TOKENS {
            let to = &mut s.turned[t * d + LANES * c..][..LANES];
            to.copy_from_slice(&[four[0][t], four[1][t], four[2][t], four[3][t]]);
        }
    }
    for (tile, q) in rows.q.chunks(ROW_TILE * d).enumerate() {
        let (base, n) = (tile * ROW_TILE, q.len() / d);
        let local = &mut s.local[..n * d];
        match block.origin {
            Some(origin) => {
                for (q, to) in q.chunks_exact(d).zip(local.chunks_exact_mut(d)) {
                    origin.undo(q, to);
                }
            }
            None => local.copy_from_slice(q),
        }
        let scores = &mut s.scores[..n * TOKENS];
        scores.fill(0.0);
        product(n, TOKENS, d, local, &s.keys, scores);
        for (r, row) in scores.as_chunks_mut::<TOKENS>().0.iter_mut().enumerate() {
            row[rows.visible(base + r, block.len)..].fill(f32::NEG_INFINITY);
            softmax(std::slice::from_mut(row), base + r, 1, state);
        }
        product(n, d, TOKENS, scores, &s.turned, &mut state.out[base * d..(base + n) * d]);
    }
}

#[target_feature(enable = "neon")]
fn rotate(tile: &mut [f32], table: &BlockTable) {
    for (pair, keys) in tile.chunks_exact_mut(2 * TOKENS).enumerate() {
        let (xs, ys) = keys.split_at_mut(TOKENS);
        let (cos, sin) = (&table.cos[pair * TOKENS..][..TOKENS], &table.sin[pair * TOKENS..][..TOKENS]);
        for (((x, y), c), s) in xs.iter_mut().zip(ys).zip(cos).zip(sin) {
            (*x, *y) = (*x * c - *y * s, *x * s + *y * c);
        }
    }
}

/// c[m, n] += a[m, k] b[k, n], all row-major and dense; n and k are multiples of 4.
#[target_feature(enable = "neon")]
fn product(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
    let mut i = 0;
    while i < m {
        let (a, c) = (&a[i * k..], &mut c[i * n..]);
        i += match m - i {
            1 => strip::<1>(n, k, a, b, c),
            2 | 3 => strip::<2>(n, k, a, b, c),
            4..8 => strip::<4>(n, k, a, b, c),
            _ => strip::<8>(n, k, a, b, c),
        };
    }
}

/// R rows of [`product`]: 8 columns at a time in 2 R registers.
#[inline]
#[target_feature(enable = "neon")]
fn strip<const R: usize>(n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) -> usize {
    let mut j = 0;
    while j < n {
        j += if n - j >= 2 * LANES { columns::<R, 2>(j, n, k, a, b, c) } else { columns::<R, 1>(j, n, k, a, b, c) };
    }
    R
}

/// V vectors of columns, from column `j` on.
#[inline]
#[target_feature(enable = "neon")]
fn columns<const R: usize, const V: usize>(j: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) -> usize {
    let rows: [&[[f32; LANES]]; R] = std::array::from_fn(|r| a[r * k..(r + 1) * k].as_chunks().0);
    let mut acc = [[vdupq_n_f32(0.0); V]; R];
    for (four, b) in b.chunks_exact(LANES * n).enumerate() {
        let mut x = [vdupq_n_f32(0.0); R];
        for r in 0..R {
            x[r] = load(&rows[r][four]);
        }
        let mut step = |b: &[f32], lane: fn(float32x4_t, float32x4_t, float32x4_t) -> float32x4_t| {
            let b = b[j..j + V * LANES].as_chunks().0;
            for v in 0..V {
                let b = load(&b[v]);
                for r in 0..R {
                    acc[r][v] = lane(acc[r][v], b, x[r]);
                }
            }
        };
        step(&b[..n], |acc, b, x| vfmaq_laneq_f32::<0>(acc, b, x));
        step(&b[n..2 * n], |acc, b, x| vfmaq_laneq_f32::<1>(acc, b, x));
        step(&b[2 * n..3 * n], |acc, b, x| vfmaq_laneq_f32::<2>(acc, b, x));
        step(&b[3 * n..], |acc, b, x| vfmaq_laneq_f32::<3>(acc, b, x));
    }
    for (r, acc) in acc.iter().enumerate() {
        let to = c[r * n + j..][..V * LANES].as_chunks_mut().0;
        for (to, x) in to.iter_mut().zip(acc) {
            store(to, vaddq_f32(load(to), *x));
        }
    }
    V * LANES
}
