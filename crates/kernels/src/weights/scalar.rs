//! The mathematics of integer products, in plain loops. Every other backend gives the same bits: sums of codes are
//! exact, and the sums over blocks run in this order, each a fused multiply-add.

use super::Weight;
use super::activations::{LOWER, Quantized, WORDS, stride};
use super::layout::{self, BLOCK, Line, ROWS};
use super::product::Sink;

/// out = x W^T for a panel's rows and the tokens of one strip.
///
/// # Safety
/// Nothing else writes these elements of `out`, whose shape is [tokens, w.rows].
pub(super) unsafe fn strip(w: &Weight, panel: usize, x: &Quantized, strip: usize, out: Sink) {
    let l = layout::layout(w.ty).expect("a type with codes");
    let (codes, scales) = w.packed.panel(panel);
    let scales = Line::bytes(scales);
    let (first, m, words) = x.strip(strip);
    let parts = x.parts();
    let width = BLOCK / l.groups();
    for r in 0..ROWS.min(w.rows - panel * ROWS) {
        for t in 0..m {
            let mut y = 0.0f32;
            for (b, words) in words.chunks_exact(m * stride(parts)).enumerate() {
                let block = &codes[b * l.bits()..][..l.bits()];
                let meta = &words[parts * m * WORDS..];
                let x_scale = f32::from_bits(meta[t]);
                for g in 0..l.groups() {
                    let mut sum = 0i32;
                    for c in g * width..(g + 1) * width {
                        let part = |p: usize| words[(p * m + t) * WORDS + c / 4].to_le_bytes()[c % 4] as i8 as i32;
                        let x = if parts == 1 { part(0) } else { (part(0) << LOWER) + part(1) };
                        sum += (l.code(block, r, c) - l.center) * x;
                    }
                    let (d, min) = l.scale(scales, b, g, r);
                    y = (sum as f32).mul_add(d * x_scale, y);
                    if l.min() {
                        let of = if l.groups() == 1 { 0 } else { 1 + g };
                        y = min.mul_add(f32::from_bits(meta[(4 + of) * m + t]), y);
                    }
                }
            }
            // SAFETY: the caller's promise.
            unsafe { out.write(first + t, panel * ROWS + r, y) };
        }
    }
}
