//! Row-wise operations between the products.

use rayon::prelude::*;

/// Rows times width from which threads pay.
const PARALLEL_FROM: usize = 1 << 16;

/// 1 / sqrt(mean(x^2) + eps) of one row.
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for c in chunks {
        for (s, v) in sums.iter_mut().zip(c) {
            *s += v * v;
        }
    }
    let square = sums.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>();
    1.0 / (square / x.len() as f32 + eps).sqrt()
}

/// out = x / sqrt(mean(x^2) + eps) * weight, row by row; x and out `[rows, weight.len()]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = weight.len();
    let row = |(x, out): (&[f32], &mut [f32])| {
        let scale = inverse_rms(x, eps);
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * scale * w;
        }
    };
    if x.len() >= PARALLEL_FROM {
        x.par_chunks(n).zip(out.par_chunks_mut(n)).for_each(row);
    } else {
        x.chunks(n).zip(out.chunks_mut(n)).for_each(row);
    }
}

/// [`rms_norm`] in place, where there is a weight; for the norms of heads, rows are heads.
pub fn rms_norm_in_place(x: &mut [f32], weight: &Option<Vec<f32>>, eps: f32) {
    let Some(weight) = weight else { return };
    let row = |x: &mut [f32]| {
        let scale = inverse_rms(x, eps);
        x.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * w);
    };
    if x.len() >= PARALLEL_FROM {
        x.par_chunks_mut(weight.len()).for_each(row);
    } else {
        x.chunks_mut(weight.len()).for_each(row);
    }
}

/// e^x in plain arithmetic that compilers vectorize; relative error below 1e-6 within +-87, clamped beyond.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
    let n = x * std::f32::consts::LOG2_E + 12_582_912.0 - 12_582_912.0;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// What the gate of an MLP goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^-x)
    Silu,
    /// The tanh form of GELU: x (1 + tanh u) / 2 = x / (1 + e^-2u), with u = sqrt(2/pi) (x + 0.044715 x^3).
    GeluTanh,
}

impl Activation {
    /// What configurations call it.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Silu => &["silu", "swish"],
            Self::GeluTanh => &["gelu_pytorch_tanh", "gelu_new"],
        }
    }
}

/// gate = activation(gate) * up
pub fn gated(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => gated_by(|g| g / (1.0 + exp(-g)), gate, up),
        Activation::GeluTanh => {
            const TWICE: f32 = -2.0 * 0.797_884_6;
            gated_by(|g| g / (1.0 + exp(TWICE * (g + 0.044715 * g * g * g))), gate, up);
        }
    }
}

fn gated_by(f: impl Fn(f32) -> f32 + Sync, gate: &mut [f32], up: &[f32]) {
    let part = |(gate, up): (&mut [f32], &[f32])| {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = f(*g) * u;
        }
    };
    if gate.len() >= PARALLEL_FROM {
        gate.par_chunks_mut(8192).zip(up.par_chunks(8192)).for_each(part);
    } else {
        part((gate, up));
    }
}

/// Multiplies every row by `by`, entry by entry; an empty `by` is none.
pub fn scale_rows(x: &mut [f32], by: &[f32]) {
    if !by.is_empty() {
        x.chunks_exact_mut(by.len()).for_each(|row| row.iter_mut().zip(by).for_each(|(x, b)| *x *= b));
    }
}

/// x += y
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Adds a bias to every row.
pub fn add_bias(x: &mut [f32], bias: &Option<Vec<f32>>) {
    if let Some(bias) = bias {
        x.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for i in -8700..8700 {
            let x = i as f32 / 100.0 + 0.003;
            let want = (x as f64).exp();
            assert!((exp(x) as f64 - want).abs() <= 1e-6 * want, "{x}");
        }
        assert!(exp(-1e30) < 1e-37 && exp(1e30).is_finite());
    }

    #[test]
    fn norm_and_activation_follow_their_formulas() {
        let x: Vec<f32> = (0..40).map(|i| i as f32 / 7.0 - 2.0).collect();
        let w: Vec<f32> = (0..20).map(|i| 1.0 + i as f32 / 10.0).collect();
        let mut out = vec![0.0; 40];
        rms_norm(&x, &w, 1e-5, &mut out);
        for r in 0..2 {
            let mean: f64 = x[r * 20..][..20].iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / 20.0;
            for i in 0..20 {
                let want = x[r * 20 + i] as f64 / (mean + 1e-5).sqrt() * w[i] as f64;
                assert!((out[r * 20 + i] as f64 - want).abs() < 1e-5);
            }
        }
        let mut gate = x.clone();
        gated(Activation::Silu, &mut gate, &out);
        for i in 0..40 {
            let g = x[i] as f64;
            assert!((gate[i] as f64 - g / (1.0 + (-g).exp()) * out[i] as f64).abs() < 1e-4);
        }
        let mut gate = x.clone();
        gated(Activation::GeluTanh, &mut gate, &out);
        for i in 0..40 {
            let g = x[i] as f64;
            let u = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            assert!((gate[i] as f64 - g * (1.0 + u.tanh()) / 2.0 * out[i] as f64).abs() < 1e-4);
        }
        let mut norm = x.clone();
        rms_norm_in_place(&mut norm, &None, 1e-5);
        assert_eq!(norm, x);
        rms_norm_in_place(&mut norm, &Some(w), 1e-5);
        assert!(norm.iter().zip(&out).all(|(a, b)| (a - b).abs() < 1e-6));
        scale_rows(&mut norm, &[]);
        scale_rows(&mut norm, &[2.0, 0.0]);
        let twice = |i: usize| if i.is_multiple_of(2) { 2.0 } else { 0.0 };
        assert!(norm.iter().zip(&out).enumerate().all(|(i, (a, b))| (a - twice(i) * b).abs() < 1e-5));
    }
}
