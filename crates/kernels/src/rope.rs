//! Rotary positions. One pairing everywhere: channels (2i, 2i+1) of a head turn by `position * inv_freq[i]`.
//! Families that pair (i, i + D/2) have their q and k rows permuted when they are loaded.
//!
//! Cached keys are kept before the rotation, so a kernel turns them while it reads them. Only relative angles
//! matter to a score, and R(n0 + j) = R(n0) R(j): the query is turned back by the block's origin n0, once per
//! block, and the keys by their place j in the block, from one small table that stays in L1. Angles are formed
//! in f64: in f32, `position * inv_freq` is off by 0.06 rad near position 1,000,000.

use kvquant_quant::pack::BLOCK_TOKENS;

/// The rotation of a model: radians per position of every channel pair.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// head_dim / 2 entries; 0 for pairs that do not turn.
    pub inv_freq: Vec<f64>,
}

/// cos and sin of one position for every pair of a head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rotation {
    /// `[head_dim / 2]`
    pub cos: Vec<f32>,
    /// `[head_dim / 2]`
    pub sin: Vec<f32>,
}

/// R(j) for every place j of a block: `cos[pair * BLOCK_TOKENS + j]`, so that tokens lie along a vector.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BlockTable {
    /// `[head_dim / 2, BLOCK_TOKENS]`
    pub cos: Vec<f32>,
    /// `[head_dim / 2, BLOCK_TOKENS]`
    pub sin: Vec<f32>,
    /// [cos, sin] of each place, pair by pair: `[head_dim / 2 * BLOCK_TOKENS]`, for single entries.
    pub(crate) turns: Vec<[f32; 2]>,
    /// [cos, sin] of each pair in units of 2^-15, tokens in [`shuffled`] order.
    pub(crate) shuffled16: Vec<Turns16>,
    /// The same, tokens in [`TURNS_ORDER`].
    pub(crate) wide16: Vec<Turns16>,
    /// Cycles of each pair in a token.
    pub(crate) cycles: Vec<f32>,
}

/// [cos, sin] of a pair's 64 places, in lines of the cache: a vector that lies across two takes twice the time to read.
#[derive(Debug, Clone, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Turns16(pub [[i16; BLOCK_TOKENS]; 2]);

/// The token at a place of the order in which byte shuffles deliver 16-bit values: of 32 bytes those that are the lower
/// eight of 16, then the upper ones.
pub(crate) const fn shuffled(place: usize) -> usize {
    place / 32 * 32 + place % 16 / 8 * 16 + place % 32 / 16 * 8 + place % 8
}

/// The token at a place of the order in which shifts of words deliver 16-bit values: of each half of the tokens the
/// even ones, then the odd ones.
pub(crate) const fn evens_first(place: usize) -> usize {
    place / 32 * 32 + place % 16 * 2 + place % 32 / 16
}

/// The order of [`Turns16`]: what AVX-512's shifts deliver; NEON's shuffles keep tokens as they come.
const TURNS_ORDER: fn(usize) -> usize = if cfg!(target_arch = "aarch64") { |place| place } else { evens_first };

impl Rope {
    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// cos and sin at an absolute position, exact to f32 rounding for positions of tens of millions.
    pub fn rotation(&self, position: usize) -> Rotation {
        let mut rotation = Rotation::default();
        self.rotate_to(position, &mut rotation);
        rotation
    }

    /// [`rotation`](Rope::rotation) into one that is there.
    pub fn rotate_to(&self, position: usize, rotation: &mut Rotation) {
        rotation.cos.clear();
        rotation.sin.clear();
        for f in &self.inv_freq {
            let (s, c) = (position as f64 * f).sin_cos();
            rotation.cos.push(c as f32);
            rotation.sin.push(s as f32);
        }
    }

    /// The table of places inside a block.
    pub fn block_table(&self) -> BlockTable {
        let (sin, cos): (Vec<f32>, Vec<f32>) = self
            .inv_freq
            .iter()
            .flat_map(|f| (0..BLOCK_TOKENS).map(move |j| (j as f64 * f).sin_cos()))
            .map(|(s, c)| (s as f32, c as f32))
            .unzip();
        let sixteen = |f: &f64, part: fn(f64) -> f64, token: fn(usize) -> usize| {
            std::array::from_fn(|i| (part(token(i) as f64 * f) * 32768.0).round() as i16)
        };
        let both = |order| {
            let pair = move |f| Turns16([f64::cos, f64::sin].map(|part| sixteen(f, part, order)));
            self.inv_freq.iter().map(pair).collect()
        };
        let turns = cos.iter().zip(&sin).map(|(c, s)| [*c, *s]).collect();
        let cycles = self.inv_freq.iter().map(|f| (f / std::f64::consts::TAU) as f32).collect();
        BlockTable { cycles, turns, shuffled16: both(shuffled), wide16: both(TURNS_ORDER), cos, sin }
    }
}

impl Rotation {
    /// Turns one head `[head_dim]` forward, in place.
    pub fn apply(&self, head: &mut [f32]) {
        for ((pair, &c), &s) in head.chunks_exact_mut(2).zip(&self.cos).zip(&self.sin) {
            let (x, y) = (pair[0], pair[1]);
            pair[0] = x * c - y * s;
            pair[1] = x * s + y * c;
        }
    }

    /// Turns one head `[head_dim]` backward, from `head` to `out`.
    #[inline]
    pub fn undo(&self, head: &[f32], out: &mut [f32]) {
        for (((pair, to), &c), &s) in head.chunks_exact(2).zip(out.chunks_exact_mut(2)).zip(&self.cos).zip(&self.sin) {
            to[0] = pair[0] * c + pair[1] * s;
            to[1] = pair[1] * c - pair[0] * s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_angle_holds_at_ten_million() {
        let rope = Rope { inv_freq: (0..32).map(|i| 100_000f64.powf(-(i as f64) / 32.0)).collect() };
        let (origin, place, query) = (10_000_000usize, 37usize, 10_000_050usize);
        let mut k: Vec<f32> = (0..64).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut q: Vec<f32> = (0..64).map(|i| (i as f32 * 0.11).cos()).collect();
        let (k0, q0) = (k.clone(), q.clone());
        rope.rotation(place).apply(&mut k);
        rope.rotation(query).apply(&mut q);
        let mut local = vec![0.0; 64];
        rope.rotation(origin).undo(&q, &mut local);
        let got: f64 = local.iter().zip(&k).map(|(a, b)| *a as f64 * *b as f64).sum();
        // The same score in f64, from the relative angle alone.
        let want: f64 = (0..32)
            .map(|i| {
                let (s, c) = ((query - origin - place) as f64 * rope.inv_freq[i]).sin_cos();
                let (a, b) = (q0[2 * i] as f64, q0[2 * i + 1] as f64);
                let (x, y) = (k0[2 * i] as f64, k0[2 * i + 1] as f64);
                (a * c - b * s) * x + (a * s + b * c) * y
            })
            .sum();
        assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{got} {want}");
    }
}
