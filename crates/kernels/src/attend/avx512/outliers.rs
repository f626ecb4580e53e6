//! Outliers: where sixteen of them lie and what they weigh is computed in lanes; then each takes one vector operation or
//! two for up to four rows, which lie side by side.

use std::arch::x86_64::*;
use std::f32::consts::PI;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::avx2::decode::ROWS;
use super::super::avx2::outliers::{Units, grow};
use super::super::view::{CodedView, TOKENS};
use super::query::{Sixteen, lanes, place_of};
use crate::rope::{BlockTable, Rotation};

/// Outliers of a vector.
const LANES: usize = 16;
/// Outliers that are added in a row.
const SOME: usize = 4;
/// From a pair's first channel to its second, in floats of a slice of [`Sixteen`].
const SECOND: usize = 16;

/// What a thread reuses from block to block: lists that only grow, whose end is left over from before.
#[derive(Default)]
pub(in crate::attend) struct Scratch {
    pub units: Units,
    /// By block.
    lists: Vec<List>,
    /// A block's weights.
    weights: [Sixteen; TOKENS / 16],
    /// Sums by channel.
    sums: Vec<Sixteen>,
}

/// Outliers one by one.
type List = Vec<Some16>;

/// Sixteen outliers.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Some16 {
    /// Floats before the rows that are read; 16 bits further those before the ones that are added to.
    at: [u32; LANES],
    /// Weight of what is read; of keys that of the pair's second channel too.
    first: [f32; LANES],
    second: [f32; LANES],
}

impl Scratch {
    /// Calls `then(list, channels, tokens, residuals)` for all outliers of a side, sixteen at a time.
    /// Every channel is below its `head_dim`, every token below 64. What fills up the last sixteen are zeros at places that
    /// differ, so that a loop over all of them neither ends where no CPU can foresee it nor waits for sums at one place.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn sixteens(
        &mut self,
        block: usize,
        v: &CodedView<'_>,
        mut then: impl FnMut(&mut Some16, __m512i, __m512i, __m512),
    ) {
        let (places, residuals) = (v.outliers.places, v.outliers.residuals);
        let n = places.len();
        assert_eq!(residuals.len(), n);
        grow(&mut self.lists, block + 1);
        let (units, list) = (self.units.of(block, n), &mut self.lists[block]);
        grow(list, n.div_ceil(LANES));
        let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let spare = _mm512_min_epu32(lane, _mm512_set1_epi32(v.head_dim() as i32 - 1));
        for (i, to) in (0..n).step_by(LANES).zip(list) {
            let some = lanes(i, n);
            // SAFETY: only lanes that lie in the slices, which are of one length, are read; units end with a vector more.
            let (unit, place, residual) = unsafe {
                let unit = _mm_maskz_mov_epi8(some, _mm_loadu_si128(units.as_ptr().add(i).cast()));
                let place = _mm_maskz_loadu_epi8(some, places.as_ptr().add(i).cast());
                let residual = _mm256_maskz_loadu_epi16(some, residuals.as_ptr().add(i).cast());
                (_mm512_cvtepu8_epi32(unit), _mm512_cvtepu8_epi32(place), _mm512_cvtph_ps(residual))
            };
            const UNIT_BITS: u32 = UNIT_CHANNELS.trailing_zeros();
            let mut channel = _mm512_add_epi32(_mm512_slli_epi32::<UNIT_BITS>(unit), _mm512_srli_epi32::<6>(place));
            if !v.lut.order.is_empty() {
                channel = ordered(v.lut.order, channel);
            }
            let token = _mm512_and_si512(place, _mm512_set1_epi32(TOKENS as i32 - 1));
            let (channel, token) =
                (_mm512_mask_mov_epi32(spare, some, channel), _mm512_mask_mov_epi32(lane, some, token));
            then(to, channel, token, residual);
        }
    }
}

/// The channels that some places hold.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn ordered(order: &[u16], places: __m512i) -> __m512i {
    let mut channels = _mm512_setzero_si512();
    for (i, part) in order.chunks(64).enumerate() {
        let all = |first: usize| {
            let part = &part[first.min(part.len())..];
            let some = if part.len() < 32 { (1 << part.len()) - 1 } else { !0 };
            // SAFETY: only words that lie in the slice are read.
            unsafe { _mm512_maskz_loadu_epi16(some, part.as_ptr().cast()) }
        };
        let here = _mm512_cmpeq_epi32_mask(_mm512_srli_epi32::<6>(places), _mm512_set1_epi32(i as i32));
        let found = _mm512_permutex2var_epi16(all(0), places, all(32));
        channels = _mm512_mask_mov_epi32(channels, here, _mm512_and_si512(found, _mm512_set1_epi32(0xffff)));
    }
    channels
}

impl Some16 {
    /// Some at a time, as few as keep the program short: where each reads and adds, and what its parts weigh.
    #[inline(always)]
    fn each(&self) -> impl Iterator<Item = (&[u32; SOME], [&[f32; SOME]; 2])> {
        let weights = self.first.as_chunks().0.iter().zip(self.second.as_chunks().0);
        self.at.as_chunks().0.iter().zip(weights).map(|(at, (first, second))| (at, [first, second]))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn places(&mut self, from: __m512i, to: __m512i) {
        let both = _mm512_or_si512(_mm512_slli_epi32::<2>(from), _mm512_slli_epi32::<18>(to));
        // SAFETY: 64 writable bytes; unaligned stores are allowed.
        unsafe { _mm512_storeu_si512(self.at.as_mut_ptr().cast(), both) };
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn store(to: &mut [f32; LANES], x: __m512) {
    // SAFETY: 64 writable bytes; unaligned stores are allowed.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) };
}

/// cos and sin of some cycles, to 4e-6.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn cos_sin(cycles: __m512) -> (__m512, __m512) {
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(cycles);
    // Half the angle, in units of pi: at most a quarter of a cycle, where a short series will do.
    let x = _mm512_sub_ps(cycles, whole);
    let square = _mm512_mul_ps(x, x);
    let series = |coefficients: &[f32]| {
        let mut sum = _mm512_set1_ps(coefficients[0]);
        for c in &coefficients[1..] {
            sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(*c));
        }
        sum
    };
    let sin = _mm512_mul_ps(x, series(&[0.082_145_89, -0.599_264_5, 2.550_164, -5.167_712_8, PI]));
    let cos = series(&[-0.025_806_89, 0.235_330_63, -1.335_262_8, 4.058_712, -4.934_802, 1.0]);
    let twice = _mm512_add_ps(sin, sin);
    (_mm512_fnmadd_ps(twice, sin, _mm512_set1_ps(1.0)), _mm512_mul_ps(twice, cos))
}

/// What a list has for some pairs.
///
/// # Safety
/// All pairs lie in the list.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn by_pair(list: &[f32], pair: __m512i) -> __m512 {
    match list.first_chunk::<32>() {
        // SAFETY: 128 readable bytes; unaligned loads are allowed.
        Some(all) if list.len() == 32 => unsafe {
            let (low, high) = (_mm512_loadu_ps(all.as_ptr()), _mm512_loadu_ps(all.as_ptr().add(16)));
            _mm512_permutex2var_ps(low, pair, high)
        },
        // SAFETY: the caller's.
        _ => unsafe { _mm512_i32gather_ps::<4>(pair, list.as_ptr()) },
    }
}

/// Makes the list of a block's keys, whose first lies at the origin's position.
///
/// A key that lies at R(t) e_c has the share cos q[c] + sin q[c + 1] in a query if c is even, cos q[c] - sin q[c - 1] if not.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::attend) fn place_keys(
    s: &mut Scratch,
    block: usize,
    v: &CodedView<'_>,
    turn: Option<(&BlockTable, &Rotation)>,
) {
    let pairs = v.head_dim() / 2;
    assert!(turn.is_none_or(|(t, o)| t.cycles.len().min(o.cos.len()).min(o.sin.len()) >= pairs));
    if v.outliers.places.is_empty() {
        return;
    }
    s.sixteens(block, v, |to, channel, token, residual| {
        let one = _mm512_set1_epi32(1);
        let (even, pair) = (_mm512_testn_epi32_mask(channel, one), _mm512_srli_epi32::<1>(channel));
        let (cos, sin) = match turn {
            Some((table, origin)) => {
                // SAFETY: channels are below head_dim (`Scratch::sixteens`), and all lists were checked to be as long.
                let [cycles, cos, sin] =
                    unsafe { [by_pair(&table.cycles, pair), by_pair(&origin.cos, pair), by_pair(&origin.sin, pair)] };
                let (c, s) = cos_sin(_mm512_mul_ps(_mm512_cvtepi32_ps(token), cycles));
                let [cos, sin] = [_mm512_mul_ps(cos, residual), _mm512_mul_ps(sin, residual)];
                (_mm512_fmsub_ps(c, cos, _mm512_mul_ps(s, sin)), _mm512_fmadd_ps(c, sin, _mm512_mul_ps(s, cos)))
            }
            None => (residual, _mm512_setzero_ps()),
        };
        to.places(place_of(_mm512_andnot_si512(one, channel)), place_of(token));
        store(&mut to.first, _mm512_mask_sub_ps(cos, !even, _mm512_setzero_ps(), sin));
        store(&mut to.second, _mm512_mask_mov_ps(cos, even, sin));
    });
}

/// Rows by token: `sums` become residuals times the queries' shares of their channels at their tokens, from the block's list.
/// `queries` lie side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn score(
    s: &Scratch,
    block: usize,
    queries: &[Sixteen],
    v: &CodedView<'_>,
    sums: &mut [Sixteen; TOKENS / 16],
) {
    *sums = Default::default();
    assert!(queries.len() >= v.head_dim().div_ceil(16));
    let from: *const f32 = queries.as_ptr().cast();
    let to: *mut f32 = sums.as_mut_ptr().cast();
    for some in &s.lists[block][..v.outliers.places.len().div_ceil(LANES)] {
        for (at, [first, second]) in some.each() {
            for i in 0..SOME {
                let [f, t] = [at[i] as u16 as usize, at[i] as usize >> 16];
                // SAFETY: channels are below head_dim, which is even, and tokens below 64 (`Scratch::sixteens`): `queries`,
                // as checked above, and `sums` have a place for each.
                unsafe {
                    let (x, y) = (_mm_loadu_ps(from.add(f)), _mm_loadu_ps(from.add(f + SECOND)));
                    let to = to.add(t);
                    let sum = _mm_fmadd_ps(x, _mm_set1_ps(first[i]), _mm_loadu_ps(to));
                    _mm_storeu_ps(to, _mm_fmadd_ps(y, _mm_set1_ps(second[i]), sum));
                }
            }
        }
    }
}

/// out[r][c] += weights[r][t] * residual, over some blocks, whose `weights` lie side by side. `out` is `[R, d]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn mix<const R: usize>(
    s: &mut Scratch,
    blocks: &[&CodedView<'_>],
    d: usize,
    weights: impl Fn(usize, &mut [Sixteen; TOKENS / 16]),
    out: &mut [f32],
) {
    if blocks.iter().all(|v| v.outliers.places.is_empty()) {
        return;
    }
    let mut sums = std::mem::take(&mut s.sums);
    sums.clear();
    sums.resize(d.div_ceil(16), Sixteen::default());
    for (b, v) in blocks.iter().enumerate() {
        s.units.find(b, v);
    }
    for (b, v) in blocks.iter().enumerate() {
        s.sixteens(b, v, |to, channel, token, residual| {
            to.places(place_of(token), place_of(channel));
            store(&mut to.first, residual);
        });
    }
    for (b, v) in blocks.iter().enumerate() {
        assert!(v.head_dim() <= d);
        weights(b, &mut s.weights);
        let from: *const f32 = s.weights.as_ptr().cast();
        let to: *mut f32 = sums.as_mut_ptr().cast();
        for some in &s.lists[b][..v.outliers.places.len().div_ceil(LANES)] {
            for (at, [first, _]) in some.each() {
                for i in 0..SOME {
                    let [f, t] = [at[i] as u16 as usize, at[i] as usize >> 16];
                    // SAFETY: channels are below head_dim and tokens below 64 (`Scratch::sixteens`): both slices have a
                    // place for each.
                    unsafe {
                        let to = to.add(t);
                        let x = _mm_loadu_ps(from.add(f));
                        _mm_storeu_ps(to, _mm_fmadd_ps(x, _mm_set1_ps(first[i]), _mm_loadu_ps(to)));
                    }
                }
            }
        }
    }
    for (first, sums) in (0..d).step_by(16).zip(&sums) {
        let rows: [__m512; ROWS] = sums.rows();
        for r in 0..R {
            let out = &mut out[r * d + first..(r + 1) * d];
            let some = lanes(0, out.len());
            // SAFETY: only lanes that lie in the row are read and written.
            unsafe {
                let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(some, out.as_ptr()), rows[r]);
                _mm512_mask_storeu_ps(out.as_mut_ptr(), some, sum);
            }
        }
    }
    s.sums = sums;
}
