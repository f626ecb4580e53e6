//! The small pieces of a layer and their gradients, on row-major f32 slices.
//!
//! Loops are written so that the compiler vectorizes them on every target.

use kvquant_kernels::linalg::gemm;
use kvquant_kernels::rope::Rotation;
use kvquant_kernels::rowwise::{Activation, exp};
use rayon::prelude::*;

/// Rows per task of the row-wise loops.
const ROWS: usize = 32;

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// y `[m, rows]` = x `[m, cols]` Wᵀ (+ y when `add`), W `[rows, cols]`.
pub(crate) fn linear(x: &[f32], w: &[f32], cols: usize, y: &mut [f32], add: bool) {
    let (m, rows) = (x.len() / cols, w.len() / cols);
    let beta = if add { 1.0 } else { 0.0 };
    gemm(m, rows, cols, 1.0, x, cols, 1, w, 1, cols, beta, y, rows, rayon::current_num_threads());
}

/// The input gradient of [`linear`]: dx `[m, cols]` = dy `[m, rows]` W (+ dx when `add`).
pub(crate) fn linear_back(dy: &[f32], w: &[f32], cols: usize, dx: &mut [f32], add: bool) {
    let rows = w.len() / cols;
    let m = dy.len() / rows;
    let beta = if add { 1.0 } else { 0.0 };
    gemm(m, cols, rows, 1.0, dy, rows, 1, w, cols, 1, beta, dx, cols, rayon::current_num_threads());
}

/// Adds `bias` to every row; an empty bias is none.
pub(crate) fn add_bias(x: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        x.par_chunks_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
    }
}

/// 1 / sqrt(mean(x²) + eps) of one row.
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let sum: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    (1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32
}

/// y = x / rms(x) * weight, row by row.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let n = weight.len();
    let mut y = vec![0.0; x.len()];
    y.par_chunks_mut(n * ROWS).zip(x.par_chunks(n * ROWS)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            let r = inverse_rms(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * r * w;
            }
        }
    });
    y
}

/// Adds the input gradient of [`rms_norm`] to `dx`: with g = dy * weight, r = 1/rms:
/// dx += r g - x r³ mean(g x).
pub(crate) fn rms_norm_back(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let n = weight.len();
    dx.par_chunks_mut(n * ROWS).zip(x.par_chunks(n * ROWS)).zip(dy.par_chunks(n * ROWS)).for_each(|((dx, x), dy)| {
        for ((dx, x), dy) in dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(dy.chunks_exact(n)) {
            let r = inverse_rms(x, eps);
            let dot: f64 = x.iter().zip(dy).zip(weight).map(|((x, d), w)| f64::from(x * d * w)).sum();
            let pull = (dot / n as f64) as f32 * r * r * r;
            for (((dx, x), d), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                *dx += r * d * w - x * pull;
            }
        }
    });
}

/// Twice the argument of GELU's tanh over x (1 + GELU_CUBE x^2).
const GELU: f32 = 2.0 * 0.797_884_6;
const GELU_CUBE: f32 = 0.044715;

/// An activation and its slope.
#[inline(always)]
fn activate(activation: Activation, x: f32) -> (f32, f32) {
    match activation {
        Activation::Silu => {
            let s = sigmoid(x);
            (x * s, s + x * s * (1.0 - s))
        }
        Activation::GeluTanh => {
            // (1 + tanh u) / 2 is the sigmoid of 2u.
            let s = sigmoid(GELU * x * (1.0 + GELU_CUBE * x * x));
            (x * s, s + x * s * (1.0 - s) * GELU * (1.0 + 3.0 * GELU_CUBE * x * x))
        }
    }
}

/// activation(gate) * up, into `gate`.
pub(crate) fn gated(activation: Activation, gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(8192).zip(up.par_chunks(8192)).for_each(|(gate, up)| {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = activate(activation, *g).0 * u;
        }
    });
}

/// The gradient of [`gated`]: `gate` and `up` become their own gradients.
pub(crate) fn gated_back(activation: Activation, gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    gate.par_chunks_mut(8192).zip(up.par_chunks_mut(8192)).zip(d.par_chunks(8192)).for_each(|((gate, up), d)| {
        for ((g, u), d) in gate.iter_mut().zip(up).zip(d) {
            let (value, slope) = activate(activation, *g);
            (*g, *u) = (d * *u * slope, d * value);
        }
    });
}

/// Multiplies every row by `by`, entry by entry; an empty `by` is none. It is its own gradient.
pub(crate) fn scale_rows(x: &mut [f32], by: &[f32]) {
    if !by.is_empty() {
        x.par_chunks_mut(by.len()).for_each(|row| row.iter_mut().zip(by).for_each(|(x, b)| *x *= b));
    }
}

/// Turns `[tokens, heads, head_dim]` to the tokens' positions, in place.
pub(crate) fn rotate(x: &mut [f32], width: usize, rotations: &[Rotation]) {
    x.par_chunks_mut(width).zip(rotations).for_each(|(row, rotation)| {
        row.chunks_exact_mut(2 * rotation.cos.len()).for_each(|head| rotation.apply(head));
    });
}

/// Turns them back. A rotation is orthogonal, so that this is also its gradient.
pub(crate) fn rotate_back(x: &[f32], width: usize, rotations: &[Rotation]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(width).zip(x.par_chunks(width)).zip(rotations).for_each(|((out, row), rotation)| {
        let d = 2 * rotation.cos.len();
        out.chunks_exact_mut(d).zip(row.chunks_exact(d)).for_each(|(out, head)| rotation.undo(head, out));
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, slope};

    /// d(sum(y * probe)) / dx against finite differences.
    fn check(x: &[f32], probe: &[f32], grad: &[f32], y: impl Fn(&[f32]) -> Vec<f32>) {
        for i in 0..x.len() {
            let want = slope(x, i, 1e-2, |x| y(x).iter().zip(probe).map(|(y, p)| f64::from(y * p)).sum());
            assert!((f64::from(grad[i]) - want).abs() < 2e-3 * want.abs().max(0.3), "{i}: {} {want}", grad[i]);
        }
    }

    #[test]
    fn rms_norm_gradient() {
        let (x, w, dy) = (noise(15, 1), noise(5, 2), noise(15, 3));
        let mut dx = vec![0.0; 15];
        rms_norm_back(&x, &w, 1e-5, &dy, &mut dx);
        check(&x, &dy, &dx, |x| rms_norm(x, &w, 1e-5));
    }

    #[test]
    fn linear_gradient() {
        let (x, w, dy) = (noise(3 * 4, 1), noise(5 * 4, 2), noise(3 * 5, 3));
        let mut dx = vec![1.0; 12];
        linear_back(&dy, &w, 4, &mut dx, true);
        dx.iter_mut().for_each(|d| *d -= 1.0);
        check(&x, &dy, &dx, |x| {
            let mut y = vec![0.0; 15];
            linear(x, &w, 4, &mut y, false);
            y
        });
    }

    #[test]
    fn gated_gradient() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let (gate, up, d) = (noise(9, 1), noise(9, 2), noise(9, 3));
            let (mut dg, mut du) = (gate.clone(), up.clone());
            gated_back(activation, &mut dg, &mut du, &d);
            let value = |gate: &[f32], up: &[f32]| {
                let mut y = gate.to_vec();
                gated(activation, &mut y, up);
                y
            };
            check(&gate, &d, &dg, |g| value(g, &up));
            check(&up, &d, &du, |u| value(&gate, u));
        }
    }

    #[test]
    fn rotating_back_is_the_gradient() {
        let rope = kvquant_kernels::rope::Rope { inv_freq: vec![1.0, 0.1] };
        let rotations: Vec<_> = (0..3).map(|p| rope.rotation(p)).collect();
        let (x, dy) = (noise(24, 1), noise(24, 2));
        let dx = rotate_back(&dy, 8, &rotations);
        check(&x, &dy, &dx, |x| {
            let mut y = x.to_vec();
            rotate(&mut y, 8, &rotations);
            y
        });
    }
}
