//! Outputs from coded values: see AVX2's file of this name, which also does what is left in f32.

use std::arch::x86_64::*;
use std::ops::Range;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::BLOCKS;
use super::super::avx2::LANES;
use super::super::avx2::ahead::{Ahead, lines_a_unit};
use super::super::avx2::decode::{ByBlock, ROWS, Row, Scratch};
use super::super::avx2::mix::{GroupScales, Weights, add_sums, mix_passes, scale_of, store_sums};
use super::super::avx2::outliers::mix as outliers_of;
use super::super::avx2::unpack::{by_rows, by_width};
use super::super::view::{CodedView, Run, TOKENS};
use super::{multiply_add, unpack};
use crate::rope::evens_first;

/// A row's integer weights in a block, in the order of signposts.
type Integers = [__m512i; 2];

/// No weight.
// SAFETY: all bits 0 is a vector of zeros.
const NO_WEIGHTS: Integers = unsafe { std::mem::zeroed() };

mix_passes!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c");

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn integers(w: &Weights, factor: f32) -> Integers {
    const PLACES: [i16; 32] = {
        let (mut at, mut i) = ([0; 32], 0);
        while i < 32 {
            // Packing two vectors of eight leaves their halves interleaved.
            let t = evens_first(i) as i16;
            at[i] = t / 16 * 16 + t % 8 / 4 * 8 + t / 8 % 2 * 4 + t % 4;
            i += 1;
        }
        at
    };
    let scale = _mm256_set1_ps(factor);
    let int = |i: usize| _mm256_cvtps_epi32(_mm256_mul_ps(w[i], scale));
    let two = |i: usize| _mm256_packs_epi32(int(i), int(i + 1));
    // SAFETY: 64 readable bytes; unaligned loads are allowed.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    let half = |i: usize| {
        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(two(i)), two(i + 2));
        _mm512_permutexvar_epi16(places, both)
    };
    [half(0), half(4)]
}

/// sums[r] = the sum over all blocks of weights times signposts, for some units of a run.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn by_units<const B: u32, const R: usize>(
    blocks: &[CodedView<'_>],
    run: &Run<'_>,
    range: Range<usize>,
    ints: &[[Integers; R]; BLOCKS],
    d: usize,
    ahead: &mut [Ahead<'_>; BLOCKS],
    sums: &mut [i32],
) {
    let mut u = range.start;
    while u < range.end {
        let (place, unit) = (u * UNIT_CHANNELS, (u - run.units.start) * B as usize);
        let tables = blocks[0].four_tables(place);
        let mut four = [[_mm512_setzero_si512(); R]; UNIT_CHANNELS];
        for ((block, ints), ahead) in blocks.iter().zip(ints).zip(&mut *ahead) {
            ahead.lines(lines_a_unit(B));
            let [low, high] = unpack::codes::<B>(&block.vectors_of(run)[unit..][..B as usize]);
            for c in 0..UNIT_CHANNELS {
                let [a, b] = unpack::look_up::<B>(tables[c], low[c], high[c]);
                for r in 0..R {
                    four[c][r] = multiply_add(multiply_add(four[c][r], a, ints[r][0]), b, ints[r][1]);
                }
            }
        }
        for r in 0..R {
            let mut half = [_mm256_setzero_si256(); UNIT_CHANNELS];
            for c in 0..UNIT_CHANNELS {
                let x = four[c][r];
                half[c] = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
            }
            let (ab, cd) = (_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
            store_sums(_mm256_hadd_epi32(ab, cd), &mut sums[r * d + place..]);
        }
        u += 1;
    }
}
