//! Scores to probabilities: see AVX2's function of this name.

use std::arch::x86_64::*;

use super::super::State;
use super::super::view::TOKENS;

/// e^x for x <= 0; 0 below -87.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn exp(x: __m512) -> __m512 {
    let keep = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(-87.0));
    let n = _mm512_maskz_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
        keep,
        _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)),
    );
    // r = x - n ln 2, with ln 2 in two parts so that the difference is exact.
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693_359_4), x);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.121_944_4e-4), r);
    let mut p = _mm512_set1_ps(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_maskz_scalef_ps(keep, p, n)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn load(from: &[f32; 16]) -> __m512 {
    // SAFETY: 64 readable bytes; unaligned loads are allowed.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

/// Turns the scores of row `row`, every `step`-th of `all`, into probabilities under the row's running maximum.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn softmax(all: &mut [[f32; TOKENS]], row: usize, step: usize, state: &mut State) {
    let mut top = _mm512_set1_ps(f32::NEG_INFINITY);
    for i in (0..all.len()).step_by(step) {
        for x in all[i].as_chunks().0 {
            top = _mm512_max_ps(top, load(x));
        }
    }
    let top = _mm512_reduce_max_ps(top);
    if top == f32::NEG_INFINITY {
        // Nothing is visible.
        all.iter_mut().step_by(step).for_each(|scores| scores.fill(0.0));
        return;
    }
    let max = _mm512_set1_ps(state.raise(row, top));
    let mut total = _mm512_setzero_ps();
    for i in (0..all.len()).step_by(step) {
        for x in all[i].as_chunks_mut().0 {
            let p = exp(_mm512_sub_ps(load(x), max));
            total = _mm512_add_ps(total, p);
            // SAFETY: 16 writable floats; unaligned stores are allowed.
            unsafe { _mm512_storeu_ps(x.as_mut_ptr(), p) };
        }
    }
    state.sum[row] += _mm512_reduce_add_ps(total);
}
