//! Products with f32 activations: panels are dequantized to `[column][16 rows]` once and multiplied with tiles of
//! tokens. For weights that are floats, and for those that want no rounding of activations (calibration, evaluation).
//!
//! Sums run over the columns in order, in parts of [`DEPTH`]; a result depends on no other token.

use std::cell::RefCell;
use std::ops::Range;

use super::activations::strips;
use super::layout::ROWS;
use super::product::Sink;
use super::{Weight, pack};

/// Columns of a dequantized part: 16 rows of it are 48 KB, in L2 whatever else there is.
const DEPTH: usize = 768;

/// A column of a panel.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Lanes(pub [f32; ROWS]);

impl Lanes {
    pub const ZERO: Lanes = Lanes([0.0; ROWS]);
}

/// A strip's part of the activations `[m, cols]`: tokens from `x` on, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Tokens {
    pub x: *const f32,
    pub stride: usize,
}

/// What a backend brings.
pub(super) trait Kernel {
    /// Tokens of a tile, at most 12.
    const TOKENS: usize;

    /// Columns `first..first + out.len()` of a panel; whole blocks where the type has codes.
    ///
    /// # Safety
    /// The CPU has what the backend uses.
    unsafe fn dequant(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]);

    /// Products of P panels with M tokens.
    ///
    /// # Safety
    /// As above; the tokens are readable for as many columns as the panels, which are equally long, have.
    unsafe fn tile<const M: usize, const P: usize>(panels: [&[Lanes]; P], x: Tokens, sums: &mut [[Lanes; M]; P]);
}

thread_local! {
    static PANELS: RefCell<Vec<Lanes>> = const { RefCell::new(Vec::new()) };
}

/// out = x W^T for some panels and all tokens; x `[m, cols]`.
///
/// # Safety
/// The CPU has what K uses. Nothing else writes these rows of `out`, whose shape is [m, w.rows].
pub(super) unsafe fn products<K: Kernel>(w: &Weight, panels: Range<usize>, x: &[f32], m: usize, out: Sink) {
    assert_eq!(x.len(), m * w.cols);
    PANELS.with_borrow_mut(|scratch| {
        for start in (0..w.cols).step_by(DEPTH) {
            let depth = DEPTH.min(w.cols - start);
            // Four panels at a time: with few tokens, one sum waits for itself.
            for first in panels.clone().step_by(4) {
                let n = (panels.end - first).min(4);
                scratch.resize(4 * DEPTH, Lanes::ZERO);
                for (p, to) in scratch.chunks_exact_mut(depth).take(n).enumerate() {
                    // SAFETY: passed on.
                    unsafe { K::dequant(w, first + p, start, to) };
                }
                let group = Group { w, first, n, panels: &scratch[..n * depth], depth, start, out };
                for strip in strips(m, K::TOKENS) {
                    let x = Tokens { x: x[strip.start * w.cols + start..].as_ptr(), stride: w.cols };
                    // SAFETY: the strip lies in x, and has `depth` columns from `start` on; else passed on.
                    unsafe {
                        match strip.len() {
                            1 => group.by::<K, 1, 4>(strip.start, x),
                            2 => group.by::<K, 2, 2>(strip.start, x),
                            3 => group.by::<K, 3, 2>(strip.start, x),
                            4 => group.by::<K, 4, 1>(strip.start, x),
                            5 => group.by::<K, 5, 1>(strip.start, x),
                            6 => group.by::<K, 6, 1>(strip.start, x),
                            7 => group.by::<K, 7, 1>(strip.start, x),
                            8 => group.by::<K, 8, 1>(strip.start, x),
                            9 => group.by::<K, 9, 1>(strip.start, x),
                            10 => group.by::<K, 10, 1>(strip.start, x),
                            11 => group.by::<K, 11, 1>(strip.start, x),
                            _ => group.by::<K, 12, 1>(strip.start, x),
                        }
                    }
                }
            }
        }
    });
}

/// Dequantized panels `first..first + n`, columns from `start` on.
struct Group<'a> {
    w: &'a Weight,
    first: usize,
    n: usize,
    panels: &'a [Lanes],
    depth: usize,
    start: usize,
    out: Sink,
}

impl Group<'_> {
    /// Panels by P, the last ones alone.
    ///
    /// # Safety
    /// As [`products`], for M tokens.
    #[inline(always)]
    unsafe fn by<K: Kernel, const M: usize, const P: usize>(&self, token: usize, x: Tokens) {
        let even = self.n / P * P;
        // SAFETY: passed on.
        unsafe {
            for p in (0..even).step_by(P) {
                let mut sums = [[Lanes::ZERO; M]; P];
                K::tile::<M, P>(std::array::from_fn(|i| self.panel(p + i)), x, &mut sums);
                self.add(token, p, &sums);
            }
            for p in even..self.n {
                let mut sums = [[Lanes::ZERO; M]; 1];
                K::tile::<M, 1>([self.panel(p)], x, &mut sums);
                self.add(token, p, &sums);
            }
        }
    }

    fn panel(&self, p: usize) -> &[Lanes] {
        &self.panels[p * self.depth..][..self.depth]
    }

    /// # Safety
    /// As [`products`].
    #[inline(always)]
    unsafe fn add<const M: usize, const P: usize>(&self, token: usize, p: usize, sums: &[[Lanes; M]; P]) {
        for (p, sums) in (p..).zip(sums) {
            let row = (self.first + p) * ROWS;
            let width = ROWS.min(self.w.rows - row);
            for (t, sums) in (token..).zip(sums) {
                // SAFETY: `width` elements of row t are ours.
                let y = unsafe { std::slice::from_raw_parts_mut(self.out.at(t, row), width) };
                let sums = &sums.0[..width];
                // Whole rows apart, so that they are vectors.
                match (self.start, <&mut [f32; ROWS]>::try_from(&mut *y)) {
                    (0, _) => y.copy_from_slice(sums),
                    (_, Ok(y)) => y.iter_mut().zip(sums).for_each(|(y, s)| *y += s),
                    (_, Err(_)) => y.iter_mut().zip(sums).for_each(|(y, s)| *y += s),
                }
            }
        }
    }
}

/// The twin, which the compiler makes NEON of on aarch64.
pub(super) struct Plain;

impl Kernel for Plain {
    const TOKENS: usize = 4;

    unsafe fn dequant(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]) {
        pack::dequant_panel(w, panel, first, out);
    }

    unsafe fn tile<const M: usize, const P: usize>(panels: [&[Lanes]; P], x: Tokens, sums: &mut [[Lanes; M]; P]) {
        for c in 0..panels[0].len() {
            for p in 0..P {
                for t in 0..M {
                    // SAFETY: the caller's promise.
                    let x = unsafe { *x.x.add(t * x.stride + c) };
                    for r in 0..ROWS {
                        sums[p][t].0[r] += panels[p][c].0[r] * x;
                    }
                }
            }
        }
    }
}
