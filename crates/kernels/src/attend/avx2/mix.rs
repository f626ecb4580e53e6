//! Outputs from coded values.
//!
//! p (s u + z) + p r = (p s) u + p z + p r: a token's scale goes into its probability once a group, the zero point is
//! one sum a group, outliers are added in f32. The products p s become 16-bit integers under the block's largest, so
//! that 64 of them times a signpost fit 32 bits.

use std::arch::x86_64::*;
use std::ops::Range;

use kvquant_quant::pack::{UNIT_CHANNELS, VECTOR};
use kvquant_quant::{TOP, Table};

use super::super::BLOCKS;
use super::super::view::{CodedView, Run, TOKENS};
use super::ahead::Ahead;
use super::decode::{ByBlock, ROWS, Row, Scratch};
use super::outliers::mix as outliers_of;
use super::unpack::{by_rows, by_width};
use super::{LANES, halves, load, sum, unpack};

/// Sum of the magnitudes of a row's integer weights.
pub(in super::super) const WEIGHT_SUM: f32 = (i32::MAX / TOP as i32) as f32 - 64.0;

/// A row's integer weights in a block.
type Integers = [[__m256i; 2]; 2];

/// No weight.
// SAFETY: all bits 0 is a vector of zeros.
const NO_WEIGHTS: Integers = unsafe { std::mem::zeroed() };

/// A row's weights over the blocks of a call: eight vectors a block.
type Weights = [__m256; TOKENS / LANES];

/// What makes a row's weights in some blocks integers, and the size of one; zeros where they are too small to scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scale_of<const R: usize>(blocks: &[[Weights; R]], row: usize) -> (f32, f32) {
    let sign = _mm256_set1_ps(-0.0);
    let (mut most, mut total) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for block in blocks {
        for x in &block[row] {
            let x = _mm256_andnot_ps(sign, *x);
            most = _mm256_max_ps(most, x);
            total = _mm256_add_ps(total, x);
        }
    }
    let half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps::<1>(most));
    let half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    let most = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    let total = sum(total);
    let factor = if total > 0.0 { (32767.0 / most).min(WEIGHT_SUM / total) } else { 0.0 };
    if factor > 0.0 && factor.is_finite() { (factor, 1.0 / factor) } else { (0.0, 0.0) }
}

/// A row's weights in a block as integers: `[half][part]` as [`unpack::look_up`] orders tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn integers(w: &Weights, factor: f32) -> Integers {
    let scale = _mm256_set1_ps(factor);
    let int = |i: usize| _mm256_cvtps_epi32(_mm256_mul_ps(w[i], scale));
    // Vectors i and i + 2 hold tokens that lie 16 apart.
    let two = |i: usize| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(int(i), int(i + 2)));
    [[two(0), two(1)], [two(4), two(5)]]
}

/// out[r] += weights times values, over some blocks.
///
/// All blocks share their tables. Their integer weights share a scale, so that what each adds to an output is summed in
/// lanes over all of them before the lanes are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn coded(
    s: &mut Scratch,
    blocks: &[&CodedView<'_>],
    weights: &[Row],
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    out: &mut [f32],
) {
    let n = weights.len() / blocks.len();
    s.sums.resize(ROWS * d, 0);
    let mut first = 0;
    while first < n {
        let (count, out) = (ROWS.min(n - first), &mut out[first * d..]);
        let weights = ByBlock { rows: &weights[first..], step: n };
        by_rows!(count, rows::<_>(blocks, weights, d, ahead, &mut s.sums, out));
        by_rows!(count, outliers_of::<_>(&mut s.outliers, blocks, weights, d, out));
        first += ROWS;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const R: usize>(
    blocks: &[&CodedView<'_>],
    weights: ByBlock<'_>,
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    sums: &mut [i32],
    out: &mut [f32],
) {
    let v = &blocks[0];
    let group_channels = v.group_channels();
    let mut first = 0;
    while first < d {
        let mut scaled = [[[_mm256_setzero_ps(); TOKENS / LANES]; R]; BLOCKS];
        for (b, block) in blocks.iter().enumerate() {
            let scales = GroupScales::of(block, first / group_channels);
            for r in 0..R {
                let group = &mut out[r * d + first..][..group_channels];
                scaled[b][r] = scales.weights(weights.row(b, r), group);
            }
        }
        let (mut units, mut ints) = ([0.0; R], [[NO_WEIGHTS; R]; BLOCKS]);
        for r in 0..R {
            let (factor, unit) = scale_of::<R>(&scaled[..blocks.len()], r);
            units[r] = unit;
            for b in 0..blocks.len() {
                ints[b][r] = integers(&scaled[b][r], factor);
            }
        }
        let group = first / UNIT_CHANNELS..(first + group_channels) / UNIT_CHANNELS;
        for run in v.runs() {
            let range = run.units.start.max(group.start)..run.units.end.min(group.end);
            by_width!(run, by_units::<_, R>(blocks, &run, range, &ints, d, ahead, sums));
        }
        for r in 0..R {
            let places = r * d + first..r * d + first + group_channels;
            add_sums(v, first, &sums[places], units[r], &mut out[r * d..(r + 1) * d]);
        }
        first += group_channels;
    }
}

/// Scales and zero points of a group, token by token.
struct GroupScales {
    scale: Option<Weights>,
    zero: Option<Weights>,
}

impl GroupScales {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn of(v: &CodedView<'_>, group: usize) -> Self {
        let of_group = |from: &[u16]| -> Weights {
            let from: &[[u16; LANES]; TOKENS / LANES] =
                from[group * TOKENS..].as_chunks().0.first_chunk().expect("64 tokens a group");
            std::array::from_fn(|i| halves(&from[i]))
        };
        GroupScales {
            scale: v.scales.map(|s| of_group(s.scale)),
            zero: v.scales.filter(|s| !s.zero.is_empty()).map(|s| of_group(s.zero)),
        }
    }

    /// A row's weights times the scales. The zero points' share of the output is added to `out`, the group's channels.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn weights(&self, row: &Row, out: &mut [f32]) -> Weights {
        let row = row.as_chunks::<LANES>().0;
        let mut w: Weights = std::array::from_fn(|i| load(&row[i]));
        if let Some(zero) = &self.zero {
            let mut shift = _mm256_setzero_ps();
            for (w, zero) in w.iter().zip(zero) {
                shift = _mm256_fmadd_ps(*w, *zero, shift);
            }
            let shift = sum(shift);
            out.iter_mut().for_each(|o| *o += shift);
        }
        if let Some(scale) = &self.scale {
            for (w, scale) in w.iter_mut().zip(scale) {
                *w = _mm256_mul_ps(*w, *scale);
            }
        }
        w
    }
}

/// sums[r] = the sum over all blocks of weights times signposts, for some units of a run.
///
/// One channel at a time: its sums, its signposts and a product are what the registers have room for.
#[target_feature(enable = "avx2,fma,f16c")]
fn by_units<const B: u32, const R: usize>(
    blocks: &[&CodedView<'_>],
    run: &Run<'_>,
    range: Range<usize>,
    ints: &[[Integers; R]; BLOCKS],
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    sums: &mut [i32],
) {
    let (n, bits) = (blocks.len(), B as usize);
    let mut vectors = [&[][..]; BLOCKS];
    for (vectors, block) in vectors.iter_mut().zip(blocks) {
        *vectors = block.vectors_of(run);
    }
    for u in range.clone() {
        let (place, unit) = (u * UNIT_CHANNELS, (u - run.units.start) * bits);
        let tables = blocks[0].four_tables(place);
        let units = vectors.map(|v| v.get(unit..unit + bits).unwrap_or_default());
        let mut four = [[_mm256_setzero_si256(); R]; UNIT_CHANNELS];
        for ahead in &ahead[..n] {
            ahead.unit::<B>(u - range.start);
        }
        channel::<B, R, 0>(tables[0], &units[..n], ints, &mut four[0]);
        channel::<B, R, 1>(tables[1], &units[..n], ints, &mut four[1]);
        channel::<B, R, 2>(tables[2], &units[..n], ints, &mut four[2]);
        channel::<B, R, 3>(tables[3], &units[..n], ints, &mut four[3]);
        for r in 0..R {
            let halves = [_mm256_hadd_epi32(four[0][r], four[1][r]), _mm256_hadd_epi32(four[2][r], four[3][r])];
            store_sums(_mm256_hadd_epi32(halves[0], halves[1]), &mut sums[r * d + place..]);
        }
    }
    ahead[..n].iter_mut().for_each(|ahead| ahead.skip_units::<B>(range.len()));
}

/// sums[r] += weights times the signposts of channel C of a unit, over its vectors in all blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn channel<const B: u32, const R: usize, const C: usize>(
    table: &Table,
    units: &[&[[u8; VECTOR]]],
    ints: &[[Integers; R]; BLOCKS],
    sums: &mut [__m256i; R],
) {
    for (unit, ints) in units.iter().zip(ints) {
        let [low, high] = unpack::codes::<B>(unit);
        let x = unpack::look_up::<B>(table, low[C], high[C]);
        for (sum, w) in sums.iter_mut().zip(ints) {
            for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(x[i][j], w[i][j]));
            }
        }
    }
}

/// The sums of a unit's four channels, of which each half of the vector has a part.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_sums(x: __m256i, to: &mut [i32]) {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let to: &mut [i32; UNIT_CHANNELS] = to.first_chunk_mut().expect("a row has head_dim places");
    // SAFETY: 16 writable bytes; unaligned stores are allowed.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), x) };
}

/// row[channels of the places from `first` on] += the sums, times step and the weights' unit.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_sums(v: &CodedView<'_>, first: usize, sums: &[i32], unit: f32, row: &mut [f32]) {
    if !v.lut.order.is_empty() {
        for ((sum, c), step) in sums.iter().zip(&v.lut.order[first..]).zip(&v.lut.steps[first..]) {
            row[*c as usize] += *sum as f32 * (unit * step);
        }
        return;
    }
    let unit = _mm_set1_ps(unit);
    let shared = v.scales.is_some().then(|| _mm_mul_ps(unit, _mm_set1_ps(v.lut.steps[0])));
    // Four at a time, as wide as sums were just written: a wider load would wait until they have reached the cache.
    for (i, (to, sums)) in row[first..].as_chunks_mut::<4>().0.iter_mut().zip(sums.as_chunks::<4>().0).enumerate() {
        // SAFETY: 4 readable numbers each, of `to` writable; a view has a step a place where scales are not shared.
        unsafe {
            let factor = match shared {
                Some(factor) => factor,
                None => _mm_mul_ps(unit, _mm_loadu_ps(v.lut.steps.as_ptr().add(first + 4 * i))),
            };
            let x = _mm_cvtepi32_ps(_mm_loadu_si128(sums.as_ptr().cast()));
            _mm_storeu_ps(to.as_mut_ptr(), _mm_fmadd_ps(x, factor, _mm_loadu_ps(to.as_ptr())));
        }
    }
}
