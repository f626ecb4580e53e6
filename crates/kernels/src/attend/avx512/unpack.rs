//! Codes to signposts: see AVX2's file of this name.

use std::arch::x86_64::*;

use kvquant_quant::Table;
use kvquant_quant::pack::{LOW_BITS, UNIT_CHANNELS, VECTOR};

/// A channel's codes as bytes, token by token. A 3-bit code may carry a fourth bit of noise.
pub(super) type Codes = __m512i;

/// A channel's signposts, 16-bit steps, in the order of [`crate::rope::shuffled`].
pub(super) type Signposts = [__m512i; 2];

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn vector(bytes: &[u8; VECTOR]) -> __m256i {
    // SAFETY: 32 readable bytes; unaligned loads are allowed.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Fields of a byte from bit `low` on for the first half of the tokens, from bit `high` on for the second.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn fields(x: __m256i, low: i16, high: i16, mask: i8) -> Codes {
    let shift = _mm512_inserti64x4::<1>(_mm512_set1_epi16(low), _mm256_set1_epi16(high));
    _mm512_and_si512(_mm512_srlv_epi16(_mm512_broadcast_i64x4(x), shift), _mm512_set1_epi8(mask))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn plane<const B: u32>(unit: &[[u8; VECTOR]]) -> [Codes; UNIT_CHANNELS] {
    match B {
        0 => [_mm512_setzero_si512(); UNIT_CHANNELS],
        1 => {
            let v = vector(&unit[0]);
            [fields(v, 0, 1, 1), fields(v, 2, 3, 1), fields(v, 4, 5, 1), fields(v, 6, 7, 1)]
        }
        2 => {
            let (v, w) = (vector(&unit[0]), vector(&unit[1]));
            [fields(v, 0, 2, 3), fields(v, 4, 6, 3), fields(w, 0, 2, 3), fields(w, 4, 6, 3)]
        }
        3 => {
            let (x, y, z) = (vector(&unit[0]), vector(&unit[1]), vector(&unit[2]));
            let bit = |v, mask: i8| _mm256_and_si256(v, _mm256_set1_epi8(mask));
            let fourth = _mm256_or_si256(
                bit(_mm256_srli_epi16::<3>(x), 0x11),
                _mm256_or_si256(bit(_mm256_srli_epi16::<2>(y), 0x22), bit(_mm256_srli_epi16::<1>(z), 0x44)),
            );
            [fields(x, 0, 4, 15), fields(y, 0, 4, 15), fields(z, 0, 4, 15), fields(fourth, 0, 4, 15)]
        }
        _ => {
            let four = |i: usize| fields(vector(&unit[i]), 0, 4, 15);
            [four(0), four(1), four(2), four(3)]
        }
    }
}

/// Codes of a unit of B bits: those of the low plane, and those of the high plane where B is above 4.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn codes<const B: u32>(unit: &[[u8; VECTOR]]) -> [[Codes; UNIT_CHANNELS]; 2] {
    match B {
        5 => [plane::<4>(unit), plane::<1>(&unit[4..])],
        6 => [plane::<4>(unit), plane::<2>(&unit[4..])],
        7 => [plane::<4>(unit), plane::<3>(&unit[4..])],
        _ => [plane::<B>(unit), plane::<0>(&[])],
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn entries(part: &[u8; 32], codes: Codes) -> Signposts {
    // SAFETY: 16 readable bytes each.
    let (low, high) = unsafe {
        let low = _mm_loadu_si128(part.as_ptr().cast());
        let high = _mm_loadu_si128(part.as_ptr().add(16).cast());
        (_mm512_broadcast_i32x4(low), _mm512_broadcast_i32x4(high))
    };
    let (x, y) = (_mm512_shuffle_epi8(low, codes), _mm512_shuffle_epi8(high, codes));
    [_mm512_unpacklo_epi8(x, y), _mm512_unpackhi_epi8(x, y)]
}

/// Signposts of a channel of a unit of B bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn look_up<const B: u32>(table: &Table, low: Codes, high: Codes) -> Signposts {
    let x = entries(&table.low, low);
    if B <= LOW_BITS {
        return x;
    }
    if B == 5 {
        // The fifth bit chooses the upper half of the table.
        let upper = _mm512_test_epi8_mask(high, high);
        let part = |bytes: &[u8; 32], i: usize| {
            // SAFETY: 16 readable bytes from 0 and from 16 on.
            unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().add(16 * i).cast())) }
        };
        let byte = |i: usize| {
            let (a, b) = (part(&table.low, i), part(&table.high, i));
            _mm512_mask_blend_epi8(upper, _mm512_shuffle_epi8(a, low), _mm512_shuffle_epi8(b, low))
        };
        let (x, y) = (byte(0), byte(1));
        return [_mm512_unpacklo_epi8(x, y), _mm512_unpackhi_epi8(x, y)];
    }
    let y = entries(&table.high, high);
    [_mm512_add_epi16(x[0], y[0]), _mm512_add_epi16(x[1], y[1])]
}
