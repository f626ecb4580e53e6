//! Scores and outputs in f32: fp16 blocks, sinks, and keys with per-token scales.

use std::arch::aarch64::*;

use super::super::SideView;
use super::super::by_const::by_rows;
use super::super::rows::{ROWS, Row};
use super::super::view::TOKENS;
use super::decode::Scratch;
use super::{LANES, dequant, halves, load, store, sum_each};
use crate::rope::BlockTable;

/// Tokens whose scores stay in registers.
const STRIP: usize = 16;
/// Vectors of those.
const VECTORS: usize = STRIP / LANES;

/// A side `[head_dim, 64]`, channel by channel.
#[derive(Clone, Copy)]
enum Tile<'a> {
    Half(&'a [[u16; TOKENS]]),
    Float(&'a [[f32; TOKENS]]),
}

impl<'a> Tile<'a> {
    /// `room` takes what has to be dequantized first.
    #[inline]
    #[target_feature(enable = "neon")]
    fn of(side: &SideView<'a>, len: usize, d: usize, room: &'a mut Vec<f32>) -> Self {
        if let SideView::Tile { data } = side {
            return Tile::Half(data.as_chunks().0);
        }
        room.resize(d * TOKENS, 0.0);
        dequant(side, len, room);
        Tile::Float(room.as_chunks().0)
    }

    /// Tokens `first .. first + 16` of a channel.
    ///
    /// # Safety
    /// The CPU has NEON.
    #[inline(always)]
    unsafe fn strip(self, channel: usize, first: usize) -> [float32x4_t; VECTORS] {
        // SAFETY: passed on.
        unsafe {
            match self {
                Tile::Half(from) => {
                    let [a, b, c, d] = from[channel].as_chunks::<LANES>().0.as_chunks::<VECTORS>().0[first / STRIP];
                    [halves(&a), halves(&b), halves(&c), halves(&d)]
                }
                Tile::Float(from) => {
                    let [a, b, c, d] = from[channel].as_chunks::<LANES>().0.as_chunks::<VECTORS>().0[first / STRIP];
                    [load(&a), load(&b), load(&c), load(&d)]
                }
            }
        }
    }
}

/// scores[r][t] = q[r] * key, the keys turned first where `turn` is given.
#[target_feature(enable = "neon")]
pub(super) fn score(
    s: &mut Scratch,
    d: usize,
    side: &SideView<'_>,
    len: usize,
    turn: Option<&BlockTable>,
    scores: &mut [Row],
) {
    let keys = Tile::of(side, len, d, &mut s.tile);
    for (q, scores) in s.local.chunks(ROWS * d).zip(scores.chunks_mut(ROWS)) {
        by_rows!(scores.len(), score_rows::<_>(q, d, keys, turn, scores));
    }
}

#[target_feature(enable = "neon")]
fn score_rows<const R: usize>(q: &[f32], d: usize, keys: Tile<'_>, turn: Option<&BlockTable>, scores: &mut [Row]) {
    let rows: [&[f32]; R] = std::array::from_fn(|r| &q[r * d..(r + 1) * d]);
    for first in (0..TOKENS).step_by(STRIP) {
        let mut sums = [[vdupq_n_f32(0.0); VECTORS]; R];
        for pair in 0..d / 2 {
            // SAFETY: the CPU has NEON here.
            let (mut x, mut y) = unsafe { (keys.strip(2 * pair, first), keys.strip(2 * pair + 1, first)) };
            if let Some(table) = turn {
                let at = pair * TOKENS + first;
                let cos = table.cos[at..at + STRIP].as_chunks().0;
                let sin = table.sin[at..at + STRIP].as_chunks().0;
                for i in 0..VECTORS {
                    let (c, s, a, b) = (load(&cos[i]), load(&sin[i]), x[i], y[i]);
                    x[i] = vfmsq_f32(vmulq_f32(a, c), b, s);
                    y[i] = vfmaq_f32(vmulq_f32(b, c), a, s);
                }
            }
            for r in 0..R {
                let (a, b) = (rows[r][2 * pair], rows[r][2 * pair + 1]);
                for i in 0..VECTORS {
                    sums[r][i] = vfmaq_n_f32(vfmaq_n_f32(sums[r][i], x[i], a), y[i], b);
                }
            }
        }
        for r in 0..R {
            for (to, x) in scores[r][first..first + STRIP].as_chunks_mut().0.iter_mut().zip(sums[r]) {
                store(to, x);
            }
        }
    }
}

/// out[r] += sum over tokens of weights[r][t] * value.
#[target_feature(enable = "neon")]
pub(super) fn mix(weights: &[Row], room: &mut Vec<f32>, d: usize, side: &SideView<'_>, len: usize, out: &mut [f32]) {
    let values = Tile::of(side, len, d, room);
    for (weights, out) in weights.chunks(ROWS).zip(out.chunks_mut(ROWS * d)) {
        by_rows!(weights.len(), mix_rows::<_>(weights, d, values, out));
    }
}

#[target_feature(enable = "neon")]
fn mix_rows<const R: usize>(weights: &[Row], d: usize, values: Tile<'_>, out: &mut [f32]) {
    for unit in (0..d).step_by(4) {
        let mut sums = [[vdupq_n_f32(0.0); 4]; R];
        for first in (0..TOKENS).step_by(STRIP) {
            for c in 0..4 {
                // SAFETY: the CPU has NEON here.
                let x = unsafe { values.strip(unit + c, first) };
                for r in 0..R {
                    let w = weights[r][first..first + STRIP].as_chunks().0;
                    for i in 0..VECTORS {
                        sums[r][c] = vfmaq_f32(sums[r][c], x[i], load(&w[i]));
                    }
                }
            }
        }
        for r in 0..R {
            let to = out[r * d + unit..].first_chunk_mut().expect("a row has head_dim channels");
            store(to, vaddq_f32(load(to), sum_each(sums[r])));
        }
    }
}
