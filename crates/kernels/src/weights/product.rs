//! y = x W^T: how a product is cut into tasks, and which kernel works on each.
//!
//! A call from within a rayon worker (`rayon::scope`, `ThreadPool::install`) starts its tasks at once; from any other
//! thread it pays two context switches (15 us), which is as much as a small product. So generation loops belong inside.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::{Weight, blocks};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::dispatch::Isa;
use crate::linalg;

/// Weights that a decode kernel takes at a time.
pub(super) const RUN: usize = 32;
/// Columns of a panel: 6 rows of activations and what streams past them stay in a 32 KB L1.
pub(super) const DEPTH: usize = 768;
/// Bytes below which a task is not worth its start (about 1 us of work).
const LEAST_BYTES: usize = 8 << 10;
/// Tasks a thread, so that one that is held up does not hold up the others.
const TASKS: usize = 8;

/// Rows of x up to which weights are multiplied as they are decoded; beyond, panels are faster (measured with Q4_1,
/// 1536 x 576: 20 and 24 us a token at 16 with AVX-512, 33 and 34 at 8 with AVX2).
fn few_at_most(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 16,
        _ => 8,
    }
}

/// Rows of activations on cache lines of their own (a load that straddles two costs as much as two), and the sum
/// of each run of 32.
pub(super) struct Rows {
    x: Vec<Lanes>,
    sums: Vec<f32>,
    cols: usize,
}

impl Rows {
    fn copy(x: &[f32], cols: usize) -> Rows {
        let m = x.len() / cols;
        let mut lines = Vec::with_capacity(m * Self::lines(cols));
        let mut sums = Vec::with_capacity(m * (cols / RUN));
        for x in x.chunks_exact(cols) {
            let (whole, rest) = x.as_chunks::<16>();
            lines.extend(whole.iter().map(|line| Lanes(*line)));
            if !rest.is_empty() {
                let mut line = Lanes::ZERO;
                line.0[..rest.len()].copy_from_slice(rest);
                lines.push(line);
            }
            sums.extend(x.as_chunks::<RUN>().0.iter().map(|run| run.iter().sum::<f32>()));
        }
        Rows { x: lines, sums, cols }
    }

    fn lines(cols: usize) -> usize {
        cols.div_ceil(16)
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.x.len() / Self::lines(self.cols)
    }

    /// Row t: its whole cache lines, 0 beyond its end.
    pub fn row(&self, t: usize) -> &[Lanes] {
        &self.x[t * Self::lines(self.cols)..][..Self::lines(self.cols)]
    }

    /// Sums of the runs of row t.
    pub fn sums(&self, t: usize) -> &[f32] {
        &self.sums[t * (self.cols / RUN)..][..self.cols / RUN]
    }

    /// The elements of row t beyond its last run.
    pub fn tail(&self, t: usize) -> impl Iterator<Item = f32> {
        let runs = self.cols / RUN;
        self.row(t)[runs * 2..].iter().flat_map(|line| line.0).take(self.cols % RUN)
    }
}

/// The output [m, rows] of one weight, which tasks write at different rows of the weight.
#[derive(Clone, Copy)]
pub(super) struct Sink {
    y: *mut f32,
    /// Elements from one row of activations to the next.
    pub stride: usize,
}

// SAFETY: a Sink is only a place; who writes through it promises to write alone (`write`, `at`).
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

impl Sink {
    /// # Safety
    /// In bounds of the output; nothing else accesses this element meanwhile.
    #[inline(always)]
    pub unsafe fn write(self, token: usize, row: usize, value: f32) {
        // SAFETY: the caller's promise.
        unsafe { *self.at(token, row) = value };
    }

    /// # Safety
    /// In bounds of the output.
    #[inline(always)]
    pub unsafe fn at(self, token: usize, row: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.y.add(token * self.stride + row) }
    }
}

/// A cache line of a panel.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Lanes(pub [f32; 16]);

impl Lanes {
    pub const ZERO: Lanes = Lanes([0.0; 16]);
}

thread_local! {
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static PANELS: RefCell<Vec<Lanes>> = const { RefCell::new(Vec::new()) };
}

/// Several weights that share the input x `[m, cols]`: `ys[i]` `[m, rows of i]` = x W_i^T, in one parallel region.
///
/// # Panics
/// Shapes do not fit.
pub fn matmul_fused(weights: &[&Weight], x: &[f32], m: usize, ys: &mut [&mut [f32]]) {
    assert_eq!(weights.len(), ys.len(), "an output for each weight");
    for (w, y) in weights.iter().zip(ys.iter()) {
        assert_eq!(Some(x.len()), m.checked_mul(w.cols), "x is [m, cols]");
        assert_eq!(Some(y.len()), m.checked_mul(w.rows), "y is [m, rows]");
    }
    let Some(first) = weights.first() else { return };
    if m == 0 {
        return;
    }
    let few = (m <= few_at_most(first.isa)).then(|| Rows::copy(x, first.cols));
    let sinks: Vec<Sink> =
        ys.iter_mut().zip(weights).map(|(y, w)| Sink { y: y.as_mut_ptr(), stride: w.rows }).collect();
    let tasks = if few.is_some() { cut_by_bytes(weights) } else { cut_by_panels(weights) };
    let work = |(i, part): (usize, Range<usize>)| {
        let w = weights[i];
        // SAFETY: the tasks are disjoint ranges of each weight's rows (`cut`), and each output is [m, w.rows].
        unsafe { multiply(w, part, x, m, few.as_ref(), sinks[i]) }
    };
    if tasks.len() == 1 {
        tasks.into_iter().for_each(work);
    } else {
        tasks.into_par_iter().with_max_len(1).for_each(work);
    }
}

/// Every weight's rows in equal parts of at most `rows(w)`.
fn cut(weights: &[&Weight], rows: impl Fn(&Weight) -> usize) -> Vec<(usize, Range<usize>)> {
    let mut tasks = Vec::with_capacity(TASKS * (rayon::current_num_threads() + weights.len()));
    for (i, w) in weights.iter().enumerate() {
        let each = rows(w).max(1);
        tasks.extend((0..w.rows).step_by(each).map(|r| (i, r..w.rows.min(r + each))));
    }
    tasks
}

fn cut_by_bytes(weights: &[&Weight]) -> Vec<(usize, Range<usize>)> {
    let threads = rayon::current_num_threads();
    let all: usize = weights.iter().map(|w| w.bytes()).sum();
    let bytes = if threads == 1 { all } else { (all / (TASKS * threads)).max(LEAST_BYTES) };
    cut(weights, |w| {
        let parts = w.bytes().div_ceil(bytes.max(1)).max(1);
        w.rows.div_ceil(parts)
    })
}

/// Whole panels: at most 128 rows, so that they stay in L2, and at least 32, so that an activation in L1 is used often.
fn cut_by_panels(weights: &[&Weight]) -> Vec<(usize, Range<usize>)> {
    let rows: usize = weights.iter().map(|w| w.rows).sum();
    let each = rows / (TASKS * rayon::current_num_threads());
    cut(weights, |_| each.next_multiple_of(32).clamp(32, 128))
}

/// `few` are the rows of x where there are few.
///
/// # Safety
/// Nothing else writes these rows of `out`, whose shape is [m, w.rows].
unsafe fn multiply(w: &Weight, rows: Range<usize>, x: &[f32], m: usize, few: Option<&Rows>, out: Sink) {
    match (w.isa, few) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on; a Weight's instruction set is one that the CPU has.
        (Isa::Avx512, Some(few)) => unsafe { avx512::few(w, rows, few, out) },
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, None) => PANELS.with_borrow_mut(|scratch| {
            // SAFETY: as above.
            unsafe { avx512::tile::many(w, rows, x, m, scratch, out) }
        }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Isa::Avx2, Some(few)) => unsafe { avx2::few(w, rows, few, out) },
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, None) => PANELS.with_borrow_mut(|scratch| {
            // SAFETY: as above.
            unsafe { avx2::tile::many(w, rows, x, m, scratch, out) }
        }),
        // SAFETY: passed on.
        (Isa::Neon, None) => unsafe { dense(w, rows, x, m, out) },
        // SAFETY: passed on.
        _ => unsafe { row_by_row(w, rows, x, m, out) },
    }
}

/// The twin: each weight row is dequantized once and multiplied with every row of x.
///
/// # Safety
/// As [`multiply`].
unsafe fn row_by_row(w: &Weight, rows: Range<usize>, x: &[f32], m: usize, out: Sink) {
    ROW.with_borrow_mut(|buffer| {
        buffer.resize(w.cols, 0.0);
        for row in rows {
            blocks::dequant(w.ty, w.row(row), buffer);
            for t in 0..m {
                // SAFETY: the caller's promise.
                unsafe { out.write(t, row, dot(&x[t * w.cols..][..w.cols], buffer)) };
            }
        }
    });
}

/// 32 partial sums, so that additions do not wait for each other.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; RUN];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<RUN>(), b.as_chunks::<RUN>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..RUN {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// Where no panels are made: the dequantized rows go through a dense product.
///
/// # Safety
/// As [`multiply`].
unsafe fn dense(w: &Weight, rows: Range<usize>, x: &[f32], m: usize, out: Sink) {
    let n = rows.len();
    ROW.with_borrow_mut(|buffer| {
        buffer.resize(n * (w.cols + m), 0.0);
        let (weights, y) = buffer.split_at_mut(n * w.cols);
        for (row, to) in rows.clone().zip(weights.chunks_exact_mut(w.cols)) {
            blocks::dequant(w.ty, w.row(row), to);
        }
        linalg::gemm(m, n, w.cols, 1.0, x, w.cols, 1, weights, 1, w.cols, 0.0, y, n, 1);
        for (t, y) in y.chunks_exact(n).enumerate() {
            for (row, y) in rows.clone().zip(y) {
                // SAFETY: the caller's promise.
                unsafe { out.write(t, row, *y) };
            }
        }
    });
}
