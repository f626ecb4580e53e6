//! Row by row between the products: norms, activations, residual sums.
//!
//! Plain loops that compilers make vectors of, compiled for the baseline and for AVX2. They sum in sixteen lanes, in one
//! order, and round every step, so that results are the same on every CPU, bit for bit.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::dispatch::{self, Isa};
use crate::threads;

/// Entries from which threads pay.
const PARALLEL_FROM: usize = 1 << 16;
/// Entries of a parallel piece, about.
const PIECE: usize = 8192;

/// Entries of whole rows of `n` that make a piece.
fn piece(n: usize) -> usize {
    n * (PIECE / n).max(1)
}

/// An override that this CPU can't follow is refused where weights are loaded; here it only has to be safe.
fn isa() -> Isa {
    dispatch::isa().unwrap_or(Isa::Scalar)
}

/// `$name` runs `$plain` as it is, or compiled for AVX2.
macro_rules! compiled_twice {
    ($name:ident, $plain:ident, $avx2:ident, ($($arg:ident: $ty:ty),*) $(-> $out:ty)?) => {
        #[inline]
        fn $name(isa: Isa, $($arg: $ty),*) $(-> $out)? {
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an instruction set that `dispatch` gives, or tests take, is one that the CPU has.
                Isa::Avx2 | Isa::Avx512 => unsafe { $avx2($($arg),*) },
                _ => $plain($($arg),*),
            }
        }

        /// # Safety
        /// AVX2.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2")]
        unsafe fn $avx2($($arg: $ty),*) $(-> $out)? {
            $plain($($arg),*)
        }
    };
}

compiled_twice!(norm_row, norm_row_plain, norm_row_avx2, (x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
compiled_twice!(norm_row_in_place, in_place_plain, in_place_avx2, (x: &mut [f32], weight: &[f32], eps: f32));
compiled_twice!(add_row, add_plain, add_avx2, (x: &mut [f32], y: &[f32]) -> f32);
compiled_twice!(scaled, scaled_plain, scaled_avx2, (x: &[f32], by: f32, weight: &[f32], out: &mut [f32]));
compiled_twice!(vec_mat_on, vec_mat_plain, vec_mat_avx2, (x: &[f32], w: &[f32], out: &mut [f32]));
compiled_twice!(silu, silu_plain, silu_avx2, (gate: &mut [f32], up: &[f32]));
compiled_twice!(gelu, gelu_plain, gelu_avx2, (gate: &mut [f32], up: &[f32]));

/// The sum of squares.
#[inline(always)]
fn squares(x: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for c in chunks {
        for (s, v) in sums.iter_mut().zip(c) {
            *s += v * v;
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>()
}

/// 1 / sqrt(mean(x^2) + eps) of a row of `n` entries.
#[inline(always)]
fn inverse_rms(squares: f32, n: usize, eps: f32) -> f32 {
    1.0 / (squares / n as f32 + eps).sqrt()
}

#[inline(always)]
fn scaled_plain(x: &[f32], by: f32, weight: &[f32], out: &mut [f32]) {
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = x * by * w;
    }
}

#[inline(always)]
fn norm_row_plain(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    scaled_plain(x, inverse_rms(squares(x), x.len(), eps), weight, out);
}

#[inline(always)]
fn in_place_plain(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_rms(squares(x), x.len(), eps);
    x.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * w);
}

/// x += y; returns the sum of squares of the new x.
#[inline(always)]
fn add_plain(x: &mut [f32], y: &[f32]) -> f32 {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    squares(x)
}

#[inline(always)]
fn silu_plain(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

#[inline(always)]
fn gelu_plain(gate: &mut [f32], up: &[f32]) {
    const TWICE: f32 = -2.0 * 0.797_884_6;
    for (gate, u) in gate.iter_mut().zip(up) {
        let g = *gate;
        *gate = g / (1.0 + exp(TWICE * (g + 0.044715 * g * g * g))) * u;
    }
}

/// e^x, within 3e-7 relative for -87 < x < 88; smaller x give a number below 2e-38. A polynomial, which compilers
/// vectorize: the library's is a call an element, and softmax needs a billion of them a window.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // x = n ln2 + r, |r| <= ln2/2. Adding 1.5 * 2^23 rounds to an integer without an SSE4.1 instruction.
    const MAGIC: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts: the first has trailing zeros, so that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    let power = (shifted.to_bits() << 23).wrapping_add(127 << 23);
    p * f32::from_bits(power)
}

/// out = x / sqrt(mean(x^2) + eps) * weight, row by row; x and out `[rows, weight.len()]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (n, isa) = (weight.len(), isa());
    let rows = |x: &[f32], out: &mut [f32]| {
        x.chunks_exact(n).zip(out.chunks_exact_mut(n)).for_each(|(x, out)| norm_row(isa, x, weight, eps, out));
    };
    if x.len() >= PARALLEL_FROM {
        let size = piece(n);
        threads::pieces_mut(out, size, |i, out| rows(&x[i * size..][..out.len()], out));
    } else {
        rows(x, out);
    }
}

/// [`rms_norm`] in place, where there is a weight; for the norms of heads, rows are heads.
pub fn rms_norm_in_place(x: &mut [f32], weight: &Option<Vec<f32>>, eps: f32) {
    let Some(weight) = weight else { return };
    let isa = isa();
    let n = weight.len();
    let rows = |x: &mut [f32]| x.chunks_exact_mut(n).for_each(|x| norm_row_in_place(isa, x, weight, eps));
    if x.len() >= PARALLEL_FROM { threads::pieces_mut(x, piece(n), |_, x| rows(x)) } else { rows(x) }
}

/// The residual sum and the norm after it in one pass: x += y, then y = norm(x) as [`rms_norm`] has it; `[rows, n]` with
/// `n` the length of `weight`. Without a weight y stays. Returns whether all of x is finite.
pub fn add_rms_norm(x: &mut [f32], y: &mut [f32], n: usize, weight: Option<&[f32]>, eps: f32) -> bool {
    let isa = isa();
    let row = |(x, y): (&mut [f32], &mut [f32])| {
        let squares = add_row(isa, x, y);
        if let Some(weight) = weight {
            scaled(isa, x, inverse_rms(squares, n, eps), weight, y);
        }
        // NaN and infinity survive a sum of squares, which can overflow without them.
        squares.is_finite() || x.iter().all(|v| v.is_finite())
    };
    let rows = |x: &mut [f32], y: &mut [f32]| {
        x.chunks_exact_mut(n).zip(y.chunks_exact_mut(n)).fold(true, |all, rows| all & row(rows))
    };
    if x.len() < PARALLEL_FROM {
        return rows(x, y);
    }
    let finite = AtomicBool::new(true);
    threads::pieces_of_two_mut((x, piece(n)), (y, piece(n)), |_, x, y| {
        if !rows(x, y) {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

/// What the gate of an MLP goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^-x)
    Silu,
    /// The tanh form of GELU: x (1 + tanh u) / 2 = x / (1 + e^-2u), with u = sqrt(2/pi) (x + 0.044715 x^3).
    GeluTanh,
}

/// gate = activation(gate) * up
pub fn gated(activation: Activation, gate: &mut [f32], up: &[f32]) {
    gated_on(isa(), activation, gate, up);
}

fn gated_on(isa: Isa, activation: Activation, gate: &mut [f32], up: &[f32]) {
    let part = |gate: &mut [f32], up: &[f32]| match activation {
        Activation::Silu => silu(isa, gate, up),
        Activation::GeluTanh => gelu(isa, gate, up),
    };
    if gate.len() >= PARALLEL_FROM {
        threads::pieces_mut(gate, PIECE, |i, gate| part(gate, &up[i * PIECE..][..gate.len()]));
    } else {
        part(gate, up);
    }
}

/// out = x W for one row x `[k]` and a small W `[k, n]`; out `[n]`. For a few rows, where calling a product of matrices
/// costs more than it takes.
///
/// # Panics
/// W is not `[k, n]`.
pub fn vec_mat(x: &[f32], w: &[f32], out: &mut [f32]) {
    assert_eq!(w.len(), x.len() * out.len(), "W is [k, n]");
    vec_mat_on(isa(), x, w, out);
}

#[inline(always)]
fn vec_mat_plain(x: &[f32], w: &[f32], out: &mut [f32]) {
    const LANES: usize = 64;
    let n = out.len();
    let (pieces, rest) = out.as_chunks_mut::<LANES>();
    for (i, piece) in pieces.iter_mut().enumerate() {
        let mut sums = [0.0; LANES];
        for (x, row) in x.iter().zip(w.chunks_exact(n)) {
            let row: &[f32; LANES] = row[i * LANES..].first_chunk().expect("a row has whole pieces");
            for (sum, w) in sums.iter_mut().zip(row) {
                *sum += x * w;
            }
        }
        *piece = sums;
    }
    let first = n - rest.len();
    rest.fill(0.0);
    for (x, row) in x.iter().zip(w.chunks_exact(n)) {
        rest.iter_mut().zip(&row[first..]).for_each(|(sum, w)| *sum += x * w);
    }
}

/// Multiplies every row by `by`, entry by entry; an empty `by` is none.
pub fn scale_rows(x: &mut [f32], by: &[f32]) {
    if !by.is_empty() {
        x.chunks_exact_mut(by.len()).for_each(|row| row.iter_mut().zip(by).for_each(|(x, b)| *x *= b));
    }
}

/// Adds a bias to every row.
pub fn add_bias(x: &mut [f32], bias: &Option<Vec<f32>>) {
    if let Some(bias) = bias {
        x.chunks_exact_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: usize = 37;

    fn rows() -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let x = (0..3 * N).map(|i| (i as f32 * 0.7).sin() * 5.0).collect();
        let y = (0..3 * N).map(|i| (i as f32 * 0.3).cos() * 2.0).collect();
        let w = (0..N).map(|i| 1.0 + i as f32 / 10.0).collect();
        (x, y, w)
    }

    fn close(got: f32, want: f64) {
        assert!((got as f64 - want).abs() < 1e-5 * (1.0 + want.abs()), "{got} and {want}");
    }

    #[test]
    fn exp_agrees_with_the_library() {
        let mut worst = 0f64;
        for i in -8600..8700 {
            let x = i as f32 * 0.01 + 0.003;
            worst = worst.max((f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs());
        }
        assert!(worst < 3e-7, "{worst}");
        assert!(exp(-1e30) < 2e-38 && exp(f32::NEG_INFINITY) < 2e-38);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn norms_and_sums_follow_their_formulas() {
        let (x, y, w) = rows();
        let want = |x: &[f32], r: usize, i: usize| {
            let mean = x[r * N..][..N].iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / N as f64;
            x[r * N + i] as f64 / (mean + 1e-5).sqrt() * w[i] as f64
        };
        let mut out = vec![f32::NAN; x.len()];
        rms_norm(&x, &w, 1e-5, &mut out);
        let mut norm = x.clone();
        rms_norm_in_place(&mut norm, &None, 1e-5);
        assert_eq!(norm, x);
        rms_norm_in_place(&mut norm, &Some(w.clone()), 1e-5);
        let (mut sum, mut after) = (x.clone(), y.clone());
        assert!(add_rms_norm(&mut sum, &mut after, N, Some(&w), 1e-5));
        let (mut plain, mut left) = (x.clone(), y.clone());
        assert!(add_rms_norm(&mut plain, &mut left, N, None, 1e-5));
        assert!(plain == sum && left == y);
        for (r, i) in (0..3).flat_map(|r| (0..N).map(move |i| (r, i))) {
            close(out[r * N + i], want(&x, r, i));
            close(norm[r * N + i], want(&x, r, i));
            assert_eq!(sum[r * N + i], x[r * N + i] + y[r * N + i]);
            close(after[r * N + i], want(&sum, r, i));
        }
        scale_rows(&mut norm, &[]);
        let before = norm.clone();
        let by: Vec<f32> = (0..N).map(|i| (i % 2) as f32 * 2.0).collect();
        scale_rows(&mut norm, &by);
        add_bias(&mut norm, &None);
        add_bias(&mut norm, &Some(w.clone()));
        assert!((0..norm.len()).all(|i| norm[i] == before[i] * by[i % N] + w[i % N]));
    }

    #[test]
    fn activations_follow_their_formulas() {
        let (x, y, _) = rows();
        let (mut silu, mut gelu) = (x.clone(), x.clone());
        gated(Activation::Silu, &mut silu, &y);
        gated(Activation::GeluTanh, &mut gelu, &y);
        for i in 0..x.len() {
            let (g, up) = (x[i] as f64, y[i] as f64);
            close(silu[i], g / (1.0 + (-g).exp()) * up);
            let u = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            close(gelu[i], g * (1.0 + u.tanh()) / 2.0 * up);
        }
    }

    #[test]
    fn a_row_times_a_matrix() {
        for (k, n) in [(1, 1), (3, 31), (5, 64), (64, 64), (80, 80), (7, 96)] {
            let x: Vec<f32> = (0..k).map(|i| (i as f32 * 0.7).sin()).collect();
            let w: Vec<f32> = (0..k * n).map(|i| (i as f32 * 0.3).cos()).collect();
            let mut out = vec![f32::NAN; n];
            vec_mat(&x, &w, &mut out);
            for (c, got) in out.into_iter().enumerate() {
                close(got, (0..k).map(|i| x[i] as f64 * w[i * n + c] as f64).sum());
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_seen_and_what_is_large_is_not_mistaken_for_it() {
        let (x, y, w) = rows();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 35, 36, 2 * N + 5] {
                let (mut sum, mut y) = (x.clone(), y.clone());
                y[at] = bad;
                assert!(!add_rms_norm(&mut sum, &mut y, N, Some(&w), 1e-5), "{bad} at {at}");
            }
        }
        let mut large = [1e30; N];
        assert!(add_rms_norm(&mut large, &mut [0.0; N], N, Some(&w), 1e-5));
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (x, y, w) = rows();
        let on = |isa: Isa| {
            let mut all = vec![vec![0.0; N], x[..N].to_vec(), x[..N].to_vec(), vec![0.0; N]];
            norm_row(isa, &x[..N], &w, 1e-5, &mut all[0]);
            norm_row_in_place(isa, &mut all[1], &w, 1e-5);
            let squares = add_row(isa, &mut all[2], &y[..N]);
            scaled(isa, &x[..N], squares, &w, &mut all[3]);
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let mut gate = x.clone();
                gated_on(isa, activation, &mut gate, &y);
                all.push(gate);
            }
            let mut product = vec![0.0; 80];
            vec_mat_on(
                isa,
                &x[..3],
                &x.iter().chain(&y).chain(&w).copied().cycle().take(240).collect::<Vec<_>>(),
                &mut product,
            );
            all.push(product);
            all.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        for isa in Isa::available() {
            assert_eq!(on(isa), on(Isa::Scalar), "{}", isa.name());
        }
    }

    #[test]
    fn threads_change_nothing() {
        let n = 4096;
        let x: Vec<f32> = (0..PARALLEL_FROM).map(|i| (i as f32 * 0.01).sin()).collect();
        let w = vec![1.5; n];
        let mut all = vec![0.0; x.len()];
        rms_norm(&x, &w, 1e-5, &mut all);
        let (mut sum, mut after) = (x.clone(), x.clone());
        assert!(add_rms_norm(&mut sum, &mut after, n, Some(&w), 1e-5));
        let mut gate = x.clone();
        gated(Activation::Silu, &mut gate, &x);
        for at in (0..x.len()).step_by(n) {
            let row = &x[at..at + n];
            let mut out = vec![0.0; n];
            rms_norm(row, &w, 1e-5, &mut out);
            assert_eq!(out, all[at..at + n]);
            let (mut s, mut a) = (row.to_vec(), row.to_vec());
            add_rms_norm(&mut s, &mut a, n, Some(&w), 1e-5);
            assert!(s == sum[at..at + n] && a == after[at..at + n]);
            let mut g = row.to_vec();
            gated(Activation::Silu, &mut g, row);
            assert_eq!(g, gate[at..at + n]);
        }
    }
}
