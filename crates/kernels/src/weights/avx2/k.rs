//! The types with blocks of 256. Q4_K and Q5_K have a scale and a minimum a run; Q2_K, Q3_K and Q6_K have one for
//! each 16, so that their runs are decoded to weights.

use std::arch::x86_64::*;

use super::{Format, Run, floats_of, halves, part};
use crate::weights::blocks;

pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bytes<const B: usize>(b: &[u8; B], at: usize) -> __m256i {
    // SAFETY: 32 readable bytes.
    unsafe { _mm256_loadu_si256(part::<32, B>(b, at).as_ptr().cast()) }
}

/// `(b >> shift) & mask` in every byte; `mask` must keep nothing that came from the next byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn field(b: __m256i, shift: usize, mask: i8) -> __m256i {
    _mm256_and_si256(_mm256_srl_epi16(b, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi8(mask))
}

/// (d s, -m n) of the 8 runs of Q4_K and Q5_K.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn six_bits<const B: usize>(b: &[u8; B]) -> [[f32; 2]; 8] {
    const LOW_6: u32 = 0x3f3f_3f3f;
    const LOW_4: u32 = 0x0f0f_0f0f;
    const LOW_2: u32 = 0x0303_0303;
    let word = |at| u32::from_le_bytes(*part::<4, B>(b, at));
    let (s, n, both) = (word(4), word(8), word(12));
    // Four of each to a word: runs 0..4 in the low 6 bits; runs 4..8 in nibbles, with their upper bits atop the former.
    let scales = (s & LOW_6) as u64 | ((both & LOW_4 | (s >> 6 & LOW_2) << 4) as u64) << 32;
    let mins = (n & LOW_6) as u64 | ((both >> 4 & LOW_4 | (n >> 6 & LOW_2) << 4) as u64) << 32;
    let dm = halves::<2>(b);
    let float = |x: u64| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x as i64)));
    let d = _mm256_mul_ps(_mm256_broadcastss_ps(dm), float(scales));
    let m = _mm256_mul_ps(_mm256_broadcastss_ps(_mm_movehdup_ps(dm)), float(mins));
    let m = _mm256_xor_ps(m, _mm256_set1_ps(-0.0));
    let (low, high) = (_mm256_unpacklo_ps(d, m), _mm256_unpackhi_ps(d, m));
    let mut out = [[0.0; 2]; 8];
    let to: *mut f32 = out.as_mut_ptr().cast();
    // SAFETY: 16 writable floats.
    unsafe {
        _mm256_storeu_ps(to, _mm256_permute2f128_ps::<0x20>(low, high));
        _mm256_storeu_ps(to.add(8), _mm256_permute2f128_ps::<0x31>(low, high));
    }
    out
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn two(x: &[f32; 2]) -> __m128 {
    // SAFETY: 8 readable bytes.
    _mm_castsi128_ps(unsafe { _mm_loadl_epi64(x.as_ptr().cast()) })
}

impl Format<144> for Q4K {
    const RUNS: usize = 8;
    const MIN: bool = true;
    type Head = [[f32; 2]; 8];

    #[inline(always)]
    unsafe fn head(b: &[u8; 144]) -> Self::Head {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe { six_bits(b) }
    }

    #[inline(always)]
    unsafe fn run(b: &[u8; 144], head: &Self::Head, i: usize) -> Run {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe { Run { q: floats_of(field(bytes(b, 16 + 32 * (i / 2)), 4 * (i % 2), 15)), dm: two(&head[i]) } }
    }
}

impl Format<176> for Q5K {
    const RUNS: usize = 8;
    const MIN: bool = true;
    type Head = [[f32; 2]; 8];

    #[inline(always)]
    unsafe fn head(b: &[u8; 176]) -> Self::Head {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe { six_bits(b) }
    }

    #[inline(always)]
    unsafe fn run(b: &[u8; 176], head: &Self::Head, i: usize) -> Run {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let low = field(bytes(b, 48 + 32 * (i / 2)), 4 * (i % 2), 15);
            let high = _mm256_slli_epi16::<4>(field(bytes(b, 16), i, 1));
            Run { q: floats_of(_mm256_or_si256(low, high)), dm: two(&head[i]) }
        }
    }
}

/// Two scales on the halves of a run.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled(q: [__m256; 4], s: [f32; 2]) -> [__m256; 4] {
    let (a, z) = (_mm256_set1_ps(s[0]), _mm256_set1_ps(s[1]));
    [_mm256_mul_ps(a, q[0]), _mm256_mul_ps(a, q[1]), _mm256_mul_ps(z, q[2]), _mm256_mul_ps(z, q[3])]
}

impl Format<84> for Q2K {
    const RUNS: usize = 8;
    const PLAIN: bool = true;
    /// d and m.
    type Head = [f32; 2];

    #[inline(always)]
    unsafe fn head(b: &[u8; 84]) -> Self::Head {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let dm = halves::<2>(part::<4, 84>(b, 80));
            [_mm_cvtss_f32(dm), _mm_cvtss_f32(_mm_movehdup_ps(dm))]
        }
    }

    #[inline(always)]
    unsafe fn run(b: &[u8; 84], [d, m]: &Self::Head, i: usize) -> Run {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let s = *part::<2, 84>(b, 2 * i);
            let q = floats_of(field(bytes(b, 16 + 32 * (i / 4)), 2 * (i % 4), 3));
            let q = scaled(q, [d * (s[0] & 15) as f32, d * (s[1] & 15) as f32]);
            let n = [_mm256_set1_ps(m * (s[0] >> 4) as f32), _mm256_set1_ps(m * (s[1] >> 4) as f32)];
            let low = [_mm256_sub_ps(q[0], n[0]), _mm256_sub_ps(q[1], n[0])];
            let high = [_mm256_sub_ps(q[2], n[1]), _mm256_sub_ps(q[3], n[1])];
            Run { q: [low[0], low[1], high[0], high[1]], dm: _mm_setzero_ps() }
        }
    }
}

impl Format<110> for Q3K {
    const RUNS: usize = 8;
    const PLAIN: bool = true;
    /// Scales of the 16 halves of runs.
    type Head = [f32; 16];

    #[inline(always)]
    unsafe fn head(b: &[u8; 110]) -> Self::Head {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let d = _mm_cvtss_f32(halves::<1>(part::<2, 110>(b, 108)));
            std::array::from_fn(|i| d * blocks::scale_q3k(part(b, 96), i))
        }
    }

    #[inline(always)]
    unsafe fn run(b: &[u8; 110], head: &Self::Head, i: usize) -> Run {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let low = field(bytes(b, 32 + 32 * (i / 4)), 2 * (i % 4), 3);
            let third = _mm256_slli_epi16::<2>(field(bytes(b, 0), i, 1));
            let q = floats_of(_mm256_sub_epi8(_mm256_or_si256(low, third), _mm256_set1_epi8(4)));
            Run { q: scaled(q, [head[2 * i], head[2 * i + 1]]), dm: _mm_setzero_ps() }
        }
    }
}

/// d s of the halves of runs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn q6k_scales(b: &[u8; 210]) -> [f32; 16] {
    let d = _mm256_broadcastss_ps(halves::<1>(part::<2, 210>(b, 208)));
    let mut out = [0.0; 16];
    for (to, at) in out.as_chunks_mut::<8>().0.iter_mut().zip([192, 200]) {
        // SAFETY: 8 readable bytes and 8 writable floats.
        unsafe {
            let s = _mm256_cvtepi8_epi32(_mm_loadl_epi64(part::<8, 210>(b, at).as_ptr().cast()));
            _mm256_storeu_ps(to.as_mut_ptr(), _mm256_mul_ps(d, _mm256_cvtepi32_ps(s)));
        }
    }
    out
}

impl Format<210> for Q6K {
    const RUNS: usize = 8;
    const PLAIN: bool = true;
    /// Scales of the 16 halves of runs.
    type Head = [f32; 16];

    #[inline(always)]
    unsafe fn head(b: &[u8; 210]) -> Self::Head {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe { q6k_scales(b) }
    }

    #[inline(always)]
    unsafe fn run(b: &[u8; 210], head: &Self::Head, i: usize) -> Run {
        // SAFETY: the caller has the features; bytes are within the block.
        unsafe {
            let (half, at) = (i / 4, i % 4);
            let low = field(bytes(b, 64 * half + 32 * (at % 2)), 4 * (at / 2), 15);
            let high = _mm256_slli_epi16::<4>(field(bytes(b, 128 + 32 * half), 2 * at, 3));
            let q = floats_of(_mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32)));
            Run { q: scaled(q, [head[2 * i], head[2 * i + 1]]), dm: _mm_setzero_ps() }
        }
    }
}
