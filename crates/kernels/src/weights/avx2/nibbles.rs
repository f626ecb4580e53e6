//! The types with blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Codes are widened straight from memory, so that
//! a low nibble costs one mask and a high one one shift.

use std::arch::x86_64::*;

use super::{Format, Run, halves, part, widen};

pub(super) struct Q40;
pub(super) struct Q41;
pub(super) struct Q50;
pub(super) struct Q51;
pub(super) struct Q80;

/// 16 bytes as 32 codes: low nibbles, then high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn codes(b: &[u8; 16]) -> [__m256i; 4] {
    let (a, z, low) = (widen(part(b, 0)), widen(part(b, 8)), _mm256_set1_epi32(15));
    [_mm256_and_si256(a, low), _mm256_and_si256(z, low), _mm256_srli_epi32::<4>(a), _mm256_srli_epi32::<4>(z)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn four(b: &[u8; 16]) -> [__m256; 4] {
    codes(b).map(|q| _mm256_cvtepi32_ps(q))
}

/// 16 for each set bit of a byte of `bits`, in four vectors.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fifth(bits: &[u8; 4]) -> [__m256i; 4] {
    let place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    bits.map(|b| {
        let all = _mm256_set1_epi32((b as i32) << 4);
        _mm256_and_si256(_mm256_srlv_epi32(all, place), _mm256_set1_epi32(16))
    })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn five(low: &[u8; 16], high: &[u8; 4]) -> [__m256; 4] {
    let (low, high) = (codes(low), fifth(high));
    [0, 1, 2, 3].map(|j| _mm256_cvtepi32_ps(_mm256_or_si256(low[j], high[j])))
}

impl Format<18> for Q40 {
    const RUNS: usize = 1;
    const CENTER: f32 = 8.0;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 18]) {}

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 18], _: &(), _: usize) -> Run {
        Run { q: four(part(b, 2)), dm: halves::<1>(b) }
    }
}

impl Format<20> for Q41 {
    const RUNS: usize = 1;
    const MIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 20]) {}

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 20], _: &(), _: usize) -> Run {
        Run { q: four(part(b, 4)), dm: halves::<2>(b) }
    }
}

impl Format<22> for Q50 {
    const RUNS: usize = 1;
    const CENTER: f32 = 16.0;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 22]) {}

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 22], _: &(), _: usize) -> Run {
        Run { q: five(part(b, 6), part(b, 2)), dm: halves::<1>(b) }
    }
}

impl Format<24> for Q51 {
    const RUNS: usize = 1;
    const MIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 24]) {}

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 24], _: &(), _: usize) -> Run {
        Run { q: five(part(b, 8), part(b, 4)), dm: halves::<2>(b) }
    }
}

impl Format<34> for Q80 {
    const RUNS: usize = 1;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 34]) {}

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 34], _: &(), _: usize) -> Run {
        let q = [0, 1, 2, 3].map(|j| {
            // SAFETY: 8 readable bytes.
            let codes = unsafe { _mm_loadl_epi64(part::<8, 34>(b, 2 + 8 * j).as_ptr().cast()) };
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))
        });
        Run { q, dm: halves::<1>(b) }
    }
}
