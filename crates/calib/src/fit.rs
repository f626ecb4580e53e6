//! One layer's keys or values to their thresholds and signposts.

use kvquant_kernels::rope::Rotation;
use kvquant_quant::{
    CodebookKind, CodedSpec, FisherWeights, LayerFit, QuantError, Scope, Side, SideFit, SideQuantizer, TokenCodes,
};
use rayon::prelude::*;

use crate::kmeans::Histogram;
use crate::{CalibError, ops, thresholds};

/// A layer's keys or values with their gradients, `[windows, ctx, kv_heads, head_dim]`.
pub(crate) struct SideData {
    pub side: Side,
    pub values: Vec<f32>,
    pub gradients: Vec<f32>,
    pub ctx: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// How a value becomes a number in [-1, 1].
enum Normalizer {
    /// Static ranges `[channels]`.
    Channel { lower: Vec<f32>, upper: Vec<f32> },
    /// Scales of each token, as the quantizer of the cache takes them, rounded to fp16.
    Token(Box<SideQuantizer>),
}

impl SideData {
    fn channels(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The same after RoPE, by position in the window. The gradient of a rotated key is the rotated gradient:
    /// a rotation is orthogonal.
    pub(crate) fn rotated(mut self, rotations: &[Rotation]) -> Self {
        let width = self.channels();
        for x in [&mut self.values, &mut self.gradients] {
            x.chunks_exact_mut(self.ctx * width).for_each(|window| ops::rotate(window, width, rotations));
        }
        self
    }

    /// Fits one spec. The first `sinks` tokens of each window and all outliers are left out.
    ///
    /// # Errors
    /// No weight is left (every gradient is zero), or a token that the cache's quantizer refuses.
    pub(crate) fn fit(&self, layer: usize, spec: &CodedSpec) -> Result<SideFit, CalibError> {
        let normalizer = self.normalizer(layer, spec)?;
        let (encode, decode) = match spec.codebook {
            CodebookKind::Nuq => self.codebook(layer, spec, &normalizer)?,
            CodebookKind::Int | CodebookKind::Nf | CodebookKind::Mix { .. } => (Vec::new(), Vec::new()),
        };
        let (lower, upper) = match normalizer {
            Normalizer::Channel { lower, upper } => (lower, upper),
            Normalizer::Token(_) => (Vec::new(), Vec::new()),
        };
        Ok(SideFit { lower, upper, encode, decode, mixed: None })
    }

    fn normalizer(&self, layer: usize, spec: &CodedSpec) -> Result<Normalizer, CalibError> {
        let scope = match self.side {
            Side::Key => spec.keys,
            Side::Value => spec.values,
        };
        if scope == Scope::Channel {
            let (lower, upper) =
                thresholds::channel_ranges(&self.values, self.channels(), self.ctx, spec.sinks, spec.outliers);
            return Ok(Normalizer::Channel { lower, upper });
        }
        // Scales and outliers of a token do not depend on the codebook: any will do.
        let n = 1 << spec.bits;
        let posts: Vec<f32> = (0..n).map(|i| (2 * i + 1 - n) as f32 / n as f32).collect();
        let any = |scope| {
            let ranges = if scope == Scope::Channel { self.channels() } else { 0 };
            SideFit {
                lower: vec![-1.0; ranges],
                upper: vec![1.0; ranges],
                encode: posts.clone(),
                decode: posts.clone(),
                mixed: None,
            }
        };
        let any = LayerFit { keys: any(spec.keys), values: any(spec.values) };
        let quantizer = SideQuantizer::new(spec, self.side, self.kv_heads, self.head_dim, Some(&any))
            .map_err(|source| CalibError::Quantizer { layer, side: self.side, source })?;
        Ok(Normalizer::Token(Box::new(quantizer)))
    }

    /// Signposts to encode and to decode with.
    fn codebook(
        &self,
        layer: usize,
        spec: &CodedSpec,
        normalizer: &Normalizer,
    ) -> Result<(Vec<f32>, Vec<f32>), CalibError> {
        let weights = spec.weights;
        let parts = self.fold(layer, spec, normalizer, Histogram::new, |h, x, s, g| {
            let (s, g) = (f64::from(s), f64::from(g));
            let weight = match weights {
                FisherWeights::FisherScale2 => g * g * s * s,
                FisherWeights::Fisher => g * g,
                FisherWeights::None => 1.0,
            };
            h.add(x, weight);
        })?;
        let mut histogram = Histogram::new();
        parts.iter().for_each(|part| histogram.merge(part));
        if !histogram.weight().is_finite() {
            return Err(CalibError::NotFinite { layer, side: self.side, window: None });
        }
        let Some(encode) = histogram.signposts(1 << spec.bits) else {
            return Err(CalibError::NoWeight {
                layer,
                side: self.side,
                spec: kvquant_quant::Spec::Coded(spec.clone()),
            });
        };
        let decode = if spec.qnorm {
            let parts =
                self.fold(layer, spec, normalizer, Moments::default, |m, x, _, _| m.add(x, nearest(&encode, x)))?;
            Moments::sum(&parts).shift(&encode)
        } else {
            encode.clone()
        };
        Ok((encode, decode))
    }

    /// Calls `add(accumulator, normalised value, scale, gradient)` for every value that is fitted, with one
    /// accumulator a window (in parallel, in a fixed order, so that the fit does not depend on the threads).
    fn fold<A: Send>(
        &self,
        layer: usize,
        spec: &CodedSpec,
        normalizer: &Normalizer,
        new: impl Fn() -> A + Sync,
        add: impl Fn(&mut A, f32, f32, f32) + Sync,
    ) -> Result<Vec<A>, CalibError> {
        let channels = self.channels();
        let window = self.ctx * channels;
        let run = |(values, gradients): (&[f32], &[f32])| -> Result<A, QuantError> {
            let mut acc = new();
            let tokens = values.chunks_exact(channels).zip(gradients.chunks_exact(channels)).skip(spec.sinks);
            match normalizer {
                Normalizer::Channel { lower, upper } => {
                    for (x, g) in tokens {
                        for (((x, g), l), u) in x.iter().zip(g).zip(lower).zip(upper) {
                            let (zero, scale) = ((u + l) / 2.0, (u - l) / 2.0);
                            // A constant channel needs no signposts.
                            if l <= x && x <= u && scale > 0.0 {
                                add(&mut acc, ((x - zero) / scale).clamp(-1.0, 1.0), scale, *g);
                            }
                        }
                    }
                }
                Normalizer::Token(quantizer) => {
                    let mut codes = TokenCodes::default();
                    let mut outlier = vec![false; channels];
                    for (x, g) in tokens {
                        quantizer.quantize(x, &mut codes)?;
                        codes.outliers.iter().for_each(|o| outlier[o.channel as usize] = true);
                        for c in 0..channels {
                            let group = c / quantizer.group_channels();
                            let scale = codes.scale[group].to_f32();
                            let zero = codes.zero.get(group).map_or(0.0, |z| z.to_f32());
                            if !outlier[c] && scale > 0.0 {
                                add(&mut acc, ((x[c] - zero) / scale).clamp(-1.0, 1.0), scale, g[c]);
                            }
                        }
                        outlier.fill(false);
                    }
                }
            }
            Ok(acc)
        };
        self.values
            .par_chunks_exact(window)
            .zip(self.gradients.par_chunks_exact(window))
            .map(run)
            .collect::<Result<Vec<A>, QuantError>>()
            .map_err(|source| CalibError::Quantizer { layer, side: self.side, source })
    }
}

/// The signpost nearest to x; the lower one of two as near.
fn nearest(posts: &[f32], x: f32) -> f32 {
    let mut best = posts[0];
    for &p in &posts[1..] {
        if (p - x).abs() < (best - x).abs() {
            best = p;
        }
    }
    best
}

/// Sums over normalised values before (x) and after (q) rounding, for Q-Norm.
#[derive(Default)]
struct Moments {
    n: f64,
    x: [f64; 2],
    q: [f64; 2],
}

impl Moments {
    fn add(&mut self, x: f32, q: f32) {
        let (x, q) = (f64::from(x), f64::from(q));
        self.n += 1.0;
        self.x = [self.x[0] + x, self.x[1] + x * x];
        self.q = [self.q[0] + q, self.q[1] + q * q];
    }

    fn sum(parts: &[Moments]) -> Moments {
        parts.iter().fold(Moments::default(), |a, b| Moments {
            n: a.n + b.n,
            x: [a.x[0] + b.x[0], a.x[1] + b.x[1]],
            q: [a.q[0] + b.q[0], a.q[1] + b.q[1]],
        })
    }

    /// Signposts a q + b that give the rounded values the mean and the deviation of the unrounded ones
    /// (the paper's Q-Norm).
    fn shift(&self, posts: &[f32]) -> Vec<f32> {
        let mean_sd = |[s, s2]: [f64; 2]| (s / self.n, (s2 / self.n - (s / self.n).powi(2)).max(0.0).sqrt());
        let ((m1, sd1), (m2, sd2)) = (mean_sd(self.x), mean_sd(self.q));
        // Everything at one signpost: there is no deviation to restore.
        let a = if sd2 > 0.0 { sd1 / sd2 } else { 1.0 };
        posts.iter().map(|p| (a * f64::from(*p) + m1 - a * m2) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, spec};

    fn data(side: Side, windows: usize, ctx: usize) -> SideData {
        let (kv_heads, head_dim) = (2, 32);
        let n = windows * ctx * kv_heads * head_dim;
        let values = noise(n, 1).iter().zip(noise(n, 2)).map(|(a, b)| a * a * a + 0.1 * b).collect();
        let gradients = noise(n, 3).iter().map(|g| g * 1e-6).collect();
        SideData { side, values, gradients, ctx, kv_heads, head_dim }
    }

    #[test]
    fn channel_scope_has_thresholds_and_sorted_signposts() {
        for (bits, outliers) in [(2, 0), (3, 100), (4, 500)] {
            let mut s = spec(bits, outliers);
            s.sinks = 2;
            let data = data(Side::Key, 3, 50);
            let fit = data.fit(0, &s).unwrap();
            assert_eq!((fit.lower.len(), fit.upper.len()), (64, 64));
            assert_eq!(fit.encode.len(), 1 << bits);
            assert_eq!(fit.encode, fit.decode);
            assert!(fit.encode.windows(2).all(|p| p[0] < p[1]));
            assert!(fit.encode.iter().all(|p| p.abs() <= 1.0));
            let outside = data.values.chunks(64).enumerate().filter(|(t, _)| t % 50 >= 2);
            let outside: usize = outside
                .map(|(_, x)| x.iter().zip(&fit.lower).zip(&fit.upper).filter(|((x, l), u)| *x < *l || *x > *u).count())
                .sum();
            let share = outside as f64 / (3.0 * 48.0 * 64.0) * 10_000.0;
            assert!((share - f64::from(outliers)).abs() <= 150.0 && (outliers > 0 || outside == 0), "{share}");
        }
    }

    #[test]
    fn token_scope_has_signposts_only() {
        let data = data(Side::Value, 2, 40);
        let fit = data.fit(0, &spec(3, 100)).unwrap();
        assert!(fit.lower.is_empty() && fit.upper.is_empty());
        assert_eq!(fit.encode.len(), 8);
        assert!(fit.encode.windows(2).all(|p| p[0] < p[1]));
    }

    /// A token's scale comes from what is left without k = floor(share / 2 * C) + 1 extremes a side.
    #[test]
    fn token_scale_leaves_the_extremes_out() {
        let data = data(Side::Value, 1, 8);
        let s = CodedSpec { sinks: 0, ..spec(3, 500) };
        let k = 64 * 500 / 20_000 + 1;
        let normalizer = data.normalizer(0, &s).unwrap();
        let scales = data
            .fold(0, &s, &normalizer, Vec::new, |all: &mut Vec<(f32, f32)>, x, scale, _| all.push((x, scale)))
            .unwrap()
            .concat();
        assert_eq!(scales.len(), 8 * (64 - 2 * k));
        for (t, fitted) in scales.chunks(64 - 2 * k).enumerate() {
            let mut x = data.values[t * 64..(t + 1) * 64].to_vec();
            x.sort_by(f32::total_cmp);
            let want = (x[63 - k] - x[k]) / 2.0;
            assert!(fitted.iter().all(|(x, s)| (s - want).abs() < 2e-3 * want && x.abs() <= 1.0), "{t}");
        }
    }

    #[test]
    fn weights_change_the_signposts_and_zero_ones_are_an_error() {
        let mut d = data(Side::Key, 2, 40);
        let fit = |d: &SideData, weights| {
            let mut s = spec(2, 100);
            s.weights = weights;
            d.fit(3, &s).map(|f| f.encode)
        };
        // The upper half of each channel matters far more: signposts move up.
        for (g, x) in d.gradients.iter_mut().zip(&d.values) {
            *g = if *x > 0.0 { 1e-5 } else { 1e-7 };
        }
        let plain = fit(&d, FisherWeights::None).unwrap();
        let weighted = fit(&d, FisherWeights::Fisher).unwrap();
        assert!(weighted[1] > plain[1] + 0.1, "{plain:?} {weighted:?}");
        d.gradients.fill(0.0);
        assert_eq!(fit(&d, FisherWeights::None).unwrap(), plain);
        let error = fit(&d, FisherWeights::FisherScale2).unwrap_err();
        assert!(matches!(error, CalibError::NoWeight { layer: 3, side: Side::Key, .. }), "{error}");
    }

    #[test]
    fn qnorm_restores_mean_and_deviation() {
        let d = data(Side::Key, 2, 60);
        let mut s = spec(2, 100);
        s.qnorm = true;
        let fit = d.fit(0, &s).unwrap();
        let normalizer = d.normalizer(0, &s).unwrap();
        let moments = d
            .fold(0, &s, &normalizer, Moments::default, |m, x, _, _| {
                let near = nearest(&fit.encode, x);
                let code = fit.encode.iter().position(|p| *p == near).unwrap();
                m.add(x, fit.decode[code]);
            })
            .unwrap();
        let m = Moments::sum(&moments);
        for i in 0..2 {
            assert!((m.x[i] - m.q[i]).abs() < 1e-4 * m.n, "{:?} {:?}", m.x, m.q);
        }
        assert_ne!(fit.encode, fit.decode);
    }

    #[test]
    fn a_constant_channel_takes_no_part() {
        let mut d = data(Side::Key, 1, 30);
        let with = d.fit(0, &spec(3, 0)).unwrap();
        d.values.iter_mut().skip(5).step_by(64).for_each(|x| *x = 2.5);
        let without = d.fit(0, &spec(3, 0)).unwrap();
        assert_eq!((without.lower[5], without.upper[5]), (2.5, 2.5));
        assert!(without.encode.iter().all(|p| p.is_finite()));
        assert_ne!(with.encode, without.encode);
    }
}
