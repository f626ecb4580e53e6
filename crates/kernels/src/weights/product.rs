//! y = x W^T: how a product is cut into tasks, and which kernel works on each.

use std::cell::Cell;
use std::ops::Range;

use super::activations::{Quantized, STRIP, stride, strips};
use super::layout::{BLOCK, ROWS};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{Activations, Weight, floats, integers};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::dispatch::Isa;
use crate::threads;

/// Weights that can share an input.
const FUSED: usize = 4;
/// Bytes below which a task is not worth its start (about 1 us of work).
const LEAST_BYTES: usize = 8 << 10;
/// Tasks a thread, so that one that is held up does not hold up the others.
const TASKS: usize = 8;
/// Panels of a task, at most, so that they stay in L2 beside the activations.
const PANELS: usize = 8;
/// Bytes of integer activations that stay in L2 while panels pass.
const CHUNK: usize = 256 << 10;

/// The output [m, rows] of one weight, which tasks write at different places.
#[derive(Clone, Copy)]
pub(super) struct Sink {
    y: *mut f32,
    /// Elements from one row of activations to the next.
    stride: usize,
}

// SAFETY: a Sink is only a place; who writes through it promises to write alone (`write`, `at`).
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

impl Sink {
    const NONE: Sink = Sink { y: std::ptr::null_mut(), stride: 0 };

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

thread_local! {
    // Taken while in use: a task of another product may run on this thread meanwhile.
    static QUANTIZED: Cell<Quantized> = Cell::default();
}

/// Several weights that share the input x `[m, cols]`: `ys[i]` `[m, rows of i]` = x W_i^T, in one parallel region.
///
/// With integer activations a token's result depends on that token alone, and is the same on every backend, bit for bit.
///
/// # Panics
/// Shapes do not fit, or more than 4 weights.
pub fn matmul_fused(activations: Activations, weights: &[&Weight], x: &[f32], m: usize, ys: &mut [&mut [f32]]) {
    assert_eq!(weights.len(), ys.len(), "an output for each weight");
    assert!(weights.len() <= FUSED, "at most {FUSED} weights");
    for (w, y) in weights.iter().zip(ys.iter()) {
        assert_eq!(Some(x.len()), m.checked_mul(w.cols), "x is [m, cols]");
        assert_eq!(Some(y.len()), m.checked_mul(w.rows), "y is [m, rows]");
    }
    let Some(first) = weights.first() else { return };
    if m == 0 {
        return;
    }
    let mut sinks = [Sink::NONE; FUSED];
    for ((s, y), w) in sinks.iter_mut().zip(ys).zip(weights) {
        *s = Sink { y: y.as_mut_ptr(), stride: w.rows };
    }
    let mut quantized = QUANTIZED.take();
    if weights.iter().any(|w| w.integers(activations)) {
        quantized.fill(first.isa, activations.parts(), x, first.cols);
    }
    let plan = Plan::new(activations, weights, m);
    let work = |i: usize| {
        let (at, panels, strips) = plan.task(weights, i);
        // SAFETY: tasks are disjoint parts of the outputs (`Plan`), and each output is [m, w.rows].
        unsafe { multiply(activations, weights[at], panels, x, m, &quantized, strips, sinks[at]) }
    };
    threads::for_each(plan.tasks(), work);
    QUANTIZED.set(quantized);
}

impl Weight {
    fn integers(&self, activations: Activations) -> bool {
        activations != Activations::F32 && !self.ty.is_float()
    }

    fn panels(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }
}

/// Tasks: chunks of strips, and for each the panels of every weight in parts.
struct Plan {
    /// Panels of a task of each weight.
    each: [usize; FUSED],
    parts: usize,
    strips: usize,
    chunk: usize,
}

impl Plan {
    fn new(activations: Activations, weights: &[&Weight], m: usize) -> Plan {
        let strips = m.div_ceil(STRIP);
        let wanted = TASKS * threads::count();
        let total: usize = weights.iter().map(|w| w.panels()).sum();
        let chunk = if weights.iter().all(|w| w.integers(activations)) {
            (CHUNK / (STRIP * weights[0].cols / BLOCK * stride(activations.parts()) * 4)).max(1)
        } else {
            // Panels are dequantized for each chunk anew; still something for every thread.
            strips.div_ceil((wanted / total.max(1)).max(1))
        };
        let chunks = strips.div_ceil(chunk);
        let each = std::array::from_fn(|i| {
            let Some(w) = weights.get(i) else { return 1 };
            let most = if m == 1 { usize::MAX } else { PANELS };
            let least = (LEAST_BYTES * w.panels() / w.bytes().max(1)).clamp(1, most);
            (chunks * total / wanted).clamp(least, most)
        });
        let parts = weights.iter().zip(each).map(|(w, each)| w.panels().div_ceil(each)).sum();
        Plan { each, parts, strips, chunk }
    }

    fn tasks(&self) -> usize {
        self.parts * self.strips.div_ceil(self.chunk)
    }

    /// Weight, panels and strips of task i.
    fn task(&self, weights: &[&Weight], i: usize) -> (usize, Range<usize>, Range<usize>) {
        let (first, mut part) = (i / self.parts * self.chunk, i % self.parts);
        let strips = first..self.strips.min(first + self.chunk);
        for (at, w) in weights.iter().enumerate() {
            let parts = w.panels().div_ceil(self.each[at]);
            if part < parts {
                let panel = part * self.each[at];
                return (at, panel..w.panels().min(panel + self.each[at]), strips);
            }
            part -= parts;
        }
        unreachable!("a task beyond the last")
    }
}

/// `x` is all of the activations, `quantized` the same where this weight's product takes integers.
///
/// # Safety
/// Nothing else writes these panels' rows of these strips' tokens of `out`, whose shape is [m, w.rows].
unsafe fn multiply(
    activations: Activations,
    w: &Weight,
    panels: Range<usize>,
    x: &[f32],
    m: usize,
    quantized: &Quantized,
    of: Range<usize>,
    out: Sink,
) {
    if w.integers(activations) {
        assert_eq!((quantized.tokens(), quantized.parts()), (m, activations.parts()));
        return match w.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a Weight's instruction set is one that the CPU has; else passed on.
            Isa::Avx512 => unsafe { integers::products::<avx512::Integers>(w, panels, quantized, of, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { integers::products::<avx2::Integers>(w, panels, quantized, of, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above; the extension was detected.
            Isa::Neon if std::arch::is_aarch64_feature_detected!("dotprod") => unsafe {
                integers::products::<neon::Integers<true>>(w, panels, quantized, of, out)
            },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Isa::Neon => unsafe { integers::products::<neon::Integers<false>>(w, panels, quantized, of, out) },
            // SAFETY: passed on.
            _ => unsafe { integers::products::<integers::Plain>(w, panels, quantized, of, out) },
        };
    }
    let mut strips = strips(m, STRIP).skip(of.start).take(of.len());
    let first = strips.next().expect("a task has strips");
    let tokens = first.start..strips.last().map_or(first.end, |s| s.end);
    let x = &x[tokens.start * w.cols..tokens.end * w.cols];
    // SAFETY: in bounds of the output.
    let out = Sink { y: unsafe { out.at(tokens.start, 0) }, ..out };
    let m = tokens.len();
    match w.isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Weight's instruction set is one that the CPU has; else passed on.
        Isa::Avx512 => unsafe { floats::products::<avx512::Floats>(w, panels, x, m, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { floats::products::<avx2::Floats>(w, panels, x, m, out) },
        // SAFETY: passed on.
        _ => unsafe { floats::products::<floats::Plain>(w, panels, x, m, out) },
    }
}
