//! Products with integer activations: panels times strips of tokens.
//!
//! Every backend gives the same bits: sums of codes are exact, and the sums over blocks run in one order, each a fused
//! multiply-add.

use std::ops::Range;

use super::Weight;
use super::activations::{LOWER, Quantized, WORDS, stride};
use super::layout::{BLOCK, Format, Line, ROWS, with_format};
use super::product::Sink;

/// What a backend brings.
pub(super) trait Kernel {
    /// out = x W^T for a panel's rows and a strip of M tokens from `first` on, integers of PARTS bytes.
    ///
    /// # Safety
    /// The CPU has what the backend uses; nothing else writes these elements of `out`, whose shape is
    /// [tokens, w.rows].
    unsafe fn strip<F: Format, const PARTS: usize, const M: usize>(
        w: &Weight,
        panel: usize,
        words: &[u32],
        first: usize,
        out: Sink,
    );
}

/// out = x W^T for some panels and strips of a weight with codes.
///
/// # Safety
/// As [`Kernel::strip`], for all of them.
pub(super) unsafe fn products<K: Kernel>(
    w: &Weight,
    panels: Range<usize>,
    x: &Quantized,
    strips: Range<usize>,
    out: Sink,
) {
    // SAFETY: passed on.
    unsafe {
        with_format!(w.ty, F => match x.parts() {
            1 => each::<K, F, 1>(w, panels, x, strips, out),
            _ => each::<K, F, 2>(w, panels, x, strips, out),
        }, floats => unreachable!("no codes"))
    }
}

/// # Safety
/// As [`products`].
unsafe fn each<K: Kernel, F: Format, const PARTS: usize>(
    w: &Weight,
    panels: Range<usize>,
    x: &Quantized,
    strips: Range<usize>,
    out: Sink,
) {
    for panel in panels {
        for s in strips.clone() {
            let (first, m, words) = x.strip(s);
            // SAFETY: passed on.
            unsafe {
                match m {
                    1 => K::strip::<F, PARTS, 1>(w, panel, words, first, out),
                    2 => K::strip::<F, PARTS, 2>(w, panel, words, first, out),
                    3 => K::strip::<F, PARTS, 3>(w, panel, words, first, out),
                    4 => K::strip::<F, PARTS, 4>(w, panel, words, first, out),
                    5 => K::strip::<F, PARTS, 5>(w, panel, words, first, out),
                    6 => K::strip::<F, PARTS, 6>(w, panel, words, first, out),
                    7 => K::strip::<F, PARTS, 7>(w, panel, words, first, out),
                    _ => K::strip::<F, PARTS, 8>(w, panel, words, first, out),
                }
            }
        }
    }
}

/// The twin: the mathematics in plain loops.
pub(super) struct Plain;

impl Kernel for Plain {
    unsafe fn strip<F: Format, const PARTS: usize, const M: usize>(
        w: &Weight,
        panel: usize,
        words: &[u32],
        first: usize,
        out: Sink,
    ) {
        let l = F::L;
        let (codes, scales) = w.packed.panel(panel);
        let scales = Line::bytes(scales);
        let width = BLOCK / l.groups();
        for r in 0..ROWS.min(w.rows - panel * ROWS) {
            for t in 0..M {
                let mut y = 0.0f32;
                for (b, words) in words.chunks_exact(M * stride(PARTS)).enumerate() {
                    let block = &codes[b * l.bits()..][..l.bits()];
                    let meta = &words[PARTS * M * WORDS..];
                    let x_scale = f32::from_bits(meta[t]);
                    for g in 0..l.groups() {
                        let mut sum = 0i32;
                        for c in g * width..(g + 1) * width {
                            let part = |p: usize| words[(p * M + t) * WORDS + c / 4].to_le_bytes()[c % 4] as i8 as i32;
                            let x = if PARTS == 1 { part(0) } else { (part(0) << LOWER) + part(1) };
                            sum += (l.code(block, r, c) - l.center) * x;
                        }
                        let (d, min) = l.scale(scales, b, g, r);
                        y = (sum as f32).mul_add(d * x_scale, y);
                        if l.min() {
                            let of = if l.groups() == 1 { 0 } else { 1 + g };
                            y = min.mul_add(f32::from_bits(meta[(4 + of) * M + t]), y);
                        }
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { out.write(first + t, panel * ROWS + r, y) };
            }
        }
    }
}
