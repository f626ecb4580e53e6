//! What the kernels look up: signposts, thresholds, turns.

use half::f16;
use kvquant_quant::{Rule, SideQuantizer};

use crate::CudaError;
use crate::device::{Buffer, Device};

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
    pub(crate) key_lut: Buffer,
    pub(crate) value_lut: Buffer,
    pub(crate) units: Buffer,
}

fn pair(low: f32, high: f32) -> u32 {
    f16::from_f32(low).to_bits() as u32 | (f16::from_f32(high).to_bits() as u32) << 16
}

/// Signposts of two codes at once, for 2 bits of four.
fn lut(posts: &[f32], bits: usize) -> Vec<u32> {
    let mask = (1 << bits) - 1;
    let two = |codes: usize| pair(posts[codes & mask], posts[codes >> bits & mask]);
    match bits {
        2 => (0..256).flat_map(|i| [two(i & 15), two(i >> 4)]).collect(),
        _ => (0..1 << (2 * bits)).map(two).collect(),
    }
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
        let units: Vec<u32> = (0..channels / 4)
            .flat_map(|i| {
                let zero = |c: usize| (upper[c] + lower[c]) / 2.0;
                let scale = |c: usize| (upper[c] - lower[c]) / 2.0;
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
            key_lut: device.upload(&lut(posts, bits))?,
            value_lut: device.upload(&lut(&value_posts, bits))?,
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
pub(crate) fn angles(frequencies: &[f64], position: usize) -> impl Iterator<Item = [f32; 2]> + '_ {
    frequencies.iter().map(move |f| {
        let (s, c) = (position as f64 * f).sin_cos();
        [c as f32, s as f32]
    })
}

/// Rotations of a history whose first block begins at a position.
pub struct Turns {
    /// `[blocks][dim / 2]` cos, sin
    pub(crate) origins: Buffer,
    /// `[64][dim / 2]` cos, sin
    pub(crate) places: Buffer,
    /// The same in fp16, as the lanes of a warp read it.
    pub(crate) turn: Buffer,
    pub(crate) frequencies: Vec<f64>,
}

impl Turns {
    /// # Errors
    /// Memory is short.
    pub fn new(device: &Device, frequencies: &[f64], first: usize, blocks: usize) -> Result<Self, CudaError> {
        let dim = 2 * frequencies.len();
        let origins: Vec<[f32; 2]> = (0..blocks).flat_map(|b| angles(frequencies, first + b * BLOCK)).collect();
        let places: Vec<[f32; 2]> = (0..BLOCK).flat_map(|t| angles(frequencies, t)).collect();
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
        Ok(Turns {
            origins: device.upload(&origins)?,
            places: device.upload(&places)?,
            turn: device.upload(&turn)?,
            frequencies: frequencies.to_vec(),
        })
    }

    /// Rotations of positions from `first` on.
    ///
    /// # Errors
    /// Memory is short.
    pub fn angles(&self, device: &Device, first: usize, tokens: usize) -> Result<Buffer, CudaError> {
        let all: Vec<[f32; 2]> = (first..first + tokens).flat_map(|p| angles(&self.frequencies, p)).collect();
        device.upload(&all)
    }
}
