//! y = x W^T.

use std::cell::RefCell;

use rayon::prelude::*;

use super::{Weight, blocks};
use crate::dispatch::{self, Isa};
use crate::linalg;

/// Rows of x up to which a weight row is multiplied as it is dequantized; beyond, a dense product is faster.
const FEW: usize = 4;
/// Weight rows of a task when x has few rows.
const ROWS_FEW: usize = 64;
/// Weight rows that are dequantized at a time for a dense product: 64 x 1536 floats stay in L2.
const ROWS_MANY: usize = 64;

thread_local! {
    static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Several weights that share the input x `[m, cols]`: `ys[i]` `[m, rows of i]` = x W_i^T, in one parallel region.
///
/// # Panics
/// Shapes do not fit.
pub fn matmul_fused(weights: &[&Weight], x: &[f32], m: usize, ys: &mut [&mut [f32]]) {
    assert_eq!(weights.len(), ys.len(), "an output for each weight");
    for (w, y) in weights.iter().zip(ys.iter()) {
        assert_eq!(x.len(), m * w.cols, "x is [m, cols]");
        assert_eq!(y.len(), m * w.rows, "y is [m, rows]");
    }
    if m == 0 {
        return;
    }
    // A faulty override is refused when the process starts to use a model; here it only has to be safe.
    let wide = matches!(dispatch::isa(), Ok(Isa::Avx2 | Isa::Avx512));
    let each = if m <= FEW { ROWS_FEW } else { ROWS_MANY };
    let tasks: Vec<(usize, usize)> =
        weights.iter().enumerate().flat_map(|(i, w)| (0..w.rows).step_by(each).map(move |first| (i, first))).collect();
    let work = |&(i, first): &(usize, usize)| {
        let w = weights[i];
        let rows = first..(first + each).min(w.rows);
        let mut out = vec![0.0f32; rows.len() * m];
        if m <= FEW {
            few(wide, w, rows, x, m, &mut out);
        } else {
            many(wide, w, rows, x, m, &mut out);
        }
        out
    };
    let parts: Vec<Vec<f32>> = tasks.par_iter().map(work).collect();
    for (&(i, first), part) in tasks.iter().zip(&parts) {
        let (rows, n) = (weights[i].rows, part.len() / m);
        for (r, y) in ys[i].chunks_exact_mut(rows).enumerate() {
            y[first..first + n].copy_from_slice(&part[r * n..(r + 1) * n]);
        }
    }
}

/// out `[m, rows]`: each weight row is dequantized once and multiplied with every row of x.
fn few(wide: bool, w: &Weight, rows: std::ops::Range<usize>, x: &[f32], m: usize, out: &mut [f32]) {
    let n = rows.len();
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(w.cols, 0.0);
        for (i, row) in rows.enumerate() {
            row_products(wide, w, row, x, buffer, |r, dot| out[r * n + i] = dot);
        }
        debug_assert_eq!(out.len(), n * m);
    });
}

#[inline]
fn row_products(wide: bool, w: &Weight, row: usize, x: &[f32], buffer: &mut [f32], then: impl FnMut(usize, f32)) {
    #[cfg(target_arch = "x86_64")]
    if wide {
        // SAFETY: `wide` is set only where AVX2, FMA and F16C were detected.
        return unsafe { row_products_avx2(w, row, x, buffer, then) };
    }
    let _ = wide;
    row_products_plain(w, row, x, buffer, then);
}

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn row_products_avx2(w: &Weight, row: usize, x: &[f32], buffer: &mut [f32], mut then: impl FnMut(usize, f32)) {
    blocks::dequant(w.ty, w.row(row), buffer);
    for (r, x) in x.chunks_exact(w.cols).enumerate() {
        then(r, dot(x, buffer, |a, b, c| a.mul_add(b, c)));
    }
}

fn row_products_plain(w: &Weight, row: usize, x: &[f32], buffer: &mut [f32], mut then: impl FnMut(usize, f32)) {
    blocks::dequant(w.ty, w.row(row), buffer);
    for (r, x) in x.chunks_exact(w.cols).enumerate() {
        then(r, dot(x, buffer, |a, b, c| a * b + c));
    }
}

/// 32 partial sums, so that additions do not wait for each other.
#[inline(always)]
fn dot(a: &[f32], b: &[f32], fma: impl Fn(f32, f32, f32) -> f32) -> f32 {
    const LANES: usize = 32;
    let mut sums = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] = fma(a[i], b[i], sums[i]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// out `[m, rows]` by a dense product with the dequantized rows.
fn many(wide: bool, w: &Weight, rows: std::ops::Range<usize>, x: &[f32], m: usize, out: &mut [f32]) {
    let n = rows.len();
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(n * w.cols, 0.0);
        for (row, to) in rows.zip(buffer.chunks_exact_mut(w.cols)) {
            dequant_row(wide, w, row, to);
        }
        linalg::gemm(m, n, w.cols, 1.0, x, w.cols, 1, &buffer[..n * w.cols], 1, w.cols, 0.0, out, n, 1);
    });
}

fn dequant_row(wide: bool, w: &Weight, row: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if wide {
        /// # Safety
        /// The CPU has AVX2, FMA and F16C.
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn dequant_avx2(w: &Weight, row: usize, out: &mut [f32]) {
            blocks::dequant(w.ty, w.row(row), out);
        }
        // SAFETY: `wide` is set only where AVX2, FMA and F16C were detected.
        return unsafe { dequant_avx2(w, row, out) };
    }
    let _ = wide;
    blocks::dequant(w.ty, w.row(row), out);
}
