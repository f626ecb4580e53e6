//! Thresholds of channels that follow the tokens, for models that nobody calibrated.
//!
//! The first tokens give percentiles. Then each value moves its channel's thresholds a little: outward, when it lies beyond
//! them, inward otherwise, in the proportion in which a share `tail` of all values lies beyond (Robbins and Monro's
//! estimate of a quantile). So a text of another kind moves them within a few hundred tokens, and no values are kept.

/// How far a value beyond a threshold moves it: this share of the distance, or of half the range if that is more.
const STEP: f32 = 1.0 / 32.0;
/// The least share of values beyond a threshold; without outliers it stands for the extremes.
const LEAST_TAIL: f32 = 0.0005;

/// A side's running thresholds.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningRanges {
    tail: f32,
    lower: Vec<f32>,
    upper: Vec<f32>,
}

impl RunningRanges {
    /// Percentiles of the first tokens `[tokens, C]`, at least one; `outliers` is the share to lie outside, in 1/10,000.
    pub fn new(x: &[f32], channels: usize, outliers: u32) -> Self {
        let tail = (outliers as f32 / 20_000.0).max(LEAST_TAIL);
        let mut column = Vec::with_capacity(x.len() / channels);
        let (lower, upper) = (0..channels)
            .map(|c| {
                column.clear();
                column.extend(x[c..].iter().step_by(channels));
                column.sort_by(f32::total_cmp);
                let rank = tail * (column.len() - 1) as f32;
                let (i, part) = (rank as usize, rank.fract());
                let between = |a: f32, b: f32| a + (b - a) * part;
                let (first, last) = (&column[i..], &column[..column.len() - i]);
                let next = |x: &[f32], at: usize| x.get(at).copied();
                let low = between(first[0], next(first, 1).unwrap_or(first[0]));
                let top = last[last.len() - 1];
                let high = between(top, last.len().checked_sub(2).map_or(top, |at| last[at]));
                (low, high)
            })
            .unzip();
        RunningRanges { tail, lower, upper }
    }

    /// Follows tokens `[tokens, C]`.
    pub fn follow(&mut self, x: &[f32]) {
        let inward = STEP * self.tail;
        for token in x.chunks_exact(self.lower.len()) {
            for ((l, u), &v) in self.lower.iter_mut().zip(&mut self.upper).zip(token) {
                let half = (*u - *l) / 2.0;
                *l += if v < *l { -STEP * half.max(*l - v) } else { inward * half };
                *u += if v > *u { STEP * half.max(v - *u) } else { -inward * half };
            }
        }
    }

    /// Lower thresholds `[C]`.
    pub fn lower(&self) -> &[f32] {
        &self.lower
    }

    /// Upper thresholds `[C]`.
    pub fn upper(&self) -> &[f32] {
        &self.upper
    }

    /// How far they are from others, as a share of the range of those, mean over channels and both ends.
    pub fn distance(&self, lower: &[f32], upper: &[f32]) -> f32 {
        let own = self.lower.iter().zip(&self.upper);
        let moved = own.zip(lower.iter().zip(upper)).map(|((l, u), (l0, u0))| {
            let range = u0 - l0;
            let moved = (l - l0).abs() + (u - u0).abs();
            // A channel that was constant has no range to compare with.
            if range > 0.0 { (moved / range / 2.0).min(1.0) } else { f32::from(moved > 0.0) }
        });
        moved.sum::<f32>() / self.lower.len() as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of two channels, evenly spread over -1 to 1 and 0 to `top`.
    fn tokens(n: usize, top: f32, seed: u32) -> Vec<f32> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 24) as f32
        };
        (0..n).flat_map(|_| [2.0 * next() - 1.0, top * next()]).collect()
    }

    fn beyond(r: &RunningRanges, x: &[f32]) -> f32 {
        let outside = |t: &[f32]| (0..2).filter(|&c| t[c] < r.lower[c] || t[c] > r.upper[c]).count();
        x.chunks_exact(2).map(outside).sum::<usize>() as f32 / x.len() as f32
    }

    #[test]
    fn the_first_thresholds_are_percentiles() {
        // 0, 1, .. 200: the 0.5 % and 99.5 % percentiles are 1 and 199.
        let x: Vec<f32> = (0..201).map(|i| (i * 7 % 201) as f32).collect();
        let r = RunningRanges::new(&x, 1, 100);
        assert!((r.lower()[0] - 1.0).abs() < 1e-4 && (r.upper()[0] - 199.0).abs() < 1e-4, "{r:?}");
        let one = RunningRanges::new(&[3.0, -1.0], 2, 100);
        assert_eq!((one.lower(), one.upper()), (&[3.0, -1.0][..], &[3.0, -1.0][..]));
    }

    #[test]
    fn thresholds_keep_their_share_and_follow_a_shift() {
        let mut r = RunningRanges::new(&tokens(256, 1.0, 1), 2, 200);
        r.follow(&tokens(4000, 1.0, 2));
        let share = beyond(&r, &tokens(20_000, 1.0, 3));
        assert!((0.012..0.03).contains(&share), "{share}");
        let before = r.clone();
        // The second channel's values become five times as large.
        assert!(beyond(&r, &tokens(1000, 5.0, 4)) > 0.3);
        r.follow(&tokens(512, 5.0, 5));
        assert!(beyond(&r, &tokens(1000, 5.0, 6)) < 0.06, "{r:?}");
        assert!(r.distance(before.lower(), before.upper()) > 0.2);
        assert_eq!(r.distance(r.lower(), r.upper()), 0.0);
    }

    #[test]
    fn a_constant_channel_opens_when_it_moves() {
        let mut r = RunningRanges::new(&[2.0; 64], 1, 100);
        assert_eq!((r.lower()[0], r.upper()[0]), (2.0, 2.0));
        r.follow(&[3.0; 200]);
        assert!(r.upper()[0] > 2.9 && r.lower()[0] >= 2.0, "{r:?}");
    }
}
