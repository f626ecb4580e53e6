//! Many rows: the block becomes two f32 tiles, and scores and outputs are small matrix products.

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::super::view::TOKENS;
use super::super::{BlockView, Rows, State};
use super::{dequant, load, softmax, store};
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

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend(rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, state: &mut State) {
    SCRATCH.with_borrow_mut(|scratch| with(scratch, rows, block, table, state));
}

#[target_feature(enable = "avx2,fma,f16c")]
fn with(s: &mut Scratch, rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, state: &mut State) {
    let d = rows.head_dim;
    for tile in [&mut s.keys, &mut s.values, &mut s.turned] {
        tile.resize(d * TOKENS, 0.0);
    }
    s.local.resize(ROW_TILE * d, 0.0);
    s.scores.resize(ROW_TILE * TOKENS, 0.0);
    // SAFETY: this function runs only where the features of its caller were detected.
    unsafe {
        dequant(&block.key, block.len, &mut s.keys);
        dequant(&block.value, block.len, &mut s.values);
    }
    if block.origin.is_some() {
        rotate(&mut s.keys, table);
    }
    // [channel][token] -> [token][channel]: the second product sums over tokens.
    for (c, channel) in s.values.chunks_exact(TOKENS).enumerate() {
        for (t, &x) in channel.iter().enumerate() {
            s.turned[t * d + c] = x;
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

#[target_feature(enable = "avx2,fma,f16c")]
fn rotate(tile: &mut [f32], table: &BlockTable) {
    for (pair, keys) in tile.chunks_exact_mut(2 * TOKENS).enumerate() {
        let (xs, ys) = keys.split_at_mut(TOKENS);
        let (cos, sin) = (&table.cos[pair * TOKENS..][..TOKENS], &table.sin[pair * TOKENS..][..TOKENS]);
        for (((x, y), c), s) in xs.iter_mut().zip(ys).zip(cos).zip(sin) {
            (*x, *y) = (*x * c - *y * s, *x * s + *y * c);
        }
    }
}

/// c[m, n] += a[m, k] b[k, n], all row-major and dense.
#[target_feature(enable = "avx2,fma,f16c")]
fn product(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
    let mut i = 0;
    while i < m {
        let left = m - i;
        let (a, c) = (&a[i * k..], &mut c[i * n..]);
        i += match left {
            1 => strip::<1>(n, k, a, b, c),
            2 => strip::<2>(n, k, a, b, c),
            3 => strip::<3>(n, k, a, b, c),
            4 => strip::<4>(n, k, a, b, c),
            5 => strip::<5>(n, k, a, b, c),
            _ => strip::<6>(n, k, a, b, c),
        };
    }
}

/// R rows of [`product`]: 16 columns at a time in 2 R registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn strip<const R: usize>(n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) -> usize {
    let rows: [&[f32]; R] = std::array::from_fn(|r| &a[r * k..(r + 1) * k]);
    let wide = n / 16 * 16;
    for j in (0..wide).step_by(16) {
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        for kk in 0..k {
            let at: &[f32; 16] = b[kk * n + j..].first_chunk().expect("16 columns are left in the row");
            let at = at.as_chunks::<8>().0;
            let (b0, b1) = (load(&at[0]), load(&at[1]));
            for r in 0..R {
                let x = _mm256_set1_ps(rows[r][kk]);
                acc[r][0] = _mm256_fmadd_ps(x, b0, acc[r][0]);
                acc[r][1] = _mm256_fmadd_ps(x, b1, acc[r][1]);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let to: &mut [f32; 16] = c[r * n + j..].first_chunk_mut().expect("16 columns are left in the row");
            for (to, x) in to.as_chunks_mut::<8>().0.iter_mut().zip(acc) {
                let y = _mm256_add_ps(load(to), *x);
                store(to, y);
            }
        }
    }
    for j in wide..n {
        for (r, row) in rows.iter().enumerate() {
            c[r * n + j] += row.iter().enumerate().map(|(kk, x)| x * b[kk * n + j]).sum::<f32>();
        }
    }
    R
}
