//! For every channel of a side: signposts at every width, and what they cost.

use half::f16;
use kvquant_quant::Side;
use rayon::prelude::*;

use super::{WIDTHS, transform};
use crate::fit::SideData;
use crate::kmeans::Histogram;

/// Bins of a channel between its extremes: 32 for the finest learned signpost.
const BINS: usize = 1024;
/// The widest learned codebook; wider ones are uniform.
const LEARNED: usize = 5;
/// Shares of the range that a uniform codebook may cover; the rest is clamped.
const SHRINKS: [f64; 9] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2];

/// Codebooks of one channel.
pub(crate) struct Channel {
    /// The least value of the calibration.
    pub lower: f32,
    /// The largest.
    pub upper: f32,
    /// Signposts of widths 0 to 5, sorted; fewer than 2^b where the channel has fewer values.
    learned: Vec<Vec<f32>>,
    /// First signpost and distance of widths 6 and 7.
    uniform: [(f32, f32); WIDTHS - LEARNED - 1],
    /// Weighted squared error at each width.
    pub cost: [f64; WIDTHS],
}

/// Codebooks of one side of one layer.
pub(crate) struct Books {
    pub side: Side,
    pub head_dim: usize,
    /// See [`kvquant_quant::MixedFit`].
    pub transform: Vec<f32>,
    /// `[C]`, after the transform.
    pub channels: Vec<Channel>,
}

impl Books {
    /// Fits all widths; the first `sinks` tokens of each window are left out.
    pub(crate) fn new(mut data: SideData, sinks: usize) -> Self {
        let width = data.kv_heads * data.head_dim;
        let keep = |x: &[f32]| -> Vec<f32> {
            x.chunks_exact(data.ctx * width).flat_map(|window| &window[sinks * width..]).copied().collect()
        };
        (data.values, data.gradients) = (keep(&data.values), keep(&data.gradients));
        let transform = match data.side {
            Side::Key => {
                let angles = transform::key_angles(&data.values, width);
                for x in [&mut data.values, &mut data.gradients] {
                    transform::turn(x, &angles);
                }
                angles
            }
            Side::Value => {
                let mut bases = transform::value_bases(&data.values, width, data.head_dim);
                // As they are stored.
                bases.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
                // The basis is orthogonal: gradients turn as values do.
                for x in [&mut data.values, &mut data.gradients] {
                    transform::project(x, &bases, data.head_dim);
                }
                bases
            }
        };
        let channels = (0..width)
            .into_par_iter()
            .map(|c| {
                let column = |x: &[f32]| -> Vec<f32> { x.iter().skip(c).step_by(width).copied().collect() };
                Channel::new(&column(&data.values), &column(&data.gradients))
            })
            .collect();
        Books { side: data.side, head_dim: data.head_dim, transform, channels }
    }
}

impl Channel {
    pub(crate) fn new(x: &[f32], gradients: &[f32]) -> Self {
        let (lower, upper) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, u), x| (l.min(*x), u.max(*x)));
        let (centre, half) = (upper / 2.0 + lower / 2.0, upper / 2.0 - lower / 2.0);
        let mut histogram = Histogram::with_bins(BINS);
        let inverse = if half > 0.0 { 1.0 / half } else { 0.0 };
        for (x, g) in x.iter().zip(gradients) {
            histogram.add((x - centre) * inverse, f64::from(*g) * f64::from(*g));
        }
        let ks: Vec<usize> = (0..=LEARNED).map(|b| 1 << b).collect();
        let scale = f64::from(half) * f64::from(half);
        let mut cost = [0.0; WIDTHS];
        let mut learned = Vec::with_capacity(ks.len());
        for (b, (posts, error)) in histogram.best_of(&ks).into_iter().enumerate() {
            learned.push(posts.iter().map(|p| centre + half * p).collect());
            cost[b] = error * scale;
        }
        let mut uniform = [(0.0, 0.0); WIDTHS - LEARNED - 1];
        for (i, to) in uniform.iter_mut().enumerate() {
            let b = LEARNED + 1 + i;
            let ((first, distance), error) = best_uniform(&histogram, 1 << b);
            *to = (centre + half * first as f32, half * distance as f32);
            // A finer grid that is worse than a coarser book is never chosen.
            cost[b] = error * scale;
        }
        Channel { lower, upper, learned, uniform, cost }
    }

    /// The largest magnitude among the signposts of a width.
    pub(super) fn top(&self, bits: u8) -> f32 {
        let (first, last) = match self.learned.get(bits as usize) {
            Some(posts) => (posts[0], posts[posts.len() - 1]),
            None => {
                let (first, distance) = self.uniform[bits as usize - LEARNED - 1];
                (first, first + distance * ((1u32 << bits) - 1) as f32)
            }
        };
        first.abs().max(last.abs())
    }

    /// Entries of the kernel's table at a width, in steps; sorted, equal ones at the end where there are too few.
    pub(super) fn entries(&self, bits: u8, step: f32) -> Vec<i16> {
        match self.learned.get(bits as usize) {
            Some(posts) => {
                let mut entries: Vec<i16> = posts.iter().map(|p| (p / step).round() as i16).collect();
                entries.resize(1 << bits, *entries.last().expect("a book has a signpost"));
                entries
            }
            None => {
                let (first, distance) = self.uniform[bits as usize - LEARNED - 1];
                // value = low[code % 16] + high[code / 16]; both multiples of one whole distance, so that sums rise.
                let steps = (distance / step).floor().max(0.0);
                let low = (0..16).map(|i| (steps * i as f32) as i16);
                let base = (first / step).ceil();
                let high = (0..1 << (bits - 4)).map(|i| (base + 16.0 * steps * i as f32) as i16);
                low.chain(high).collect()
            }
        }
    }
}

/// First signpost and distance of the best of some uniform books with n signposts over [-1, 1], and its error.
fn best_uniform(histogram: &Histogram, n: usize) -> ((f64, f64), f64) {
    let sums = histogram.sums();
    let total: f64 = sums.iter().map(|b| b[0]).sum();
    let mean = if total > 0.0 { sums.iter().map(|b| b[1]).sum::<f64>() / total } else { 0.0 };
    let mut best = ((-1.0, 2.0 / (n - 1) as f64), f64::INFINITY);
    for shrink in SHRINKS {
        let (first, last) = (mean + shrink * (-1.0 - mean), mean + shrink * (1.0 - mean));
        let distance = (last - first) / (n - 1) as f64;
        let mut error = 0.0;
        for b in sums.iter().filter(|b| b[0] > 0.0) {
            let code = ((b[1] / b[0] - first) / distance).round().clamp(0.0, (n - 1) as f64);
            let q = first + code * distance;
            error += (b[2] - 2.0 * q * b[1] + q * q * b[0]).max(0.0);
        }
        if error < best.1 {
            best = ((first, distance), error);
        }
    }
    best
}
