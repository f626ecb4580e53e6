//! Outputs from coded values.
//!
//! p (s u + z) + p r = (p s) u + p z + p r: a token's scale goes into its probability once a group, the zero point is
//! one sum a group, outliers are added in f32. The products p s become integers under the largest of the call's blocks.
//!
//! With DOT, weights and signposts are 128 h + l each, with signed bytes l and h, and `sdot` sums all four products over
//! tokens: no scale can overflow. Without, weights are 16-bit integers of which 256 times a signpost fit 32 bits.

use std::arch::aarch64::*;
use std::ops::Range;

use kvquant_quant::TOP;
use kvquant_quant::pack::{UNIT_CHANNELS, VECTOR};

use super::super::BLOCKS;
use super::super::ahead::Ahead;
use super::super::by_const::{by_rows, by_width};
use super::super::rows::{ByBlock, ROWS, Row};
use super::super::view::{CodedView, Run, TOKENS};
use super::decode::Scratch;
use super::outliers::mix as outliers_of;
use super::unpack::{BYTES, Entries, codes};
use super::{LANES, halves, load, store, sum_each};
use crate::neon::dot;

/// Sum of the magnitudes of a row's 16-bit weights.
const WEIGHT_SUM: f32 = (i32::MAX / TOP as i32) as f32 - 64.0;

/// The largest weight of two signed bytes 128 h + l.
const TWO_BYTES: f32 = 16319.0;

/// A row's weights in a block as f32.
type Weights = [float32x4_t; TOKENS / LANES];

/// A row's integer weights in a block, 16 tokens a place: with DOT the bytes h, then l; without, words.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Integers([[u8; 2 * BYTES]; TOKENS / BYTES]);

/// All blocks share their tables. Their integer weights share a scale, so that what each adds to an output is summed in
/// lanes over all of them before the lanes are.
///
/// # Safety
/// Where DOT is true, the CPU has the dot product extension.
#[target_feature(enable = "neon")]
pub(super) unsafe fn coded<const DOT: bool>(
    s: &mut Scratch,
    blocks: &[&CodedView<'_>],
    weights: &[Row],
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    out: &mut [f32],
) {
    let n = weights.len() / blocks.len();
    s.sums.resize(ROWS * d, 0.0);
    let mut first = 0;
    while first < n {
        let (count, out) = (ROWS.min(n - first), &mut out[first * d..]);
        let weights = ByBlock { rows: &weights[first..], step: n };
        // SAFETY: passed on.
        unsafe { by_rows!(count, rows::<_, DOT>(blocks, weights, d, ahead, &mut s.sums, out)) };
        by_rows!(count, outliers_of::<_>(&mut s.outliers, blocks, weights, d, out));
        first += ROWS;
    }
}

/// # Safety
/// As [`coded`].
#[target_feature(enable = "neon")]
unsafe fn rows<const R: usize, const DOT: bool>(
    blocks: &[&CodedView<'_>],
    weights: ByBlock<'_>,
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    sums: &mut [f32],
    out: &mut [f32],
) {
    let v = &blocks[0];
    let group_channels = v.group_channels();
    for first in (0..d).step_by(group_channels) {
        let mut units = [0.0; R];
        let mut ints = [[Integers([[0; 2 * BYTES]; TOKENS / BYTES]); R]; BLOCKS];
        for r in 0..R {
            let group = &mut out[r * d + first..][..group_channels];
            let mut scaled = [[vdupq_n_f32(0.0); TOKENS / LANES]; BLOCKS];
            for (b, block) in blocks.iter().enumerate() {
                scaled[b] = scale(block, first / group_channels, weights.row(b, r), group);
            }
            let (most, total) = if DOT { (TWO_BYTES, f32::INFINITY) } else { (32767.0, WEIGHT_SUM) };
            let (factor, unit) = scale_of(&scaled[..blocks.len()], most, total);
            units[r] = unit;
            for b in 0..blocks.len() {
                ints[b][r] = integers::<DOT>(&scaled[b], factor);
            }
        }
        let group = first / UNIT_CHANNELS..(first + group_channels) / UNIT_CHANNELS;
        for run in v.runs() {
            let range = run.units.start.max(group.start)..run.units.end.min(group.end);
            // SAFETY: passed on.
            unsafe { by_width!(run, by_units::<_, R, DOT>(blocks, &run, range, &ints, d, ahead, sums)) };
        }
        for r in 0..R {
            let places = r * d + first..r * d + first + group_channels;
            add_sums(v, first, &sums[places], units[r], &mut out[r * d..(r + 1) * d]);
        }
    }
}

/// A row's weights times the scales of a group. The zero points' share of the output is added to `out`, the group's channels.
#[inline]
#[target_feature(enable = "neon")]
fn scale(v: &CodedView<'_>, group: usize, row: &Row, out: &mut [f32]) -> Weights {
    let row = row.as_chunks::<LANES>().0;
    let mut w = [vdupq_n_f32(0.0); TOKENS / LANES];
    for (w, x) in w.iter_mut().zip(row) {
        *w = load(x);
    }
    let Some(s) = &v.scales else { return w };
    let of_group = group * TOKENS..(group + 1) * TOKENS;
    if !s.zero.is_empty() {
        let mut shift = [vdupq_n_f32(0.0); 4];
        for (i, (w, zero)) in w.iter().zip(s.zero[of_group.clone()].as_chunks().0).enumerate() {
            shift[i % 4] = vfmaq_f32(shift[i % 4], *w, halves(zero));
        }
        let shift = vaddvq_f32(sum_each(shift));
        out.iter_mut().for_each(|o| *o += shift);
    }
    for (w, scale) in w.iter_mut().zip(s.scale[of_group].as_chunks().0) {
        *w = vmulq_f32(*w, halves(scale));
    }
    w
}

/// What makes a row's weights in some blocks integers of magnitudes up to `most`, and up to `total` together, and the size
/// of one; zeros where they are too small to scale.
#[inline]
#[target_feature(enable = "neon")]
fn scale_of(blocks: &[Weights], most: f32, total: f32) -> (f32, f32) {
    let (mut top, mut sum) = ([vdupq_n_f32(0.0); 2], [vdupq_n_f32(0.0); 2]);
    for (i, x) in blocks.as_flattened().iter().enumerate() {
        let x = vabsq_f32(*x);
        top[i % 2] = vmaxnmq_f32(top[i % 2], x);
        sum[i % 2] = vaddq_f32(sum[i % 2], x);
    }
    let (top, sum) = (vmaxnmvq_f32(vmaxnmq_f32(top[0], top[1])), vaddvq_f32(vaddq_f32(sum[0], sum[1])));
    let factor = if sum > 0.0 { (most / top).min(total / sum) } else { 0.0 };
    if factor > 0.0 && factor.is_finite() { (factor, 1.0 / factor) } else { (0.0, 0.0) }
}

#[inline]
#[target_feature(enable = "neon")]
fn integers<const DOT: bool>(w: &Weights, factor: f32) -> Integers {
    let mut ints = Integers([[0; 2 * BYTES]; TOKENS / BYTES]);
    for (to, four) in ints.0.iter_mut().zip(w.as_chunks::<4>().0) {
        let int = |i: usize| vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(four[i], factor)));
        let (x, y) = (vcombine_s16(int(0), int(1)), vcombine_s16(int(2), int(3)));
        let both = if DOT {
            let high = vrshrn_high_n_s16::<7>(vrshrn_n_s16::<7>(x), y);
            let low = vuzp1q_s8(vreinterpretq_s8_s16(x), vreinterpretq_s8_s16(y));
            [high, vsubq_s8(low, vshlq_n_s8::<7>(high))]
        } else {
            [x, y].map(|x| vreinterpretq_s8_s16(x))
        };
        // SAFETY: 32 writable bytes.
        unsafe { vst1q_s8_x2(to.as_mut_ptr().cast(), int8x16x2_t(both[0], both[1])) };
    }
    ints
}

/// sums[r] = the sum over all blocks of weights times signposts, for some units of a run.
///
/// # Safety
/// As [`coded`].
#[target_feature(enable = "neon")]
unsafe fn by_units<const B: u32, const R: usize, const DOT: bool>(
    blocks: &[&CodedView<'_>],
    run: &Run<'_>,
    range: Range<usize>,
    ints: &[[Integers; R]; BLOCKS],
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    sums: &mut [f32],
) {
    let vectors: [_; BLOCKS] = std::array::from_fn(|b| blocks.get(b).map_or(&[][..], |block| block.vectors_of(run)));
    for u in range.clone() {
        let (place, unit) = (u * UNIT_CHANNELS, (u - run.units.start) * B as usize);
        let tables = blocks[0].four_tables(place);
        ahead[..blocks.len()].iter().for_each(|ahead| ahead.unit::<B>(u - range.start));
        let mut four = [[vdupq_n_f32(0.0); UNIT_CHANNELS]; R];
        for c in 0..UNIT_CHANNELS {
            let entries = if DOT { Entries::split(tables[c]) } else { Entries::of(tables[c]) };
            let mut acc = [[vdupq_n_s32(0); 3]; R];
            for (vectors, ints) in vectors[..blocks.len()].iter().zip(ints) {
                let vectors = &vectors[unit..][..B as usize];
                // SAFETY: passed on.
                unsafe {
                    add_half::<B, R, DOT>(&entries, vectors, c, 0, ints, &mut acc);
                    add_half::<B, R, DOT>(&entries, vectors, c, 1, ints, &mut acc);
                }
            }
            for r in 0..R {
                let [x, y, z] = acc[r];
                four[r][c] = if DOT {
                    let x = vfmaq_n_f32(vcvtq_f32_s32(z), vcvtq_f32_s32(x), 16384.0);
                    vfmaq_n_f32(x, vcvtq_f32_s32(y), 128.0)
                } else {
                    vcvtq_f32_s32(vaddq_s32(x, y))
                };
            }
        }
        for r in 0..R {
            let to = sums[r * d + place..].first_chunk_mut().expect("a row has head_dim places");
            store(to, sum_each(four[r]));
        }
    }
    ahead[..blocks.len()].iter_mut().for_each(|ahead| ahead.skip_units::<B>(range.len()));
}

/// [`add_products`] of half `h` of a channel's vectors.
///
/// # Safety
/// As [`add_products`].
#[inline(always)]
unsafe fn add_half<const B: u32, const R: usize, const DOT: bool>(
    entries: &Entries,
    vectors: &[[u8; VECTOR]],
    c: usize,
    h: usize,
    ints: &[Integers; R],
    acc: &mut [[int32x4_t; 3]; R],
) {
    // SAFETY: passed on.
    unsafe {
        let [low, high] = codes::<B>(vectors, c, h);
        add_products::<B, R, DOT>(entries, low[0], high[0], ints, h, acc);
        add_products::<B, R, DOT>(entries, low[1], high[1], ints, h + 2, acc);
    }
}

/// acc += weights times 16 signposts, those at place `at` of the weights: of DOT, products of high bytes, of one each, of low
/// bytes.
///
/// # Safety
/// The CPU has NEON, and the dot product extension where DOT.
#[inline(always)]
unsafe fn add_products<const B: u32, const R: usize, const DOT: bool>(
    entries: &Entries,
    low: uint8x16_t,
    high: uint8x16_t,
    ints: &[Integers; R],
    at: usize,
    acc: &mut [[int32x4_t; 3]; R],
) {
    // SAFETY: 32 readable bytes of weights; passed on.
    unsafe {
        if DOT {
            let [l, h] = entries.bytes::<B>(low, high);
            let (l, h) = (vreinterpretq_s8_u8(l), vreinterpretq_s8_u8(h));
            for r in 0..R {
                let w: *const i8 = ints[r].0[at].as_ptr().cast();
                let (wh, wl) = (vld1q_s8(w), vld1q_s8(w.add(BYTES)));
                let [a, b, c] = &mut acc[r];
                *a = dot::<DOT>(*a, h, wh);
                *b = dot::<DOT>(dot::<DOT>(*b, h, wl), l, wh);
                *c = dot::<DOT>(*c, l, wl);
            }
        } else {
            let [x, y] = entries.words::<B>(low, high);
            for r in 0..R {
                let w: *const i16 = ints[r].0[at].as_ptr().cast();
                let (v, w) = (vld1q_s16(w), vld1q_s16(w.add(BYTES / 2)));
                let [a, b, _] = &mut acc[r];
                *a = vmlal_s16(*a, vget_low_s16(x), vget_low_s16(v));
                *b = vmlal_high_s16(*b, x, v);
                *a = vmlal_s16(*a, vget_low_s16(y), vget_low_s16(w));
                *b = vmlal_high_s16(*b, y, w);
            }
        }
    }
}

/// row[channels of the places from `first` on] += the sums, times step and the weights' unit.
#[inline]
#[target_feature(enable = "neon")]
fn add_sums(v: &CodedView<'_>, first: usize, sums: &[f32], unit: f32, row: &mut [f32]) {
    if !v.lut.order.is_empty() {
        for ((sum, c), step) in sums.iter().zip(&v.lut.order[first..]).zip(&v.lut.steps[first..]) {
            row[*c as usize] += sum * (unit * step);
        }
    } else if v.scales.is_some() {
        let factor = unit * v.lut.steps[0];
        row[first..].iter_mut().zip(sums).for_each(|(to, sum)| *to += sum * factor);
    } else {
        for ((to, sum), step) in row[first..].iter_mut().zip(sums).zip(&v.lut.steps[first..]) {
            *to += sum * (unit * step);
        }
    }
}
