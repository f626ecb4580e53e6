//! What the kernels look up: signposts, thresholds, turns.

use half::f16;
use kvquant_quant::{Rule, SideQuantizer};

use crate::CudaError;
use crate::device::{Buffer, Device};
use crate::modules::SLAB;

/// Tokens of a block.
pub const BLOCK: usize = 64;

/// A layer's quantizers on a card.
pub struct Tables {
    pub(crate) bits: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) extremes: usize,
    pub(crate) keep: bool,
    pub(crate) bounds: Buffer,
    pub(crate) lower: Buffer,
    pub(crate) upper: Buffer,
    pub(crate) key_posts: Buffer,
    pub(crate) value_bounds: Buffer,
    pub(crate) value_posts: Buffer,
    /// Signposts of 8 bits, for the decode kernel.
    pub(crate) key_steps: Buffer,
    pub(crate) value_steps: Buffer,
    pub(crate) value_step: f32,
    pub(crate) units: Buffer,
}

fn pair(low: f32, high: f32) -> u32 {
    f16::from_f32(low).to_bits() as u32 | (f16::from_f32(high).to_bits() as u32) << 16
}

/// The largest signpost in steps of 8 bits, one below what a byte holds.
const TOP: f32 = 126.0;

/// Signposts as integers of 8 bits, and the size of their step.
fn in_steps(posts: &[f32]) -> (Vec<i8>, f32) {
    let top = posts.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    (posts.iter().map(|x| (x / top * TOP).round() as i8).collect(), top / TOP)
}

/// Tables of 16 signposts for kernels/codes.cuh's `look_up_both`: entry i stands for low[i] + sign(high[i]), entry 8 + i for
/// sign(low[i]) + high[i], where sign is 0 or -1.
fn as_sums(posts: &[i8]) -> Vec<i8> {
    let (mut low, mut high) = (Vec::new(), Vec::new());
    for (l, h) in posts[..8].iter().zip(&posts[8..]) {
        let choice = [(0, 0), (-1, 0), (0, -1), (-1, -1)].into_iter().find_map(|(of_low, of_high)| {
            let (a, b) = (l - of_high, h - of_low);
            (a >> 7 == of_low && b >> 7 == of_high).then_some((a, b))
        });
        // There is one for every two numbers from -126 to 126 in order; a test tries all.
        let (a, b) = choice.unwrap_or((*l, *h));
        low.push(a);
        high.push(b);
    }
    [low, high].concat()
}

impl Tables {
    /// # Errors
    /// The kernels do not do this kind of quantizer, or memory is short.
    pub fn new(
        device: &Device,
        keys: &SideQuantizer,
        values: &SideQuantizer,
        kv_heads: usize,
        dim: usize,
    ) -> Result<Self, CudaError> {
        let supported = "head dimensions of 64, 128 and 256; nuqN, intN and nfN of 2 to 4 bits with keys per channel and values per token";
        let unsupported = |what: String| CudaError::Unsupported { what, supported };
        let (Rule::Channel { lower, upper, bounds, keep_outliers }, Rule::Token { extremes, middles }) =
            (keys.rule(), values.rule())
        else {
            return Err(unsupported("this choice of scales".into()));
        };
        let (channels, posts) = (kv_heads * dim, keys.signposts());
        let bits = posts.len().ilog2() as usize;
        if ![64, 128, 256].contains(&dim) || !(2..=4).contains(&bits) || posts.len() != values.signposts().len() {
            return Err(unsupported(format!("{bits} bits with a head dimension of {dim}")));
        }
        if lower.len() != channels || channels > 8192 {
            return Err(unsupported(format!("{channels} channels a token with thresholds for {}", lower.len())));
        }
        let dense =
            |q: &SideQuantizer, c: usize| -> Vec<f32> { (0..posts.len()).map(|i| q.lut().dense(c, i as u8)).collect() };
        let key_posts: Vec<f32> = (0..channels).flat_map(|c| dense(keys, c)).collect();
        let value_posts = dense(values, 0);
        let (key_steps, key_step) = in_steps(posts);
        let (mut value_steps, value_step) = in_steps(&value_posts);
        if bits == 4 {
            value_steps = as_sums(&value_steps);
        }
        let units: Vec<u32> = (0..channels / 4)
            .flat_map(|i| {
                let zero = |c: usize| (upper[c] + lower[c]) / 2.0;
                let scale = |c: usize| (upper[c] - lower[c]) / 2.0 * key_step * 128.0;
                let (x, y) = ((4 * i, 4 * i + 2), (4 * i + 1, 4 * i + 3));
                [
                    pair(scale(x.0), scale(x.1)),
                    pair(zero(x.0), zero(x.1)),
                    pair(scale(y.0), scale(y.1)),
                    pair(zero(y.0), zero(y.1)),
                ]
            })
            .collect();
        Ok(Tables {
            bits,
            kv_heads,
            dim,
            extremes,
            keep: keep_outliers,
            bounds: device.upload(&bounds.concat())?,
            lower: device.upload(lower)?,
            upper: device.upload(upper)?,
            key_posts: device.upload(&key_posts)?,
            value_bounds: device.upload(middles)?,
            key_steps: device.upload(&key_steps)?,
            value_steps: device.upload(&value_steps)?,
            value_step,
            value_posts: device.upload(&value_posts)?,
            units: device.upload(&units)?,
        })
    }

    pub(crate) fn channels(&self) -> usize {
        self.kv_heads * self.dim
    }

    /// Bytes of a block: kernels/device.cuh.
    pub fn block_bytes(&self) -> usize {
        self.kv_heads * (2 * self.dim * 8 * self.bits + 16) + 256
    }
}

/// Cosine and sine of each pair at a position.
pub(crate) fn angles(frequencies: &[f64], position: f64) -> impl Iterator<Item = [f32; 2]> + '_ {
    frequencies.iter().map(move |f| {
        let (s, c) = (position * f).sin_cos();
        [c as f32, s as f32]
    })
}

/// How far a pair may turn from a block's middle to its end, in radians, for a series of `TERMS` terms: what is left out is then
/// below 2e-3 of that pair's part of a score, and far below for the others of its slab.
const SERIES_REACH: f64 = 3.3;
/// Terms of a series.
pub(crate) const TERMS: usize = 8;

/// Chebyshev coefficients of cos(x u) (even terms) and sin(x u) (odd ones) for u in -1..1.
fn series(x: f64) -> [f32; TERMS] {
    const NODES: usize = 64;
    std::array::from_fn(|r| {
        let at = |k: usize| std::f64::consts::PI * (k as f64 + 0.5) / NODES as f64;
        let f = |k: usize| {
            let u = x * at(k).cos();
            (if r % 2 == 0 { u.cos() } else { u.sin() }) * (r as f64 * at(k)).cos()
        };
        let sum: f64 = (0..NODES).map(f).sum();
        (sum * if r == 0 { 1.0 } else { 2.0 } / NODES as f64) as f32
    })
}

/// Rotations of a history whose first block begins at a position. A block's tokens are turned from its middle.
pub struct Turns {
    /// `[blocks][dim / 2]` cos, sin of each block's middle
    pub(crate) origins: Buffer,
    /// `[64][dim / 2]` cos, sin from there
    pub(crate) places: Buffer,
    /// The same in fp16, as the lanes of a warp read it.
    pub(crate) turn: Buffer,
    /// And `[dim / 2][64]` in fp16.
    pub(crate) by_pair: Buffer,
    /// `[TERMS][dim / 2]`: cos and sin of a place as polynomials, for slow pairs.
    pub(crate) series: Buffer,
    /// `[4][32][4]`: the polynomials' values, as the lanes of a warp read them.
    pub(crate) basis: Buffer,
    /// Slabs with pairs that are too fast for that.
    pub(crate) fast: usize,
    pub(crate) frequencies: Vec<f64>,
}

impl Turns {
    /// # Errors
    /// Memory is short.
    pub fn new(device: &Device, frequencies: &[f64], first: usize, blocks: usize) -> Result<Self, CudaError> {
        let dim = 2 * frequencies.len();
        let middle = BLOCK as f64 / 2.0;
        let origins: Vec<[f32; 2]> =
            (0..blocks).flat_map(|b| angles(frequencies, (first + b * BLOCK) as f64 + middle)).collect();
        let places: Vec<[f32; 2]> = (0..BLOCK).flat_map(|t| angles(frequencies, t as f64 - middle)).collect();
        let mut turn = Vec::with_capacity(dim * 32);
        for step in 0..dim / 16 {
            for m in 0..4 {
                for lane in 0..32 {
                    let two = 2 * (step * 4 + lane % 4);
                    for token in [lane / 4 + 16 * m, lane / 4 + 16 * m + 8] {
                        let at = |p: usize, i: usize| places[token * (dim / 2) + p][i];
                        turn.extend([0, 1].map(|i| pair(at(two, i), at(two + 1, i))));
                    }
                }
            }
        }
        let by_pair: Vec<u32> = (0..dim / 2)
            .flat_map(|p| (0..BLOCK).map(move |t| (p, t)))
            .map(|(p, t)| pair(places[t * (dim / 2) + p][0], places[t * (dim / 2) + p][1]))
            .collect();
        let coefficients: Vec<[f32; TERMS]> = frequencies.iter().map(|f| series(f * middle)).collect();
        let by_term: Vec<f32> = (0..TERMS).flat_map(|r| coefficients.iter().map(move |c| c[r])).collect();
        let mut basis = Vec::with_capacity(4 * 32 * 4);
        for m in 0..4 {
            for lane in 0..32 {
                for token in [lane / 4 + 16 * m, lane / 4 + 16 * m + 8] {
                    let at = ((token as f64 - middle) / middle).acos();
                    basis.extend([0, 1].map(|i| ((2 * (lane % 4) + i) as f64 * at).cos() as f32));
                }
            }
        }
        let is_fast = |f: &f64| f.abs() * middle > SERIES_REACH;
        Ok(Turns {
            origins: device.upload(&origins)?,
            places: device.upload(&places)?,
            turn: device.upload(&turn)?,
            by_pair: device.upload(&by_pair)?,
            series: device.upload(&by_term)?,
            basis: device.upload(&basis)?,
            fast: frequencies.iter().rposition(is_fast).map_or(0, |i| i / (SLAB / 2) + 1),
            frequencies: frequencies.to_vec(),
        })
    }

    /// Rotations of positions from `first` on.
    ///
    /// # Errors
    /// Memory is short.
    pub fn angles(&self, device: &Device, first: usize, tokens: usize) -> Result<Buffer, CudaError> {
        let all: Vec<[f32; 2]> = (first..first + tokens).flat_map(|p| angles(&self.frequencies, p as f64)).collect();
        device.upload(&all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_what_it_stands_for() {
        for x in [0.0, 0.02, 0.7, 3.2] {
            let c = series(x);
            for t in 0..BLOCK {
                let u = (t as f64 - 32.0) / 32.0;
                let term = |r: usize| c[r] as f64 * (r as f64 * u.acos()).cos();
                let (cos, sin) = (0..TERMS / 2).fold((0.0, 0.0), |(c, s), i| (c + term(2 * i), s + term(2 * i + 1)));
                assert!((cos - (x * u).cos()).abs() < 2e-3 && (sin - (x * u).sin()).abs() < 2e-3, "{x} at {t}");
            }
        }
    }

    #[test]
    fn signposts_keep_their_size() {
        let (steps, step) = in_steps(&[-0.5, 0.0, 2.0]);
        assert_eq!(steps, [-32, 0, 126]);
        assert!((steps[2] as f32 * step - 2.0).abs() < 1e-6);
    }

    #[test]
    fn two_tables_add_up() {
        for low in -126..=126i8 {
            for high in low..=126 {
                let posts: Vec<i8> = [[low; 8], [high; 8]].concat();
                let sums = as_sums(&posts);
                let (l, h) = (sums[0], sums[8]);
                assert_eq!([l + (h >> 7), (l >> 7) + h], [low, high], "{low} {high}");
            }
        }
    }
}
