//! Queries turned to a block's origin: as integers for signposts, and as floats, rows side by side, for outliers.

use std::arch::x86_64::*;

use super::super::avx2::decode::ROWS;
use super::super::avx2::score::QUERY_SUM;
use crate::rope::Rotation;

/// Sixteen places of up to four rows: place p of row r at `[p % 4][p / 4 * 4 + r]`, as a transposition within lanes leaves
/// them. [`place_of`] numbers the groups of four rows.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct Sixteen(pub [[f32; 16]; 4]);

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

/// What makes each row's channels, times their steps, integers at any origin.
///
/// A turn keeps a pair's length, and a key's pair is at most as long as [`QUERY_SUM`] takes it to be: the largest length
/// bounds every channel, and the sum of lengths every score. A length is at most the larger channel and 0.42 of the smaller.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn factors(q: &[f32], steps: &[f32], to: &mut Vec<f32>) {
    to.clear();
    for row in q.chunks_exact(steps.len()) {
        let (mut most, mut total) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for first in (0..row.len()).step_by(16) {
            let x = _mm512_abs_ps(_mm512_mul_ps(some(row, first), some(steps, first)));
            let y = _mm512_permute_ps::<0b10_11_00_01>(x);
            let length = _mm512_fmadd_ps(_mm512_min_ps(x, y), _mm512_set1_ps(0.414_214), _mm512_max_ps(x, y));
            most = _mm512_max_ps(most, length);
            total = _mm512_add_ps(total, length);
        }
        // Each pair was counted twice.
        let (most, total) = (_mm512_reduce_max_ps(most), _mm512_reduce_add_ps(total) / 2.0);
        let factor = if total > 0.0 { (32767.0 / most).min(QUERY_SUM / total) } else { 0.0 };
        // A query of zeros, or one too small to scale, scores 0.
        to.push(if factor.is_finite() { factor } else { 0.0 });
    }
}

/// Integer queries of a pair of channels, up to four rows: its two channels in 16 bits each.
pub(super) type Pair = [i32; ROWS];

/// Eight pairs of each row to rows side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn set(to: &mut [Pair; 8], [a, b, c, d]: [__m256i; ROWS]) {
    let (low, high) = (
        [_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d)],
        [_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d)],
    );
    let both = |x, y| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(x), y);
    // Pairs 0, 4, 1 and 5, then 2, 6, 3 and 7.
    let x = both(_mm256_unpacklo_epi64(low[0], low[1]), _mm256_unpackhi_epi64(low[0], low[1]));
    let y = both(_mm256_unpacklo_epi64(high[0], high[1]), _mm256_unpackhi_epi64(high[0], high[1]));
    let halves = [_mm512_shuffle_i64x2::<0b10_00_10_00>(x, y), _mm512_shuffle_i64x2::<0b11_01_11_01>(x, y)];
    for (to, x) in to.as_chunks_mut::<4>().0.iter_mut().zip(halves) {
        // SAFETY: 64 writable bytes; unaligned stores are allowed.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) };
    }
}

/// Turns R rows `[R, d]` back by the origin: their channels times steps and factors to `ints`, and as they are to `local`,
/// where it is asked for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn turn<const R: usize>(
    q: &[f32],
    origin: Option<&Rotation>,
    steps: &[f32],
    factors: &[f32; R],
    ints: &mut [[Pair; 8]],
    local: Option<&mut [Sixteen]>,
) {
    let d = steps.len();
    let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    let odd = _mm512_castsi512_ps(_mm512_set1_epi64(i64::MIN));
    let mut local = local.map(<[Sixteen]>::iter_mut);
    for (first, ints) in (0..d).step_by(16).zip(ints) {
        let step = some(steps, first);
        let both = |part: &[f32]| {
            let part = &part[first / 2..];
            // SAFETY: only lanes that lie in the slice are read.
            let eight = unsafe { _mm256_maskz_loadu_ps(lanes(0, part.len()) as u8, part.as_ptr()) };
            _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(eight))
        };
        let turns = origin.map(|o| (both(&o.cos), _mm512_xor_ps(both(&o.sin), odd)));
        let (mut rows, mut pairs) = ([_mm512_setzero_ps(); ROWS], [_mm256_setzero_si256(); ROWS]);
        for r in 0..R {
            let mut x = some(&q[r * d..(r + 1) * d], first);
            if let Some((cos, sin)) = turns {
                let other = _mm512_mul_ps(_mm512_permute_ps::<0b10_11_00_01>(x), sin);
                x = _mm512_fmadd_ps(x, cos, other);
            }
            rows[r] = x;
            let int = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_mul_ps(step, _mm512_set1_ps(factors[r]))));
            pairs[r] = _mm512_cvtsepi32_epi16(int);
        }
        set(ints, pairs);
        if let Some(to) = local.as_mut().and_then(Iterator::next) {
            to.set(rows);
        }
    }
}
