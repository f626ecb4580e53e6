//! One token's keys or values of a layer, to codes and back.

use half::f16;
use smallvec::SmallVec;

use crate::codebook::{normal_float, symmetric, uniform};
use crate::count;
use crate::file::{LayerFit, SideFit};
use crate::lut::Lut;
use crate::mixed::MixedFit;
use crate::pack::UNIT_CHANNELS;
use crate::spec::{CodebookKind, CodedSpec, Scope};

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys.
    Key,
    /// Values.
    Value,
}

/// An entry kept apart: its exact value is the dense value plus the residual.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlier {
    /// Channel in the token, over all heads.
    pub channel: u16,
    /// Exact minus dense.
    pub residual: f16,
}

/// One token, quantized but not yet packed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenCodes {
    /// `[C]`
    pub codes: Vec<u8>,
    /// `[groups]`
    pub scale: Vec<f16>,
    /// `[groups]`, empty where scales have no zero point.
    pub zero: Vec<f16>,
    /// In no particular order.
    pub outliers: Vec<Outlier>,
}

/// A token can't be quantized, or a fit does not suit the spec.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QuantError {
    /// NaN, infinite, or beyond fp16.
    #[error("channel {channel} is {value}, not a finite fp16 number")]
    NotFinite {
        /// Channel in the token, over all heads.
        channel: usize,
        /// Its value.
        value: f32,
    },
    /// The spec needs calibration data for this side.
    #[error("{side:?}: the spec needs {what} from a quantizer file; make one with `kvquant calibrate`")]
    NoFit {
        /// Keys or values.
        side: Side,
        /// Thresholds or codebook.
        what: &'static str,
    },
    /// Calibration data of the wrong size.
    #[error("{side:?} {what}: {got} entries, expected {expected}")]
    FitSize {
        /// Keys or values.
        side: Side,
        /// Which data.
        what: &'static str,
        /// Entries it should have.
        expected: usize,
        /// Entries it has.
        got: usize,
    },
    /// No channels, or too many for 16-bit channel numbers.
    #[error("{channels} channels a token; 1 to 65536 are supported")]
    Width {
        /// kv_heads * head_dim
        channels: usize,
    },
    /// Mixed widths that contradict themselves.
    #[error("{side:?}: mixed widths: {problem}; make a new quantizer with `kvquant calibrate`")]
    Mixed {
        /// Keys or values.
        side: Side,
        /// What is wrong.
        problem: &'static str,
    },
    /// Scale groups do not tile a token.
    #[error("groups of {group} channels do not divide the {channels} of a token; choose a -gN that does")]
    Group {
        /// Channels of a group.
        group: usize,
        /// kv_heads * head_dim
        channels: usize,
    },
    /// An outlier is too far from its dense value for an fp16 residual.
    #[error("channel {channel} is {value}, {residual} from its dense value, beyond fp16")]
    Residual {
        /// Channel in the token, over all heads.
        channel: usize,
        /// Its value.
        value: f32,
        /// Exact minus dense.
        residual: f32,
    },
}

/// How a side's codes and outliers are chosen, for quantizers on other hardware.
#[derive(Debug, Clone, Copy)]
pub enum Rule<'a> {
    /// By thresholds of each channel.
    Channel {
        /// Below it a value is an outlier `[C]`.
        lower: &'a [f32],
        /// Above it a value is an outlier `[C]`.
        upper: &'a [f32],
        /// A code is how many of its channel's bounds lie below the value `[2^bits - 1][C]`.
        bounds: &'a [Vec<f32>],
        /// Whether outliers are kept apart.
        keep_outliers: bool,
    },
    /// By the range of the whole token, with a zero point.
    Token {
        /// Outliers on each side.
        extremes: usize,
        /// A code is how many of these lie below `(value - zero) / scale`.
        middles: &'a [f32],
    },
    /// Groups of channels, or mixed widths.
    Other,
}

/// The largest finite fp16 number.
const F16_MAX: f32 = 65504.0;

/// Whether a number is finite and within fp16; false for NaN.
pub fn fits_half(x: f32) -> bool {
    x.abs() <= F16_MAX
}

/// Quantizes one side of a layer, a token `[kv_heads * head_dim]` at a time.
#[derive(Debug, Clone)]
pub struct SideQuantizer {
    channels: usize,
    /// Signposts to encode with, sorted.
    encode: Vec<f32>,
    /// Signposts to decode with, in normalised units; empty for mixed widths.
    decode: Vec<f32>,
    /// Midpoints between them; a value takes the lower signpost up to and including the midpoint.
    middles: Vec<f32>,
    lut: Lut,
    ranges: Ranges,
}

#[derive(Debug, Clone)]
enum Ranges {
    /// Offline, per channel. `bounds[m][c]` is the m-th midpoint in the channel's own units.
    Channel { lower: Vec<f32>, upper: Vec<f32>, bounds: Vec<Vec<f32>>, keep_outliers: bool },
    /// Online, per token and group of channels; `extremes` outliers on each side.
    Token { group: usize, extremes: usize, zero_point: bool },
    /// Offline, per channel, with signposts of its own.
    Mixed(MixedRanges),
}

#[derive(Debug, Clone)]
struct MixedRanges {
    lower: Vec<f32>,
    upper: Vec<f32>,
    /// Where each channel is packed.
    places: Vec<u16>,
    /// As of `Ranges::Channel`; infinite where a channel has fewer midpoints, or is among the wide ones.
    bounds: Vec<Vec<f32>>,
    /// Channels with more midpoints than are worth counting, and these.
    wide: Vec<(usize, Vec<f32>)>,
}

/// Midpoints up to which all of a channel are compared; more are searched.
const COUNTED: usize = 15;

impl SideQuantizer {
    /// The quantizer of one side. `fit` is the layer's calibration, for specs that need one.
    ///
    /// # Errors
    /// The fit is missing or of another size.
    pub fn new(
        spec: &CodedSpec,
        side: Side,
        kv_heads: usize,
        head_dim: usize,
        fit: Option<&LayerFit>,
    ) -> Result<Self, QuantError> {
        let channels = kv_heads * head_dim;
        if channels == 0 || channels > 1 << 16 {
            return Err(QuantError::Width { channels });
        }
        let (scope, fit) = match side {
            Side::Key => (spec.keys, fit.map(|f| &f.keys)),
            Side::Value => (spec.values, fit.map(|f| &f.values)),
        };
        let need = |what| fit.ok_or(QuantError::NoFit { side, what });
        let sized = |what, got: usize, expected| {
            if got == expected { Ok(()) } else { Err(QuantError::FitSize { side, what, expected, got }) }
        };
        if let CodebookKind::Mix { .. } = spec.codebook {
            let fit = need("mixed widths")?;
            let mixed = fit.mixed.as_ref().ok_or(QuantError::NoFit { side, what: "mixed widths" })?;
            sized("lower thresholds", fit.lower.len(), channels)?;
            sized("upper thresholds", fit.upper.len(), channels)?;
            mixed.check(side, kv_heads, head_dim)?;
            return Ok(Self::mixed(fit, mixed, head_dim));
        }
        let n = 1usize << spec.bits;
        let is_symmetric = spec.codebook == CodebookKind::Int && matches!(scope, Scope::Group(_)) && !spec.zero_point;
        let (encode, decode) = match spec.codebook {
            CodebookKind::Nuq => {
                let SideFit { encode, decode, .. } = need("a codebook")?;
                sized("codebook", encode.len(), n)?;
                sized("decode codebook", decode.len(), n)?;
                (encode.clone(), decode.clone())
            }
            CodebookKind::Int if is_symmetric => (symmetric(spec.bits), symmetric(spec.bits)),
            CodebookKind::Int => (uniform(spec.bits), uniform(spec.bits)),
            CodebookKind::Nf | CodebookKind::Mix { .. } => (normal_float(spec.bits), normal_float(spec.bits)),
        };
        let middles: Vec<f32> = encode.windows(2).map(|w| w[0] + (w[1] - w[0]) / 2.0).collect();
        let (ranges, table) = match scope {
            Scope::Channel => {
                let fit = need("thresholds")?;
                sized("lower thresholds", fit.lower.len(), channels)?;
                sized("upper thresholds", fit.upper.len(), channels)?;
                let units: Vec<(f32, f32)> =
                    fit.lower.iter().zip(&fit.upper).map(|(l, u)| ((u + l) / 2.0, (u - l) / 2.0)).collect();
                let bounds = middles.iter().map(|m| units.iter().map(|(z, s)| z + s * m).collect()).collect();
                let table: Vec<Vec<f32>> =
                    units.iter().map(|(z, s)| decode.iter().map(|q| z + s * q).collect()).collect();
                let keep_outliers = spec.outliers > 0;
                (Ranges::Channel { lower: fit.lower.clone(), upper: fit.upper.clone(), bounds, keep_outliers }, table)
            }
            Scope::Token => {
                // Paper, section 3.4: floor(share / 2 * C) + 1 on each side.
                let extremes = if spec.outliers == 0 { 0 } else { spec.outliers as usize * channels / 20_000 + 1 };
                (
                    Ranges::Token { group: channels, extremes: extremes.min(channels / 2), zero_point: true },
                    vec![decode.clone()],
                )
            }
            Scope::Group(group) if group == 0 || !channels.is_multiple_of(group) => {
                return Err(QuantError::Group { group, channels });
            }
            Scope::Group(group) => {
                (Ranges::Token { group, extremes: 0, zero_point: spec.zero_point }, vec![decode.clone()])
            }
        };
        let lut = Lut::uniform(&table, scope == Scope::Channel, channels, spec.bits);
        Ok(SideQuantizer { channels, encode, decode, middles, lut, ranges })
    }

    fn mixed(fit: &SideFit, mixed: &MixedFit, head_dim: usize) -> Self {
        let lut = Lut::mixed(mixed, head_dim);
        let channels = mixed.order.len();
        let (mut places, mut bounds, mut wide) = (vec![0; channels], Vec::new(), Vec::new());
        for (place, &c) in mixed.order.iter().enumerate() {
            let c = place / head_dim * head_dim + c as usize;
            places[c] = place as u16;
            let dense = |code: usize| lut.dense(place, code as u8);
            let last = (1usize << lut.widths[place / UNIT_CHANNELS]) - 1;
            let middles = (0..last).map(|i| dense(i) + (dense(i + 1) - dense(i)) / 2.0);
            if last > COUNTED {
                wide.push((c, middles.collect()));
                continue;
            }
            for (m, middle) in middles.enumerate() {
                if m == bounds.len() {
                    bounds.push(vec![f32::INFINITY; channels]);
                }
                bounds[m][c] = middle;
            }
        }
        let (lower, upper) = (fit.lower.clone(), fit.upper.clone());
        let ranges = Ranges::Mixed(MixedRanges { lower, upper, places, bounds, wide });
        SideQuantizer { channels, encode: Vec::new(), decode: Vec::new(), middles: Vec::new(), lut, ranges }
    }

    /// Signposts to decode with, in normalised units; empty for mixed widths.
    pub fn signposts(&self) -> &[f32] {
        &self.decode
    }

    /// How codes and outliers are chosen.
    pub fn rule(&self) -> Rule<'_> {
        match &self.ranges {
            Ranges::Channel { lower, upper, bounds, keep_outliers } => {
                Rule::Channel { lower, upper, bounds, keep_outliers: *keep_outliers }
            }
            Ranges::Token { group, extremes, zero_point: true } if *group == self.channels => {
                Rule::Token { extremes: *extremes, middles: &self.middles }
            }
            _ => Rule::Other,
        }
    }

    /// The decode table.
    pub fn lut(&self) -> &Lut {
        &self.lut
    }

    /// Bytes of all tables.
    pub fn table_bytes(&self) -> usize {
        let bounds = |b: &[Vec<f32>]| b.iter().map(Vec::len).sum::<usize>();
        let numbers = match &self.ranges {
            Ranges::Channel { lower, upper, bounds: b, .. } => lower.len() + upper.len() + bounds(b),
            Ranges::Mixed(m) => {
                let wide: usize = m.wide.iter().map(|(_, w)| w.len()).sum();
                m.lower.len() + m.upper.len() + m.places.len() / 2 + bounds(&m.bounds) + wide
            }
            Ranges::Token { .. } => 0,
        };
        let books = self.encode.len() + self.decode.len() + self.middles.len();
        4 * (numbers + books + self.lut.steps.len()) + self.lut.widths.len() + size_of_val(&self.lut.tables[..])
    }

    /// Scales per token; 0 where ranges are static.
    pub fn groups(&self) -> usize {
        match &self.ranges {
            Ranges::Channel { .. } | Ranges::Mixed(_) => 0,
            Ranges::Token { group, .. } => self.channels / group,
        }
    }

    /// Channels that share a per-token scale: all of them for token scope.
    pub fn group_channels(&self) -> usize {
        match &self.ranges {
            Ranges::Channel { .. } | Ranges::Mixed(_) => self.channels,
            Ranges::Token { group, .. } => *group,
        }
    }

    /// Whether a zero point is stored beside each scale.
    pub fn has_zero_point(&self) -> bool {
        matches!(self.ranges, Ranges::Token { zero_point: true, .. })
    }

    /// Quantizes a token `[C]`.
    ///
    /// # Errors
    /// An entry is not a finite fp16 number.
    pub fn quantize(&self, x: &[f32], out: &mut TokenCodes) -> Result<(), QuantError> {
        assert_eq!(x.len(), self.channels, "a token has kv_heads * head_dim channels");
        // One pass that vectorizes.
        if !x.iter().fold(true, |ok, v| ok & fits_half(*v)) {
            let channel = x.iter().position(|v| !fits_half(*v)).unwrap_or(0);
            return Err(QuantError::NotFinite { channel, value: x[channel] });
        }
        out.codes.clear();
        out.codes.resize(x.len(), 0);
        out.scale.clear();
        out.zero.clear();
        out.outliers.clear();
        match &self.ranges {
            Ranges::Channel { lower, upper, bounds, keep_outliers } => {
                count::below(x, bounds, &mut out.codes);
                if *keep_outliers {
                    for (c, ((&v, &l), &u)) in x.iter().zip(lower).zip(upper).enumerate() {
                        if v < l || v > u {
                            self.keep(c, v, self.lut.dense(c, out.codes[c]), out)?;
                        }
                    }
                }
            }
            Ranges::Mixed(MixedRanges { lower, upper, places, bounds, wide }) => {
                count::below(x, bounds, &mut out.codes);
                for (c, middles) in wide {
                    out.codes[*c] = middles.partition_point(|m| *m < x[*c]) as u8;
                }
                for (c, ((&v, &l), &u)) in x.iter().zip(lower).zip(upper).enumerate() {
                    // Beyond the bounds: kept exactly.
                    if v < l || v > u {
                        self.keep(c, v, self.lut.dense(places[c] as usize, out.codes[c]), out)?;
                    }
                }
            }
            Ranges::Token { group, extremes, zero_point } => {
                for (g, part) in x.chunks_exact(*group).enumerate() {
                    self.quantize_group(g * group, part, *extremes, *zero_point, out)?;
                }
            }
        }
        Ok(())
    }

    fn quantize_group(
        &self,
        first: usize,
        x: &[f32],
        extremes: usize,
        zero_point: bool,
        out: &mut TokenCodes,
    ) -> Result<(), QuantError> {
        let kept_apart = outer(x, extremes);
        let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
        if kept_apart.is_empty() {
            for &v in x {
                (low, high) = (low.min(v), high.max(v));
            }
        } else {
            for (i, &v) in x.iter().enumerate().filter(|(i, _)| !kept_apart.contains(i)) {
                debug_assert!(i < x.len());
                (low, high) = (low.min(v), high.max(v));
            }
        }
        let (scale, zero) = if zero_point {
            // Halves first, so that the range of two large numbers can't overflow.
            (f16::from_f32(high / 2.0 - low / 2.0), f16::from_f32(high / 2.0 + low / 2.0))
        } else {
            // The extreme of the larger magnitude maps to the lowest signpost, exactly.
            let extreme = if high.abs() > low.abs() { high } else { low };
            (f16::from_f32(extreme / self.encode[0]), f16::ZERO)
        };
        out.scale.push(scale);
        if zero_point {
            out.zero.push(zero);
        }
        let (s, z) = (scale.to_f32(), zero.to_f32());
        let inverse = if s != 0.0 { 1.0 / s } else { 0.0 };
        let codes = &mut out.codes[first..first + x.len()];
        count::below_scaled(x, z, inverse, &self.middles, codes);
        for &i in &kept_apart {
            let dense = s * self.lut.dense(first + i, out.codes[first + i]) + z;
            self.keep(first + i, x[i], dense, out)?;
        }
        Ok(())
    }

    fn keep(&self, channel: usize, exact: f32, dense: f32, out: &mut TokenCodes) -> Result<(), QuantError> {
        let residual = exact - dense;
        if !fits_half(residual) {
            return Err(QuantError::Residual { channel, value: exact, residual });
        }
        out.outliers.push(Outlier { channel: channel as u16, residual: f16::from_f32(residual) });
        Ok(())
    }

    /// What a packed block must decode to, bit for bit: the scalar twin of the kernels' decoding.
    pub fn dequantize(&self, codes: &TokenCodes, out: &mut [f32]) {
        let group = self.group_channels();
        for (c, (x, &code)) in out.iter_mut().zip(&codes.codes).enumerate() {
            *x = if let Ranges::Mixed(MixedRanges { places, .. }) = &self.ranges {
                self.lut.dense(places[c] as usize, code)
            } else if self.lut.per_channel {
                self.lut.dense(c, code)
            } else {
                let zero = codes.zero.get(c / group).map_or(0.0, |z| z.to_f32());
                codes.scale[c / group].to_f32() * self.lut.dense(c, code) + zero
            };
        }
        for o in &codes.outliers {
            out[o.channel as usize] += o.residual.to_f32();
        }
    }
}

/// Indices of a group, without an allocation for 1 % of 6,400 channels.
type Outer = SmallVec<[usize; 64]>;

/// Indices of the `n` smallest and the `n` largest entries; of equal ones the first. Chosen by index, never by a
/// threshold, so that ties can't add to them.
fn outer(x: &[f32], n: usize) -> Outer {
    let mut chosen = Outer::with_capacity(2 * n);
    for sign in [1.0f32, -1.0] {
        for _ in 0..n {
            let mut best = usize::MAX;
            let mut least = f32::INFINITY;
            for (i, &v) in x.iter().enumerate() {
                if sign * v < least && !chosen.contains(&i) {
                    (best, least) = (i, sign * v);
                }
            }
            chosen.push(best);
        }
    }
    chosen
}

#[cfg(test)]
mod tests;
