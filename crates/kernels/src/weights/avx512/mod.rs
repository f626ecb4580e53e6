//! AVX-512. A vector is a line of the layout: 16 rows, 4 columns. Products are those of the twins, bit for bit where
//! activations are integers.

mod floats;
mod integers;

pub(super) use floats::Floats;
pub(super) use integers::Integers;

use std::arch::x86_64::*;

use super::layout::{Format, Layout, Line, SUPER, Scales};

/// The 8 vectors of codes of a block.
///
/// # Safety
/// AVX-512 F and BW; `block` has as many lines as a code has bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn unpack<F: Format>(block: *const Line) -> [__m512i; 8] {
    let mut codes = [_mm512_setzero_si512(); 8];
    // SAFETY: lines of this block.
    let line = |i: usize| unsafe { _mm512_load_si512(block.add(i).cast()) };
    for (k, code) in codes.iter_mut().enumerate() {
        let (at, shift) = Layout::place(F::L.low, k);
        *code = line(at);
        if F::L.low < 8 {
            let mask = _mm512_set1_epi8(((1u16 << F::L.low) - 1) as i8);
            *code = _mm512_and_si512(_mm512_srl_epi16(*code, _mm_cvtsi32_si128(shift as i32)), mask);
        }
        if F::L.high > 0 {
            let (at, shift) = Layout::place(F::L.high, k);
            let upper = line(F::L.low + at);
            let upper = if shift <= F::L.low {
                _mm512_sll_epi16(upper, _mm_cvtsi32_si128((F::L.low - shift) as i32))
            } else {
                _mm512_srl_epi16(upper, _mm_cvtsi32_si128((shift - F::L.low) as i32))
            };
            let mask = _mm512_set1_epi8((((1u16 << F::L.high) - 1) << F::L.low) as i8);
            *code = _mm512_or_si512(*code, _mm512_and_si512(upper, mask));
        }
    }
    codes
}

/// d and m of group g of block b; m is 0 where the layout has none.
///
/// # Safety
/// AVX-512 F; `scales` are those of a panel that has block b.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn scale<F: Format>(scales: *const u8, b: usize, g: usize) -> (__m512, __m512) {
    let (at, within) = match F::L.scales {
        Scales::Half | Scales::HalfMin => (b, 0),
        _ => (b / SUPER, b % SUPER),
    };
    // SAFETY: the layout's drawing says what lies where.
    unsafe {
        let s = scales.add(at * F::L.scale_stride());
        let half = |at: usize| _mm512_cvtph_ps(_mm256_loadu_si256(s.add(at).cast()));
        let byte = |at: usize| _mm_loadu_si128(s.add(at).cast());
        let zero = _mm512_setzero_ps();
        match F::L.scales {
            Scales::Half => (half(0), zero),
            Scales::HalfMin => (half(0), half(32)),
            Scales::Signed => {
                let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(byte(32 + 16 * (2 * within + g))));
                (_mm512_mul_ps(half(0), scale), zero)
            }
            Scales::BytesMin => {
                let scale = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(byte(64 + 32 * within)));
                let min = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(byte(80 + 32 * within)));
                (_mm512_mul_ps(half(0), scale), negative(_mm512_mul_ps(half(32), min)))
            }
            Scales::NibblesMin => {
                let both = _mm512_cvtepu8_epi32(byte(64 + 16 * (2 * within + g)));
                let scale = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
                let min = _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(both));
                (_mm512_mul_ps(half(0), scale), negative(_mm512_mul_ps(half(32), min)))
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn negative(x: __m512) -> __m512 {
    _mm512_xor_ps(x, _mm512_set1_ps(-0.0))
}
