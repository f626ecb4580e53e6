//! What is tuned of one side of a layer: signposts, and the ranges of channels where one codebook serves all of them.

use kvquant_quant::pack::UNIT_CHANNELS;
use kvquant_quant::{CodedSpec, LayerFit, MixedFit, QuantError, Side, SideFit, SideQuantizer, TOP, Table, TokenCodes};
use rayon::prelude::*;

use crate::mixed::transform;

/// Widths with a signpost of its own for every code.
const MOST_TUNED_BITS: u8 = 5;
/// Adam's means of gradients and of their squares.
const MOMENTUM: f32 = 0.9;
const SQUARES: f32 = 0.99;

/// One side of one layer, and where its tuning stands.
pub(super) struct TunedSide {
    side: Side,
    spec: CodedSpec,
    kv_heads: usize,
    head_dim: usize,
    fit: SideFit,
    quantizer: SideQuantizer,
    /// Mixed widths: the signposts of every place in turn. Otherwise a codebook, then lower and upper thresholds of all channels
    /// where they are static.
    parameters: Vec<f32>,
    /// How large a step of 1 is.
    units: Vec<f32>,
    gradient: Vec<f32>,
    mean: Vec<f32>,
    squares: Vec<f32>,
    steps: i32,
    /// Mixed widths: where each place's signposts begin; none where they are not tuned.
    starts: Vec<Option<usize>>,
    /// Mixed widths: the place of each channel.
    places: Vec<usize>,
}

impl TunedSide {
    pub fn new(spec: &CodedSpec, side: Side, kv_heads: usize, head_dim: usize, fit: &SideFit) -> Self {
        let quantizer = quantizer(spec, side, kv_heads, head_dim, fit).expect("the fit was checked when it was read");
        let (mut parameters, mut units, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        let mut places = Vec::new();
        if let Some(mixed) = &fit.mixed {
            places = vec![0; mixed.order.len()];
            for (place, &c) in mixed.order.iter().enumerate() {
                let channel = place / head_dim * head_dim + c as usize;
                places[channel] = place;
                let bits = mixed.widths[place / UNIT_CHANNELS];
                starts.push((bits <= MOST_TUNED_BITS).then_some(parameters.len()));
                if bits <= MOST_TUNED_BITS {
                    let posts = (0..1u16 << bits).map(|code| quantizer.lut().dense(place, code as u8));
                    parameters.extend(posts);
                    let range = fit.upper[channel] - fit.lower[channel];
                    units.resize(parameters.len(), range / f32::from(1u16 << (bits + 1)));
                }
            }
        } else {
            parameters.extend(&fit.decode);
            units.resize(parameters.len(), 2.0 / fit.decode.len() as f32);
            // A range moves its outermost signposts as far as a codebook does.
            let spread = fit.lower.iter().zip(&fit.upper).map(|(l, u)| (u - l) / fit.decode.len() as f32);
            let spread: Vec<f32> = spread.collect();
            parameters.extend(fit.lower.iter().chain(&fit.upper));
            units.extend(spread.iter().chain(&spread));
        }
        let zeros = vec![0.0; parameters.len()];
        let (gradient, mean, squares) = (zeros.clone(), zeros.clone(), zeros);
        let (spec, fit) = (spec.clone(), fit.clone());
        TunedSide {
            side,
            spec,
            kv_heads,
            head_dim,
            fit,
            quantizer,
            parameters,
            units,
            gradient,
            mean,
            squares,
            steps: 0,
            starts,
            places,
        }
    }

    pub fn fit(&self) -> &SideFit {
        &self.fit
    }

    fn channels(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Replaces tokens `[tokens, kv_heads, head_dim]` from `sinks` on by what the cache gives back, and returns their codes.
    pub fn quantize(&self, x: &mut [f32], sinks: usize) -> Result<Vec<TokenCodes>, QuantError> {
        let c = self.channels();
        let x = &mut x[sinks * c..];
        self.transform(x);
        let codes = x
            .par_chunks_exact_mut(c)
            .map(|token| {
                let mut codes = TokenCodes::default();
                self.quantizer.quantize(token, &mut codes)?;
                self.quantizer.dequantize(&codes, token);
                Ok(codes)
            })
            .collect::<Result<_, _>>()?;
        self.restore(x);
        Ok(codes)
    }

    /// Back from the space in which codes are chosen.
    fn restore(&self, x: &mut [f32]) {
        if let Some(mixed) = &self.fit.mixed {
            match self.side {
                Side::Key => {
                    let back: Vec<f32> = mixed.transform.iter().map(|a| -a).collect();
                    transform::turn(x, &back);
                }
                Side::Value => transform::restore(x, &mixed.transform, self.head_dim),
            }
        }
    }

    /// Into the space in which codes are chosen.
    fn transform(&self, x: &mut [f32]) {
        if let Some(mixed) = &self.fit.mixed {
            match self.side {
                Side::Key => transform::turn(x, &mixed.transform),
                Side::Value => transform::project(x, &mixed.transform, self.head_dim),
            }
        }
    }

    /// Adds the gradient of the parameters, from that of the tokens `[tokens, kv_heads, head_dim]` behind the sinks.
    pub fn gather(&mut self, codes: &[TokenCodes], d: &[f32], sinks: usize) {
        let c = self.channels();
        let mut d = d[sinks * c..].to_vec();
        self.transform(&mut d);
        for (codes, token) in codes.iter().zip(d.chunks_exact_mut(c)) {
            // An outlier is exact, whatever its signpost is.
            codes.outliers.iter().for_each(|o| token[o.channel as usize] = 0.0);
            if self.fit.mixed.is_some() {
                for ((g, &code), &place) in token.iter().zip(&codes.codes).zip(&self.places) {
                    if let Some(start) = self.starts[place] {
                        self.gradient[start + code as usize] += g;
                    }
                }
                continue;
            }
            let n = self.fit.decode.len();
            if let Some(scale) = codes.scale.first() {
                let scale = scale.to_f32();
                for (g, &code) in token.iter().zip(&codes.codes) {
                    self.gradient[code as usize] += g * scale;
                }
                continue;
            }
            // value = (u + l) / 2 + (u - l) / 2 * post
            for (i, (g, &code)) in token.iter().zip(&codes.codes).enumerate() {
                let post = self.parameters[code as usize];
                self.gradient[code as usize] += g * (self.fit.upper[i] - self.fit.lower[i]) / 2.0;
                self.gradient[n + i] += g * (1.0 - post) / 2.0;
                self.gradient[n + c + i] += g * (1.0 + post) / 2.0;
            }
        }
    }

    /// A step against the gradient, which is then forgotten.
    pub fn step(&mut self, rate: f32) {
        self.steps += 1;
        let (first, second) = (1.0 - MOMENTUM.powi(self.steps), 1.0 - SQUARES.powi(self.steps));
        for (i, g) in self.gradient.iter_mut().enumerate() {
            self.mean[i] = MOMENTUM * self.mean[i] + (1.0 - MOMENTUM) * *g;
            self.squares[i] = SQUARES * self.squares[i] + (1.0 - SQUARES) * *g * *g;
            let size = (self.squares[i] / second).sqrt();
            if size > 0.0 {
                self.parameters[i] -= rate * self.units[i] * (self.mean[i] / first) / size;
            }
            *g = 0.0;
        }
        self.write();
    }

    /// Brings the fit and its quantizer up to date with the parameters.
    fn write(&mut self) {
        match self.fit.mixed.take() {
            Some(mut mixed) => {
                self.write_posts(&mut mixed);
                self.fit.mixed = Some(mixed);
            }
            None => self.write_book(),
        }
        self.quantizer = quantizer(&self.spec, self.side, self.kv_heads, self.head_dim, &self.fit)
            .expect("sorted signposts within their bounds are a fit");
    }

    /// Moves all parameters by `share` of their units along the gradient, and says what that adds to a linear loss.
    #[cfg(test)]
    pub fn step_along_gradient(&mut self, share: f32) -> f64 {
        let mut gain = 0.0;
        for ((p, g), unit) in self.parameters.iter_mut().zip(&self.gradient).zip(&self.units) {
            let before = *p;
            *p += share * unit * g.signum();
            gain += f64::from(*p - before) * f64::from(*g);
        }
        self.write();
        gain
    }

    /// What codes stand for; outliers of the tokens in `x` stay as they are.
    #[cfg(test)]
    pub fn decode(&self, codes: &[TokenCodes], x: &mut [f32], sinks: usize) {
        let c = self.channels();
        let x = &mut x[sinks * c..];
        self.transform(x);
        for (codes, token) in codes.iter().zip(x.chunks_exact_mut(c)) {
            let exact = token.to_vec();
            self.quantizer.dequantize(codes, token);
            codes.outliers.iter().for_each(|o| token[o.channel as usize] = exact[o.channel as usize]);
        }
        self.restore(x);
    }

    /// Signposts of mixed widths, in order and in whole steps.
    fn write_posts(&mut self, mixed: &mut MixedFit) {
        // Channels that share a step: a RoPE pair of keys.
        let shared = if self.side == Side::Key { 2 } else { 1 };
        let mut tops = vec![Some(0.0f32); self.places.len() / shared];
        for (channel, &place) in self.places.iter().enumerate() {
            let bits = mixed.widths[place / UNIT_CHANNELS];
            let top = &mut tops[channel / shared];
            // Where one of them is not tuned, the step stays.
            *top = top.zip(self.starts[place]).map(|(top, start)| {
                let posts = &mut self.parameters[start..][..1 << bits];
                posts.sort_by(f32::total_cmp);
                posts.iter().fold(top, |top, post| top.max(post.abs()))
            });
        }
        for (channel, &place) in self.places.iter().enumerate() {
            if let Some(top) = tops[channel / shared].filter(|top| *top > 0.0) {
                mixed.steps[place] = (top / f32::from(TOP)).max(f32::MIN_POSITIVE);
            }
        }
        let mut at = 0;
        for (place, start) in self.starts.iter().enumerate() {
            let bits = mixed.widths[place / UNIT_CHANNELS];
            let entries = &mut mixed.posts[at..][..Table::entries(bits.into())];
            at += entries.len();
            let Some(start) = *start else { continue };
            let posts = &mut self.parameters[start..][..1 << bits];
            posts.sort_by(f32::total_cmp);
            let (step, top) = (mixed.steps[place], f32::from(TOP));
            for (entry, post) in entries.iter_mut().zip(posts) {
                *entry = (*post / step).round().clamp(-top, top) as i16;
            }
        }
    }

    /// A codebook, and thresholds.
    fn write_book(&mut self) {
        let (book, ranges) = self.parameters.split_at_mut(self.fit.decode.len());
        book.sort_by(f32::total_cmp);
        self.fit.encode.copy_from_slice(book);
        self.fit.decode.copy_from_slice(book);
        let (lower, upper) = ranges.split_at_mut(self.fit.lower.len());
        for (l, u) in lower.iter_mut().zip(upper.iter_mut()) {
            if *l > *u {
                std::mem::swap(l, u);
            }
        }
        self.fit.lower.copy_from_slice(lower);
        self.fit.upper.copy_from_slice(upper);
    }
}

fn quantizer(
    spec: &CodedSpec,
    side: Side,
    kv_heads: usize,
    head_dim: usize,
    fit: &SideFit,
) -> Result<SideQuantizer, QuantError> {
    // Only the side's own part is read.
    let both = LayerFit { keys: fit.clone(), values: fit.clone() };
    SideQuantizer::new(spec, side, kv_heads, head_dim, Some(&both))
}
