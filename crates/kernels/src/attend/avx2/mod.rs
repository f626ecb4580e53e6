//! AVX2, FMA and F16C. Departures from the scalar twin:
//! - 8 tokens a vector; a unit's codes of one word are shifted out in place, and a signpost is one permute
//!   (`vpermilps` for 2 bits, `vpermps` for 3, two of them and a blend for 4): no masks, since the permutes
//!   read only the low bits of an index;
//! - few rows: a unit at a time through 1 KB of stack ([`decode`]); many rows: whole tiles ([`prefill`]);
//! - exp is a polynomial (relative error below 3e-7), 0 below -87;
//! - sums run in another order.

mod decode;
mod prefill;

use std::arch::x86_64::*;

use half::f16;
use kvquant_quant::pack::{LANES, UNIT_CHANNELS};

use super::view::{CodedView, TOKENS, UNIT};
use super::{BlockView, DECODE_ROWS, Rows, SideView, State};
use crate::rope::BlockTable;

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn attend(rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, state: &mut State) {
    if block.is_empty() || rows.is_empty() {
        return;
    }
    if rows.len() <= DECODE_ROWS {
        decode::attend(rows, block, table, state);
    } else {
        prefill::attend(rows, block, table, state);
    }
}

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dequant(side: &SideView<'_>, len: usize, tile: &mut [f32]) {
    match side {
        SideView::Coded(v) => {
            let scales = TokenScales::load(v);
            let mut first = 0;
            for (u, out) in tile.as_chunks_mut::<UNIT>().0.iter_mut().enumerate() {
                signposts(v, u, out);
                scale_unit(v, u, &scales, out);
                first = add_outliers(v, u, first, out);
            }
        }
        SideView::Tile { data } => {
            for (from, to) in data.as_chunks::<LANES>().0.iter().zip(tile.as_chunks_mut::<LANES>().0) {
                store(to, halves(from));
            }
        }
        SideView::Rows { .. } => return super::scalar::dequant(side, len, tile),
    }
    if len < TOKENS {
        for channel in tile.chunks_exact_mut(TOKENS) {
            channel[len..].fill(0.0);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(from: &[f32; LANES]) -> __m256 {
    // SAFETY: 8 readable floats; unaligned loads are allowed.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut [f32; LANES], x: __m256) {
    // SAFETY: 8 writable floats; unaligned stores are allowed.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(from: &[u16; LANES]) -> __m256 {
    // SAFETY: 8 readable fp16 values; unaligned loads are allowed.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())) }
}

/// A channel's signposts in registers.
#[derive(Clone, Copy)]
struct Table {
    low: __m256,
    high: __m256,
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn table<const B: i32>(lut: &[f32]) -> Table {
    let lut = &lut[..1 << B];
    // SAFETY: the slice above holds 2^B floats, and each arm reads exactly as many.
    unsafe {
        let at = lut.as_ptr();
        match B {
            2 => {
                let four = _mm_loadu_ps(at);
                let low = _mm256_set_m128(four, four);
                Table { low, high: low }
            }
            3 => Table { low: _mm256_loadu_ps(at), high: _mm256_loadu_ps(at) },
            _ => Table { low: _mm256_loadu_ps(at), high: _mm256_loadu_ps(at.add(8)) },
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn look_up<const B: i32>(t: Table, codes: __m256i) -> __m256 {
    match B {
        2 => _mm256_permutevar_ps(t.low, codes),
        3 => _mm256_permutevar8x32_ps(t.low, codes),
        _ => {
            let low = _mm256_permutevar8x32_ps(t.low, codes);
            let high = _mm256_permutevar8x32_ps(t.high, codes);
            // Bit 3 of the code, moved to the sign bit, chooses the upper half of the table.
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)))
        }
    }
}

/// Dense signposts of a unit, `[4 channels][64 tokens]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn signposts(v: &CodedView<'_>, unit: usize, out: &mut [f32; UNIT]) {
    match v.bits {
        2 => unpack::<2>(v, unit, out),
        3 => unpack::<3>(v, unit, out),
        _ => unpack::<4>(v, unit, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<const B: i32>(v: &CodedView<'_>, unit: usize, out: &mut [f32; UNIT]) {
    let words = v.unit(unit).as_chunks::<LANES>().0;
    let channel = unit * UNIT_CHANNELS;
    let t = [0, 1, 2, 3].map(|i| table::<B>(v.lut(channel + i)));
    let word = |w: usize| {
        // SAFETY: `words[w]` is 8 readable u32; unaligned loads are allowed.
        unsafe { _mm256_loadu_si256(words[w].as_ptr().cast()) }
    };
    let places = out.as_chunks_mut::<LANES>().0;
    if B == 3 {
        // 32 codes in 3 words: 0-9 | 10 crosses | 11-20 | 21 crosses | 22-31.
        let (w0, w1, w2) = (word(0), word(1), word(2));
        let c10 = _mm256_or_si256(_mm256_srli_epi32::<30>(w0), _mm256_slli_epi32::<2>(w1));
        let c21 = _mm256_or_si256(_mm256_srli_epi32::<31>(w1), _mm256_slli_epi32::<1>(w2));
        let mut run = |first: usize, n: usize, mut x: __m256i| {
            for i in first..first + n {
                store(&mut places[i], look_up::<B>(t[i / 8], x));
                x = _mm256_srli_epi32::<B>(x);
            }
        };
        run(0, 10, w0);
        run(10, 1, c10);
        run(11, 10, _mm256_srli_epi32::<1>(w1));
        run(21, 1, c21);
        run(22, 10, _mm256_srli_epi32::<2>(w2));
    } else {
        let per_word = 32 / B as usize;
        for w in 0..B as usize {
            let mut x = word(w);
            for i in 0..per_word {
                let n = w * per_word + i;
                store(&mut places[n], look_up::<B>(t[n / 8], x));
                x = _mm256_srli_epi32::<B>(x);
            }
        }
    }
}

/// Per-token scales and zero points of a head as f32; empty for static sides.
struct TokenScales {
    scale: Vec<f32>,
    zero: Vec<f32>,
}

impl TokenScales {
    fn load(v: &CodedView<'_>) -> Self {
        let wide = |x: &[u16]| x.iter().map(|&b| f16::from_bits(b).to_f32()).collect();
        TokenScales { scale: wide(v.scale), zero: wide(v.zero) }
    }
}

/// x = scale[token] * signpost + zero[token]; product and sum rounded one by one, as the twin does.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scale_unit(v: &CodedView<'_>, unit: usize, s: &TokenScales, out: &mut [f32; UNIT]) {
    if v.per_channel {
        return;
    }
    let at = unit * UNIT_CHANNELS / v.group_channels * TOKENS;
    let scale = s.scale[at..at + TOKENS].as_chunks::<LANES>().0;
    let none = [[0.0f32; LANES]; TOKENS / LANES];
    let zero = if s.zero.is_empty() { &none[..] } else { s.zero[at..at + TOKENS].as_chunks::<LANES>().0 };
    for channel in out.as_chunks_mut::<TOKENS>().0 {
        for ((x, s), z) in channel.as_chunks_mut::<LANES>().0.iter_mut().zip(scale).zip(zero) {
            let y = _mm256_add_ps(_mm256_mul_ps(load(s), load(x)), load(z));
            store(x, y);
        }
    }
}

/// Adds a unit's outliers, the first of which is number `first`; returns the next unit's first.
#[inline]
fn add_outliers(v: &CodedView<'_>, unit: usize, first: usize, out: &mut [f32; UNIT]) -> usize {
    let end = first + v.counts[unit] as usize;
    for (place, residual) in v.outliers(first, end) {
        out[place] += residual;
    }
    end
}

/// e^x for x <= 0; 0 below -87.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exp(x: __m256) -> __m256 {
    let keep = _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_set1_ps(-87.0));
    let x = _mm256_max_ps(x, _mm256_set1_ps(-87.0));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(std::f32::consts::LOG2_E),
    ));
    // r = x - n ln 2, with ln 2 in two parts so that the difference is exact.
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693_359_4), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.121_944_4e-4), r);
    let mut p = _mm256_set1_ps(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    }
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
    _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(power)), keep)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// Turns one row's scores of `n` visible tokens into probabilities under the row's running maximum; places
/// from `n` on become 0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn softmax(scores: &mut [f32; TOKENS], n: usize, row: usize, state: &mut State) {
    scores[n..].fill(f32::NEG_INFINITY);
    let lanes = scores.as_chunks_mut::<LANES>().0;
    let mut top = load(&lanes[0]);
    for x in &lanes[1..] {
        top = _mm256_max_ps(top, load(x));
    }
    let mut each = [0.0; LANES];
    store(&mut each, top);
    let max = state.raise(row, each.into_iter().fold(f32::NEG_INFINITY, f32::max));
    let max = _mm256_set1_ps(max);
    let mut total = _mm256_setzero_ps();
    for x in lanes {
        let p = exp(_mm256_sub_ps(load(x), max));
        total = _mm256_add_ps(total, p);
        store(x, p);
    }
    state.sum[row] += sum(total);
}
