//! AVX2, FMA and F16C. Departures from the plain loops:
//! - a run of 32 weights is decoded to four vectors of codes ([`Format`]). For one token, code x activation is summed
//!   and multiplied by the run's scale once, and a minimum (or the centre of a signed code) meets the run's sum of
//!   activations, which is known before: 14 to 19 vector instructions a run. For more tokens, codes are made
//!   weights first;
//! - sums run in another order. Dequantization multiplies and adds apart, so it is bit-exact.

mod floats;
pub(super) mod k;
mod nibbles;
pub(super) mod tile;

use std::arch::x86_64::*;
use std::ops::Range;

use super::product::{Lanes, RUN, Rows, Sink};
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
    type Head: Copy + Default;
    /// # Safety
    /// AVX2, FMA and F16C.
    unsafe fn head(b: &[u8; B]) -> Self::Head;
    /// # Safety
    /// AVX2, FMA and F16C.
    unsafe fn run(b: &[u8; B], head: &Self::Head, i: usize) -> Run;
}

/// Calls a function for the format of a weight type: `$f::<B, Format, ..>(args)`.
macro_rules! for_format {
    ($ty:expr, $f:ident; $($arg:expr),*) => {
        match $ty {
            WeightType::F32 => $f::<128, floats::F32>($($arg),*),
            WeightType::F16 => $f::<64, floats::F16>($($arg),*),
            WeightType::Bf16 => $f::<64, floats::Bf16>($($arg),*),
            WeightType::Q4_0 => $f::<18, nibbles::Q40>($($arg),*),
            WeightType::Q4_1 => $f::<20, nibbles::Q41>($($arg),*),
            WeightType::Q5_0 => $f::<22, nibbles::Q50>($($arg),*),
            WeightType::Q5_1 => $f::<24, nibbles::Q51>($($arg),*),
            WeightType::Q8_0 => $f::<34, nibbles::Q80>($($arg),*),
            WeightType::Q2K => $f::<84, k::Q2K>($($arg),*),
            WeightType::Q3K => $f::<110, k::Q3K>($($arg),*),
            WeightType::Q4K => $f::<144, k::Q4K>($($arg),*),
            WeightType::Q5K => $f::<176, k::Q5K>($($arg),*),
            WeightType::Q6K => $f::<210, k::Q6K>($($arg),*),
        }
    };
}

/// Products of weight rows with few rows of activations.
///
/// # Safety
/// AVX2, FMA and F16C; nothing else writes these rows of `out`, whose shape is [x.len(), w.rows].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn few(w: &Weight, rows: Range<usize>, x: &Rows, out: Sink) {
    // SAFETY: passed on.
    unsafe { for_format!(w.ty, by_tokens; w, rows, x, out) }
}

/// # Safety
/// As [`few`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn by_tokens<const B: usize, F: Format<B>>(w: &Weight, rows: Range<usize>, x: &Rows, out: Sink) {
    for tokens in tile::strips(x.len(), 4) {
        // SAFETY: passed on.
        unsafe {
            match tokens.len() {
                1 => pairs::<B, F, 1, 1>(w, rows.clone(), x, tokens.start, out),
                2 => pairs::<B, F, 2, 2>(w, rows.clone(), x, tokens.start, out),
                3 => pairs::<B, F, 3, 1>(w, rows.clone(), x, tokens.start, out),
                _ => pairs::<B, F, 4, 1>(w, rows.clone(), x, tokens.start, out),
            }
        }
    }
}

/// Rows by R, the last ones alone.
///
/// # Safety
/// As [`few`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pairs<const B: usize, F: Format<B>, const M: usize, const R: usize>(
    w: &Weight,
    rows: Range<usize>,
    x: &Rows,
    first: usize,
    out: Sink,
) {
    let even = rows.end - rows.len() % R;
    // SAFETY: passed on.
    unsafe {
        products::<B, F, M, R>(w, rows.start..even, x, first, out);
        products::<B, F, M, 1>(w, even..rows.end, x, first, out);
    }
}

/// Vector j of run n.
///
/// # Safety
/// `x` has that run.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(x: &[Lanes], n: usize, j: usize) -> __m256 {
    // SAFETY: 8 readable floats, aligned as Lanes are.
    unsafe { _mm256_load_ps(x.as_ptr().cast::<f32>().add(n * RUN + 8 * j)) }
}

/// R rows of weights at a time, so that an activation is loaded once for them, with the M activations from `first` on.
/// The R rows are far apart: R long streams are prefetched, neighbours would not be (3 times slower from memory).
///
/// # Safety
/// As [`few`]; `rows` are a multiple of R.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products<const B: usize, F: Format<B>, const M: usize, const R: usize>(
    w: &Weight,
    rows: Range<usize>,
    x: &Rows,
    first: usize,
    out: Sink,
) {
    let xs: [&[Lanes]; M] = std::array::from_fn(|t| x.row(first + t));
    let sums = x.sums(first);
    assert!(sums.len() == w.cols / RUN && xs.iter().all(|x| 16 * x.len() >= w.cols));
    let each = rows.len() / R;
    for row in rows.start..rows.start + each {
        let bytes: [&[u8]; R] = std::array::from_fn(|r| w.row(row + r * each));
        let blocks = bytes.map(|b| b.as_chunks::<B>().0);
        let mut acc = [[_mm256_setzero_ps(); M]; R];
        let mut side = [_mm_setzero_ps(); R];
        let mut heads = [F::Head::default(); R];
        for at in 0..blocks[0].len() {
            // No closures and one call of `run`: what isn't inlined here passes vectors through memory.
            for r in 0..R {
                // SAFETY: rows have equally many blocks; the caller has the features.
                heads[r] = unsafe { F::head(blocks[r].get_unchecked(at)) };
            }
            for i in 0..F::RUNS {
                let n = at * F::RUNS + i;
                let mut q = [[_mm256_setzero_ps(); 4]; R];
                let mut dm = [_mm_setzero_ps(); R];
                for r in 0..R {
                    // SAFETY: as above.
                    let run = unsafe { F::run(blocks[r].get_unchecked(at), &heads[r], i) };
                    (q[r], dm[r]) = (run.q, run.dm);
                }
                if M == 1 {
                    for r in 0..R {
                        let mut s = _mm256_setzero_ps();
                        for j in 0..4 {
                            // SAFETY: a row has `cols / RUN` runs, and x has `cols` elements (asserted above).
                            let x = unsafe { load(xs[0], n, j) };
                            s = if j == 0 { _mm256_mul_ps(q[r][j], x) } else { _mm256_fmadd_ps(q[r][j], x, s) };
                        }
                        acc[r][0] = if F::PLAIN {
                            _mm256_add_ps(s, acc[r][0])
                        } else {
                            _mm256_fmadd_ps(_mm256_broadcastss_ps(dm[r]), s, acc[r][0])
                        };
                        if F::MIN || F::CENTER != 0.0 {
                            // SAFETY: as above: x has a sum for each run.
                            side[r] = _mm_fmadd_ps(dm[r], _mm_set1_ps(unsafe { *sums.get_unchecked(n) }), side[r]);
                        }
                    }
                    continue;
                }
                if !F::PLAIN {
                    for r in 0..R {
                        let d = _mm256_broadcastss_ps(dm[r]);
                        let m = if F::MIN {
                            _mm256_broadcastss_ps(_mm_movehdup_ps(dm[r]))
                        } else {
                            _mm256_mul_ps(d, _mm256_set1_ps(-F::CENTER))
                        };
                        for q in &mut q[r] {
                            *q = _mm256_fmadd_ps(d, *q, m);
                        }
                    }
                }
                for t in 0..M {
                    for j in 0..4 {
                        // SAFETY: as above.
                        let x = unsafe { load(xs[t], n, j) };
                        for r in 0..R {
                            acc[r][t] = _mm256_fmadd_ps(q[r][j], x, acc[r][t]);
                        }
                    }
                }
            }
        }
        for r in 0..R {
            let tail = &bytes[r][blocks[r].len() * B..];
            for t in 0..M {
                let mut y = sum(acc[r][t]);
                if M == 1 && F::MIN {
                    y += _mm_cvtss_f32(_mm_movehdup_ps(side[r]));
                }
                if M == 1 && F::CENTER != 0.0 {
                    y -= F::CENTER * _mm_cvtss_f32(side[r]);
                }
                if !tail.is_empty() {
                    y += tail_product(w, tail, x.tail(first + t));
                }
                // SAFETY: the caller gives these rows to us alone.
                unsafe { out.write(first + t, row + r * each, y) };
            }
        }
    }
}

/// What is left of a row of floats beyond the last run.
#[cold]
pub(super) fn tail_product(w: &Weight, tail: &[u8], x: impl Iterator<Item = f32>) -> f32 {
    let mut rest = [0.0; RUN];
    let rest = &mut rest[..w.cols % RUN];
    blocks::dequant(w.ty, tail, rest);
    rest.iter().zip(x).map(|(w, x)| w * x).sum()
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
pub(super) unsafe fn dequant(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
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
