//! Outputs from coded values: see AVX2's file of this name, which also does what is left in f32.

use std::arch::x86_64::*;
use std::ops::Range;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::avx2::decode::{ROWS, Row};
use super::super::avx2::mix::{Integers, add_unit, mix_passes, prepared, rest};
use super::super::avx2::unpack::{by_rows, by_width, units};
use super::super::view::{CodedView, Run};
use super::unpack;

mix_passes!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c");

/// A row's weights with all lanes of a half together.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn wide(ints: &Integers) -> [__m512i; 2] {
    let w = &ints.weights;
    [0, 1].map(|part| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(w[0][part]), w[1][part]))
}

/// out[r] += the sum of weights times signposts, for some units of a run.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn by_units<const B: u32, const R: usize>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    range: Range<usize>,
    ints: &[Integers; R],
    d: usize,
    out: &mut [f32],
) {
    let mut w = [[_mm512_setzero_si512(); 2]; R];
    for r in 0..R {
        w[r] = wide(&ints[r]);
    }
    let skip = range.start.saturating_sub(run.units.start);
    for (u, unit) in units::<B>(run).skip(skip).take(range.len()) {
        let place = u * UNIT_CHANNELS;
        let tables = v.four_tables(place);
        let [low, high] = unpack::codes::<B>(unit);
        let mut halves = [[_mm256_setzero_si256(); R]; 2];
        for (p, halves) in halves.iter_mut().enumerate() {
            let mut first = [_mm256_setzero_si256(); R];
            for i in [2 * p, 2 * p + 1] {
                let [a, b] = unpack::look_up::<B>(tables[i], low[i], high[i]);
                for r in 0..R {
                    let x = _mm512_dpwssd_epi32(_mm512_setzero_si512(), a, w[r][0]);
                    let x = _mm512_dpwssd_epi32(x, b, w[r][1]);
                    let sum = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
                    if i % 2 == 0 {
                        first[r] = sum;
                    } else {
                        halves[r] = _mm256_hadd_epi32(first[r], sum);
                    }
                }
            }
        }
        let steps = v.four_steps(place);
        for r in 0..R {
            let x = _mm256_hadd_epi32(halves[0][r], halves[1][r]);
            let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            add_unit(v, place, x, &steps, ints[r].unit, &mut out[r * d..(r + 1) * d]);
        }
    }
}
