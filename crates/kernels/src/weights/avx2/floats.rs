//! f32 activations: tiles of 6 tokens x 16 rows in 12 registers.

use std::arch::x86_64::*;

use super::{scale, unpack};
use crate::weights::floats::{Kernel, Lanes, Tokens};
use crate::weights::layout::{BLOCK, Format, Line, with_format};
use crate::weights::{Weight, WeightType};

/// AVX2, FMA and F16C.
pub(in super::super) struct Floats;

impl Kernel for Floats {
    const TOKENS: usize = 6;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dequant(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]) {
        // SAFETY: passed on.
        unsafe { with_format!(w.ty, F => codes::<F>(w, panel, first, out), floats => floats(w, panel, first, out)) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const M: usize, const P: usize>(panels: [&[Lanes]; P], x: Tokens, sums: &mut [[Lanes; M]; P]) {
        let mut acc = [[[_mm256_setzero_ps(); 2]; M]; P];
        for c in 0..panels[0].len() {
            for p in 0..P {
                // SAFETY: panels are equally long; the tokens have as many columns.
                unsafe {
                    let w: *const f32 = panels[p].as_ptr().add(c).cast();
                    let (a, z) = (_mm256_load_ps(w), _mm256_load_ps(w.add(8)));
                    for t in 0..M {
                        let x = _mm256_broadcast_ss(&*x.x.add(t * x.stride + c));
                        acc[p][t] = [_mm256_fmadd_ps(x, a, acc[p][t][0]), _mm256_fmadd_ps(x, z, acc[p][t][1])];
                    }
                }
            }
        }
        for (sums, acc) in sums.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
            // SAFETY: 8 aligned floats, twice.
            unsafe {
                _mm256_store_ps(sums.0.as_mut_ptr(), acc[0]);
                _mm256_store_ps(sums.0.as_mut_ptr().add(8), acc[1]);
            }
        }
    }
}

/// # Safety
/// As [`Kernel::dequant`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn codes<F: Format>(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]) {
    let (codes, scales) = w.packed.panel(panel);
    let scales = Line::bytes(scales).as_ptr();
    assert!(first + out.len() <= w.cols);
    let center = _mm256_set1_epi32(F::L.center);
    for (i, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let b = first / BLOCK + i;
        for half in 0..2 {
            // SAFETY: block b of the panel (asserted above).
            let (vectors, group) = unsafe {
                let group = |g: usize| scale::<F>(scales, b, g % F::L.groups(), half);
                (unpack::<F>(codes.as_ptr().add(b * F::L.bits()), half), [group(0), group(1)])
            };
            for (k, v) in vectors.into_iter().enumerate() {
                let (d, m) = group[k * F::L.groups() / 8];
                for j in 0..4 {
                    let code = _mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * j as i32));
                    let code = _mm256_sub_epi32(_mm256_and_si256(code, _mm256_set1_epi32(255)), center);
                    let mut value = _mm256_mul_ps(d, _mm256_cvtepi32_ps(code));
                    if F::L.min() {
                        value = _mm256_add_ps(value, m);
                    }
                    // SAFETY: 8 aligned floats.
                    unsafe { _mm256_store_ps(out[4 * k + j].0.as_mut_ptr().add(8 * half), value) };
                }
            }
        }
    }
}

/// # Safety
/// As [`Kernel::dequant`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]) {
    assert!(first + out.len() <= w.cols);
    let bytes = Line::bytes(w.packed.panel(panel).0).as_ptr();
    for (i, out) in out.iter_mut().enumerate() {
        for half in 0..2 {
            // SAFETY: column first + i of the panel, 16 floats of the type; 16 aligned floats of `out`.
            unsafe {
                let at = |size: usize| bytes.add(((first + i) * 16 + 8 * half) * size);
                let value = match w.ty {
                    WeightType::F32 => _mm256_loadu_ps(at(4).cast()),
                    WeightType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(at(2).cast())),
                    _ => {
                        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at(2).cast()));
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                    }
                };
                _mm256_store_ps(out.0.as_mut_ptr().add(8 * half), value);
            }
        }
    }
}
