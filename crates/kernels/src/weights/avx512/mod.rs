//! AVX-512 (F, BW, DQ, VL). As AVX2, with two vectors a run, and:
//! - a nibble becomes a float by one permute of a table, which needs neither mask nor conversion;
//! - Q2_K and Q3_K have no kernels of their own: AVX2's are used, and so is its dequantization.

mod formats;
pub(super) mod tile;

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx2;
use super::product::{Lanes, RUN, Rows, Sink};
use super::{Weight, WeightType};

/// 32 weights: `dm[0] * q + dm[1]`; `dm[2..]` are 0.
struct Run {
    q: [__m512; 2],
    dm: __m128,
}

/// How a block of B bytes becomes runs. The methods need AVX-512 F, BW, DQ, VL.
trait Format<const B: usize> {
    /// Runs of a block.
    const RUNS: usize;
    /// Whether `dm[1]` may differ from 0.
    const MIN: bool = false;
    /// Whether q already are the weights; `dm` is not looked at.
    const PLAIN: bool = false;
    /// What is decoded once a block.
    type Head: Copy + Default;
    /// # Safety
    /// AVX-512 F, BW, DQ, VL.
    unsafe fn head(b: &[u8; B]) -> Self::Head;
    /// # Safety
    /// AVX-512 F, BW, DQ, VL.
    unsafe fn run(b: &[u8; B], head: &Self::Head, i: usize) -> Run;
}

/// Products of weight rows with few rows of activations.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL; nothing else writes these rows of `out`, whose shape is [x.len(), w.rows].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn few(w: &Weight, rows: Range<usize>, x: &Rows, out: Sink) {
    // SAFETY: passed on.
    unsafe {
        match w.ty {
            WeightType::F32 => by_tokens::<128, formats::F32>(w, rows, x, out),
            WeightType::F16 => by_tokens::<64, formats::F16>(w, rows, x, out),
            WeightType::Bf16 => by_tokens::<64, formats::Bf16>(w, rows, x, out),
            WeightType::Q4_0 => by_tokens::<18, formats::Q40>(w, rows, x, out),
            WeightType::Q4_1 => by_tokens::<20, formats::Q41>(w, rows, x, out),
            WeightType::Q5_0 => by_tokens::<22, formats::Q50>(w, rows, x, out),
            WeightType::Q5_1 => by_tokens::<24, formats::Q51>(w, rows, x, out),
            WeightType::Q8_0 => by_tokens::<34, formats::Q80>(w, rows, x, out),
            WeightType::Q4K => by_tokens::<144, formats::Q4K>(w, rows, x, out),
            WeightType::Q5K => by_tokens::<176, formats::Q5K>(w, rows, x, out),
            WeightType::Q6K => by_tokens::<210, formats::Q6K>(w, rows, x, out),
            WeightType::Q2K | WeightType::Q3K => avx2::few(w, rows, x, out),
        }
    }
}

/// # Safety
/// As [`few`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn by_tokens<const B: usize, F: Format<B>>(w: &Weight, rows: Range<usize>, x: &Rows, out: Sink) {
    for tokens in avx2::tile::strips(x.len(), 8) {
        // SAFETY: passed on.
        unsafe {
            match tokens.len() {
                1 => pairs::<B, F, 1, 1>(w, rows.clone(), x, tokens.start, out),
                2 => pairs::<B, F, 2, 2>(w, rows.clone(), x, tokens.start, out),
                3 => pairs::<B, F, 3, 2>(w, rows.clone(), x, tokens.start, out),
                4 => pairs::<B, F, 4, 2>(w, rows.clone(), x, tokens.start, out),
                5 => pairs::<B, F, 5, 2>(w, rows.clone(), x, tokens.start, out),
                6 => pairs::<B, F, 6, 2>(w, rows.clone(), x, tokens.start, out),
                7 => pairs::<B, F, 7, 2>(w, rows.clone(), x, tokens.start, out),
                _ => pairs::<B, F, 8, 2>(w, rows.clone(), x, tokens.start, out),
            }
        }
    }
}

/// Rows by R, the last ones alone.
///
/// # Safety
/// As [`few`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn load(x: &[Lanes], n: usize, j: usize) -> __m512 {
    // SAFETY: 16 readable floats, aligned as Lanes are.
    unsafe { _mm512_load_ps(x.as_ptr().cast::<f32>().add(n * RUN + 16 * j)) }
}

/// R rows of weights at a time, so that an activation is loaded once for them, with the M activations from `first` on.
/// The R rows are far apart: R long streams are prefetched, neighbours would not be (3 times slower from memory).
///
/// # Safety
/// As [`few`]; `rows` are a multiple of R.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
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
        let mut acc = [[_mm512_setzero_ps(); M]; R];
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
                let mut q = [[_mm512_setzero_ps(); 2]; R];
                let mut dm = [_mm_setzero_ps(); R];
                for r in 0..R {
                    // SAFETY: as above.
                    let run = unsafe { F::run(blocks[r].get_unchecked(at), &heads[r], i) };
                    (q[r], dm[r]) = (run.q, run.dm);
                }
                if M == 1 {
                    for r in 0..R {
                        let mut s = _mm512_setzero_ps();
                        for j in 0..2 {
                            // SAFETY: a row has `cols / RUN` runs, and x has `cols` elements (asserted above).
                            let x = unsafe { load(xs[0], n, j) };
                            s = if j == 0 { _mm512_mul_ps(q[r][j], x) } else { _mm512_fmadd_ps(q[r][j], x, s) };
                        }
                        acc[r][0] = if F::PLAIN {
                            _mm512_add_ps(s, acc[r][0])
                        } else {
                            _mm512_fmadd_ps(_mm512_broadcastss_ps(dm[r]), s, acc[r][0])
                        };
                        if F::MIN {
                            // SAFETY: as above: x has a sum for each run.
                            side[r] = _mm_fmadd_ps(dm[r], _mm_set1_ps(unsafe { *sums.get_unchecked(n) }), side[r]);
                        }
                    }
                    continue;
                }
                if !F::PLAIN {
                    for r in 0..R {
                        let d = _mm512_broadcastss_ps(dm[r]);
                        let m = _mm512_broadcastss_ps(_mm_movehdup_ps(dm[r]));
                        for q in &mut q[r] {
                            *q = if F::MIN { _mm512_fmadd_ps(d, *q, m) } else { _mm512_mul_ps(d, *q) };
                        }
                    }
                }
                for t in 0..M {
                    for j in 0..2 {
                        // SAFETY: as above.
                        let x = unsafe { load(xs[t], n, j) };
                        for r in 0..R {
                            acc[r][t] = _mm512_fmadd_ps(q[r][j], x, acc[r][t]);
                        }
                    }
                }
            }
        }
        for r in 0..R {
            let tail = &bytes[r][blocks[r].len() * B..];
            for t in 0..M {
                let mut y = _mm512_reduce_add_ps(acc[r][t]);
                if M == 1 && F::MIN {
                    y += _mm_cvtss_f32(_mm_movehdup_ps(side[r]));
                }
                if !tail.is_empty() {
                    y += avx2::tail_product(w, tail, x.tail(first + t));
                }
                // SAFETY: the caller gives these rows to us alone.
                unsafe { out.write(first + t, row + r * each, y) };
            }
        }
    }
}
