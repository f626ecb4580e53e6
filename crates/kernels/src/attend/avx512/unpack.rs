//! Codes to signposts: a shift of words puts a code into the low bits of a 16-bit lane, and one word shuffle, which reads
//! the low five bits only, looks it up. What lies above a code is noise that tables, which repeat, ignore.

use std::arch::x86_64::*;

use kvquant_quant::Table;
use kvquant_quant::pack::{LOW_BITS, UNIT_CHANNELS, VECTOR};

/// A channel's codes in the low bits of 16-bit lanes, in the order of [`crate::rope::evens_first`].
pub(super) type Codes = [__m512i; 2];

/// A channel's signposts, 16-bit steps, in the same order.
pub(super) type Signposts = [__m512i; 2];

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn vector(bytes: &[u8; VECTOR]) -> __m256i {
    // SAFETY: 32 readable bytes; unaligned loads are allowed.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Fields of a byte from bit `FIRST` on for the first half of the tokens, from bit `SECOND` on for the second.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn fields<const FIRST: i16, const SECOND: i16>(x: __m256i) -> Codes {
    let twice = _mm512_broadcast_i64x4(x);
    let from = |bit: i16| {
        // Bytes of even tokens are the low ones of their words.
        let shift = _mm512_inserti64x4::<1>(_mm512_set1_epi16(bit), _mm256_set1_epi16(bit + 8));
        _mm512_srlv_epi16(twice, shift)
    };
    [from(FIRST), from(SECOND)]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn plane<const B: u32>(unit: &[[u8; VECTOR]]) -> [Codes; UNIT_CHANNELS] {
    match B {
        0 => [[_mm512_setzero_si512(); 2]; UNIT_CHANNELS],
        1 => {
            let v = vector(&unit[0]);
            [fields::<0, 1>(v), fields::<2, 3>(v), fields::<4, 5>(v), fields::<6, 7>(v)]
        }
        2 => {
            let (v, w) = (vector(&unit[0]), vector(&unit[1]));
            [fields::<0, 2>(v), fields::<4, 6>(v), fields::<0, 2>(w), fields::<4, 6>(w)]
        }
        3 => {
            let (x, y, z) = (vector(&unit[0]), vector(&unit[1]), vector(&unit[2]));
            let bit = |v, mask: i8| _mm256_and_si256(v, _mm256_set1_epi8(mask));
            let fourth = _mm256_or_si256(
                bit(_mm256_srli_epi16::<3>(x), 0x11),
                _mm256_or_si256(bit(_mm256_srli_epi16::<2>(y), 0x22), bit(_mm256_srli_epi16::<1>(z), 0x44)),
            );
            [fields::<0, 4>(x), fields::<0, 4>(y), fields::<0, 4>(z), fields::<0, 4>(fourth)]
        }
        _ => {
            let four = |i: usize| fields::<0, 4>(vector(&unit[i]));
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

/// Signposts of a channel of a unit of B bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn look_up<const B: u32>(table: &Table, low: Codes, high: Codes) -> Signposts {
    if B <= LOW_BITS + 1 {
        // SAFETY: both parts, 64 readable bytes.
        let words = unsafe { _mm512_loadu_si512(table.words.as_ptr().cast()) };
        let look = |i: usize| {
            let code = match B {
                // The fifth bit goes above the low four.
                5 => _mm512_ternarylogic_epi32::<0xca>(
                    _mm512_set1_epi16(15),
                    low[i],
                    _mm512_slli_epi16::<{ LOW_BITS }>(high[i]),
                ),
                _ => low[i],
            };
            _mm512_permutexvar_epi16(code, words)
        };
        return [look(0), look(1)];
    }
    let part = |i: usize| {
        // SAFETY: 32 readable bytes; unaligned loads are allowed.
        _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(table.words[i].as_ptr().cast()) })
    };
    let (x, y) = (part(0), part(1));
    let look = |i: usize| _mm512_add_epi16(_mm512_permutexvar_epi16(low[i], x), _mm512_permutexvar_epi16(high[i], y));
    [look(0), look(1)]
}
