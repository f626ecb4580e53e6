//! AVX2, FMA and F16C. Departures from the plain loops:
//! - a run of 32 weights is decoded to four vectors of codes ([`Format`]); a product sums code x activation and
//!   multiplies by the run's scale once, and a minimum (or the centre of a signed code) meets the run's sum of
//!   activations, which is known before: 14 to 19 vector instructions a run;
//! - sums run in another order. Dequantization multiplies and adds apart, so it is bit-exact.

mod floats;
mod k;
mod nibbles;
pub(super) mod tile;

use std::arch::x86_64::*;
use std::ops::Range;

use super::product::{RUN, Rows, Sink};
use super::{Weight, WeightType, blocks};

/// 32 weights: `dm[0] * (q - CENTER) + dm[1]`; `dm[2..]` are 0.
pub(super) struct Run {
    pub q: [__m256; 4],
    pub dm: __m128,
}

/// How a block of B bytes becomes runs. The methods need AVX2, FMA and F16C.
pub(super) trait Format<const B: usize> {
    /// Runs of a block.
    const RUNS: usize;
    /// What is subtracted from a code.
    const CENTER: f32 = 0.0;
    /// Whether `dm[1]` may differ from 0.
    const MIN: bool = false;
    /// Whether q already are the weights; `dm` is not looked at.
    const PLAIN: bool = false;
    /// What is decoded once a block.
    type Head;
    /// # Safety
    /// AVX2, FMA and F16C.
    unsafe fn head(b: &[u8; B]) -> Self::Head;
    /// # Safety
    /// AVX2, FMA and F16C.
    unsafe fn run(b: &[u8; B], head: &Self::Head, i: usize) -> Run;
}

/// Calls a function for the format of a weight type: `$f::<B, Format, ..>(args)`.
macro_rules! for_format {
    ($ty:expr, $f:ident $(, $m:expr)?; $($arg:expr),*) => {
        match $ty {
            WeightType::F32 => $f::<128, floats::F32 $(, $m)?>($($arg),*),
            WeightType::F16 => $f::<64, floats::F16 $(, $m)?>($($arg),*),
            WeightType::Bf16 => $f::<64, floats::Bf16 $(, $m)?>($($arg),*),
            WeightType::Q4_0 => $f::<18, nibbles::Q40 $(, $m)?>($($arg),*),
            WeightType::Q4_1 => $f::<20, nibbles::Q41 $(, $m)?>($($arg),*),
            WeightType::Q5_0 => $f::<22, nibbles::Q50 $(, $m)?>($($arg),*),
            WeightType::Q5_1 => $f::<24, nibbles::Q51 $(, $m)?>($($arg),*),
            WeightType::Q8_0 => $f::<34, nibbles::Q80 $(, $m)?>($($arg),*),
            WeightType::Q2K => $f::<84, k::Q2K $(, $m)?>($($arg),*),
            WeightType::Q3K => $f::<110, k::Q3K $(, $m)?>($($arg),*),
            WeightType::Q4K => $f::<144, k::Q4K $(, $m)?>($($arg),*),
            WeightType::Q5K => $f::<176, k::Q5K $(, $m)?>($($arg),*),
            WeightType::Q6K => $f::<210, k::Q6K $(, $m)?>($($arg),*),
        }
    };
}

/// Products of weight rows with 1 to 4 rows of activations.
///
/// # Safety
/// AVX2, FMA and F16C; nothing else writes these rows of `out`, whose shape is [x.m, w.rows].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn few(w: &Weight, rows: Range<usize>, x: &Rows<'_>, out: Sink) {
    // SAFETY: passed on.
    unsafe {
        match x.m {
            1 => for_format!(w.ty, products, 1; w, rows, x, out),
            2 => for_format!(w.ty, products, 2; w, rows, x, out),
            3 => for_format!(w.ty, products, 3; w, rows, x, out),
            _ => for_format!(w.ty, products, 4; w, rows, x, out),
        }
    }
}

/// # Safety
/// As [`few`], with M = x.m.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products<const B: usize, F: Format<B>, const M: usize>(
    w: &Weight,
    rows: Range<usize>,
    x: &Rows<'_>,
    out: Sink,
) {
    assert!(x.m == M && x.x.len() == M * w.cols && x.sums.len() == M * (w.cols / RUN));
    let runs = w.cols / RUN;
    for r in rows {
        let (blocks, tail) = w.row(r).as_chunks::<B>();
        let mut acc = [_mm256_setzero_ps(); M];
        let mut side = [_mm_setzero_ps(); M];
        for (at, b) in blocks.iter().enumerate() {
            // SAFETY: the caller has the features.
            let head = unsafe { F::head(b) };
            for i in 0..F::RUNS {
                // SAFETY: as above.
                let run = unsafe { F::run(b, &head, i) };
                let n = at * F::RUNS + i;
                debug_assert!(n < runs);
                for t in 0..M {
                    // SAFETY: a row has `runs` runs and x has M rows of `cols` elements (asserted above).
                    let (x, sum) =
                        unsafe { (x.x.as_ptr().add(t * w.cols + n * RUN), *x.sums.get_unchecked(t * runs + n)) };
                    // SAFETY: as above: 32 readable floats.
                    let v = |j: usize| unsafe { _mm256_loadu_ps(x.add(8 * j)) };
                    let mut s = _mm256_mul_ps(run.q[0], v(0));
                    s = _mm256_fmadd_ps(run.q[1], v(1), s);
                    s = _mm256_fmadd_ps(run.q[2], v(2), s);
                    s = _mm256_fmadd_ps(run.q[3], v(3), s);
                    if F::PLAIN {
                        acc[t] = _mm256_add_ps(s, acc[t]);
                    } else {
                        acc[t] = _mm256_fmadd_ps(_mm256_broadcastss_ps(run.dm), s, acc[t]);
                    }
                    if F::MIN || F::CENTER != 0.0 {
                        side[t] = _mm_fmadd_ps(run.dm, _mm_set1_ps(sum), side[t]);
                    }
                }
            }
        }
        for t in 0..M {
            let mut y = sum(acc[t]);
            if F::MIN {
                y += _mm_cvtss_f32(_mm_movehdup_ps(side[t]));
            }
            if F::CENTER != 0.0 {
                y -= F::CENTER * _mm_cvtss_f32(side[t]);
            }
            if !tail.is_empty() {
                y += tail_product(w.ty, tail, &x.x[(t + 1) * w.cols - w.cols % RUN..][..w.cols % RUN]);
            }
            // SAFETY: the caller gives this row to us alone.
            unsafe { out.write(t, r, y) };
        }
    }
}

/// What is left of a row of floats beyond the last run.
#[cold]
pub(super) fn tail_product(ty: WeightType, tail: &[u8], x: &[f32]) -> f32 {
    let mut w = [0.0; RUN];
    blocks::dequant(ty, tail, &mut w[..x.len()]);
    w.iter().zip(x).map(|(w, x)| w * x).sum()
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// Whole blocks and, of floats, any number of elements, bit for bit as [`blocks::dequant`].
///
/// # Safety
/// AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn dequant(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    // SAFETY: passed on.
    unsafe { for_format!(ty, dequant_as; ty, bytes, out) }
}

/// # Safety
/// AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dequant_as<const B: usize, F: Format<B>>(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    let (blocks, tail) = bytes.as_chunks::<B>();
    let (whole, rest) = out.split_at_mut(blocks.len() * F::RUNS * RUN);
    for (b, to) in blocks.iter().zip(whole.chunks_exact_mut(F::RUNS * RUN)) {
        // SAFETY: the caller has the features.
        let head = unsafe { F::head(b) };
        for (i, to) in to.as_chunks_mut::<RUN>().0.iter_mut().enumerate() {
            // SAFETY: as above.
            let run = unsafe { F::run(b, &head, i) };
            let (d, m) = (_mm256_broadcastss_ps(run.dm), _mm256_broadcastss_ps(_mm_movehdup_ps(run.dm)));
            for (q, to) in run.q.into_iter().zip(to.as_chunks_mut::<8>().0) {
                let mut v = q;
                if F::CENTER != 0.0 {
                    v = _mm256_sub_ps(v, _mm256_set1_ps(F::CENTER));
                }
                if !F::PLAIN {
                    v = _mm256_mul_ps(d, v);
                }
                if F::MIN {
                    v = _mm256_add_ps(v, m);
                }
                // SAFETY: 8 writable floats.
                unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) };
            }
        }
    }
    blocks::dequant(ty, tail, rest);
}

/// The first half (d), or with N = 2 halves d and m, at the start of `b`; the rest is 0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn halves<const N: usize>(b: &[u8]) -> __m128 {
    let bits =
        if N == 1 { u16::from_le_bytes([b[0], b[1]]) as u32 } else { u32::from_le_bytes([b[0], b[1], b[2], b[3]]) };
    _mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32))
}

/// 8 unsigned bytes as 32-bit lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen(b: &[u8; 8]) -> __m256i {
    // SAFETY: 8 readable bytes.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(b.as_ptr().cast()) })
}

/// 32 signed bytes as floats.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn floats_of(b: __m256i) -> [__m256; 4] {
    let (low, high) = (_mm256_castsi256_si128(b), _mm256_extracti128_si256::<1>(b));
    [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)]
        .map(|x| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)))
}

/// The `N` bytes at `at`.
#[inline(always)]
pub(super) fn part<const N: usize, const B: usize>(b: &[u8; B], at: usize) -> &[u8; N] {
    b[at..].first_chunk().expect("formats ask for bytes of their block")
}
