//! Per-channel ranges: percentiles over all calibration tokens, by selection.

use rayon::prelude::*;

/// Channels gathered at a time: one cache line of f32.
const GATHER: usize = 16;

/// The values at the two quantiles `tail` and `1 - tail` of `x`, interpolated between neighbours (numpy's
/// default); smallest and largest for a tail of 0. `x` is reordered; it must not be empty.
pub(crate) fn range(x: &mut [f32], tail: f64) -> (f32, f32) {
    let last = x.len() - 1;
    let low = tail * last as f64;
    (at(x, low), at(x, last as f64 - low))
}

/// The order statistic at a real-valued rank.
fn at(x: &mut [f32], rank: f64) -> f32 {
    // Ranks such as 0.005 * 600 come out as 2.9999999999999996.
    let rank = if (rank - rank.round()).abs() < 1e-9 { rank.round() } else { rank };
    let (index, part) = (rank as usize, rank.fract());
    let (_, low, above) = x.select_nth_unstable_by(index, f32::total_cmp);
    let low = *low;
    match above.iter().copied().min_by(f32::total_cmp) {
        Some(high) if part > 0.0 => (f64::from(low) * (1.0 - part) + f64::from(high) * part) as f32,
        _ => low,
    }
}

/// `(lower, upper)` of every channel of `x` `[windows, ctx, channels]`. The first `sinks` tokens of each window are
/// left out (the paper leaves sink tokens out of the thresholds; its reference code does not). `outliers` is the
/// share of all values to lie outside, in 1/10,000, half on each side.
pub(crate) fn channel_ranges(
    x: &[f32],
    channels: usize,
    ctx: usize,
    sinks: usize,
    outliers: u32,
) -> (Vec<f32>, Vec<f32>) {
    let tail = f64::from(outliers) / 20_000.0;
    let ranges: Vec<Vec<(f32, f32)>> = (0..channels.div_ceil(GATHER))
        .into_par_iter()
        .map(|group| {
            let from = group * GATHER;
            let to = (from + GATHER).min(channels);
            let mut columns = vec![Vec::with_capacity(x.len() / channels); to - from];
            for window in x.chunks_exact(ctx * channels) {
                for token in window.chunks_exact(channels).skip(sinks) {
                    columns.iter_mut().zip(&token[from..to]).for_each(|(column, x)| column.push(*x));
                }
            }
            columns.iter_mut().map(|column| range(column, tail)).collect()
        })
        .collect();
    ranges.into_iter().flatten().unzip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn range_is_numpys_percentile() {
        // numpy.percentile([7, 1, 3, 10], [5, 95]) = [1.3, 9.55]; [25, 75] = [2.5, 7.75]
        let x = [7.0, 1.0, 3.0, 10.0];
        let close = |a: (f32, f32), b: (f32, f32)| (a.0 - b.0).abs() < 1e-6 && (a.1 - b.1).abs() < 1e-6;
        assert!(close(range(&mut x.to_vec(), 0.05), (1.3, 9.55)));
        assert!(close(range(&mut x.to_vec(), 0.25), (2.5, 7.75)));
        assert_eq!(range(&mut x.to_vec(), 0.0), (1.0, 10.0));
        assert_eq!(range(&mut [4.0], 0.05), (4.0, 4.0));
    }

    #[test]
    fn range_selects_as_a_sort_does() {
        for n in [2usize, 3, 100, 601, 2001] {
            let mut x = noise(n, n as u64);
            let mut sorted = x.clone();
            sorted.sort_by(f32::total_cmp);
            for tail in [0.0, 0.005, 0.025] {
                let (low, high) = range(&mut x, tail);
                let rank = tail * (n - 1) as f64;
                let i = rank.floor() as usize;
                assert!(sorted[i] <= low && low <= sorted[(i + 1).min(n - 1)], "{n} {tail}");
                assert!(sorted[n - 1 - i] >= high && high >= sorted[(n - 1 - i).saturating_sub(1)], "{n} {tail}");
            }
        }
    }

    #[test]
    fn sinks_of_every_window_are_left_out() {
        // Two windows of 3 tokens, 18 channels; the first token of each is huge.
        let channels = 18;
        let x: Vec<f32> = (0..6)
            .flat_map(|t| (0..channels).map(move |c| if t % 3 == 0 { 1e4 } else { (t * 100 + c) as f32 }))
            .collect();
        let (lower, upper) = channel_ranges(&x, channels, 3, 1, 0);
        for c in 0..channels {
            assert_eq!((lower[c], upper[c]), ((100 + c) as f32, (500 + c) as f32));
        }
        assert_eq!(channel_ranges(&x, channels, 3, 0, 0).1, vec![1e4; channels]);
    }
}
