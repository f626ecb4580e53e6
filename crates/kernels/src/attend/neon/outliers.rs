//! Outliers, for up to four rows at once: rows lie side by side, so that an entry takes one vector operation instead of
//! one a row.

use std::arch::aarch64::*;

use kvquant_quant::pack::UNIT_CHANNELS;

use super::super::rows::{ByBlock, ROWS, Row};
use super::super::view::{CodedView, TOKENS};
use super::{LANES, half, halves, load, store};
use crate::rope::BlockTable;

/// The same place of four rows.
type Four = [f32; ROWS];

/// What a thread reuses from block to block.
#[derive(Default)]
pub(in super::super) struct Scratch {
    channels: Vec<Four>,
    tokens: Vec<Four>,
    residuals: Vec<f32>,
}

/// Calls `then(channel, token, residual)` for every outlier: channels are below `head_dim`, tokens below 64.
#[inline]
#[target_feature(enable = "neon")]
fn each(v: &CodedView<'_>, residuals: &mut Vec<f32>, mut then: impl FnMut(usize, usize, f32)) {
    floats(v.outliers.residuals, residuals);
    let mut rest = (v.outliers.places, &residuals[..]);
    for (u, &n) in v.outliers.counts.iter().enumerate() {
        let ((places, more), (of_unit, more_residuals)) = (rest.0.split_at(n as usize), rest.1.split_at(n as usize));
        rest = (more, more_residuals);
        for (&p, &residual) in places.iter().zip(of_unit) {
            then(v.channel(u * UNIT_CHANNELS + p as usize / TOKENS), p as usize % TOKENS, residual);
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn floats(residuals: &[[u8; 2]], to: &mut Vec<f32>) {
    to.resize(residuals.len(), 0.0);
    let (fours, rest) = residuals.as_chunks::<LANES>();
    let (to, to_rest) = to.as_chunks_mut::<LANES>();
    for (from, to) in fours.iter().zip(to) {
        store(to, halves(&from.map(u16::from_le_bytes)));
    }
    for (from, to) in rest.iter().zip(to_rest) {
        *to = half(u16::from_le_bytes(*from));
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn transpose([a, b, c, d]: [float32x4_t; 4]) -> [float32x4_t; 4] {
    let wide = |x| vreinterpretq_f64_f32(x);
    let (ab, cd) = ([vtrn1q_f32(a, b), vtrn2q_f32(a, b)].map(wide), [vtrn1q_f32(c, d), vtrn2q_f32(c, d)].map(wide));
    [vtrn1q_f64(ab[0], cd[0]), vtrn1q_f64(ab[1], cd[1]), vtrn2q_f64(ab[0], cd[0]), vtrn2q_f64(ab[1], cd[1])]
        .map(|x| vreinterpretq_f32_f64(x))
}

/// Puts R rows side by side.
#[inline]
#[target_feature(enable = "neon")]
fn side_by_side<const R: usize>(rows: [&[f32]; R], to: &mut Vec<Four>) {
    to.resize(rows[0].len(), [0.0; ROWS]);
    let rows = rows.map(|r| r.as_chunks::<LANES>().0);
    for (i, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let mut four = [vdupq_n_f32(0.0); ROWS];
        for r in 0..R {
            four[r] = load(&rows[r][i]);
        }
        for (to, x) in to.iter_mut().zip(transpose(four)) {
            store(to, x);
        }
    }
}

/// Adds what lies side by side to R rows.
#[inline]
#[target_feature(enable = "neon")]
fn add_to_rows<const R: usize>(from: &[Four], rows: [&mut [f32]; R]) {
    let rows = rows.map(|r| r.as_chunks_mut::<LANES>().0);
    for (i, from) in from.as_chunks::<LANES>().0.iter().enumerate() {
        let x = transpose([load(&from[0]), load(&from[1]), load(&from[2]), load(&from[3])]);
        for r in 0..R {
            let to = &mut rows[r][i];
            store(to, vaddq_f32(load(to), x[r]));
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn add(to: &mut Four, x: float32x4_t, residual: f32) {
    store(to, vfmaq_n_f32(load(to), x, residual));
}

/// scores[r][t] += residual * (the query's share of the channel at the token). `q` is `[R, d]`.
#[target_feature(enable = "neon")]
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
    side_by_side::<R>(std::array::from_fn(|r| &q[r * d..(r + 1) * d]), &mut s.channels);
    s.tokens.clear();
    s.tokens.resize(TOKENS, [0.0; ROWS]);
    let (channels, sums) = (&s.channels[..d], &mut s.tokens[..TOKENS]);
    match turn {
        Some(table) => {
            let turns = &table.turns[..d / 2 * TOKENS];
            each(v, &mut s.residuals, |c, t, residual| {
                let [cos, sin] = turns[c / 2 * TOKENS + t];
                // The other channel of the pair gets sin from an even one, -sin from an odd one.
                let sin = f32::from_bits(sin.to_bits() ^ (c as u32) << 31);
                let x = vmulq_n_f32(load(&channels[c]), cos);
                let x = vfmaq_n_f32(x, load(&channels[c ^ 1]), sin);
                add(&mut sums[t], x, residual);
            });
        }
        None => each(v, &mut s.residuals, |c, t, residual| {
            add(&mut sums[t], load(&channels[c]), residual);
        }),
    }
    add_to_rows::<R>(sums, scores.each_mut().map(|row| &mut row[..]));
}

/// out[r][c] += weights[r][t] * residual, over some blocks. `out` is `[R, d]`.
#[target_feature(enable = "neon")]
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
        side_by_side::<R>(std::array::from_fn(|r| &weights.row(b, r)[..]), &mut s.tokens);
        let tokens = &s.tokens[..TOKENS];
        each(v, &mut s.residuals, |c, t, residual| {
            add(&mut sums[c], load(&tokens[t]), residual);
        });
    }
    let mut rows = out.chunks_exact_mut(d);
    add_to_rows::<R>(sums, std::array::from_fn(|_| rows.next().expect("out has R rows")));
}
