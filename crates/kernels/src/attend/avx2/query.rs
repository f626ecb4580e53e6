//! Queries as integers: made once a task, and turned to each block's origin as such (AVX-512 takes the same, and turns them
//! itself); and as floats, for outliers.

use std::arch::x86_64::*;

use super::decode::ROWS;
use super::score::QUERY_SUM;
use crate::rope::Rotation;

/// A task's queries at their own position: what of them no block changes.
#[derive(Debug, Default)]
pub(in crate::attend) struct Queries {
    /// What one is worth in each row of `ints`; 0 where all are.
    pub units: Vec<f32>,
    /// Rows times steps as integers: pairs of 16-bit channels `[rows, head_dim / 32]`, rounded up.
    pub ints: Vec<Pairs>,
    /// Rows as they are, side by side: `[rows / 4, head_dim]`, rounded up.
    pub sides: Vec<[f32; ROWS]>,
}

/// Sixteen pairs of channels of a row.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(in crate::attend) struct Pairs(pub [i32; 16]);

/// Integer queries of a pair of channels, up to four rows: its two channels in 16 bits each.
pub(in crate::attend) type Pair = [i32; ROWS];

impl Queries {
    /// Rows of [`Queries::ints`] are so long.
    pub fn vectors(d: usize) -> usize {
        d.div_ceil(32)
    }

    /// Becomes the queries `q` `[rows, head_dim]` of blocks with these steps `[head_dim]`, but for `sides`.
    ///
    /// A turn keeps a pair's length, and a key's pair is at most as long as [`QUERY_SUM`] takes it to be: the largest length
    /// bounds every channel, and the sum of lengths every score. A length is at most the larger channel and 0.42 of the smaller.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn set(&mut self, q: &[f32], steps: &[f32]) {
        let d = steps.len();
        let (rows, vectors) = (q.len() / d, Self::vectors(d));
        self.units.clear();
        self.ints.resize(rows * vectors, Pairs::default());
        // SAFETY: 4 readable floats; unaligned loads are allowed.
        let four = |from: &[f32; 4]| unsafe { _mm_loadu_ps(from.as_ptr()) };
        for (row, ints) in q.chunks_exact(d).zip(self.ints.chunks_exact_mut(vectors)) {
            let both = || row.as_chunks::<4>().0.iter().zip(steps.as_chunks::<4>().0);
            let (mut most, mut total) = (_mm_setzero_ps(), _mm_setzero_ps());
            for (q, step) in both() {
                let x = _mm_andnot_ps(_mm_set1_ps(-0.0), _mm_mul_ps(four(q), four(step)));
                let y = _mm_permute_ps::<0b10_11_00_01>(x);
                let length = _mm_fmadd_ps(_mm_min_ps(x, y), _mm_set1_ps(0.414_214), _mm_max_ps(x, y));
                most = _mm_max_ps(most, length);
                total = _mm_add_ps(total, length);
            }
            let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
            let most = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
            // Each pair was counted twice.
            let total = _mm_add_ps(total, _mm_movehl_ps(total, total));
            let total = _mm_cvtss_f32(_mm_add_ss(total, _mm_movehdup_ps(total))) / 2.0;
            let factor = if total > 0.0 { (32767.0 / most).min(QUERY_SUM / total) } else { 0.0 };
            // A query of zeros, or one too small to scale, scores 0.
            let factor = if factor.is_finite() { factor } else { 0.0 };
            self.units.push(if factor > 0.0 { 1.0 / factor } else { 0.0 });
            for ((q, step), to) in both().zip(ints.iter_mut().flat_map(|to| to.0.as_chunks_mut::<2>().0)) {
                let scale = _mm_mul_ps(four(step), _mm_set1_ps(factor));
                let x = _mm_cvtps_epi32(_mm_mul_ps(four(q), scale));
                // SAFETY: 8 writable bytes; unaligned stores are allowed.
                unsafe { _mm_storel_epi64(to.as_mut_ptr().cast(), _mm_packs_epi32(x, x)) };
            }
        }
    }

    /// Puts the rows `q` `[rows, head_dim]` side by side.
    pub fn set_sides(&mut self, q: &[f32], d: usize) {
        self.sides.clear();
        for rows in q.chunks(ROWS * d) {
            self.sides.extend((0..d).map(|c| {
                let mut four = [0.0; ROWS];
                for (to, row) in four.iter_mut().zip(rows.chunks_exact(d)) {
                    *to = row[c];
                }
                four
            }));
        }
    }
}

/// Eight floats, or as many as there are and zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight(from: &[f32]) -> __m256 {
    match from.first_chunk::<8>() {
        Some(all) => super::load(all),
        None => {
            let mut all = [0.0; 8];
            all.iter_mut().zip(from).for_each(|(to, x)| *to = *x);
            super::load(&all)
        }
    }
}

/// Integer queries of up to four rows, `vectors` each, at the block's origin, side by side.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn turn<const R: usize>(rows: &[Pairs], vectors: usize, origin: Option<&Rotation>, to: &mut [[Pair; 16]]) {
    // Rounds as products of 16 bits do, whose 1 is 2^15: a cosine of 1 is as near to it as 16 bits allow.
    let fixed = |x| _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(32767.0)));
    for i in 0..2 * vectors {
        let turns = origin.map(|o| {
            let pairs = (8 * i).min(o.cos.len())..;
            let (cos, sin) = (fixed(eight(&o.cos[pairs.clone()])), fixed(eight(&o.sin[pairs])));
            let minus = _mm256_sub_epi32(_mm256_setzero_si256(), sin);
            (
                _mm256_blend_epi16::<0b1010_1010>(cos, _mm256_slli_epi32::<16>(cos)),
                _mm256_blend_epi16::<0b1010_1010>(sin, _mm256_slli_epi32::<16>(minus)),
            )
        });
        let mut four = [_mm256_setzero_si256(); ROWS];
        for (r, four) in four.iter_mut().enumerate().take(R) {
            let eight: &[i32; 8] = &rows[r * vectors + i / 2].0.as_chunks().0[i % 2];
            // SAFETY: 32 readable bytes; unaligned loads are allowed.
            let x = unsafe { _mm256_loadu_si256(eight.as_ptr().cast()) };
            *four = match turns {
                Some((cos, sin)) => {
                    let other = _mm256_or_si256(_mm256_slli_epi32::<16>(x), _mm256_srli_epi32::<16>(x));
                    _mm256_adds_epi16(_mm256_mulhrs_epi16(x, cos), _mm256_mulhrs_epi16(other, sin))
                }
                None => x,
            };
        }
        side_by_side(&mut to[i / 2].as_chunks_mut::<8>().0[i % 2], four);
    }
}

/// Eight pairs of each row to rows side by side.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn side_by_side(to: &mut [Pair; 8], [a, b, c, d]: [__m256i; ROWS]) {
    let (low, high) = (
        [_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d)],
        [_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d)],
    );
    // Pair i and pair i + 4.
    let two = [
        _mm256_unpacklo_epi64(low[0], low[1]),
        _mm256_unpackhi_epi64(low[0], low[1]),
        _mm256_unpacklo_epi64(high[0], high[1]),
        _mm256_unpackhi_epi64(high[0], high[1]),
    ];
    for (i, x) in two.into_iter().enumerate() {
        // SAFETY: 16 writable bytes each; unaligned stores are allowed.
        unsafe {
            _mm_storeu_si128(to[i].as_mut_ptr().cast(), _mm256_castsi256_si128(x));
            _mm_storeu_si128(to[i + 4].as_mut_ptr().cast(), _mm256_extracti128_si256::<1>(x));
        }
    }
}
