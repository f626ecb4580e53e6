//! Outliers, for up to four rows at once: rows lie side by side, so that an entry takes one vector operation instead of
//! one a row.

use std::arch::x86_64::*;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::view::{CodedView, TOKENS};
use super::decode::{ByBlock, ROWS, Row};
use crate::rope::{BlockTable, Rotation};

/// The same place of four rows.
type Four = [f32; ROWS];

/// Outliers of a vector.
const LANES: usize = 8;

/// What a thread reuses from block to block: lists that only grow, whose end is left over from before.
#[derive(Default)]
pub(super) struct Scratch {
    pub units: Units,
    /// By block.
    lists: Vec<List>,
    channels: Vec<Four>,
    tokens: Vec<Four>,
}

/// Outliers one by one.
type List = Vec<Some8>;

/// Eight outliers.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Some8 {
    /// Floats before the rows that are read; 16 bits further those before the ones that are added to.
    at: [u32; LANES],
    residuals: [f32; LANES],
    /// Of keys: the place in [`BlockTable::turns`].
    turns: [u32; LANES],
    /// Of keys: what the other channel of the pair weighs, times sin.
    others: [f32; LANES],
}

/// Makes a list as long, if it is shorter.
#[inline(always)]
pub(in crate::attend) fn grow<T: Clone + Default>(list: &mut Vec<T>, len: usize) {
    // Rare, and long: not where it is called.
    #[cold]
    #[inline(never)]
    fn longer<T: Clone + Default>(list: &mut Vec<T>, len: usize) {
        list.resize(len, T::default());
    }
    if list.len() < len {
        longer(list, len);
    }
}

/// The unit of each outlier of a side, by block.
///
/// A unit's number is stored as often as it has outliers, a vector at a time. Who reads several of these stores at once has to wait
/// until they have reached the cache: units of all blocks are found before the first is used.
#[derive(Default)]
pub(in crate::attend) struct Units(Vec<Vec<u8>>);

impl Units {
    const VECTOR: usize = 16;

    /// Finds the units of a side.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn find(&mut self, block: usize, v: &CodedView<'_>) {
        grow(&mut self.0, block + 1);
        let units = &mut self.0[block];
        grow(units, v.outliers.places.len() + 2 * Self::VECTOR);
        let (mut to, mut unit) = (units.as_mut_ptr(), _mm_setzero_si128());
        for &count in v.outliers.counts {
            // SAFETY: a view has as many outliers as it counts. So `to` is no further than the last one's end, behind which there
            // is room for a vector and more. What goes beyond a unit's end the next one overwrites.
            unsafe {
                _mm_storeu_si128(to.cast(), unit);
                if count as usize > Self::VECTOR {
                    to.write_bytes(_mm_extract_epi8::<0>(unit) as u8, count as usize);
                }
                to = to.add(count as usize);
            }
            unit = _mm_add_epi8(unit, _mm_set1_epi8(1));
        }
    }

    /// The units of a block's `n` outliers, and a vector more that is readable.
    #[inline]
    pub fn of(&self, block: usize, n: usize) -> &[u8] {
        &self.0[block][..n + Self::VECTOR]
    }
}

/// What some lanes hold.
#[derive(Clone, Copy)]
struct Eight {
    unit: __m256i,
    place: __m256i,
    residual: __m256,
}

impl Scratch {
    /// Calls `then(list, channels, tokens, residuals)` for all outliers of a side, eight at a time. Every
    /// channel is below its `head_dim`, every token below 64. The last eight may hold some once more, with residuals of 0, so
    /// that a loop over all of them ends where a CPU can foresee it.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn eights(&mut self, block: usize, v: &CodedView<'_>, mut then: impl FnMut(&mut Some8, __m256i, __m256i, __m256)) {
        let (places, residuals) = (v.outliers.places, v.outliers.residuals);
        let n = places.len();
        assert_eq!(residuals.len(), n);
        grow(&mut self.lists, block + 1);
        let (units, list) = (self.units.of(block, n), &mut self.lists[block]);
        grow(list, n.div_ceil(LANES));
        for (i, to) in (0..n).step_by(LANES).zip(list) {
            let first = i.min(n.saturating_sub(LANES));
            let eight = if n >= LANES {
                // SAFETY: `first` is at most `n - LANES`, and all lists have `n`, as checked above.
                unsafe {
                    eight_of(units.as_ptr().add(first), places.as_ptr().add(first), residuals.as_ptr().add(first))
                }
            } else {
                let (mut few, mut of_few) = ([0; LANES], [[0; 2]; LANES]);
                few.iter_mut().zip(places).for_each(|(to, from)| *to = *from);
                of_few.iter_mut().zip(residuals).for_each(|(to, from)| *to = *from);
                // SAFETY: lists of eight; units end with more than a vector.
                unsafe { eight_of(units.as_ptr(), few.as_ptr(), of_few.as_ptr()) }
            };
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let before = _mm256_cmpgt_epi32(_mm256_set1_epi32((i - first) as i32), lane);
            let residual = _mm256_andnot_ps(_mm256_castsi256_ps(before), eight.residual);
            const UNIT_BITS: i32 = UNIT_CHANNELS.trailing_zeros() as i32;
            let mut channel =
                _mm256_add_epi32(_mm256_slli_epi32::<UNIT_BITS>(eight.unit), _mm256_srli_epi32::<6>(eight.place));
            if !v.lut.order.is_empty() {
                channel = ordered(v.lut.order, channel);
            }
            then(to, channel, _mm256_and_si256(eight.place, _mm256_set1_epi32(TOKENS as i32 - 1)), residual);
        }
    }
}

/// # Safety
/// Eight of each are readable.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn eight_of(units: *const u8, places: *const u8, residuals: *const [u8; 2]) -> Eight {
    // SAFETY: 8, 8 and 16 readable bytes; unaligned loads are allowed.
    unsafe {
        Eight {
            unit: _mm256_cvtepu8_epi32(_mm_loadl_epi64(units.cast())),
            place: _mm256_cvtepu8_epi32(_mm_loadl_epi64(places.cast())),
            residual: _mm256_cvtph_ps(_mm_loadu_si128(residuals.cast())),
        }
    }
}

/// The channels that some places hold.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn ordered(order: &[u16], places: __m256i) -> __m256i {
    let mut all = [0u32; LANES];
    // SAFETY: 32 writable bytes, then 32 readable ones; unaligned access is allowed.
    unsafe { _mm256_storeu_si256(all.as_mut_ptr().cast(), places) };
    for place in &mut all {
        *place = order[*place as usize].into();
    }
    // SAFETY: 32 readable bytes; unaligned loads are allowed.
    unsafe { _mm256_loadu_si256(all.as_ptr().cast()) }
}

impl Some8 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn set(&mut self, from: __m256i, to: __m256i, residual: __m256) {
        put(&mut self.at, _mm256_or_si256(_mm256_slli_epi32::<2>(from), _mm256_slli_epi32::<18>(to)));
        super::store(&mut self.residuals, residual);
    }

    /// to[place of each] += residual * from[place of each].
    ///
    /// # Safety
    /// `from` and `to` have four floats at every place.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add(&self, from: *const f32, to: *mut f32) {
        for i in 0..LANES {
            let [f, t] = places(self.at[i]);
            // SAFETY: the caller's.
            unsafe {
                let to = to.add(t);
                let sum = _mm_fmadd_ps(_mm_loadu_ps(from.add(f)), _mm_set1_ps(self.residuals[i]), _mm_loadu_ps(to));
                _mm_storeu_ps(to, sum);
            }
        }
    }
}

#[inline(always)]
fn places(at: u32) -> [usize; 2] {
    [at as u16 as usize, at as usize >> 16]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put(to: &mut [u32; LANES], x: __m256i) {
    // SAFETY: 32 writable bytes; unaligned stores are allowed.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), x) };
}

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

/// Makes the list of a block's keys.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn place_keys(s: &mut Scratch, block: usize, v: &CodedView<'_>) {
    s.eights(block, v, |to, channel, token, residual| {
        to.set(channel, token, residual);
        let pair = _mm256_srli_epi32::<1>(channel);
        put(&mut to.turns, _mm256_add_epi32(_mm256_slli_epi32::<TOKEN_BITS>(pair), token));
        // The other channel of the pair gets sin from an even one, -sin from an odd one.
        let minus = _mm256_castsi256_ps(_mm256_slli_epi32::<31>(channel));
        super::store(&mut to.others, _mm256_xor_ps(residual, minus));
    });
}

const TOKEN_BITS: i32 = TOKENS.trailing_zeros() as i32;

/// scores[r][t] += residual * (the query's share of the channel at the token), from the block's list. `queries` `[head_dim]` lie
/// side by side.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn score<const R: usize>(
    s: &mut Scratch,
    block: usize,
    queries: &[Four],
    v: &CodedView<'_>,
    turn: Option<(&BlockTable, &Rotation)>,
    scores: &mut [Row],
) {
    let n = v.outliers.places.len();
    if n == 0 {
        return;
    }
    let scores: &mut [Row; R] = scores.first_chunk_mut().expect("called with R rows");
    let Scratch { lists, channels, tokens, .. } = s;
    let list = &lists[block];
    tokens.clear();
    tokens.resize(TOKENS, [0.0; ROWS]);
    let to: *mut f32 = tokens.as_mut_ptr().cast();
    let d = v.head_dim();
    assert!(queries.len() >= d && d.is_multiple_of(2));
    match turn {
        Some((table, origin)) => {
            undo(origin, queries, channels);
            assert!(table.turns.len() >= d / 2 * TOKENS);
            let from: *const f32 = channels.as_ptr().cast();
            for some in &list[..n.div_ceil(LANES)] {
                for i in 0..LANES {
                    let [f, t] = places(some.at[i]);
                    // SAFETY: channels are below head_dim, which is even, and tokens below 64 (`Scratch::eights`): `channels`,
                    // as long as the queries, the sums and the table, as checked above, have a place for each.
                    unsafe {
                        let [cos, sin] = table.turns.get_unchecked(some.turns[i] as usize);
                        let x = _mm_mul_ps(_mm_loadu_ps(from.add(f)), _mm_set1_ps(*cos));
                        let y = _mm_mul_ps(_mm_loadu_ps(from.add(f ^ ROWS)), _mm_set1_ps(*sin));
                        let to = to.add(t);
                        let sum = _mm_fmadd_ps(x, _mm_set1_ps(some.residuals[i]), _mm_loadu_ps(to));
                        _mm_storeu_ps(to, _mm_fmadd_ps(y, _mm_set1_ps(some.others[i]), sum));
                    }
                }
            }
        }
        None => {
            let from: *const f32 = queries.as_ptr().cast();
            // SAFETY: as above.
            list[..n.div_ceil(LANES)].iter().for_each(|some| unsafe { some.add(from, to) });
        }
    }
    add_to_rows::<R>(tokens, scores.each_mut().map(|row| &mut row[..]));
}

/// [`Rotation::undo`] of four rows side by side, a pair of channels at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn undo(origin: &Rotation, queries: &[Four], to: &mut Vec<Four>) {
    to.resize(queries.len(), [0.0; ROWS]);
    let minus = _mm256_setr_ps(0.0, 0.0, 0.0, 0.0, -0.0, -0.0, -0.0, -0.0);
    let pairs = queries.as_chunks::<2>().0.iter().zip(to.as_chunks_mut::<2>().0);
    for ((from, to), (cos, sin)) in pairs.zip(origin.cos.iter().zip(&origin.sin)) {
        // SAFETY: 8 readable floats, and 8 writable ones; unaligned access is allowed.
        unsafe {
            let q = _mm256_loadu_ps(from.as_ptr().cast());
            let other = _mm256_permute2f128_ps::<1>(q, q);
            let sin = _mm256_xor_ps(_mm256_set1_ps(*sin), minus);
            let turned = _mm256_fmadd_ps(q, _mm256_set1_ps(*cos), _mm256_mul_ps(other, sin));
            _mm256_storeu_ps(to.as_mut_ptr().cast(), turned);
        }
    }
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
    for (b, v) in blocks.iter().enumerate() {
        s.units.find(b, v);
    }
    for (b, v) in blocks.iter().enumerate() {
        s.eights(b, v, |to, channel, token, residual| to.set(token, channel, residual));
    }
    let Scratch { lists, channels, tokens, .. } = s;
    channels.clear();
    channels.resize(d, [0.0; ROWS]);
    let to: *mut f32 = channels.as_mut_ptr().cast();
    for (b, v) in blocks.iter().enumerate() {
        let mut rows = [&[][..]; R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = weights.row(b, r);
        }
        side_by_side::<R>(rows, tokens);
        assert!(tokens.len() >= TOKENS && channels.len() >= v.head_dim());
        let from: *const f32 = tokens.as_ptr().cast();
        // SAFETY: channels are below head_dim and tokens below 64 (`Scratch::eights`); both have a place for each.
        lists[b][..v.outliers.places.len().div_ceil(LANES)].iter().for_each(|some| unsafe { some.add(from, to) });
    }
    let mut rows = out.chunks_exact_mut(d);
    add_to_rows::<R>(channels, std::array::from_fn(|_| rows.next().expect("out has R rows")));
}
