//! Keys and values of all windows with their gradients, at four bytes a value.
//!
//! Values are kept in fp16 (as a cache would), gradients in bf16: they span more powers of two than fp16 has, and
//! 8 bits are plenty for a weight. Gradients rather than their squares: the key gradient of a spec that quantizes
//! after RoPE is the rotated gradient, and has to be squared after the rotation.
//!
//! Keys are kept without their projection's bias, which is added back in f32: with a bias in the hundreds, as
//! Qwen2 has, fp16 would round away the part that varies.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// One layer's keys or values, `[windows, ctx, channels]`.
pub(crate) struct SideSamples {
    base: Vec<f32>,
    channels: usize,
    values: Vec<f16>,
    gradients: Vec<bf16>,
}

impl SideSamples {
    /// Bytes of one value and its gradient.
    pub(crate) const BYTES: usize = 4;

    /// `base` `[channels]` is stored once instead of with every token; empty for none.
    pub(crate) fn new(base: Vec<f32>, channels: usize, tokens: usize) -> Self {
        SideSamples {
            base,
            channels,
            values: Vec::with_capacity(tokens * channels),
            gradients: Vec::with_capacity(tokens * channels),
        }
    }

    /// Appends a window's values and gradients `[ctx, channels]`. `false` when one of them is not finite (in fp16).
    pub(crate) fn push(&mut self, values: &[f32], gradients: &[f32]) -> bool {
        let from = self.values.len();
        if self.base.is_empty() {
            self.values.extend(values.iter().map(|x| f16::from_f32(*x)));
        } else {
            for token in values.chunks_exact(self.channels) {
                self.values.extend(token.iter().zip(&self.base).map(|(x, b)| f16::from_f32(x - b)));
            }
        }
        self.gradients.extend(gradients.iter().map(|g| bf16::from_f32(*g)));
        self.values[from..].iter().all(|x| x.is_finite()) && gradients.iter().all(|g| g.is_finite())
    }

    /// Values and gradients as f32.
    pub(crate) fn unpack(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut x, mut g) = (vec![0.0; self.values.len()], vec![0.0; self.gradients.len()]);
        let rows = 64 * self.channels;
        x.par_chunks_mut(rows).zip(self.values.par_chunks(rows)).for_each(|(to, from)| {
            from.convert_to_f32_slice(to);
            if !self.base.is_empty() {
                to.chunks_exact_mut(self.channels)
                    .for_each(|t| t.iter_mut().zip(&self.base).for_each(|(x, b)| *x += b));
            }
        });
        g.par_chunks_mut(rows)
            .zip(self.gradients.par_chunks(rows))
            .for_each(|(to, from)| from.convert_to_f32_slice(to));
        (x, g)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_bias_does_not_cost_precision() {
        let base = vec![300.0, -0.5];
        let mut s = SideSamples::new(base, 2, 2);
        assert!(s.push(&[300.011, 0.25, 299.5, -0.5], &[1e-20, -3.0, 0.0, 1e20]));
        let (x, g) = s.unpack();
        for (got, want) in x.iter().zip([300.011, 0.25, 299.5, -0.5]) {
            assert!((got - want).abs() < 1e-4, "{got} {want}");
        }
        for (got, want) in g.iter().zip([1e-20f32, -3.0, 0.0, 1e20]) {
            assert!((got - want).abs() <= 0.004 * want.abs(), "{got} {want}");
        }
    }

    #[test]
    fn what_is_not_finite_is_reported() {
        let mut s = SideSamples::new(Vec::new(), 1, 4);
        assert!(s.push(&[1.0], &[0.0]));
        assert!(!s.push(&[1e6], &[1.0]));
        assert!(!s.push(&[1.0], &[f32::NAN]));
    }
}
