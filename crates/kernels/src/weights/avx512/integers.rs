//! Integer activations: one `vpdpbusd` multiplies 64 codes with 4 activations that 16 rows share.
//!
//! Of a block and a token that is 8 of them, one conversion, one multiplication of scales and one or two fused
//! multiply-adds: 10 or 11 operations on the multipliers for 512 products, where f32 takes 32.

use std::arch::x86_64::*;

use super::{scale, unpack};
use crate::weights::Weight;
use crate::weights::activations::{LOWER, WORDS, stride};
use crate::weights::integers::Kernel;
use crate::weights::layout::{BLOCK, Format, Line, ROWS};
use crate::weights::product::Sink;

/// AVX-512 F, BW, DQ, VL, VNNI.
pub(in super::super) struct Integers;

impl Kernel for Integers {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
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
        let scales = Line::bytes(scales).as_ptr();
        let mut acc = [_mm512_setzero_ps(); M];
        for b in 0..blocks {
            // SAFETY: block b of the panel; words of block b, as `activations` draws them.
            unsafe {
                let c = unpack::<F>(codes.as_ptr().add(b * F::L.bits()));
                let x = words.as_ptr().add(b * M * stride(PARTS));
                let meta = x.add(PARTS * M * WORDS);
                let word = |at: *const u32| _mm512_set1_epi32(at.read() as i32);
                let float = |at: *const u32| _mm512_set1_ps(f32::from_bits(at.read()));
                for g in 0..groups {
                    let (d, min) = scale::<F>(scales, b, g);
                    let of = if groups == 1 { 0 } else { 1 + g };
                    for t in 0..M {
                        let mut sum = _mm512_setzero_si512();
                        for part in 0..PARTS {
                            sum = _mm512_sll_epi32(sum, _mm_cvtsi32_si128(if part == 0 { 0 } else { LOWER }));
                            for k in g * WORDS / groups..(g + 1) * WORDS / groups {
                                sum = _mm512_dpbusd_epi32(sum, c[k], word(x.add((part * M + t) * WORDS + k)));
                            }
                        }
                        if F::L.center != 0 {
                            let all = word(meta.add((1 + of) * M + t));
                            let shift = _mm_cvtsi32_si128(F::L.center.trailing_zeros() as i32);
                            sum = _mm512_sub_epi32(sum, _mm512_sll_epi32(all, shift));
                        }
                        let d = _mm512_mul_ps(d, float(meta.add(t)));
                        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), d, acc[t]);
                        if F::L.min() {
                            acc[t] = _mm512_fmadd_ps(min, float(meta.add((4 + of) * M + t)), acc[t]);
                        }
                    }
                }
            }
        }
        let width = ROWS.min(w.rows - panel * ROWS);
        let mask = ((1u32 << width) - 1) as u16;
        for t in 0..M {
            // SAFETY: `width` elements of this row are ours; the others are masked.
            unsafe { _mm512_mask_storeu_ps(out.at(first + t, panel * ROWS), mask, acc[t]) };
        }
    }
}
