//! Scores from codes with static tables.
//!
//! Pass 1, once for all rows: signposts in half steps, turned by their place in the block, four channels of a unit side by
//! side. Pass 2: products with integer queries (`smlal`), summed in 32 bits. Outliers, a hundredth of the entries, are added in
//! f32.
//!
//! ```text
//! keys   [8 chunks of 8 tokens][head_dim / 4 units][4 channels][8 tokens] 16 bits each
//! ```
//!
//! Overflow: a turned channel is at most 2 sqrt(2) * 8191 + 2 half steps; queries are scaled so that the sum of their
//! magnitudes times that stays below 2^31.
//!
//! `sdot` was tried: keys and queries as two bytes each, three products of bytes instead of two of words. Splitting keys and
//! laying four channels' bytes side by side costs more than the products save: 16,100 instructions a block of 64 tokens, 3
//! rows, against 12,700.

use std::arch::aarch64::*;

use kvquant_quant::TOP;
use kvquant_quant::pack::{UNIT_CHANNELS, VECTOR};

use super::super::ahead::Ahead;
use super::super::by_const::{by_rows, by_width, units};
use super::super::rows::{ROWS, Row};
use super::super::view::{CodedView, Run, TOKENS};
use super::decode::{Line, Scratch};
use super::unpack::{self, BYTES, Entries, Signposts};
use super::{LANES, load, outliers, store};
use crate::neon::add_fraction;
use crate::rope::{BlockTable, Turns16};

/// Sum of the magnitudes of an integer query of 16 bits.
const QUERY_SUM: f32 = (i32::MAX as f64 / (2.0 * TOP as f64 * std::f64::consts::SQRT_2 + 4.0)) as f32 - 1024.0;

/// Tokens of a line of keys.
const CHUNK: usize = 8;

/// # Safety
/// Where RDM is true, the CPU has it.
#[target_feature(enable = "neon")]
pub(super) unsafe fn coded<const RDM: bool>(
    s: &mut Scratch,
    d: usize,
    v: &CodedView<'_>,
    turn: Option<&BlockTable>,
    ahead: &mut Ahead<'_>,
    scores: &mut [Row],
) {
    s.keys.resize(TOKENS / CHUNK * d / UNIT_CHANNELS, Line([[0; CHUNK]; UNIT_CHANNELS]));
    let keys = &mut s.keys[..];
    let ordered = v.lut.order.is_empty();
    if !ordered {
        s.signposts.resize(d, [0; TOKENS]);
    }
    for run in v.runs() {
        if ordered {
            // SAFETY: passed on.
            unsafe { by_width!(run, turned::<_, RDM>(v, &run, turn, ahead, keys)) };
        } else {
            by_width!(run, signposts::<_>(v, &run, ahead, &mut s.signposts));
        }
    }
    if !ordered {
        for (u, four) in s.signposts.as_chunks::<UNIT_CHANNELS>().0.iter().enumerate() {
            for (t, place) in (0..TOKENS).step_by(BYTES).enumerate() {
                let posts = four.each_ref().map(|channel| [place, place + CHUNK].map(|at| words(&channel[at..])));
                // SAFETY: passed on.
                unsafe { turn_sixteen::<RDM>(posts, u, t, turn, keys) };
            }
        }
    }
    let steps = if ordered { v.lut.steps } else { &s.steps };
    s.ints.resize(ROWS * d, 0);
    for (q, scores) in s.local.chunks(ROWS * d).zip(scores.chunks_mut(ROWS)) {
        by_rows!(scores.len(), rows::<_>(q, d, v, steps, turn, keys, &mut s.ints, &mut s.outliers, scores));
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn words(from: &[i16]) -> int16x8_t {
    let from: &[i16; CHUNK] = from.first_chunk().expect("whole chunks");
    // SAFETY: 8 readable words.
    unsafe { vld1q_s16(from.as_ptr()) }
}

/// Puts steps in the order of channels, where that is not the order of places.
pub(super) fn steps_by_channel(v: &CodedView<'_>, to: &mut Vec<f32>) {
    to.resize(v.lut.order.len(), 0.0);
    for (&c, &step) in v.lut.order.iter().zip(v.lut.steps) {
        to[c as usize] = step;
    }
}

/// Signposts of a run, channel by channel, where channels lie in another order.
#[target_feature(enable = "neon")]
fn signposts<const B: u32>(v: &CodedView<'_>, run: &Run<'_>, ahead: &mut Ahead<'_>, rows: &mut [[i16; TOKENS]]) {
    for (n, (u, unit)) in units::<B>(run).enumerate() {
        ahead.unit::<B>(n);
        for c in 0..UNIT_CHANNELS {
            let place = u * UNIT_CHANNELS + c;
            let entries = Entries::doubled(v.table(place).0);
            let row = rows[v.channel(place)].as_chunks_mut::<CHUNK>().0;
            for h in 0..2 {
                // SAFETY: the CPU has NEON here.
                let [low, high] = unsafe { unpack::codes::<B>(unit, c, h) };
                for i in 0..2 {
                    let first = (TOKENS / 2 * i + BYTES * h) / CHUNK;
                    // SAFETY: 8 writable words each; the CPU has NEON here.
                    unsafe {
                        let [x, y] = entries.words::<B>(low[i], high[i]);
                        vst1q_s16(row[first].as_mut_ptr(), x);
                        vst1q_s16(row[first + 1].as_mut_ptr(), y);
                    }
                }
            }
        }
    }
    ahead.skip_units::<B>(run.units.len());
}

/// Pass 1, for a run of units whose channels lie in their own order.
///
/// # Safety
/// As [`coded`].
#[target_feature(enable = "neon")]
unsafe fn turned<const B: u32, const RDM: bool>(
    v: &CodedView<'_>,
    run: &Run<'_>,
    turn: Option<&BlockTable>,
    ahead: &mut Ahead<'_>,
    keys: &mut [Line],
) {
    for (n, (u, unit)) in units::<B>(run).enumerate() {
        ahead.unit::<B>(n);
        let entries = v.four_tables(u * UNIT_CHANNELS).map(|table| Entries::doubled(table));
        // SAFETY: passed on.
        unsafe {
            turn_half::<B, RDM>(unit, &entries, u, 0, turn, keys);
            turn_half::<B, RDM>(unit, &entries, u, 1, turn, keys);
        }
    }
    ahead.skip_units::<B>(run.units.len());
}

/// Turns what half `h` of a unit's vectors holds.
///
/// # Safety
/// As [`turn_sixteen`].
#[inline(always)]
unsafe fn turn_half<const B: u32, const RDM: bool>(
    unit: &[[u8; VECTOR]],
    entries: &[Entries; UNIT_CHANNELS],
    u: usize,
    h: usize,
    turn: Option<&BlockTable>,
    keys: &mut [Line],
) {
    // SAFETY: passed on.
    unsafe {
        let [a, b, c, d] = [
            unpack::codes::<B>(unit, 0, h),
            unpack::codes::<B>(unit, 1, h),
            unpack::codes::<B>(unit, 2, h),
            unpack::codes::<B>(unit, 3, h),
        ];
        for i in 0..2 {
            let posts = [
                entries[0].words::<B>(a[0][i], a[1][i]),
                entries[1].words::<B>(b[0][i], b[1][i]),
                entries[2].words::<B>(c[0][i], c[1][i]),
                entries[3].words::<B>(d[0][i], d[1][i]),
            ];
            turn_sixteen::<RDM>(posts, u, h + 2 * i, turn, keys);
        }
    }
}

/// Turns 16 tokens of unit `u`, which `sixteen` times as many precede, and stores their lines.
///
/// # Safety
/// The CPU has NEON, and RDM where it is true.
// Inlined at any size, as what it is given lies in registers.
#[inline(always)]
unsafe fn turn_sixteen<const RDM: bool>(
    posts: [Signposts; UNIT_CHANNELS],
    u: usize,
    sixteen: usize,
    turn: Option<&BlockTable>,
    keys: &mut [Line],
) {
    let [a, b, c, d] = posts;
    // SAFETY: passed on.
    unsafe {
        turn_chunk::<RDM>([a[0], b[0], c[0], d[0]], u, 2 * sixteen, turn, keys);
        turn_chunk::<RDM>([a[1], b[1], c[1], d[1]], u, 2 * sixteen + 1, turn, keys);
    }
}

/// # Safety
/// As [`turn_sixteen`].
#[inline(always)]
unsafe fn turn_chunk<const RDM: bool>(
    [mut a, mut b, mut c, mut d]: [int16x8_t; UNIT_CHANNELS],
    u: usize,
    chunk: usize,
    turn: Option<&BlockTable>,
    keys: &mut [Line],
) {
    let Line(to) = &mut keys[chunk * (keys.len() / (TOKENS / CHUNK)) + u];
    // SAFETY: passed on; 8 writable words each.
    unsafe {
        if let Some(table) = turn {
            (a, b) = rotate::<RDM>(a, b, &table.wide16[2 * u], chunk);
            (c, d) = rotate::<RDM>(c, d, &table.wide16[2 * u + 1], chunk);
        }
        for (to, x) in to.iter_mut().zip([a, b, c, d]) {
            vst1q_s16(to.as_mut_ptr(), x);
        }
    }
}

/// # Safety
/// The CPU has NEON, and RDM where it is true.
#[inline(always)]
unsafe fn rotate<const RDM: bool>(
    x: int16x8_t,
    y: int16x8_t,
    Turns16([cos, sin]): &Turns16,
    chunk: usize,
) -> (int16x8_t, int16x8_t) {
    // SAFETY: passed on.
    unsafe {
        let (c, s) = (words(&cos[CHUNK * chunk..]), words(&sin[CHUNK * chunk..]));
        (add_fraction::<RDM, true>(vqrdmulhq_s16(x, c), y, s), add_fraction::<RDM, false>(vqrdmulhq_s16(x, s), y, c))
    }
}

/// An integer query: each channel times its step, scaled by the inverse of the returned factor and rounded.
#[inline]
#[target_feature(enable = "neon")]
fn integers(q: &[f32], steps: &[f32], ints: &mut [i16]) -> f32 {
    let both = || q.as_chunks::<LANES>().0.iter().zip(steps.as_chunks::<LANES>().0);
    let stepped = |(q, step): (&[f32; LANES], &[f32; LANES])| vmulq_f32(load(q), load(step));
    let (mut top, mut sum) = (vdupq_n_f32(0.0), vdupq_n_f32(0.0));
    for four in both() {
        let x = vabsq_f32(stepped(four));
        top = vmaxnmq_f32(top, x);
        sum = vaddq_f32(sum, x);
    }
    let (top, sum) = (vmaxnmvq_f32(top), vaddvq_f32(sum));
    let factor = if sum > 0.0 { (32767.0 / top).min(QUERY_SUM / sum) } else { 0.0 };
    // A query of zeros, or one too small to scale, scores 0.
    let factor = if factor.is_finite() { factor } else { 0.0 };
    for (four, to) in both().zip(ints.as_chunks_mut::<LANES>().0) {
        let x = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(stepped(four), factor)));
        // SAFETY: 4 writable words.
        unsafe { vst1_s16(to.as_mut_ptr(), x) };
    }
    if factor > 0.0 { 1.0 / factor } else { 0.0 }
}

/// sums += a line of keys times a query's unit, 8 tokens, of two channels in two sums each.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn add_products(
    [k0, k1, k2, k3]: [int16x8_t; UNIT_CHANNELS],
    q: &[i16; UNIT_CHANNELS],
    sums: &mut [int32x4_t; 4],
) {
    // SAFETY: 4 readable words; passed on.
    unsafe {
        let [a, b, c, d] = sums;
        let q = vld1_s16(q.as_ptr());
        *a = vmlal_lane_s16::<0>(*a, vget_low_s16(k0), q);
        *b = vmlal_high_lane_s16::<0>(*b, k0, q);
        *c = vmlal_lane_s16::<1>(*c, vget_low_s16(k1), q);
        *d = vmlal_high_lane_s16::<1>(*d, k1, q);
        *a = vmlal_lane_s16::<2>(*a, vget_low_s16(k2), q);
        *b = vmlal_high_lane_s16::<2>(*b, k2, q);
        *c = vmlal_lane_s16::<3>(*c, vget_low_s16(k3), q);
        *d = vmlal_high_lane_s16::<3>(*d, k3, q);
    }
}

/// Pass 2: scores of R rows.
#[target_feature(enable = "neon")]
fn rows<const R: usize>(
    q: &[f32],
    d: usize,
    v: &CodedView<'_>,
    steps: &[f32],
    turn: Option<&BlockTable>,
    keys: &[Line],
    ints: &mut [i16],
    extra: &mut outliers::Scratch,
    scores: &mut [Row],
) {
    let scores: &mut [Row; R] = scores.first_chunk_mut().expect("called with R rows");
    let mut factors = [0.0; R];
    for ((q, ints), factor) in q.chunks_exact(d).zip(ints.chunks_exact_mut(d)).zip(&mut factors) {
        // Keys are half steps.
        *factor = 0.5 * integers(q, steps, ints);
    }
    let queries: [&[[i16; UNIT_CHANNELS]]; R] = std::array::from_fn(|r| ints[r * d..(r + 1) * d].as_chunks().0);
    for (chunk, lines) in keys.chunks_exact(d / UNIT_CHANNELS).enumerate() {
        let mut sums = [[vdupq_n_s32(0); 4]; R];
        for (u, Line([a, b, c, d])) in lines.iter().enumerate() {
            let k = [words(a), words(b), words(c), words(d)];
            for r in 0..R {
                // SAFETY: every query has as many units as a chunk has lines; the CPU has NEON here.
                unsafe { add_products(k, queries[r].get_unchecked(u), &mut sums[r]) };
            }
        }
        for r in 0..R {
            let to = scores[r][CHUNK * chunk..][..CHUNK].as_chunks_mut::<LANES>().0;
            for i in 0..2 {
                let x = vcvtq_f32_s32(vaddq_s32(sums[r][i], sums[r][2 + i]));
                store(&mut to[i], vmulq_n_f32(x, factors[r]));
            }
        }
    }
    outliers::score::<R>(extra, q, d, v, turn, scores);
}
