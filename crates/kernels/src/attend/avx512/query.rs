//! Queries turned to a block's origin: as integers for signposts, and as floats, rows side by side, for outliers.

use std::arch::x86_64::*;

use super::super::avx2::decode::ROWS;
use super::super::avx2::query::{Pair, Pairs};
use crate::rope::Rotation;

/// Sixteen places of up to four rows: place p of row r at `[p % 4][p / 4 * 4 + r]`, as a transposition within lanes leaves
/// them. [`place_of`] numbers the groups of four rows.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(in crate::attend) struct Sixteen(pub [[f32; 16]; 4]);

/// Where the rows of each of these places lie, in groups of four floats, in a slice of [`Sixteen`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn place_of(p: __m512i) -> __m512i {
    let quarter = _mm512_and_si512(_mm512_srli_epi32::<2>(p), _mm512_set1_epi32(3));
    let in_four = _mm512_slli_epi32::<2>(_mm512_and_si512(p, _mm512_set1_epi32(3)));
    let sixteens = _mm512_andnot_si512(_mm512_set1_epi32(15), p);
    _mm512_or_si512(sixteens, _mm512_or_si512(quarter, in_four))
}

/// Rows to places side by side, and back.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn transpose([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    let pairs =
        |a: __m512, b: __m512| [_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(a, b))];
    let (ab, cd) = (pairs(a, b), pairs(c, d));
    [
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab[0], cd[0])),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ab[0], cd[0])),
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab[1], cd[1])),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ab[1], cd[1])),
    ]
}

impl Sixteen {
    /// Four rows' sixteen places.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn set(&mut self, rows: [__m512; ROWS]) {
        for (to, x) in self.0.iter_mut().zip(transpose(rows)) {
            // SAFETY: 64 writable bytes; unaligned stores are allowed.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) };
        }
    }

    /// Row by row.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn rows(&self) -> [__m512; ROWS] {
        // SAFETY: 64 readable bytes; unaligned loads are allowed.
        let four = |i: usize| unsafe { _mm512_loadu_ps(self.0[i].as_ptr()) };
        transpose([four(0), four(1), four(2), four(3)])
    }
}

/// Lanes of a vector of sixteen that hold the places from `first` on of `n`.
#[inline(always)]
pub(super) fn lanes(first: usize, n: usize) -> __mmask16 {
    match n - first {
        0..16 => (1 << (n - first)) - 1,
        _ => !0,
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn some(from: &[f32], first: usize) -> __m512 {
    let from = &from[first..];
    // SAFETY: only lanes that lie in the slice are read.
    unsafe { _mm512_maskz_loadu_ps(lanes(0, from.len()), from.as_ptr()) }
}

/// Puts the rows `q` `[rows, head_dim]` side by side: `[rows / 4, head_dim / 16]`, rounded up.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn set_sides(to: &mut Vec<Sixteen>, q: &[f32], d: usize) {
    let sixteens = d.div_ceil(16);
    to.resize(q.len().div_ceil(ROWS * d) * sixteens, Sixteen::default());
    for (rows, sides) in q.chunks(ROWS * d).zip(to.chunks_exact_mut(sixteens)) {
        for (first, side) in (0..d).step_by(16).zip(sides) {
            let mut four = [_mm512_setzero_ps(); ROWS];
            for (row, to) in rows.chunks_exact(d).zip(&mut four) {
                *to = some(row, first);
            }
            side.set(four);
        }
    }
}

/// Sixteen pairs of each row to rows side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn side_by_side(to: &mut [Pair; 16], [a, b, c, d]: [__m512i; ROWS]) {
    let (low, high) = (
        [_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)],
        [_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)],
    );
    // Of each four pairs the first, the second, and so on.
    let nth = [
        _mm512_unpacklo_epi64(low[0], low[1]),
        _mm512_unpackhi_epi64(low[0], low[1]),
        _mm512_unpacklo_epi64(high[0], high[1]),
        _mm512_unpackhi_epi64(high[0], high[1]),
    ];
    let halves = |x, y| [_mm512_shuffle_i64x2::<0b01_00_01_00>(x, y), _mm512_shuffle_i64x2::<0b11_10_11_10>(x, y)];
    let (ab, cd) = (halves(nth[0], nth[1]), halves(nth[2], nth[3]));
    for (h, to) in to.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let four =
            [_mm512_shuffle_i64x2::<0b10_00_10_00>(ab[h], cd[h]), _mm512_shuffle_i64x2::<0b11_01_11_01>(ab[h], cd[h])];
        for (to, x) in to.as_chunks_mut::<4>().0.iter_mut().zip(four) {
            // SAFETY: 64 writable bytes; unaligned stores are allowed.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) };
        }
    }
}

/// Integer queries of up to four rows, `vectors` each, at the block's origin, side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn turn(count: usize, rows: &[Pairs], vectors: usize, origin: Option<&Rotation>, to: &mut [[Pair; 16]]) {
    // Rounds as products of 16 bits do, whose 1 is 2^15: a cosine of 1 is as near to it as 16 bits allow.
    let fixed = |x| _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(32767.0)));
    let high = 0xaaaa_aaaa;
    for (i, to) in to.iter_mut().enumerate().take(vectors) {
        let turns = origin.map(|o| {
            let (cos, sin) = (fixed(some(&o.cos, 16 * i)), fixed(some(&o.sin, 16 * i)));
            let minus = _mm512_sub_epi32(_mm512_setzero_si512(), sin);
            (
                _mm512_mask_mov_epi16(cos, high, _mm512_slli_epi32::<16>(cos)),
                _mm512_mask_mov_epi16(sin, high, _mm512_slli_epi32::<16>(minus)),
            )
        });
        let mut four = [_mm512_setzero_si512(); ROWS];
        for (r, four) in four.iter_mut().enumerate().take(count) {
            // SAFETY: 64 readable bytes; unaligned loads are allowed.
            let x = unsafe { _mm512_loadu_si512(rows[r * vectors + i].0.as_ptr().cast()) };
            *four = match turns {
                Some((cos, sin)) => {
                    let other = _mm512_rol_epi32::<16>(x);
                    _mm512_adds_epi16(_mm512_mulhrs_epi16(x, cos), _mm512_mulhrs_epi16(other, sin))
                }
                None => x,
            };
        }
        side_by_side(to, four);
    }
}
