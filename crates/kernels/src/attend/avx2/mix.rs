//! Outputs from coded values.
//!
//! p (s u + z) + p r = (p s) u + p z + p r: a token's scale goes into its probability once a group, the zero point is
//! one sum a group, outliers are added in f32. The products p s become 16-bit integers under the block's largest, so
//! that 64 of them times a signpost fit 32 bits.

use std::arch::x86_64::*;
use std::ops::Range;

use kvquant_quant::TOP;
use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::view::{CodedView, Run, TOKENS};
use super::decode::{ROWS, Row};
use super::unpack::{by_rows, by_width};
use super::{LANES, halves, load, sum, unpack};

/// Sum of the magnitudes of a row's integer weights.
const WEIGHT_SUM: f32 = (i32::MAX / TOP as i32) as f32 - 64.0;

/// A row's weights as integers: `[half][part]` as [`unpack::look_up`] orders tokens, and the size of one.
#[derive(Clone, Copy)]
pub(in super::super) struct Integers {
    pub weights: [[__m256i; 2]; 2],
    pub unit: f32,
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn integers(w: &[__m256; TOKENS / LANES]) -> Integers {
    let sign = _mm256_set1_ps(-0.0);
    let (mut most, mut total) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for x in w {
        let x = _mm256_andnot_ps(sign, *x);
        most = _mm256_max_ps(most, x);
        total = _mm256_add_ps(total, x);
    }
    let half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps::<1>(most));
    let half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    let most = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    let total = sum(total);
    let factor = if total > 0.0 { (32767.0 / most).min(WEIGHT_SUM / total) } else { 0.0 };
    // Weights too small to scale add nothing.
    let factor = if factor.is_finite() { factor } else { 0.0 };
    let scale = _mm256_set1_ps(factor);
    let int = |i: usize| _mm256_cvtps_epi32(_mm256_mul_ps(w[i], scale));
    // Vectors i and i + 2 hold tokens that lie 16 apart.
    let two = |i: usize| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(int(i), int(i + 2)));
    Integers { weights: [[two(0), two(1)], [two(4), two(5)]], unit: if factor > 0.0 { 1.0 / factor } else { 0.0 } }
}

/// `coded`, the way through scale groups and runs, for the instruction set of the module that calls it: `by_units` is
/// that module's own.
macro_rules! mix_passes {
    ($features:tt) => {
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::attend) fn coded(v: &CodedView<'_>, weights: &[Row], d: usize, out: &mut [f32]) {
            for (weights, out) in weights.chunks(ROWS).zip(out.chunks_mut(ROWS * d)) {
                by_rows!(weights.len(), rows::<_>(v, weights, d, out));
            }
        }

        #[target_feature(enable = $features)]
        fn rows<const R: usize>(v: &CodedView<'_>, weights: &[Row], d: usize, out: &mut [f32]) {
            let weights: &[Row; R] = weights.first_chunk().expect("called with R rows");
            let group_units = v.group_channels() / UNIT_CHANNELS;
            for g in 0..d / UNIT_CHANNELS / group_units {
                let ints = prepared::<R>(v, weights, g, d, out);
                for run in v.runs() {
                    let range = run.units.start.max(g * group_units)..run.units.end.min((g + 1) * group_units);
                    by_width!(run, by_units::<_, R>(v, &run, range, &ints, d, out));
                }
            }
            rest(v, weights, d, out);
        }
    };
}
pub(in super::super) use mix_passes;

mix_passes!("avx2,fma,f16c");

/// Integer weights of a scale group; its zero points are added here.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn prepared<const R: usize>(
    v: &CodedView<'_>,
    weights: &[Row; R],
    group: usize,
    d: usize,
    out: &mut [f32],
) -> [Integers; R] {
    const VECTORS: usize = TOKENS / LANES;
    let of_group = |from: &[u16]| -> [__m256; VECTORS] {
        let from: &[[u16; LANES]; VECTORS] =
            from[group * TOKENS..].as_chunks().0.first_chunk().expect("64 tokens a group");
        std::array::from_fn(|i| halves(&from[i]))
    };
    let mut ints = [Integers { weights: [[_mm256_setzero_si256(); 2]; 2], unit: 0.0 }; R];
    let scale = v.scales.map(|s| of_group(s.scale));
    let zero = v.scales.filter(|s| !s.zero.is_empty()).map(|s| of_group(s.zero));
    for r in 0..R {
        let row = weights[r].as_chunks::<LANES>().0;
        let mut w: [__m256; VECTORS] = std::array::from_fn(|i| load(&row[i]));
        if let Some(zero) = &zero {
            let mut shift = _mm256_setzero_ps();
            for i in 0..VECTORS {
                shift = _mm256_fmadd_ps(w[i], zero[i], shift);
            }
            let shift = sum(shift);
            for o in &mut out[r * d + group * v.group_channels()..][..v.group_channels()] {
                *o += shift;
            }
        }
        if let Some(scale) = &scale {
            for i in 0..VECTORS {
                w[i] = _mm256_mul_ps(w[i], scale[i]);
            }
        }
        ints[r] = integers(&w);
    }
    ints
}

/// Outliers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn rest<const R: usize>(v: &CodedView<'_>, weights: &[Row; R], d: usize, out: &mut [f32]) {
    for (u, places, residuals) in v.outliers_by_unit() {
        for (&place, &residual) in places.iter().zip(residuals) {
            let residual = unpack::half(u16::from_le_bytes(residual));
            let (t, c) = (place as usize % TOKENS, v.channel(u * UNIT_CHANNELS + place as usize / TOKENS));
            for r in 0..R {
                out[r * d + c] += weights[r][t] * residual;
            }
        }
    }
}

/// out[r] += the sum of weights times signposts, for some units of a run.
#[target_feature(enable = "avx2,fma,f16c")]
fn by_units<const B: u32, const R: usize>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    range: Range<usize>,
    ints: &[Integers; R],
    d: usize,
    out: &mut [f32],
) {
    let skip = range.start.saturating_sub(run.units.start);
    for (u, unit) in unpack::units::<B>(run).skip(skip).take(range.len()) {
        let place = u * UNIT_CHANNELS;
        let tables = v.four_tables(place);
        // Sums over tokens are halved as early as can be, so that few of them wait in registers.
        let mut halves = [[_mm256_setzero_si256(); R]; 2];
        for (p, halves) in halves.iter_mut().enumerate() {
            let [low, high] = unpack::codes::<B>(unit);
            let mut first = [_mm256_setzero_si256(); R];
            for i in [2 * p, 2 * p + 1] {
                let [a, b] = unpack::look_up::<B>(tables[i], low[i], high[i]);
                for r in 0..R {
                    let w = &ints[r].weights;
                    let x = _mm256_add_epi32(_mm256_madd_epi16(a[0], w[0][0]), _mm256_madd_epi16(a[1], w[0][1]));
                    let y = _mm256_add_epi32(_mm256_madd_epi16(b[0], w[1][0]), _mm256_madd_epi16(b[1], w[1][1]));
                    let sum = _mm256_add_epi32(x, y);
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

/// row[channels of the unit] += the sums, times step and the weights' unit.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn add_unit(
    v: &CodedView<'_>,
    place: usize,
    sums: __m128i,
    steps: &[f32; UNIT_CHANNELS],
    unit: f32,
    row: &mut [f32],
) {
    // SAFETY: 4 readable floats; unaligned loads are allowed.
    let steps = unsafe { _mm_loadu_ps(steps.as_ptr()) };
    let x = _mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_mul_ps(steps, _mm_set1_ps(unit)));
    if v.lut.order.is_empty() {
        let to: &mut [f32; UNIT_CHANNELS] = row[place..].first_chunk_mut().expect("a row has head_dim channels");
        // SAFETY: 4 readable and writable floats; unaligned access is allowed.
        unsafe { _mm_storeu_ps(to.as_mut_ptr(), _mm_add_ps(_mm_loadu_ps(to.as_ptr()), x)) };
    } else {
        let mut four = [0.0f32; UNIT_CHANNELS];
        // SAFETY: 4 writable floats; unaligned stores are allowed.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), x) };
        for (x, c) in four.into_iter().zip(&v.lut.order[place..]) {
            row[*c as usize] += x;
        }
    }
}
