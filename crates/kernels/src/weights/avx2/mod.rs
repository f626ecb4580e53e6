//! AVX2, FMA and F16C. A line of the layout is two vectors: 8 rows each, 4 columns. Products are those of the twins,
//! bit for bit where activations are integers.

mod floats;
mod integers;

pub(super) use floats::Floats;
pub(super) use integers::Integers;

use std::arch::x86_64::*;

use super::layout::{Format, Layout, Line, SUPER, Scales};

/// The 8 vectors of codes of a block, of its rows `8 * half..`.
///
/// # Safety
/// AVX2; `block` has as many lines as a code has bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<F: Format>(block: *const Line, half: usize) -> [__m256i; 8] {
    let mut codes = [_mm256_setzero_si256(); 8];
    // SAFETY: lines of this block, and a half of each.
    let line = |i: usize| unsafe { _mm256_load_si256(block.add(i).cast::<__m256i>().add(half)) };
    for (k, code) in codes.iter_mut().enumerate() {
        let (at, shift) = Layout::place(F::L.low, k);
        *code = line(at);
        if F::L.low < 8 {
            let mask = _mm256_set1_epi8(((1u16 << F::L.low) - 1) as i8);
            *code = _mm256_and_si256(_mm256_srl_epi16(*code, _mm_cvtsi32_si128(shift as i32)), mask);
        }
        if F::L.high > 0 {
            let (at, shift) = Layout::place(F::L.high, k);
            let upper = line(F::L.low + at);
            let upper = if shift <= F::L.low {
                _mm256_sll_epi16(upper, _mm_cvtsi32_si128((F::L.low - shift) as i32))
            } else {
                _mm256_srl_epi16(upper, _mm_cvtsi32_si128((shift - F::L.low) as i32))
            };
            let mask = _mm256_set1_epi8((((1u16 << F::L.high) - 1) << F::L.low) as i8);
            *code = _mm256_or_si256(*code, _mm256_and_si256(upper, mask));
        }
    }
    codes
}

/// d and m of group g of block b, rows `8 * half..`; m is 0 where the layout has none.
///
/// # Safety
/// AVX2, F16C; `scales` are those of a panel that has block b.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale<F: Format>(scales: *const u8, b: usize, g: usize, half: usize) -> (__m256, __m256) {
    let (at, within) = match F::L.scales {
        Scales::Half | Scales::HalfMin => (b, 0),
        _ => (b / SUPER, b % SUPER),
    };
    // SAFETY: the layout's drawing says what lies where.
    unsafe {
        let s = scales.add(at * F::L.scale_stride());
        let halves = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(s.add(at + 16 * half).cast()));
        let bytes = |at: usize| _mm_loadl_epi64(s.add(at + 8 * half).cast());
        let zero = _mm256_setzero_ps();
        match F::L.scales {
            Scales::Half => (halves(0), zero),
            Scales::HalfMin => (halves(0), halves(32)),
            Scales::Signed => {
                let scale = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(32 + 16 * (2 * within + g))));
                (_mm256_mul_ps(halves(0), scale), zero)
            }
            Scales::BytesMin => {
                let scale = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes(64 + 32 * within)));
                let min = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes(80 + 32 * within)));
                (_mm256_mul_ps(halves(0), scale), negative(_mm256_mul_ps(halves(32), min)))
            }
            Scales::NibblesMin => {
                let both = _mm256_cvtepu8_epi32(bytes(64 + 16 * (2 * within + g)));
                let scale = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
                let min = _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(both));
                (_mm256_mul_ps(halves(0), scale), negative(_mm256_mul_ps(halves(32), min)))
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn negative(x: __m256) -> __m256 {
    _mm256_xor_ps(x, _mm256_set1_ps(-0.0))
}
