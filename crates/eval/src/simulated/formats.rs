//! Vectors to what a format gives back of them.

use half::f16;

fn half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// llama.cpp's q8_0: steps of the largest magnitude / 127.
pub(super) fn q8_0(group: &mut [f32]) {
    let step = group.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
    let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
    let stored = half(step);
    group.iter_mut().for_each(|x| *x = (*x * inverse).round() * stored);
}

/// llama.cpp's q4_0: -8 to 7 steps, of which -8 is the entry of the largest magnitude.
pub(super) fn q4_0(group: &mut [f32]) {
    let extreme = group.iter().fold(0.0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let step = extreme / -8.0;
    let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
    let stored = half(step);
    group.iter_mut().for_each(|x| *x = ((*x * inverse + 8.5).floor().min(15.0) - 8.0) * stored);
}

/// Even steps from the least to the largest entry, both ends and the step in fp16.
pub(super) fn asymmetric(group: &mut [f32], bits: u32) {
    let low = group.iter().copied().fold(f32::INFINITY, f32::min);
    let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let last = ((1u32 << bits) - 1) as f32;
    let (zero, step) = (half(low), half((high - low) / last));
    for x in group {
        let code = if step > 0.0 { ((*x - zero) / step).round().clamp(0.0, last) } else { 0.0 };
        *x = code * step + zero;
    }
}

/// A head whose coordinates were made normal by a transform: its norm in fp16, its coordinates by a codebook.
pub(super) fn turbo(head: &mut [f32], book: &[f32]) {
    let norm = head.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    // Coordinates of a unit vector have a variance of 1 / n.
    let unit = norm as f32 / (head.len() as f32).sqrt();
    let stored = half(norm as f32) / (head.len() as f32).sqrt();
    for x in head {
        let scaled = if unit > 0.0 { *x / unit } else { 0.0 };
        let place = book.windows(2).take_while(|pair| scaled > (pair[0] + pair[1]) / 2.0).count();
        *x = book[place] * stored;
    }
}

/// The 2^bits signposts that keep the mean squared error of a standard normal variable least (Lloyd-Max).
pub(super) fn gaussian_book(bits: u32) -> Vec<f32> {
    const FAR: f64 = 8.0;
    let density = |x: f64| (-x * x / 2.0).exp();
    // Simpson's rule.
    let mass = |a: f64, b: f64| {
        let h = (b - a) / 64.0;
        let weight = |i: i32| if i == 0 || i == 64 { 1.0 } else { f64::from(2 + 2 * (i % 2)) };
        (0..=64).map(|i| weight(i) * density(a + h * f64::from(i))).sum::<f64>() * h / 3.0
    };
    let n = 1usize << bits;
    let mut book: Vec<f64> = (0..n).map(|i| (i as f64 + 0.5) * 6.0 / n as f64 - 3.0).collect();
    for _ in 0..500 {
        let between = book.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        let ends: Vec<f64> = [-FAR].into_iter().chain(between).chain([FAR]).collect();
        for (post, end) in book.iter_mut().zip(ends.windows(2)) {
            *post = (density(end[0]) - density(end[1])) / mass(end[0], end[1]);
        }
    }
    book.into_iter().map(|x| x as f32).collect()
}

/// A normalized Hadamard transform of a head, in pieces of the largest power of two that divides it.
#[derive(Debug)]
pub(super) struct Hadamard {
    piece: usize,
    /// Signs before the transform; empty for none.
    signs: Vec<f32>,
}

impl Hadamard {
    pub fn new(head_dim: usize, with_signs: bool) -> Self {
        let piece = 1 << head_dim.trailing_zeros();
        // A linear congruential sequence: any fixed signs will do.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut sign = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if state >> 63 == 0 { 1.0 } else { -1.0 }
        };
        Hadamard { piece, signs: (0..if with_signs { head_dim } else { 0 }).map(|_| sign()).collect() }
    }

    pub fn forward(&self, x: &mut [f32]) {
        x.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
        self.turn(x);
    }

    /// The transform is its own inverse.
    pub fn back(&self, x: &mut [f32]) {
        self.turn(x);
        x.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
    }

    fn turn(&self, x: &mut [f32]) {
        let scale = 1.0 / (self.piece as f32).sqrt();
        for piece in x.chunks_exact_mut(self.piece) {
            let mut width = 1;
            while width < self.piece {
                for pair in piece.chunks_exact_mut(2 * width) {
                    let (a, b) = pair.split_at_mut(width);
                    a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
                }
                width *= 2;
            }
            piece.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 % 61) as f32 - 30.0) / 7.0).collect()
    }

    fn worst(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
    }

    #[test]
    fn errors_stay_within_half_a_step() {
        let x = ramp(32);
        let top = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let mut y = x.clone();
        q8_0(&mut y);
        // Rounding the step to fp16 adds up to 127 / 2048 of one.
        assert!((1e-4..0.57 * top / 127.0).contains(&worst(&x, &y)));
        y.clone_from(&x);
        q4_0(&mut y);
        // The far end is a whole step beyond the last code.
        assert!((1e-2..1.01 * top / 8.0).contains(&worst(&x, &y)));
        y.clone_from(&x);
        asymmetric(&mut y, 4);
        let range = 2.0 * top;
        assert!((1e-2..0.51 * range / 15.0).contains(&worst(&x, &y)));
        for format in [q8_0, q4_0, |x: &mut [f32]| asymmetric(x, 2), |x: &mut [f32]| turbo(x, &gaussian_book(3))] {
            let mut zeros = [0.0; 32];
            format(&mut zeros);
            assert!(zeros.iter().all(|x| *x == 0.0));
        }
    }

    #[test]
    fn q4_0_is_what_llama_cpp_stores() {
        // The extreme is -4: a step of 0.5; 3.9 would need code 16.
        let mut x = vec![-4.0, 3.9, 0.26, 0.24, -0.26, 1.0];
        q4_0(&mut x);
        assert_eq!(x, [-4.0, 3.5, 0.5, 0.0, -0.5, 1.0]);
    }

    #[test]
    fn the_codebook_is_max_of_1960() {
        let want = [0.2451, 0.7560, 1.344, 2.152];
        let got = gaussian_book(3);
        for (i, w) in want.iter().enumerate() {
            assert!((got[4 + i] - w).abs() < 1e-3 && (got[3 - i] + w).abs() < 1e-3, "{got:?}");
        }
        assert!((gaussian_book(4)[15] - 2.733).abs() < 2e-3);
    }

    #[test]
    fn transforms_turn_and_come_back() {
        for (n, signs) in [(64, false), (64, true), (80, true)] {
            let (x, h) = (ramp(n), Hadamard::new(n, signs));
            let mut y = x.clone();
            h.forward(&mut y);
            let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
            assert!((norm(&x) - norm(&y)).abs() < 1e-3 * norm(&x) && worst(&x, &y) > 1.0);
            h.back(&mut y);
            assert!(worst(&x, &y) < 1e-5);
        }
        let mut one = vec![0.0; 64];
        one[5] = 8.0;
        Hadamard::new(64, false).forward(&mut one);
        assert!(one.iter().all(|x| (x.abs() - 1.0).abs() < 1e-6), "an outlier is spread over all");
    }
}
