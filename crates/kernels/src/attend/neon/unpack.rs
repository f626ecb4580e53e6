//! Codes to signposts: one shift and one mask give a byte a code, one byte shuffle each the low and the high byte of its
//! signpost, in the order of tokens.

use std::arch::aarch64::*;

use kvquant_quant::Table;
use kvquant_quant::pack::{LOW_BITS, UNIT_CHANNELS, VECTOR};

use super::super::by_const::{by_width, units};
use super::super::view::{CodedView, Run, TOKENS};
use super::{LANES, half, halves, load, store};

/// Bytes of a vector.
pub(super) const BYTES: usize = 16;

/// Codes of a channel as bytes: of 16 tokens in the first half of the block, and of those 32 tokens further. A 3-bit code
/// may carry a fourth bit of noise.
type Codes = [uint8x16_t; 2];

/// 16 signposts, 16-bit steps.
pub(super) type Signposts = [int16x8_t; 2];

/// Half `h` of a unit's vector.
#[inline]
#[target_feature(enable = "neon")]
fn vector(bytes: &[u8; VECTOR], h: usize) -> uint8x16_t {
    let bytes: &[u8; BYTES] = &bytes.as_chunks().0[h];
    // SAFETY: 16 readable bytes.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// Fields of a byte from bit `low` and bit `high` on.
#[inline]
#[target_feature(enable = "neon")]
fn fields(x: uint8x16_t, low: u32, high: u32, mask: u8) -> Codes {
    let field = |from: u32| vandq_u8(vshlq_u8(x, vdupq_n_s8(-(from as i8))), vdupq_n_u8(mask));
    [field(low), field(high)]
}

/// The fourth bits of the nibbles of a 3-bit plane, which are its last channel's codes.
#[inline]
#[target_feature(enable = "neon")]
fn fourth_bits(unit: &[[u8; VECTOR]], h: usize) -> uint8x16_t {
    let bit = |v, mask: u8| vandq_u8(v, vdupq_n_u8(mask));
    let (x, y, z) = (vector(&unit[0], h), vector(&unit[1], h), vector(&unit[2], h));
    let low = vorrq_u8(bit(vshrq_n_u8::<3>(x), 0x11), bit(vshrq_n_u8::<2>(y), 0x22));
    vorrq_u8(low, bit(vshrq_n_u8::<1>(z), 0x44))
}

/// Codes of channel c of a unit's plane of B bits, 0 to 4.
///
/// # Safety
/// The CPU has NEON.
// Inlined at any size: a call would pass vectors through memory. No function with a target feature can ask for that.
#[inline(always)]
unsafe fn plane<const B: u32>(unit: &[[u8; VECTOR]], c: usize, h: usize) -> Codes {
    // SAFETY: passed on.
    unsafe {
        match B {
            0 => [vdupq_n_u8(0); 2],
            1 => fields(vector(&unit[0], h), 2 * c as u32, 2 * c as u32 + 1, 1),
            2 => {
                let first = 4 * (c as u32 % 2);
                fields(vector(&unit[c / 2], h), first, first + 2, 3)
            }
            3 if c == 3 => fields(fourth_bits(unit, h), 0, 4, 15),
            _ => fields(vector(&unit[c], h), 0, 4, 15),
        }
    }
}

/// Codes of channel c of a unit of B bits, of half `h` of each vector: those of the low plane, and those of the high plane
/// where B is above 4.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
pub(super) unsafe fn codes<const B: u32>(unit: &[[u8; VECTOR]], c: usize, h: usize) -> [Codes; 2] {
    // SAFETY: passed on.
    unsafe {
        match B {
            5 => [plane::<4>(unit, c, h), plane::<1>(&unit[4..], c, h)],
            6 => [plane::<4>(unit, c, h), plane::<2>(&unit[4..], c, h)],
            7 => [plane::<4>(unit, c, h), plane::<3>(&unit[4..], c, h)],
            _ => [plane::<B>(unit, c, h), plane::<0>(&[], c, h)],
        }
    }
}

/// A channel's table: low and high bytes of the entries of both parts.
#[derive(Clone, Copy)]
pub(super) struct Entries([[uint8x16_t; 2]; 2]);

impl Entries {
    /// The signposts' own bytes.
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn of(table: &Table) -> Self {
        Entries([&table.low, &table.high].map(|part| [vector(part, 0), vector(part, 1)]))
    }

    /// Those of twice the signposts: a turned key is then exact to half a step.
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn doubled(table: &Table) -> Self {
        let Entries(parts) = Self::of(table);
        Entries(parts.map(|[low, high]| [vshlq_n_u8::<1>(low), vsriq_n_u8::<7>(vshlq_n_u8::<1>(high), low)]))
    }

    /// Signed bytes l and h of every signpost 128 h + l, |l| <= 64, such that those of two parts add up without a carry.
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn split(table: &Table) -> Self {
        let part = |bytes: &[u8; 32], words: &[i16; 16]| {
            let [first, second] = [0, 8].map(|i| {
                let eight: &[i16; 8] = words[i..].first_chunk().expect("16 words");
                // SAFETY: 8 readable words.
                unsafe { vld1q_s16(eight.as_ptr()) }
            });
            let high = vreinterpretq_u8_s8(vrshrn_high_n_s16::<7>(vrshrn_n_s16::<7>(first), second));
            [vsubq_u8(vector(bytes, 0), vshlq_n_u8::<7>(high)), high]
        };
        // The words of a missing high part are those of the low one once more: it is not read then.
        Entries([part(&table.low, &table.words[0]), part(&table.high, &table.words[1])])
    }

    /// Low and high bytes of 16 signposts of a channel of B bits; of 6 and 7 bits, only where they are [`split`](Self::split).
    ///
    /// # Safety
    /// The CPU has NEON.
    #[inline(always)]
    pub unsafe fn bytes<const B: u32>(&self, low: uint8x16_t, high: uint8x16_t) -> [uint8x16_t; 2] {
        let Entries([a, b]) = self;
        // SAFETY: passed on.
        unsafe {
            match B {
                5 => {
                    let code = vsliq_n_u8::<{ LOW_BITS as i32 }>(low, high);
                    [vqtbl2q_u8(uint8x16x2_t(a[0], b[0]), code), vqtbl2q_u8(uint8x16x2_t(a[1], b[1]), code)]
                }
                6.. => [
                    vaddq_u8(vqtbl1q_u8(a[0], low), vqtbl1q_u8(b[0], high)),
                    vaddq_u8(vqtbl1q_u8(a[1], low), vqtbl1q_u8(b[1], high)),
                ],
                _ => [vqtbl1q_u8(a[0], low), vqtbl1q_u8(a[1], low)],
            }
        }
    }

    /// 16 signposts of a channel of B bits, in steps or half steps.
    ///
    /// # Safety
    /// The CPU has NEON.
    #[inline(always)]
    pub unsafe fn words<const B: u32>(&self, low: uint8x16_t, high: uint8x16_t) -> Signposts {
        let Entries([a, b]) = self;
        // SAFETY: passed on.
        unsafe {
            if B <= LOW_BITS + 1 {
                let [l, h] = self.bytes::<B>(low, high);
                return zipped(l, h);
            }
            let x = zipped(vqtbl1q_u8(a[0], low), vqtbl1q_u8(a[1], low));
            let y = zipped(vqtbl1q_u8(b[0], high), vqtbl1q_u8(b[1], high));
            [vaddq_s16(x[0], y[0]), vaddq_s16(x[1], y[1])]
        }
    }
}

/// Words from their low and high bytes.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn zipped(l: uint8x16_t, h: uint8x16_t) -> Signposts {
    // SAFETY: passed on.
    unsafe { [vreinterpretq_s16_u8(vzip1q_u8(l, h)), vreinterpretq_s16_u8(vzip2q_u8(l, h))] }
}

/// The whole side as f32, `[head_dim, 64]`.
#[target_feature(enable = "neon")]
pub(super) fn dequant(v: &CodedView<'_>, tile: &mut [f32]) {
    let rows = tile.as_chunks_mut::<TOKENS>().0;
    for run in v.runs() {
        by_width!(run, dequant_run::<_>(v, &run, rows));
    }
    if let Some(s) = &v.scales {
        // Product and sum are rounded one by one, as the twin does.
        for (c, row) in rows.iter_mut().enumerate() {
            let at = c / v.group_channels() * TOKENS;
            for (i, x) in row.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let four = |from: &[u16]| from[at + LANES * i..].first_chunk().map_or(vdupq_n_f32(0.0), |e| halves(e));
                let scaled = vmulq_f32(four(s.scale), load(x));
                let zero = if s.zero.is_empty() { vdupq_n_f32(0.0) } else { four(s.zero) };
                store(x, vaddq_f32(scaled, zero));
            }
        }
    }
    for (channel, token, residual) in v.each_outlier() {
        rows[channel][token] += half(residual);
    }
}

#[target_feature(enable = "neon")]
fn dequant_run<const B: u32>(v: &CodedView<'_>, run: &Run<'_>, rows: &mut [[f32; TOKENS]]) {
    for (u, unit) in units::<B>(run) {
        for c in 0..UNIT_CHANNELS {
            let place = u * UNIT_CHANNELS + c;
            let (table, step) = v.table(place);
            let entries = Entries::of(table);
            let row = rows[v.channel(place)].as_chunks_mut::<LANES>().0;
            for h in 0..2 {
                // SAFETY: the CPU has NEON here.
                let [low, high] = unsafe { codes::<B>(unit, c, h) };
                for i in 0..2 {
                    let first = (TOKENS / 2 * i + BYTES * h) / LANES;
                    // SAFETY: likewise.
                    let posts = unsafe { entries.words::<B>(low[i], high[i]) };
                    for (part, x) in posts.into_iter().enumerate() {
                        let fours = [vmovl_s16(vget_low_s16(x)), vmovl_high_s16(x)];
                        for (j, four) in fours.into_iter().enumerate() {
                            store(&mut row[first + 2 * part + j], vmulq_n_f32(vcvtq_f32_s32(four), step));
                        }
                    }
                }
            }
        }
    }
}
