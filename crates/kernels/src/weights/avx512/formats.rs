//! Runs of every type but Q2_K and Q3_K.

use std::arch::x86_64::*;

use super::{Format, Run};
use crate::weights::avx2::k::{q6k_scales, six_bits, two};
use crate::weights::avx2::{halves, part};

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q40;
pub(super) struct Q41;
pub(super) struct Q50;
pub(super) struct Q51;
pub(super) struct Q80;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

/// 16 unsigned bytes as 32-bit lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn widen(b: &[u8; 16]) -> __m512i {
    // SAFETY: 16 readable bytes.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(b.as_ptr().cast()) })
}

/// 16 signed bytes as floats.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn signed(b: &[u8; 16]) -> __m512 {
    // SAFETY: 16 readable bytes.
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(b.as_ptr().cast()) }))
}

/// 16 words as 32-bit lanes' source.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn words(b: &[u8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes.
    unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
}

/// The floats `-center..16 - center`; a permute of it reads the low 4 bits of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn table(center: f32) -> __m512 {
    let codes = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
    _mm512_sub_ps(codes, _mm512_set1_ps(center))
}

/// 16 bytes as 32 codes minus `center`: low nibbles, then high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn nibbles(b: &[u8; 16], center: f32) -> [__m512; 2] {
    let b = widen(b);
    [_mm512_permutexvar_ps(b, table(center)), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(b), table(center))]
}

/// As [`nibbles`], with a fifth bit from `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn fives(b: &[u8; 16], high: &[u8; 4], center: f32) -> [__m512; 2] {
    let ([a, z], high, more) = (nibbles(b, center), u32::from_le_bytes(*high), _mm512_set1_ps(16.0));
    [_mm512_mask_add_ps(a, high as u16, a, more), _mm512_mask_add_ps(z, (high >> 16) as u16, z, more)]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn shifted(x: __m512i, by: usize) -> __m512i {
    _mm512_srl_epi32(x, _mm_cvtsi32_si128(by as i32))
}

impl Format<128> for F32 {
    const RUNS: usize = 1;
    const PLAIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 128]) {}

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 128], _: &(), _: usize) -> Run {
        // SAFETY: 64 readable bytes, twice.
        let q = [0, 1].map(|j| unsafe { _mm512_loadu_ps(part::<64, 128>(b, 64 * j).as_ptr().cast()) });
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
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 64], _: &(), _: usize) -> Run {
        Run { q: [0, 1].map(|j| _mm512_cvtph_ps(words(part(b, 32 * j)))), dm: _mm_setzero_ps() }
    }
}

impl Format<64> for Bf16 {
    const RUNS: usize = 1;
    const PLAIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 64]) {}

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 64], _: &(), _: usize) -> Run {
        let q = [0, 1].map(|j| _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words(part(b, 32 * j)))));
        Run { q: q.map(|q| _mm512_castsi512_ps(q)), dm: _mm_setzero_ps() }
    }
}

impl Format<18> for Q40 {
    const RUNS: usize = 1;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 18]) {}

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 18], _: &(), _: usize) -> Run {
        Run { q: nibbles(part(b, 2), 8.0), dm: halves::<1>(b) }
    }
}

impl Format<20> for Q41 {
    const RUNS: usize = 1;
    const MIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 20]) {}

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 20], _: &(), _: usize) -> Run {
        Run { q: nibbles(part(b, 4), 0.0), dm: halves::<2>(b) }
    }
}

impl Format<22> for Q50 {
    const RUNS: usize = 1;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 22]) {}

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 22], _: &(), _: usize) -> Run {
        Run { q: fives(part(b, 6), part(b, 2), 16.0), dm: halves::<1>(b) }
    }
}

impl Format<24> for Q51 {
    const RUNS: usize = 1;
    const MIN: bool = true;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 24]) {}

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 24], _: &(), _: usize) -> Run {
        Run { q: fives(part(b, 8), part(b, 4), 0.0), dm: halves::<2>(b) }
    }
}

impl Format<34> for Q80 {
    const RUNS: usize = 1;
    type Head = ();

    #[inline(always)]
    unsafe fn head(_: &[u8; 34]) {}

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn run(b: &[u8; 34], _: &(), _: usize) -> Run {
        Run { q: [signed(part(b, 2)), signed(part(b, 18))], dm: halves::<1>(b) }
    }
}

/// 16 codes: the nibbles at `shift`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn nibble(b: &[u8; 16], shift: usize) -> __m512 {
    _mm512_permutexvar_ps(shifted(widen(b), shift), table(0.0))
}

/// 16 more where bit i is set.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn add_bit(q: __m512, bits: &[u8; 16], i: usize) -> __m512 {
    let set = _mm512_test_epi32_mask(widen(bits), _mm512_set1_epi32(1 << i));
    _mm512_mask_add_ps(q, set, q, _mm512_set1_ps(16.0))
}

/// 16 codes of 6 bits minus 32, times a scale.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn six(low: &[u8; 16], low_shift: usize, high: &[u8; 16], high_shift: usize, scale: f32) -> __m512 {
    let low = _mm512_and_si512(shifted(widen(low), low_shift), _mm512_set1_epi32(15));
    let high = _mm512_and_si512(_mm512_slli_epi32::<4>(shifted(widen(high), high_shift)), _mm512_set1_epi32(48));
    let code = _mm512_sub_epi32(_mm512_or_si512(low, high), _mm512_set1_epi32(32));
    _mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(scale))
}

impl Format<144> for Q4K {
    const RUNS: usize = 8;
    const MIN: bool = true;
    type Head = [[f32; 2]; 8];

    #[inline(always)]
    unsafe fn head(b: &[u8; 144]) -> [[f32; 2]; 8] {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe { six_bits(b) }
    }

    #[inline(always)]
    unsafe fn run(b: &[u8; 144], head: &[[f32; 2]; 8], i: usize) -> Run {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let (at, shift) = (16 + 32 * (i / 2), 4 * (i % 2));
            let q = [nibble(part(b, at), shift), nibble(part(b, at + 16), shift)];
            Run { q, dm: two(&head[i]) }
        }
    }
}

impl Format<176> for Q5K {
    const RUNS: usize = 8;
    const MIN: bool = true;
    type Head = [[f32; 2]; 8];

    #[inline(always)]
    unsafe fn head(b: &[u8; 176]) -> [[f32; 2]; 8] {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe { six_bits(b) }
    }

    #[inline(always)]
    unsafe fn run(b: &[u8; 176], head: &[[f32; 2]; 8], i: usize) -> Run {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let (at, shift) = (48 + 32 * (i / 2), 4 * (i % 2));
            let q = [nibble(part(b, at), shift), nibble(part(b, at + 16), shift)];
            let q = [add_bit(q[0], part(b, 16), i), add_bit(q[1], part(b, 32), i)];
            Run { q, dm: two(&head[i]) }
        }
    }
}

impl Format<210> for Q6K {
    const RUNS: usize = 8;
    const PLAIN: bool = true;
    type Head = [f32; 16];

    #[inline(always)]
    unsafe fn head(b: &[u8; 210]) -> [f32; 16] {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe { q6k_scales(b) }
    }

    #[inline(always)]
    unsafe fn run(b: &[u8; 210], head: &[f32; 16], i: usize) -> Run {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let (low, high) = (64 * (i / 4) + 32 * (i % 2), 128 + 32 * (i / 4));
            let (down, up) = (4 * (i % 4 / 2), 2 * (i % 4));
            let q = [
                six(part(b, low), down, part(b, high), up, head[2 * i]),
                six(part(b, low + 16), down, part(b, high + 16), up, head[2 * i + 1]),
            ];
            Run { q, dm: _mm_setzero_ps() }
        }
    }
}
