//! Weighted 1-D k-means, solved by dynamic programming over a histogram.
//!
//! Lloyd's algorithm with restarts (scikit-learn's, in the reference code) finds a local optimum of hundreds of
//! millions of points. In one dimension clusters are intervals, so that over B sorted bins the optimum can be
//! computed: best(k, j) = min over i of best(k - 1, i) + cost(i..j), where the arg min grows with j, which divide
//! and conquer uses: O(k B log B).
//!
//! Tolerance: bins keep exact sums of w, w x and w x², so that the cost of a clustering is exact, but borders
//! between clusters fall only on bin edges. A point on the wrong side of the best border is at most one bin width
//! h = 2/8192 from it; moving it costs at most 2 h d w, d being the distance of the two signposts. With a share p
//! of the weight in the border bins, the excess is at most 2 h d p of the total weight: about 1e-7 for smooth data at
//! 3 bits, against a least cost of about 1e-2.

/// Bins over [-1, 1].
pub(crate) const BINS: usize = 8192;

/// Weighted sums of the points in each bin of [-1, 1].
#[derive(Clone)]
pub(crate) struct Histogram {
    /// (sum w, sum w x, sum w x²)
    bins: Vec<[f64; 3]>,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self::with_bins(BINS)
    }

    /// Fewer bins, for data of one channel.
    pub(crate) fn with_bins(bins: usize) -> Self {
        Histogram { bins: vec![[0.0; 3]; bins] }
    }

    /// Sums of each bin: weight, weight x, weight x^2.
    pub(crate) fn sums(&self) -> &[[f64; 3]] {
        &self.bins
    }

    /// For each k of `ks` (ascending): the best signposts, at most k of them, and their weighted squared error.
    pub(crate) fn best_of(&self, ks: &[usize]) -> Vec<(Vec<f32>, f64)> {
        let bins: Vec<[f64; 3]> = self.bins.iter().filter(|b| b[0] > 0.0).copied().collect();
        if bins.is_empty() {
            return vec![(vec![0.0], 0.0); ks.len()];
        }
        let mut sums = vec![[0.0; 3]; bins.len() + 1];
        for (i, b) in bins.iter().enumerate() {
            sums[i + 1] = [sums[i][0] + b[0], sums[i][1] + b[1], sums[i][2] + b[2]];
        }
        let most = ks.last().map_or(1, |k| (*k).min(bins.len()));
        let (costs, from) = tables(&sums, most);
        ks.iter()
            .map(|&k| {
                let k = k.min(bins.len());
                let borders = walk(&from[..k - 1], bins.len());
                let mut posts: Vec<f32> = borders.windows(2).map(|w| mean(&sums, w[0], w[1]) as f32).collect();
                posts.dedup();
                (posts, costs[k - 1])
            })
            .collect()
    }

    /// Adds a point in [-1, 1] (rounding a little beyond goes to the outer bins).
    #[inline]
    pub(crate) fn add(&mut self, x: f32, weight: f64) {
        let bins = self.bins.len();
        let bin = ((x + 1.0) * (bins as f32 / 2.0)).max(0.0) as usize;
        let (sums, x) = (&mut self.bins[bin.min(bins - 1)], f64::from(x));
        sums[0] += weight;
        sums[1] += weight * x;
        sums[2] += weight * x * x;
    }

    pub(crate) fn merge(&mut self, other: &Histogram) {
        for (a, b) in self.bins.iter_mut().zip(&other.bins) {
            (0..3).for_each(|i| a[i] += b[i]);
        }
    }

    /// Sum of all weights.
    pub(crate) fn weight(&self) -> f64 {
        self.bins.iter().map(|b| b[0]).sum()
    }

    /// `k` sorted, distinct signposts with the least weighted squared error; `None` when there is no weight at all.
    /// With fewer than `k` occupied bins the others go to the middle of the widest gaps of [-1, 1].
    pub(crate) fn signposts(&self, k: usize) -> Option<Vec<f32>> {
        // Empty bins change no cost; without them every cluster has weight.
        let bins: Vec<[f64; 3]> = self.bins.iter().filter(|b| b[0] > 0.0).copied().collect();
        if bins.is_empty() {
            return None;
        }
        let mut sums = vec![[0.0; 3]; bins.len() + 1];
        for (i, b) in bins.iter().enumerate() {
            sums[i + 1] = [sums[i][0] + b[0], sums[i][1] + b[1], sums[i][2] + b[2]];
        }
        let borders = borders(&sums, k.min(bins.len()));
        let mut posts: Vec<f32> = borders.windows(2).map(|w| mean(&sums, w[0], w[1]).clamp(-1.0, 1.0) as f32).collect();
        posts.dedup();
        while posts.len() < k {
            split_widest_gap(&mut posts);
        }
        Some(posts)
    }
}

/// Mean of bins `i..j`.
fn mean(sums: &[[f64; 3]], i: usize, j: usize) -> f64 {
    (sums[j][1] - sums[i][1]) / (sums[j][0] - sums[i][0])
}

/// Weighted squared error of bins `i..j` as one cluster.
fn cost(sums: &[[f64; 3]], i: usize, j: usize) -> f64 {
    let d = |n: usize| sums[j][n] - sums[i][n];
    let weight = d(0);
    // Less than zero only by rounding; a weight that vanishes against the sums before it costs nothing.
    if weight > 0.0 { (d(2) - d(1) * d(1) / weight).max(0.0) } else { 0.0 }
}

/// Borders `0 = b_0 < b_1 < ... < b_k = bins` of the best clustering.
fn borders(sums: &[[f64; 3]], k: usize) -> Vec<usize> {
    walk(&tables(sums, k).1, sums.len() - 1)
}

/// The least cost of all bins for 1 to k clusters, and `from[c][j]`: where the last of c + 2 clusters of bins 0..j
/// begins.
fn tables(sums: &[[f64; 3]], k: usize) -> (Vec<f64>, Vec<Vec<usize>>) {
    let bins = sums.len() - 1;
    let mut best: Vec<f64> = (0..=bins).map(|j| cost(sums, 0, j)).collect();
    let (mut costs, mut from) = (vec![best[bins]], Vec::new());
    for clusters in 2..=k {
        let mut next = vec![f64::INFINITY; bins + 1];
        let mut start = vec![0; bins + 1];
        solve(sums, &best, &mut next, &mut start, (clusters, bins), (clusters - 1, bins - 1));
        best = next;
        costs.push(best[bins]);
        from.push(start);
    }
    (costs, from)
}

/// Borders of the clustering that `from` leads to.
fn walk(from: &[Vec<usize>], bins: usize) -> Vec<usize> {
    let mut borders = vec![bins];
    let mut j = bins;
    for start in from.iter().rev() {
        j = start[j];
        borders.push(j);
    }
    borders.push(0);
    borders.reverse();
    borders
}

/// Fills `next` and `start` for j in `ends` (inclusive); the last cluster begins in `starts` (inclusive).
fn solve(
    sums: &[[f64; 3]],
    best: &[f64],
    next: &mut [f64],
    start: &mut [usize],
    ends: (usize, usize),
    starts: (usize, usize),
) {
    if ends.0 > ends.1 {
        return;
    }
    let j = ends.0.midpoint(ends.1);
    for i in starts.0..=starts.1.min(j - 1) {
        let c = best[i] + cost(sums, i, j);
        if c < next[j] {
            (next[j], start[j]) = (c, i);
        }
    }
    let i = start[j];
    solve(sums, best, next, start, (ends.0, j - 1), (starts.0, i));
    solve(sums, best, next, start, (j + 1, ends.1), (i, starts.1));
}

/// Inserts the middle of the widest gap between -1, the posts and 1.
fn split_widest_gap(posts: &mut Vec<f32>) {
    let (mut low, mut widest) = (-1.0, (0.0, 0, 0.0));
    for (i, high) in posts.iter().copied().chain([1.0]).enumerate() {
        if high - low > widest.0 {
            widest = (high - low, i, (low + high) / 2.0);
        }
        low = high;
    }
    posts.insert(widest.1, widest.2);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    fn histogram(points: &[(f32, f64)]) -> Histogram {
        let mut h = Histogram::new();
        points.iter().for_each(|(x, w)| h.add(*x, *w));
        h
    }

    /// Weighted squared error with every point at its nearest signpost.
    fn error(points: &[(f32, f64)], posts: &[f32]) -> f64 {
        let near = |x: f32| posts.iter().map(|p| f64::from(x - p).powi(2)).fold(f64::INFINITY, f64::min);
        points.iter().map(|(x, w)| w * near(*x)).sum()
    }

    /// The least error over all ways to cut the sorted points into k runs.
    fn brute_force(points: &[(f32, f64)], k: usize) -> f64 {
        fn one(points: &[(f32, f64)]) -> f64 {
            let w: f64 = points.iter().map(|p| p.1).sum();
            let m = points.iter().map(|p| f64::from(p.0) * p.1).sum::<f64>() / w;
            points.iter().map(|p| p.1 * (f64::from(p.0) - m).powi(2)).sum()
        }
        if k == 1 {
            return one(points);
        }
        (1..=points.len() - (k - 1))
            .map(|first| one(&points[..first]) + brute_force(&points[first..], k - 1))
            .fold(f64::INFINITY, f64::min)
    }

    fn points(n: usize, seed: u64) -> Vec<(f32, f64)> {
        let mut points: Vec<(f32, f64)> = noise(n, seed)
            .iter()
            .zip(noise(n, seed + 1000))
            .map(|(x, w)| ((x / 1.5).powi(3), f64::from((3.0 * w).exp())))
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    }

    #[test]
    fn it_is_the_optimum_of_small_inputs() {
        for seed in 0..30 {
            for (n, k) in [(9, 2), (12, 4), (11, 8), (8, 8)] {
                let points = points(n, seed);
                let posts = histogram(&points).signposts(k).unwrap();
                assert!(posts.windows(2).all(|p| p[0] < p[1]), "{posts:?}");
                let (got, want) = (error(&points, &posts), brute_force(&points, k));
                let weight: f64 = points.iter().map(|p| p.1).sum();
                assert!(got <= want + 1e-6 * weight, "seed {seed}, {k} of {n}: {got} {want}");
            }
        }
    }

    #[test]
    fn no_restart_of_lloyd_is_better() {
        use rand::{Rng, SeedableRng};
        let points = points(4000, 77);
        let weight: f64 = points.iter().map(|p| p.1).sum();
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        for k in [4, 8, 16] {
            let ours = error(&points, &histogram(&points).signposts(k).unwrap());
            for _ in 0..8 {
                let mut posts: Vec<f64> = (0..k).map(|_| rng.random_range(-1.0..1.0)).collect();
                for _ in 0..60 {
                    let mut sums = vec![(0.0, 0.0); k];
                    for (x, w) in &points {
                        let far = |p: &f64| (p - f64::from(*x)).abs();
                        let near = (0..k).min_by(|a, b| far(&posts[*a]).total_cmp(&far(&posts[*b]))).unwrap();
                        sums[near].0 += w;
                        sums[near].1 += w * f64::from(*x);
                    }
                    posts.iter_mut().zip(&sums).filter(|(_, s)| s.0 > 0.0).for_each(|(p, s)| *p = s.1 / s.0);
                }
                let posts: Vec<f32> = posts.iter().map(|p| *p as f32).collect();
                assert!(ours <= error(&points, &posts) + 1e-6 * weight, "{k}");
            }
        }
    }

    #[test]
    fn fewer_points_than_signposts() {
        assert_eq!(histogram(&[]).signposts(4), None);
        assert_eq!(histogram(&[(0.5, 0.0)]).signposts(4), None);
        for points in [&[(0.0f32, 1.0)][..], &[(1.0, 2.0)], &[(-1.0, 1.0), (1.0, 1.0)]] {
            let posts = histogram(points).signposts(8).unwrap();
            assert_eq!(posts.len(), 8);
            assert!(posts.windows(2).all(|p| p[0] < p[1]), "{posts:?}");
            assert!(error(points, &posts) < 1e-12);
        }
    }

    #[test]
    fn merging_is_adding() {
        let (a, b) = (points(50, 1), points(70, 2));
        let mut merged = histogram(&a);
        merged.merge(&histogram(&b));
        let both = histogram(&[a, b].concat());
        assert_eq!(merged.signposts(8), both.signposts(8));
        assert!((merged.weight() - both.weight()).abs() < 1e-9 * both.weight());
    }
}
