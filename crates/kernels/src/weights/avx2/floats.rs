//! F32, F16 and BF16 in runs of 32.

use std::arch::x86_64::*;

use super::{Format, Run, part};

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Format<128> for F32 {
    const RUNS: usize = 1;
    const PLAIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 128]) {}

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 128], _: &(), _: usize) -> Run {
        // SAFETY: 32 readable bytes, four times.
        let q = [0, 1, 2, 3].map(|j| unsafe { _mm256_loadu_ps(part::<32, 128>(b, 32 * j).as_ptr().cast()) });
        Run { q, dm: _mm_setzero_ps() }
    }
}

impl Format<64> for F16 {
    const RUNS: usize = 1;
    const PLAIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 64]) {}

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 64], _: &(), _: usize) -> Run {
        Run { q: [0, 1, 2, 3].map(|j| _mm256_cvtph_ps(words(b, j))), dm: _mm_setzero_ps() }
    }
}

impl Format<64> for Bf16 {
    const RUNS: usize = 1;
    const PLAIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 64]) {}

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 64], _: &(), _: usize) -> Run {
        let q = [0, 1, 2, 3].map(|j| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words(b, j)))));
        Run { q, dm: _mm_setzero_ps() }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn words(b: &[u8; 64], j: usize) -> __m128i {
    // SAFETY: 16 readable bytes.
    unsafe { _mm_loadu_si128(part::<16, 64>(b, 16 * j).as_ptr().cast()) }
}
