//! Codes to signposts: one shift and one mask give a byte a code, one byte shuffle each the low and the high byte
//! of its signpost.

use std::arch::x86_64::*;

use kvquant_quant::Table;
use kvquant_quant::pack::{LOW_BITS, UNIT_CHANNELS, VECTOR};

pub(in super::super) use super::super::by_const::{by_rows, by_width, units};
use super::super::view::{CodedView, Run, TOKENS};
use super::{halves, load, store};

/// A channel's codes as bytes, one vector for each half of the tokens. A 3-bit code may carry a fourth bit of noise.
pub(super) type Codes = [__m256i; 2];

/// A channel's signposts, 16-bit steps: `[half]` of the tokens: tokens 0-7 and 16-23, then 8-15 and 24-31.
pub(super) type Signposts = [[__m256i; 2]; 2];

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn vector(bytes: &[u8; VECTOR]) -> __m256i {
    // SAFETY: 32 readable bytes; unaligned loads are allowed.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Fields of a byte from bit `LOW` and bit `HIGH` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fields<const LOW: i32, const HIGH: i32>(x: __m256i, mask: i8) -> Codes {
    let mask = _mm256_set1_epi8(mask);
    [_mm256_and_si256(_mm256_srli_epi16::<LOW>(x), mask), _mm256_and_si256(_mm256_srli_epi16::<HIGH>(x), mask)]
}

/// Codes of the 4 channels of a unit's plane of B bits, 0 to 4.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn plane<const B: u32>(unit: &[[u8; VECTOR]]) -> [Codes; UNIT_CHANNELS] {
    match B {
        0 => [[_mm256_setzero_si256(); 2]; UNIT_CHANNELS],
        1 => {
            let v = vector(&unit[0]);
            [fields::<0, 1>(v, 1), fields::<2, 3>(v, 1), fields::<4, 5>(v, 1), fields::<6, 7>(v, 1)]
        }
        2 => {
            let (v, w) = (vector(&unit[0]), vector(&unit[1]));
            [fields::<0, 2>(v, 3), fields::<4, 6>(v, 3), fields::<0, 2>(w, 3), fields::<4, 6>(w, 3)]
        }
        3 => {
            let (x, y, z) = (vector(&unit[0]), vector(&unit[1]), vector(&unit[2]));
            let bit = |v, mask: i8| _mm256_and_si256(v, _mm256_set1_epi8(mask));
            let fourth = _mm256_or_si256(
                bit(_mm256_srli_epi16::<3>(x), 0x11),
                _mm256_or_si256(bit(_mm256_srli_epi16::<2>(y), 0x22), bit(_mm256_srli_epi16::<1>(z), 0x44)),
            );
            [fields::<0, 4>(x, 15), fields::<0, 4>(y, 15), fields::<0, 4>(z, 15), fields::<0, 4>(fourth, 15)]
        }
        _ => {
            let four = |i: usize| fields::<0, 4>(vector(&unit[i]), 15);
            [four(0), four(1), four(2), four(3)]
        }
    }
}

/// Codes of a unit of B bits: those of the low plane, and those of the high plane where B is above 4.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn codes<const B: u32>(unit: &[[u8; VECTOR]]) -> [[Codes; UNIT_CHANNELS]; 2] {
    match B {
        5 => [plane::<4>(unit), plane::<1>(&unit[4..])],
        6 => [plane::<4>(unit), plane::<2>(&unit[4..])],
        7 => [plane::<4>(unit), plane::<3>(&unit[4..])],
        _ => [plane::<B>(unit), plane::<0>(&[])],
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn entries(part: &[u8; 32], codes: Codes) -> Signposts {
    // SAFETY: 16 readable bytes each.
    let (low, high) = unsafe {
        let low = _mm_loadu_si128(part.as_ptr().cast());
        let high = _mm_loadu_si128(part.as_ptr().add(16).cast());
        (_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high))
    };
    let look = |code: __m256i| {
        let (x, y) = (_mm256_shuffle_epi8(low, code), _mm256_shuffle_epi8(high, code));
        [_mm256_unpacklo_epi8(x, y), _mm256_unpackhi_epi8(x, y)]
    };
    [look(codes[0]), look(codes[1])]
}

/// Signposts of a table of 32 entries: `upper` has the sign bit of a byte set for the upper half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn entries_of_two(table: &Table, codes: Codes, upper: Codes) -> Signposts {
    let part = |bytes: &[u8; 32], i: usize| {
        // SAFETY: 16 readable bytes from 0 and from 16 on.
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().add(16 * i).cast())) }
    };
    let look = |code: __m256i, upper: __m256i| {
        let byte = |i: usize| {
            let (a, b) = (part(&table.low, i), part(&table.high, i));
            _mm256_blendv_epi8(_mm256_shuffle_epi8(a, code), _mm256_shuffle_epi8(b, code), upper)
        };
        let (x, y) = (byte(0), byte(1));
        [_mm256_unpacklo_epi8(x, y), _mm256_unpackhi_epi8(x, y)]
    };
    [look(codes[0], upper[0]), look(codes[1], upper[1])]
}

/// Signposts of a channel of a unit of B bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn look_up<const B: u32>(table: &Table, low: Codes, high: Codes) -> Signposts {
    let x = entries(&table.low, low);
    if B <= LOW_BITS {
        return x;
    }
    if B == 5 {
        // The fifth bit, moved to the sign, chooses the upper half of the table, byte by byte.
        return entries_of_two(table, low, [_mm256_slli_epi16::<7>(high[0]), _mm256_slli_epi16::<7>(high[1])]);
    }
    let y = entries(&table.high, high);
    let add = |i: usize, j: usize| _mm256_add_epi16(x[i][j], y[i][j]);
    [[add(0, 0), add(0, 1)], [add(1, 0), add(1, 1)]]
}

/// The whole side as f32, `[head_dim, 64]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dequant(v: &CodedView<'_>, tile: &mut [f32]) {
    let rows = tile.as_chunks_mut::<TOKENS>().0;
    for run in v.runs() {
        by_width!(run, dequant_run::<_>(v, &run, rows));
    }
    if let Some(s) = &v.scales {
        // Product and sum are rounded one by one, as the twin does.
        for (c, row) in rows.iter_mut().enumerate() {
            let at = c / v.group_channels() * TOKENS;
            for (i, x) in row.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let eight = |from: &[u16]| from[at + 8 * i..].first_chunk().map_or(_mm256_setzero_ps(), |e| halves(e));
                let scaled = _mm256_mul_ps(eight(s.scale), load(x));
                let zero = if s.zero.is_empty() { _mm256_setzero_ps() } else { eight(s.zero) };
                store(x, _mm256_add_ps(scaled, zero));
            }
        }
    }
    for (channel, token, residual) in v.each_outlier() {
        rows[channel][token] += half(residual);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dequant_run<const B: u32>(v: &CodedView<'_>, run: &Run<'_>, rows: &mut [[f32; TOKENS]]) {
    for (u, unit) in units::<B>(run) {
        let [low, high] = codes::<B>(unit);
        for i in 0..UNIT_CHANNELS {
            let place = u * UNIT_CHANNELS + i;
            let (table, step) = v.table(place);
            let step = _mm256_set1_ps(step);
            let row = rows[v.channel(place)].as_chunks_mut::<8>().0;
            for (half, posts) in look_up::<B>(table, low[i], high[i]).iter().enumerate() {
                for (part, x) in posts.iter().enumerate() {
                    let first = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(*x));
                    let second = _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(*x));
                    store(&mut row[4 * half + part], _mm256_mul_ps(step, _mm256_cvtepi32_ps(first)));
                    store(&mut row[4 * half + part + 2], _mm256_mul_ps(step, _mm256_cvtepi32_ps(second)));
                }
            }
        }
    }
}

/// fp16 to f32, in place of a call that asks for the CPU's features again each time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn half(bits: u16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32)))
}
