//! One channel: the bounds beyond which a value is an outlier, and for every width the signposts between them with their error.

use kvquant_quant::pack::MAX_BITS;

use crate::kmeans::Histogram;
use crate::thresholds;

/// Widths that a channel can have.
pub(super) const WIDTHS: usize = MAX_BITS as usize + 1;
/// Share of the calibration's values beyond the bounds, both sides together.
pub(super) const OUTLIERS: f64 = 0.003;
/// Bins of a channel between its bounds: 32 for the finest learned signpost.
const BINS: usize = 1024;
/// The widest learned codebook; wider ones are uniform.
const LEARNED: usize = 5;
/// Shares of the range that a uniform codebook may cover; the rest is clamped.
const SHRINKS: [f64; 9] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2];

/// Codebooks of one channel.
pub(crate) struct Channel {
    /// Below it a value is an outlier.
    pub(super) lower: f32,
    /// Above it a value is an outlier.
    pub(super) upper: f32,
    /// Signposts of widths 0 to 5, sorted; fewer than 2^b where the channel has fewer values.
    learned: Vec<Vec<f32>>,
    /// First signpost and distance of widths 6 and 7.
    uniform: [(f32, f32); WIDTHS - LEARNED - 1],
    /// Weighted squared error at each width, without outliers.
    pub(super) cost: [f64; WIDTHS],
}

impl Channel {
    /// Of a channel's values and their gradients.
    pub(super) fn new(x: &[f32], gradients: &[f32]) -> Self {
        let (lower, upper) = bounds(x);
        let (centre, half) = (upper / 2.0 + lower / 2.0, upper / 2.0 - lower / 2.0);
        let mut histogram = Histogram::with_bins(BINS);
        let inverse = if half > 0.0 { 1.0 / half } else { 0.0 };
        let within = |x: &f32| (lower..=upper).contains(x);
        for (x, g) in x.iter().zip(gradients).filter(|(x, _)| within(x)) {
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

/// The bounds of a channel: as many of its values lie beyond as may be outliers.
fn bounds(x: &[f32]) -> (f32, f32) {
    // A whole number, so that a short calibration has none.
    let beyond = (OUTLIERS / 2.0 * x.len() as f64).floor();
    thresholds::range(&mut x.to_vec(), beyond / (x.len() - 1).max(1) as f64)
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
