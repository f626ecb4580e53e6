//! Integer activations: `vpmaddubsw` multiplies unsigned codes with signed activations and adds neighbours in 16 bits.
//! As many of them as can't overflow are added in 16 bits before `vpmaddwd` widens: 8 of codes up to 4 bits, 4 of 5 bits,
//! 2 of 6 bits. Codes of 8 bits go as magnitudes, with their signs on the activations, one at a time.

use std::arch::x86_64::*;

use super::{scale, unpack};
use crate::weights::Weight;
use crate::weights::activations::{LOWER, WORDS, stride};
use crate::weights::integers::Kernel;
use crate::weights::layout::{BLOCK, Format, Line, ROWS};
use crate::weights::product::Sink;

/// Vectors whose products can be added in 16 bits: 2 x 127 x the largest code each.
const fn together<F: Format>() -> usize {
    match F::L.bits() {
        0..=4 => 8,
        5 => 4,
        6 => 2,
        _ => 1,
    }
}

/// AVX2, FMA and F16C.
pub(in super::super) struct Integers;

impl Kernel for Integers {
    #[target_feature(enable = "avx2,fma,f16c")]
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
        let together = together::<F>();
        let (ones, center) = (_mm256_set1_epi16(1), _mm256_set1_epi8(F::L.center as u8 as i8));
        let mut acc = [[_mm256_setzero_ps(); 2]; M];
        for b in 0..blocks {
            for half in 0..2 {
                // SAFETY: block b of the panel; words of block b, as `activations` draws them.
                unsafe {
                    let mut c = unpack::<F>(codes.as_ptr().add(b * F::L.bits()), half);
                    let mut signs = c;
                    if F::L.bits() == 8 {
                        for (c, s) in c.iter_mut().zip(&mut signs) {
                            *s = _mm256_sub_epi8(*c, center);
                            *c = _mm256_abs_epi8(*s);
                        }
                    }
                    let x = words.as_ptr().add(b * M * stride(PARTS));
                    let meta = x.add(PARTS * M * WORDS);
                    let word = |at: *const u32| _mm256_set1_epi32(at.read() as i32);
                    let float = |at: *const u32| _mm256_set1_ps(f32::from_bits(at.read()));
                    for g in 0..groups {
                        let (d, min) = scale::<F>(scales, b, g, half);
                        let of = if groups == 1 { 0 } else { 1 + g };
                        for t in 0..M {
                            let mut sum = _mm256_setzero_si256();
                            for part in 0..PARTS {
                                sum = _mm256_sll_epi32(sum, _mm_cvtsi32_si128(if part == 0 { 0 } else { LOWER }));
                                let mut short = _mm256_setzero_si256();
                                for k in g * WORDS / groups..(g + 1) * WORDS / groups {
                                    let mut x = word(x.add((part * M + t) * WORDS + k));
                                    if F::L.bits() == 8 {
                                        x = _mm256_sign_epi8(x, signs[k]);
                                    }
                                    let product = _mm256_maddubs_epi16(c[k], x);
                                    short = if k % together == 0 { product } else { _mm256_add_epi16(short, product) };
                                    if (k + 1) % together == 0 || (k + 1) % (WORDS / groups) == 0 {
                                        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(short, ones));
                                    }
                                }
                            }
                            if F::L.bits() < 8 && F::L.center != 0 {
                                let all = word(meta.add((1 + of) * M + t));
                                let shift = _mm_cvtsi32_si128(F::L.center.trailing_zeros() as i32);
                                sum = _mm256_sub_epi32(sum, _mm256_sll_epi32(all, shift));
                            }
                            let d = _mm256_mul_ps(d, float(meta.add(t)));
                            acc[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, acc[t][half]);
                            if F::L.min() {
                                acc[t][half] = _mm256_fmadd_ps(min, float(meta.add((4 + of) * M + t)), acc[t][half]);
                            }
                        }
                    }
                }
            }
        }
        let width = ROWS.min(w.rows - panel * ROWS);
        for t in 0..M {
            let mut row = [0.0f32; ROWS];
            // SAFETY: 16 floats of `row`; `width` elements of this row of `out` are ours.
            unsafe {
                _mm256_storeu_ps(row.as_mut_ptr(), acc[t][0]);
                _mm256_storeu_ps(row.as_mut_ptr().add(8), acc[t][1]);
                std::slice::from_raw_parts_mut(out.at(first + t, panel * ROWS), width).copy_from_slice(&row[..width]);
            }
        }
    }
}
