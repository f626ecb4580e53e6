//! NEON on aarch64. A line of the layout is four vectors: 4 rows each, 4 columns. With the dot product extension `sdot`
//! multiplies 16 codes with 4 activations that all rows share; without it, `smull` and `sadalp` do the same in four steps.
//! Products are those of the twin, bit for bit. Codes of 8 bits are taken as signed, which is their center gone.

use std::arch::aarch64::*;

use super::Weight;
use super::activations::{LOWER, WORDS, stride};
use super::integers::Kernel;
use super::layout::{BLOCK, Format, Layout, Line, ROWS};
use super::product::Sink;
use crate::neon::dot;

/// NEON, and the dot product extension where DOT.
pub(super) struct Integers<const DOT: bool>;

/// Vector k of 4 rows from `4 * quarter` on.
///
/// # Safety
/// NEON; `block` has as many lines as a code has bits.
#[inline(always)]
unsafe fn unpack<F: Format>(block: *const Line, quarter: usize, k: usize) -> int8x16_t {
    // SAFETY: lines of this block, and a quarter of each.
    unsafe {
        let line = |i: usize| vld1q_u8(block.add(i).cast::<u8>().add(16 * quarter));
        let (at, shift) = Layout::place(F::L.low, k);
        let mut code = line(at);
        if F::L.low == 8 {
            return vreinterpretq_s8_u8(veorq_u8(code, vdupq_n_u8(0x80)));
        }
        let mask = vdupq_n_u8(((1u16 << F::L.low) - 1) as u8);
        code = vandq_u8(vshlq_u8(code, vdupq_n_s8(-(shift as i8))), mask);
        if F::L.high > 0 {
            let (at, shift) = Layout::place(F::L.high, k);
            let upper = vshlq_u8(line(F::L.low + at), vdupq_n_s8(F::L.low as i8 - shift as i8));
            let mask = vdupq_n_u8((((1u16 << F::L.high) - 1) << F::L.low) as u8);
            code = vorrq_u8(code, vandq_u8(upper, mask));
        }
        vreinterpretq_s8_u8(code)
    }
}

impl<const DOT: bool> Kernel for Integers<DOT> {
    unsafe fn strip<F: Format, const PARTS: usize, const M: usize>(
        w: &Weight,
        panel: usize,
        words: &[u32],
        first: usize,
        out: Sink,
    ) {
        let (codes, scales) = w.packed.panel(panel);
        let (blocks, groups) = (w.cols / BLOCK, F::L.groups());
        assert_eq!(words.len(), blocks * M * stride(PARTS));
        let scales = Line::bytes(scales);
        let mut acc = [[0.0f32; ROWS]; M];
        for b in 0..blocks {
            let x = &words[b * M * stride(PARTS)..][..M * stride(PARTS)];
            let meta = &x[PARTS * M * WORDS..];
            for g in 0..groups {
                let of = if groups == 1 { 0 } else { 1 + g };
                let scale: [(f32, f32); ROWS] = std::array::from_fn(|r| F::L.scale(scales, b, g, r));
                let (d, min) = (scale.map(|s| s.0), scale.map(|s| s.1));
                for quarter in 0..4 {
                    // SAFETY: block b of the panel; 4 rows of each array; words of a token in this block.
                    unsafe {
                        let mut c = [vdupq_n_s8(0); WORDS];
                        for k in g * WORDS / groups..(g + 1) * WORDS / groups {
                            c[k] = unpack::<F>(codes.as_ptr().add(b * F::L.bits()), quarter, k);
                        }
                        let d = vld1q_f32(d.as_ptr().add(4 * quarter));
                        let min = vld1q_f32(min.as_ptr().add(4 * quarter));
                        for t in 0..M {
                            let mut sum = vdupq_n_s32(0);
                            for part in 0..PARTS {
                                sum = vshlq_s32(sum, vdupq_n_s32(if part == 0 { 0 } else { LOWER }));
                                for k in g * WORDS / groups..(g + 1) * WORDS / groups {
                                    let four = vreinterpretq_s8_u32(vdupq_n_u32(x[(part * M + t) * WORDS + k]));
                                    sum = dot::<DOT>(sum, c[k], four);
                                }
                            }
                            if F::L.low < 8 && F::L.center != 0 {
                                let all = (meta[(1 + of) * M + t] as i32).wrapping_mul(F::L.center);
                                sum = vsubq_s32(sum, vdupq_n_s32(all));
                            }
                            let to = acc[t].as_mut_ptr().add(4 * quarter);
                            let d = vmulq_n_f32(d, f32::from_bits(meta[t]));
                            let mut y = vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sum), d);
                            if F::L.min() {
                                y = vfmaq_n_f32(y, min, f32::from_bits(meta[(4 + of) * M + t]));
                            }
                            vst1q_f32(to, y);
                        }
                    }
                }
            }
        }
        let width = ROWS.min(w.rows - panel * ROWS);
        for (t, acc) in acc.iter().enumerate() {
            for (r, y) in acc[..width].iter().enumerate() {
                // SAFETY: these elements are ours.
                unsafe { out.write(first + t, panel * ROWS + r, *y) };
            }
        }
    }
}
