//! Signposts that need no calibration, sorted, in normalised units.

use crate::side::Side;

/// 2^bits evenly spaced signposts from -1 to 1.
pub fn uniform(bits: u32) -> Vec<f32> {
    let last = (1u32 << bits) - 1;
    (0..=last).map(|i| -1.0 + 2.0 * i as f32 / last as f32).collect()
}

/// q_0 .. of the symmetric group quantizer, as llama.cpp's q4_0 has it: -2^(bits-1) .. 2^(bits-1) - 1.
pub(crate) fn symmetric(bits: u32) -> Vec<f32> {
    let half = 1i32 << (bits - 1);
    (-half..half).map(|i| i as f32).collect()
}

/// 2^bits quantiles of a normal distribution, scaled to [-1, 1], with an exact 0: the construction of NF4
/// (QLoRA, arXiv 2305.14314, appendix E) for any width: 2^(bits-1) values on the negative side, 2^(bits-1) + 1 on the
/// positive, at evenly spaced probabilities from an offset of 0.9677083 = 1 - (1/32 + 1/30) / 2 to 1/2.
pub fn normal_float(bits: u32) -> Vec<f32> {
    const OFFSET: f64 = 0.967_708_3;
    let half = 1usize << (bits - 1);
    // n quantiles at probabilities from OFFSET down to 1/2, the last of which is 0.
    let side = |n: usize| (0..n - 1).map(move |i| quantile(OFFSET + (0.5 - OFFSET) * i as f64 / (n - 1) as f64));
    let mut all: Vec<f64> = side(half + 1).chain([0.0]).chain(side(half).map(|x| -x)).collect();
    all.sort_by(f64::total_cmp);
    let top = all.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    all.iter().map(|x| (x / top) as f32).collect()
}

/// 2^bits signposts that suit keys per channel and values per token of most models: the means over layers of the learned ones
/// of SmolLM2-135M, Qwen2.5-Coder-0.5B and Gemma 3 270M (1 % outliers), which differ by less than one layer from the next,
/// made symmetric. `None` for widths that have none.
pub fn universal(side: Side, bits: u32) -> Option<Vec<f32>> {
    // The upper halves.
    let upper: &[f32] = match (side, bits) {
        (Side::Key, 2) => &[0.212, 0.661],
        (Side::Key, 3) => &[0.108, 0.328, 0.561, 0.824],
        (Side::Key, 4) => &[0.054, 0.162, 0.271, 0.384, 0.499, 0.621, 0.756, 0.912],
        (Side::Value, 2) => &[0.179, 0.612],
        (Side::Value, 3) => &[0.093, 0.288, 0.516, 0.834],
        (Side::Value, 4) => &[0.047, 0.140, 0.239, 0.342, 0.457, 0.587, 0.744, 0.945],
        _ => return None,
    };
    Some(upper.iter().rev().map(|x| -x).chain(upper.iter().copied()).collect())
}

/// The x below which a standard normal variable lies with probability p, by bisection on its distribution.
fn quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-10.0, 10.0);
    for _ in 0..80 {
        let middle = (low + high) / 2.0;
        if distribution(middle) < p { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// P(X < x) by the series of the error function; good to 1e-14 for |x| < 5.
fn distribution(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-17 && n < 400.0 {
        term *= x * x / (2.0 * n + 1.0);
        sum += term;
        n += 1.0;
    }
    0.5 + sum * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_float_4_is_the_published_table() {
        // QLoRA, appendix E.
        let nf4 = [
            -1.0,
            -0.696_192_8,
            -0.525_073,
            -0.394_917_5,
            -0.284_441_38,
            -0.184_773_43,
            -0.091_050_04,
            0.0,
            0.079_580_3,
            0.160_930_2,
            0.246_112_3,
            0.337_915_24,
            0.440_709_83,
            0.562_617,
            0.722_956_84,
            1.0,
        ];
        let got = normal_float(4);
        assert!(got.iter().zip(nf4).all(|(a, b)| (a - b).abs() < 2e-5), "{got:?}");
    }

    #[test]
    fn codebooks_are_sorted_and_normalised() {
        for book in [uniform(2), uniform(3), uniform(4), normal_float(3), normal_float(4)] {
            assert!(book.windows(2).all(|w| w[0] < w[1]));
            assert_eq!((book[0], *book.last().unwrap()), (-1.0, 1.0));
        }
        for (side, bits) in [Side::Key, Side::Value].into_iter().flat_map(|s| [2, 3, 4].map(|b| (s, b))) {
            let book = universal(side, bits).unwrap();
            assert!(book.len() == 1 << bits && book.windows(2).all(|w| w[0] < w[1]) && book[0] > -1.0);
        }
        assert_eq!(universal(Side::Key, 5), None);
        assert_eq!(symmetric(2), [-2.0, -1.0, 0.0, 1.0]);
    }
}
