//! Scores to probabilities: see AVX2's function of this name.

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use super::super::State;
use super::super::avx2::{EXP2, LEAST, WHOLE};
use super::super::view::TOKENS;

/// e^x for x <= 0, to 2e-7 near 0 and 2e-6 at -87; 0 from -87.7 on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn exp(x: __m512) -> __m512 {
    let x = _mm512_max_ps(x, _mm512_set1_ps(LEAST));
    let log2 = _mm512_set1_ps(LOG2_E);
    // x / ln 2 in whole ones, with the exponent's offset, in the low bits; then the rest.
    let whole = _mm512_fmadd_ps(x, log2, _mm512_set1_ps(WHOLE));
    let rest = _mm512_fmsub_ps(x, log2, _mm512_sub_ps(whole, _mm512_set1_ps(WHOLE)));
    let mut p = _mm512_set1_ps(EXP2[0]);
    for c in &EXP2[1..] {
        p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(*c));
    }
    let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(whole));
    _mm512_mul_ps(p, _mm512_castsi512_ps(power))
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
