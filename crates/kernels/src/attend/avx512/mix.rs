//! Outputs from coded values: see AVX2's file of this name for the mathematics.

use std::arch::x86_64::*;
use std::ops::Range;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::BLOCKS;
use super::super::avx2::ahead::Ahead;
use super::super::avx2::decode::{ByBlock, ROWS, Row, Scratch};
use super::super::avx2::mix::WEIGHT_SUM;
use super::super::avx2::unpack::{by_rows, by_width};
use super::super::view::{CodedView, Run, TOKENS};
use super::query::Sixteen;
use super::{multiply_add, outliers, unpack};
use crate::rope::evens_first;

/// A row's weights in a block.
type Weights = [__m512; TOKENS / 16];
/// The same as integers, in the order of signposts.
type Integers = [__m512i; 2];

// SAFETY: all bits 0 is a vector of zeros.
const NO_WEIGHTS: Weights = unsafe { std::mem::zeroed() };
// SAFETY: likewise.
const NO_INTEGERS: Integers = unsafe { std::mem::zeroed() };

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn weights_of(row: &Row) -> Weights {
    let row = row.as_chunks::<16>().0;
    // SAFETY: 64 readable bytes; unaligned loads are allowed.
    let sixteen = |i: usize| unsafe { _mm512_loadu_ps(row[i].as_ptr()) };
    [sixteen(0), sixteen(1), sixteen(2), sixteen(3)]
}

/// out[r] += weights times values, over some blocks that share their tables.
///
/// Their integer weights share a scale, so that what each adds to an output is summed in lanes over all of them before the
/// lanes are.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn coded(
    s: &mut Scratch,
    blocks: &[&CodedView<'_>],
    weights: &[Row],
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    out: &mut [f32],
) {
    let n = weights.len() / blocks.len();
    let mut first = 0;
    while first < n {
        let (count, out) = (ROWS.min(n - first), &mut out[first * d..]);
        let weights = ByBlock { rows: &weights[first..], step: n };
        by_rows!(count, rows::<_>(&mut s.wide, blocks, weights, d, ahead, out));
        first += ROWS;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows<const R: usize>(
    s: &mut super::Scratch,
    blocks: &[&CodedView<'_>],
    weights: ByBlock<'_>,
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    out: &mut [f32],
) {
    let v = &blocks[0];
    let group_channels = v.group_channels();
    for first in (0..d).step_by(group_channels) {
        let units = integers::<R>(&mut s.weights, blocks, weights, d, first, out);
        let ints = s.weights.ints.as_chunks::<R>().0;
        let group = first / UNIT_CHANNELS..(first + group_channels) / UNIT_CHANNELS;
        for run in v.runs() {
            let range = run.units.start.max(group.start)..run.units.end.min(group.end);
            if range.is_empty() {
                continue;
            }
            if let Some(four) = blocks.first_chunk::<BLOCKS>() {
                let ints = ints.first_chunk().expect("weights of each block");
                by_width!(run, by_units::<_, R, BLOCKS>(four, &run, range, &units, ints, d, ahead, out));
                continue;
            }
            let each = blocks.as_chunks().0.iter().zip(ints.as_chunks().0).zip(ahead.as_chunks_mut().0);
            for ((one, ints), ahead) in each {
                by_width!(run, by_units::<_, R, 1>(one, &run, range.clone(), &units, ints, d, ahead, out));
            }
        }
    }
    let side_by_side = |b: usize, to: &mut [Sixteen; TOKENS / 16]| {
        let mut rows = [NO_WEIGHTS; ROWS];
        for r in 0..R {
            rows[r] = weights_of(weights.row(b, r));
        }
        for (i, to) in to.iter_mut().enumerate() {
            to.set([rows[0][i], rows[1][i], rows[2][i], rows[3][i]]);
        }
    };
    outliers::mix::<R>(&mut s.outliers, blocks, d, side_by_side, out);
}

/// What a thread reuses from call to call.
#[derive(Default)]
pub(super) struct Room {
    /// Weights times scales `[blocks, R]`.
    scaled: Vec<Weights>,
    /// The same as integers.
    ints: Vec<Integers>,
}

/// Makes a group's weights integers, and returns the size of one of each row. The zero points' share of the group's outputs is
/// added to `out` `[R, d]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn integers<const R: usize>(
    room: &mut Room,
    blocks: &[&CodedView<'_>],
    weights: ByBlock<'_>,
    d: usize,
    first: usize,
    out: &mut [f32],
) -> [f32; R] {
    let group_channels = blocks[0].group_channels();
    room.scaled.resize(R * blocks.len(), NO_WEIGHTS);
    room.ints.resize(R * blocks.len(), NO_INTEGERS);
    let scaled = room.scaled.as_chunks_mut::<R>().0;
    let mut shifts = [_mm512_setzero_ps(); R];
    let (mut most, mut total) = (shifts, shifts);
    for (b, (block, scaled)) in blocks.iter().zip(scaled.iter_mut()).enumerate() {
        let of_group = |from: &[u16]| -> Weights {
            let from = from[first / group_channels * TOKENS..].as_chunks::<16>().0;
            // SAFETY: 32 readable bytes; unaligned loads are allowed.
            let sixteen = |i: usize| _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from[i].as_ptr().cast()) });
            [sixteen(0), sixteen(1), sixteen(2), sixteen(3)]
        };
        let scale = block.scales.map(|s| of_group(s.scale));
        let zero = block.scales.filter(|s| !s.zero.is_empty()).map(|s| of_group(s.zero));
        for r in 0..R {
            let mut w = weights_of(weights.row(b, r));
            for i in 0..w.len() {
                if let Some(zero) = &zero {
                    shifts[r] = _mm512_fmadd_ps(w[i], zero[i], shifts[r]);
                }
                if let Some(scale) = &scale {
                    w[i] = _mm512_mul_ps(w[i], scale[i]);
                }
                let size = _mm512_abs_ps(w[i]);
                most[r] = _mm512_max_ps(most[r], size);
                total[r] = _mm512_add_ps(total[r], size);
            }
            scaled[r] = w;
        }
    }
    let ints = room.ints.as_chunks_mut::<R>().0;
    let mut units = [0.0; R];
    for r in 0..R {
        let (most, total) = (_mm512_reduce_max_ps(most[r]), _mm512_reduce_add_ps(total[r]));
        let factor = if total > 0.0 { (32767.0 / most).min(WEIGHT_SUM / total) } else { 0.0 };
        // Weights that are too small to scale add nothing.
        let factor = if factor.is_finite() { factor } else { 0.0 };
        units[r] = if factor > 0.0 { 1.0 / factor } else { 0.0 };
        for (ints, scaled) in ints.iter_mut().zip(scaled.iter()) {
            ints[r] = rounded(&scaled[r], factor);
        }
        if blocks[0].scales.is_some_and(|s| !s.zero.is_empty()) {
            let shift = _mm512_reduce_add_ps(shifts[r]);
            out[r * d + first..][..group_channels].iter_mut().for_each(|o| *o += shift);
        }
    }
    units
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rounded(w: &Weights, factor: f32) -> Integers {
    // The low words of two vectors of sixteen.
    const PLACES: [i16; 32] = {
        let (mut at, mut i) = ([0; 32], 0);
        while i < 32 {
            at[i] = 2 * evens_first(i) as i16;
            i += 1;
        }
        at
    };
    let factor = _mm512_set1_ps(factor);
    // SAFETY: 64 readable bytes; unaligned loads are allowed.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    let int = |x: __m512| _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
    let half = |i: usize| _mm512_permutex2var_epi16(int(w[i]), places, int(w[i + 1]));
    [half(0), half(2)]
}

/// out[r] += the sum over N blocks of weights times signposts, for some units of a run. The number of blocks is known, so that
/// little but products and lookups is left of the loop.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn by_units<const B: u32, const R: usize, const N: usize>(
    blocks: &[&CodedView<'_>; N],
    run: &Run<'_>,
    range: Range<usize>,
    weight_units: &[f32; R],
    ints: &[[Integers; R]; N],
    d: usize,
    ahead: &mut [Ahead<'_>; N],
    out: &mut [f32],
) {
    let (v, n, bits) = (&blocks[0], range.len(), B as usize);
    let first = (range.start - run.units.start) * bits;
    let mut vectors = [&[][..]; N];
    for (vectors, block) in vectors.iter_mut().zip(blocks) {
        *vectors = &block.vectors_of(run)[first..][..n * bits];
    }
    let units = {
        let mut lanes = [0.0; 16];
        for (r, lanes) in lanes.as_chunks_mut::<4>().0.iter_mut().enumerate().take(R) {
            *lanes = [weight_units[r]; 4];
        }
        // SAFETY: 64 readable bytes; unaligned loads are allowed.
        unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
    };
    // One step for all, or one a place.
    let step = v.lut.steps.first().filter(|_| v.lut.steps.len() == 1).map(|&step| _mm512_set1_ps(step));
    for i in 0..n {
        let place = (range.start + i) * UNIT_CHANNELS;
        let tables = v.four_tables(place);
        let mut four = [[_mm512_setzero_si512(); R]; UNIT_CHANNELS];
        for b in 0..N {
            ahead[b].unit::<B>(i);
            // SAFETY: `n` units of as many vectors lie in the slice.
            let unit = unsafe { vectors[b].get_unchecked(i * bits..(i + 1) * bits) };
            let [low, high] = unpack::codes::<B>(unit);
            for c in 0..UNIT_CHANNELS {
                let [x, y] = unpack::look_up::<B>(tables[c], low[c], high[c]);
                for r in 0..R {
                    four[c][r] = multiply_add(multiply_add(four[c][r], x, ints[b][r][0]), y, ints[b][r][1]);
                }
            }
        }
        let steps = step.unwrap_or_else(|| {
            let steps: &[f32; UNIT_CHANNELS] = v.lut.steps[place..].first_chunk().expect("a step a place");
            // SAFETY: 16 readable bytes; unaligned loads are allowed.
            _mm512_broadcast_f32x4(unsafe { _mm_loadu_ps(steps.as_ptr()) })
        });
        let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(sums_of(&four)), _mm512_mul_ps(steps, units));
        let rows = [
            _mm512_castps512_ps128(sums),
            _mm512_extractf32x4_ps::<1>(sums),
            _mm512_extractf32x4_ps::<2>(sums),
            _mm512_extractf32x4_ps::<3>(sums),
        ];
        for r in 0..R {
            if v.lut.order.is_empty() {
                let to: &mut [f32; UNIT_CHANNELS] = out[r * d + place..].first_chunk_mut().expect("whole units");
                // SAFETY: 4 readable and writable floats; unaligned access is allowed.
                unsafe { _mm_storeu_ps(to.as_mut_ptr(), _mm_add_ps(rows[r], _mm_loadu_ps(to.as_ptr()))) };
            } else {
                let mut of_places = [0.0; UNIT_CHANNELS];
                // SAFETY: 4 writable floats; unaligned stores are allowed.
                unsafe { _mm_storeu_ps(of_places.as_mut_ptr(), rows[r]) };
                for (&c, x) in v.lut.order[place..].iter().zip(of_places) {
                    out[r * d + c as usize] += x;
                }
            }
        }
    }
    ahead.iter_mut().for_each(|ahead| ahead.skip_units::<B>(n));
}

/// Sums of the lanes of each: row r of channel c in lane 4 r + c.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sums_of<const R: usize>(four: &[[__m512i; R]; UNIT_CHANNELS]) -> __m512i {
    let two = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let mut rows = [_mm512_setzero_si512(); ROWS];
    for r in 0..R {
        let (ab, cd) = (two(four[0][r], four[1][r]), two(four[2][r], four[3][r]));
        rows[r] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    // Each row's four quarters, which hold the four channels.
    let halves = |a, b| {
        _mm512_add_epi32(_mm512_shuffle_i64x2::<0b01_00_01_00>(a, b), _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b))
    };
    let (ab, cd) = (halves(rows[0], rows[1]), halves(rows[2], rows[3]));
    _mm512_add_epi32(_mm512_shuffle_i64x2::<0b10_00_10_00>(ab, cd), _mm512_shuffle_i64x2::<0b11_01_11_01>(ab, cd))
}
