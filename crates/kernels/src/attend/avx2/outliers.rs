//! Outliers, for up to four rows at once: rows lie side by side, so that an entry takes one vector operation instead of
//! one a row.

use std::arch::x86_64::*;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::view::{CodedView, TOKENS};
use super::decode::{ByBlock, ROWS, Row};
use super::unpack;
use crate::rope::BlockTable;

/// The same place of four rows.
type Four = [f32; ROWS];

/// What a thread reuses from block to block.
#[derive(Default)]
pub(super) struct Scratch {
    channels: Vec<Four>,
    tokens: Vec<Four>,
    list: List,
}

/// Outliers one by one: where they are and what they add.
#[derive(Default)]
struct List {
    channels: Vec<u16>,
    tokens: Vec<u8>,
    residuals: Vec<f32>,
}

impl List {
    /// Outliers of a side. Every channel is below its `head_dim`, every token below 64.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn fill(&mut self, v: &CodedView<'_>) {
        let (places, counts) = (v.outliers.places, v.outliers.counts);
        self.channels.resize(places.len(), 0);
        self.tokens.resize(places.len(), 0);
        if places.len() <= u8::MAX as usize && counts.len() <= MOST_UNITS {
            self.place(places, counts);
        } else {
            let units = counts.iter().enumerate().flat_map(|(u, &n)| std::iter::repeat_n(u, n as usize));
            for ((unit, place), channel) in units.zip(places).zip(&mut self.channels) {
                *channel = (unit * UNIT_CHANNELS) as u16 + (*place / TOKENS as u8) as u16;
            }
        }
        for (place, token) in places.iter().zip(&mut self.tokens) {
            *token = *place % TOKENS as u8;
        }
        if !v.lut.order.is_empty() {
            for c in &mut self.channels {
                *c = v.lut.order[*c as usize];
            }
        }
        floats(v.outliers.residuals, &mut self.residuals);
    }

    /// Channels, 32 outliers at a time and without a branch on counts: an outlier's unit is the number of units that
    /// end before it.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn place(&mut self, places: &[u8], counts: &[u8]) {
        let (mut ends, mut end) = ([0u8; MOST_UNITS], 0u8);
        for (to, count) in ends.iter_mut().zip(counts) {
            end = end.wrapping_add(*count);
            *to = end;
        }
        let ends = &ends[..counts.len()];
        let (full, rest) = places.as_chunks::<STRIDE>();
        for (i, (from, to)) in full.iter().zip(self.channels.as_chunks_mut::<STRIDE>().0).enumerate() {
            channels_of(STRIDE * i, from, ends, to);
        }
        if !rest.is_empty() {
            // The last 32 once more, where there are as many: a copy to pad would wait for its own stores.
            if let (Some(from), n) = (places.last_chunk::<STRIDE>(), places.len())
                && let Some(to) = self.channels.last_chunk_mut::<STRIDE>()
            {
                channels_of(n - STRIDE, from, ends, to);
                return;
            }
            let (mut padded, mut channels) = ([0; STRIDE], [0; STRIDE]);
            for (to, from) in padded.iter_mut().zip(rest) {
                *to = *from;
            }
            channels_of(0, &padded, ends, &mut channels);
            for (to, from) in self.channels.iter_mut().zip(channels) {
                *to = from;
            }
        }
    }

    /// Channel, token, residual.
    #[inline(always)]
    fn each(&self) -> impl Iterator<Item = (usize, usize, f32)> {
        let all = self.channels.iter().zip(&self.tokens).zip(&self.residuals);
        all.map(|((&c, &t), &r)| (c as usize, t as usize, r))
    }
}

/// Outliers that are placed at a time.
const STRIDE: usize = 32;

/// Channels of the outliers from `first` on, at most 255.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn channels_of(first: usize, places: &[u8; STRIDE], ends: &[u8], channels: &mut [u16; STRIDE]) {
    const NUMBERS: [u8; STRIDE] = {
        let (mut numbers, mut i) = ([0; STRIDE], 0);
        while i < STRIDE {
            numbers[i] = i as u8;
            i += 1;
        }
        numbers
    };
    // SAFETY: 32 readable bytes each; unaligned loads are allowed.
    let (number, place) =
        unsafe { (_mm256_loadu_si256(NUMBERS.as_ptr().cast()), _mm256_loadu_si256(places.as_ptr().cast())) };
    let number = _mm256_add_epi8(number, _mm256_set1_epi8(first as i8));
    let mut unit = _mm256_setzero_si256();
    for &end in ends {
        let behind = _mm256_cmpeq_epi8(_mm256_max_epu8(number, _mm256_set1_epi8(end as i8)), number);
        unit = _mm256_sub_epi8(unit, behind);
    }
    let half = |unit: __m128i, place: __m128i| {
        let in_unit = _mm256_srli_epi16::<6>(_mm256_cvtepu8_epi16(place));
        _mm256_add_epi16(_mm256_slli_epi16::<2>(_mm256_cvtepu8_epi16(unit)), in_unit)
    };
    let low = half(_mm256_castsi256_si128(unit), _mm256_castsi256_si128(place));
    let high = half(_mm256_extracti128_si256::<1>(unit), _mm256_extracti128_si256::<1>(place));
    // SAFETY: 64 writable bytes; unaligned stores are allowed.
    unsafe {
        _mm256_storeu_si256(channels.as_mut_ptr().cast(), low);
        _mm256_storeu_si256(channels.as_mut_ptr().add(16).cast(), high);
    }
}

/// Units of a head of 256 channels.
const MOST_UNITS: usize = 64;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(from: &Four) -> __m128 {
    // SAFETY: 4 readable floats; unaligned loads are allowed.
    unsafe { _mm_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(x: __m128, to: &mut Four) {
    // SAFETY: 4 writable floats; unaligned stores are allowed.
    unsafe { _mm_storeu_ps(to.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose([a, b, c, d]: [__m128; 4]) -> [__m128; 4] {
    let (ab, cd) = ([_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)], [_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d)]);
    [_mm_movelh_ps(ab[0], cd[0]), _mm_movehl_ps(cd[0], ab[0]), _mm_movelh_ps(ab[1], cd[1]), _mm_movehl_ps(cd[1], ab[1])]
}

/// Puts R rows side by side.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn side_by_side<const R: usize>(rows: [&[f32]; R], to: &mut Vec<Four>) {
    to.resize(rows[0].len(), [0.0; ROWS]);
    let rows = rows.map(|r| r.as_chunks::<4>().0);
    for (i, to) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut four = [_mm_setzero_ps(); ROWS];
        for r in 0..R {
            four[r] = load(&rows[r][i]);
        }
        for (to, x) in to.iter_mut().zip(transpose(four)) {
            store(x, to);
        }
    }
}

/// Adds what lies side by side to R rows, eight places at a time, as wide as rows are read afterwards.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_to_rows<const R: usize>(from: &[Four], rows: [&mut [f32]; R]) {
    let (eights, rest) = from.as_chunks::<8>();
    let rows = rows.map(|r| r.as_chunks_mut::<8>());
    for (i, from) in eights.iter().enumerate() {
        let x = transpose([load(&from[0]), load(&from[1]), load(&from[2]), load(&from[3])]);
        let y = transpose([load(&from[4]), load(&from[5]), load(&from[6]), load(&from[7])]);
        for r in 0..R {
            let to = &mut rows[r].0[i];
            super::store(to, _mm256_add_ps(super::load(to), _mm256_set_m128(y[r], x[r])));
        }
    }
    for (i, from) in rest.iter().enumerate() {
        for r in 0..R {
            rows[r].1[i] += from[r];
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn floats(residuals: &[[u8; 2]], to: &mut Vec<f32>) {
    to.resize(residuals.len(), 0.0);
    let (eights, rest) = residuals.as_chunks::<8>();
    let (to, to_rest) = to.as_chunks_mut::<8>();
    for (from, to) in eights.iter().zip(to) {
        // SAFETY: 16 readable bytes; unaligned loads are allowed.
        super::store(to, _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.as_ptr().cast()) }));
    }
    for (from, to) in rest.iter().zip(to_rest) {
        *to = unpack::half(u16::from_le_bytes(*from));
    }
}

/// scores[r][t] += residual * (the query's share of the channel at the token). `q` is `[R, d]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn score<const R: usize>(
    s: &mut Scratch,
    q: &[f32],
    d: usize,
    v: &CodedView<'_>,
    turn: Option<&BlockTable>,
    scores: &mut [Row; R],
) {
    if v.outliers.places.is_empty() {
        return;
    }
    s.list.fill(v);
    side_by_side::<R>(std::array::from_fn(|r| &q[r * d..(r + 1) * d]), &mut s.channels);
    s.tokens.clear();
    s.tokens.resize(TOKENS, [0.0; ROWS]);
    let (channels, sums) = (&s.channels[..], &mut s.tokens[..]);
    match turn {
        Some(table) => {
            assert!(table.turns.len() >= d / 2 * TOKENS && channels.len() >= d);
            for (c, t, residual) in s.list.each() {
                // SAFETY: c < d and t < 64 (`List::fill`), d is even; the tables' sizes were checked above.
                let ([cos, sin], x, y, sum) = unsafe {
                    let turn = table.turns.get_unchecked(c / 2 * TOKENS + t);
                    (turn, channels.get_unchecked(c), channels.get_unchecked(c ^ 1), sums.get_unchecked_mut(t))
                };
                // The other channel of the pair gets sin from an even one, -sin from an odd one.
                let sin = f32::from_bits(sin.to_bits() ^ (c as u32) << 31);
                let x = _mm_mul_ps(load(x), _mm_set1_ps(*cos));
                let x = _mm_fmadd_ps(load(y), _mm_set1_ps(sin), x);
                store(_mm_fmadd_ps(x, _mm_set1_ps(residual), load(sum)), sum);
            }
        }
        None => {
            for (c, t, residual) in s.list.each() {
                store(_mm_fmadd_ps(load(&channels[c]), _mm_set1_ps(residual), load(&sums[t])), &mut sums[t]);
            }
        }
    }
    add_to_rows::<R>(sums, scores.each_mut().map(|row| &mut row[..]));
}

/// out[r][c] += weights[r][t] * residual, over some blocks. `out` is `[R, d]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn mix<const R: usize>(
    s: &mut Scratch,
    blocks: &[&CodedView<'_>],
    weights: ByBlock<'_>,
    d: usize,
    out: &mut [f32],
) {
    if blocks.iter().all(|v| v.outliers.places.is_empty()) {
        return;
    }
    s.channels.clear();
    s.channels.resize(d, [0.0; ROWS]);
    let sums = &mut s.channels[..];
    for (b, v) in blocks.iter().enumerate() {
        s.list.fill(v);
        side_by_side::<R>(std::array::from_fn(|r| &weights.row(b, r)[..]), &mut s.tokens);
        let tokens = &s.tokens[..];
        assert!(tokens.len() >= TOKENS && sums.len() >= v.head_dim());
        for (c, t, residual) in s.list.each() {
            // SAFETY: c < head_dim and t < 64 (`List::fill`); the sizes were checked above.
            let (x, sum) = unsafe { (tokens.get_unchecked(t), sums.get_unchecked_mut(c)) };
            store(_mm_fmadd_ps(load(x), _mm_set1_ps(residual), load(sum)), sum);
        }
    }
    let mut rows = out.chunks_exact_mut(d);
    add_to_rows::<R>(sums, std::array::from_fn(|_| rows.next().expect("out has R rows")));
}
