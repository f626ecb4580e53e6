//! f32 activations: tiles of 12 tokens x 16 rows in 12 registers.

use std::arch::x86_64::*;

use super::{scale, unpack};
use crate::weights::floats::{Kernel, Lanes, Tokens};
use crate::weights::layout::{BLOCK, Format, Line, with_format};
use crate::weights::{Weight, WeightType};

/// AVX-512 F, BW, DQ, VL.
pub(in super::super) struct Floats;

impl Kernel for Floats {
    const TOKENS: usize = 12;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn dequant(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]) {
        // SAFETY: passed on.
        unsafe { with_format!(w.ty, F => codes::<F>(w, panel, first, out), floats => floats(w, panel, first, out)) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn tile<const M: usize, const P: usize>(panels: [&[Lanes]; P], x: Tokens, sums: &mut [[Lanes; M]; P]) {
        let mut acc = [[_mm512_setzero_ps(); M]; P];
        for c in 0..panels[0].len() {
            for p in 0..P {
                // SAFETY: panels are equally long; the tokens have as many columns.
                unsafe {
                    let w = _mm512_load_ps(panels[p].as_ptr().add(c).cast());
                    for t in 0..M {
                        acc[p][t] = _mm512_fmadd_ps(_mm512_set1_ps(*x.x.add(t * x.stride + c)), w, acc[p][t]);
                    }
                }
            }
        }
        for (sums, acc) in sums.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
            // SAFETY: 16 aligned floats.
            unsafe { _mm512_store_ps(sums.0.as_mut_ptr(), *acc) };
        }
    }
}

/// # Safety
/// As [`Kernel::dequant`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn codes<F: Format>(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]) {
    let (codes, scales) = w.packed.panel(panel);
    let scales = Line::bytes(scales).as_ptr();
    assert!(first + out.len() <= w.cols);
    let center = _mm512_set1_epi32(F::L.center);
    for (i, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let b = first / BLOCK + i;
        // SAFETY: block b of the panel (asserted above).
        let (vectors, group) = unsafe {
            let group = |g: usize| scale::<F>(scales, b, g % F::L.groups());
            (unpack::<F>(codes.as_ptr().add(b * F::L.bits())), [group(0), group(1)])
        };
        for (k, v) in vectors.into_iter().enumerate() {
            let (d, m) = group[k * F::L.groups() / 8];
            for j in 0..4 {
                let code = _mm512_srl_epi32(v, _mm_cvtsi32_si128(8 * j as i32));
                let code = _mm512_sub_epi32(_mm512_and_si512(code, _mm512_set1_epi32(255)), center);
                let mut value = _mm512_mul_ps(d, _mm512_cvtepi32_ps(code));
                if F::L.min() {
                    value = _mm512_add_ps(value, m);
                }
                // SAFETY: 16 aligned floats.
                unsafe { _mm512_store_ps(out[4 * k + j].0.as_mut_ptr(), value) };
            }
        }
    }
}

/// # Safety
/// As [`Kernel::dequant`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn floats(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]) {
    assert!(first + out.len() <= w.cols);
    let bytes = Line::bytes(w.packed.panel(panel).0).as_ptr();
    for (i, out) in out.iter_mut().enumerate() {
        // SAFETY: column first + i of the panel, 16 floats of the type; 16 aligned floats of `out`.
        unsafe {
            let at = |size: usize| bytes.add((first + i) * 16 * size);
            let value = match w.ty {
                WeightType::F32 => _mm512_loadu_ps(at(4).cast()),
                WeightType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at(2).cast())),
                _ => {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at(2).cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            };
            _mm512_store_ps(out.0.as_mut_ptr(), value);
        }
    }
}
