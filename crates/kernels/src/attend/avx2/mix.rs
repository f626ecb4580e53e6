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

/// A row's weights in a block.
type Weights = [__m256; TOKENS / LANES];

// SAFETY: all bits 0 is a vector of zeros.
const NO_INTEGERS: Integers = unsafe { std::mem::zeroed() };
// SAFETY: likewise.
const NO_WEIGHTS: Weights = unsafe { std::mem::zeroed() };

/// What a thread reuses from call to call.
#[derive(Default)]
pub(super) struct Room {
    /// Weights times scales `[blocks, R]`.
    scaled: Vec<Weights>,
    /// The same as integers.
    ints: Vec<Integers>,
    /// Sums of weights times signposts `[R, head_dim]`, by place.
    sums: Vec<i32>,
}

/// What makes a row's weights in some blocks integers, and the size of one; zeros where they are too small to scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scale_of<const R: usize>(blocks: &[[Weights; R]], row: usize) -> (f32, f32) {
    let sign = _mm256_set1_ps(-0.0);
    // Four chains instead of one, which would be what the row waits for.
    let (mut most, mut totals) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4]);
    for block in blocks {
        for four in block[row].as_chunks::<4>().0 {
            for i in 0..4 {
                let x = _mm256_andnot_ps(sign, four[i]);
                most[i] = _mm256_max_ps(most[i], x);
                totals[i] = _mm256_add_ps(totals[i], x);
            }
        }
    }
    let most = _mm256_max_ps(_mm256_max_ps(most[0], most[1]), _mm256_max_ps(most[2], most[3]));
    let total = _mm256_add_ps(_mm256_add_ps(totals[0], totals[1]), _mm256_add_ps(totals[2], totals[3]));
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
    s.mix.sums.resize(ROWS * d, 0);
    let mut first = 0;
    while first < n {
        let (count, out) = (ROWS.min(n - first), &mut out[first * d..]);
        let weights = ByBlock { rows: &weights[first..], step: n };
        by_rows!(count, rows::<_>(&mut s.mix, blocks, weights, d, ahead, out));
        by_rows!(count, outliers_of::<_>(&mut s.outliers, blocks, weights, d, out));
        first += ROWS;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const R: usize>(
    room: &mut Room,
    blocks: &[&CodedView<'_>],
    weights: ByBlock<'_>,
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    out: &mut [f32],
) {
    let v = &blocks[0];
    let group_channels = v.group_channels();
    room.scaled.resize(R * blocks.len(), NO_WEIGHTS);
    room.ints.resize(R * blocks.len(), NO_INTEGERS);
    let (scaled, sums) = (room.scaled.as_chunks_mut::<R>().0, &mut room.sums[..]);
    for first in (0..d).step_by(group_channels) {
        for (b, (block, scaled)) in blocks.iter().zip(scaled.iter_mut()).enumerate() {
            let scales = GroupScales::of(block, first / group_channels);
            for r in 0..R {
                let group = &mut out[r * d + first..][..group_channels];
                scales.weights(weights.row(b, r), &mut scaled[r], group);
            }
        }
        let mut units = [0.0; R];
        let ints = room.ints.as_chunks_mut::<R>().0;
        for r in 0..R {
            let (factor, unit) = scale_of::<R>(scaled, r);
            units[r] = unit;
            for (ints, scaled) in ints.iter_mut().zip(scaled.iter()) {
                ints[r] = integers(&scaled[r], factor);
            }
        }
        let group = first / UNIT_CHANNELS..(first + group_channels) / UNIT_CHANNELS;
        for run in v.runs() {
            let range = run.units.start.max(group.start)..run.units.end.min(group.end);
            if range.is_empty() {
                continue;
            }
            by_width!(run, by_units::<_, R>(blocks, &run, range, ints, d, ahead, sums));
        }
        for r in 0..R {
            let places = r * d + first..r * d + first + group_channels;
            add_sums(v, first, &sums[places], units[r], &mut out[r * d..(r + 1) * d]);
        }
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
        let of_group = |from: &[u16]| {
            let mut all = NO_WEIGHTS;
            for (to, from) in all.iter_mut().zip(from[group * TOKENS..].as_chunks().0) {
                *to = halves(from);
            }
            all
        };
        GroupScales {
            scale: v.scales.map(|s| of_group(s.scale)),
            zero: v.scales.filter(|s| !s.zero.is_empty()).map(|s| of_group(s.zero)),
        }
    }

    /// A row's weights times the scales. The zero points' share of the output is added to `out`, the group's channels.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn weights(&self, row: &Row, to: &mut Weights, out: &mut [f32]) {
        let row = row.as_chunks::<LANES>().0;
        let mut w = NO_WEIGHTS;
        for (w, row) in w.iter_mut().zip(row) {
            *w = load(row);
        }
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
        *to = w;
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
    ints: &[[Integers; R]],
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    sums: &mut [i32],
) {
    let (n, bits) = (range.len(), B as usize);
    let first = (range.start - run.units.start) * bits;
    let mut vectors = [&[][..]; BLOCKS];
    for (vectors, block) in vectors.iter_mut().zip(blocks) {
        *vectors = &block.vectors_of(run)[first..][..n * bits];
    }
    let mut units = [&[][..]; BLOCKS];
    for i in 0..n {
        let place = (range.start + i) * UNIT_CHANNELS;
        let tables = blocks[0].four_tables(place);
        for ((unit, vectors), ahead) in units.iter_mut().zip(&vectors[..blocks.len()]).zip(&*ahead) {
            ahead.unit::<B>(i);
            // SAFETY: `n` units of as many vectors lie in the slice.
            *unit = unsafe { vectors.get_unchecked(i * bits..(i + 1) * bits) };
        }
        let units = &units[..blocks.len()];
        let mut four = [[_mm256_setzero_si256(); R]; UNIT_CHANNELS];
        channel::<B, R, 0>(tables[0], units, ints, &mut four[0]);
        channel::<B, R, 1>(tables[1], units, ints, &mut four[1]);
        channel::<B, R, 2>(tables[2], units, ints, &mut four[2]);
        channel::<B, R, 3>(tables[3], units, ints, &mut four[3]);
        for r in 0..R {
            let halves = [_mm256_hadd_epi32(four[0][r], four[1][r]), _mm256_hadd_epi32(four[2][r], four[3][r])];
            store_sums(_mm256_hadd_epi32(halves[0], halves[1]), &mut sums[r * d + place..]);
        }
    }
    ahead[..blocks.len()].iter_mut().for_each(|ahead| ahead.skip_units::<B>(n));
}

/// sums[r] += weights times the signposts of channel C of a unit, over its vectors in all blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn channel<const B: u32, const R: usize, const C: usize>(
    table: &Table,
    units: &[&[[u8; VECTOR]]],
    ints: &[[Integers; R]],
    sums: &mut [__m256i; R],
) {
    for (unit, ints) in units.iter().zip(ints) {
        let [low, high] = unpack::codes::<B>(unit);
        let x = unpack::look_up::<B>(table, low[C], high[C]);
        for r in 0..R {
            for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(x[i][j], ints[r][i][j]));
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
