//! Inputs that are hard: constant, full of outliers, with all mass on one token, with scores of any size, at every edge of
//! vectors and blocks, far from position 0.

use super::*;

/// Lengths around the edges of vectors of 4, 8, 16 and 32 tokens and of a block.
const LENGTHS: [usize; 19] = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64];

/// Forms with ways of their own through the kernels: fp16 in both layouts, codes of one plane and of two, widths that
/// differ, scales of tokens.
const WAYS: [Form; 7] = [
    Form::Rows,
    Form::Tile,
    Form::Static(3),
    Form::Static(6),
    Form::Mixed,
    Form::Token(2, 0, true),
    Form::Token(4, 4, true),
];

/// Rows of decode and of prefill.
const ROWS: [usize; 2] = [3, DECODE_ROWS + 5];

/// Repeats one number: what it makes is constant.
fn constant() -> Noise {
    Noise(0)
}

#[test]
fn lengths_around_vector_and_block_edges() {
    let mut n = Noise(21);
    for (i, key) in WAYS.into_iter().enumerate() {
        for len in LENGTHS {
            let value = WAYS[(i + len) % WAYS.len()];
            let (k, v) = (Owned::new(&mut n, key, 64, len, 1.0, 5), Owned::new(&mut n, value, 64, len, 1.0, 5));
            for rows in ROWS {
                let q = n.vec(rows * 64, 0.3);
                // All of the block, and all but its last token for the first.
                for visible in [len, len - 1] {
                    let case = Case { q: &q, group: 3, visible, key: &k, value: &v, len, origin: Some(64), size: 1.0 };
                    case.check(&"length");
                }
            }
        }
    }
}

#[test]
fn head_sizes_and_groups() {
    let mut n = Noise(22);
    for d in [64, 80, 96, 128, 256] {
        for group in [1, 2, 3, 4, 5, 6, 7, 8, 16] {
            // One token, and some.
            for tokens in [1, 3] {
                let (k, v) = (n.below(WAYS.len()), n.below(WAYS.len()));
                check(&mut n, (WAYS[k], WAYS[v]), d, 40, group * tokens, group, 1.0, 128);
            }
        }
    }
}

#[test]
fn positions_to_ten_million() {
    let mut n = Noise(23);
    for origin in [0, 64, 1 << 17, 1_000_000, 4_194_304 + 1, 10_000_000] {
        for key in WAYS {
            for rows in ROWS {
                let (k, v) = (Owned::new(&mut n, key, 64, 64, 1.0, 5), Owned::new(&mut n, key, 64, 64, 1.0, 5));
                let q = n.vec(rows * 64, 0.3);
                let origin = Some(origin);
                let case = Case { q: &q, group: 1, visible: 64, key: &k, value: &v, len: 64, origin, size: 1.0 };
                case.check(&"far position");
            }
        }
    }
}

#[test]
fn constant_sides() {
    for key in FORMS {
        let value = if key == Form::Mixed { Form::Static(3) } else { key };
        let (k, v) =
            (Owned::new(&mut constant(), key, 80, 50, 1.0, 5), Owned::new(&mut constant(), value, 80, 50, 1.0, 5));
        for (rows, size) in [(ROWS[0], 0.2), (ROWS[1], 0.2), (ROWS[0], 4e4), (ROWS[1], 4e4), (ROWS[0], 0.0)] {
            // Without RoPE all scores of a row are the same, however large: the output is the mean of values.
            for origin in [None, Some(6400)].into_iter().take(if size > 1.0 { 1 } else { 2 }) {
                let q = Noise(24).vec(rows * 80, size);
                let case = Case { q: &q, group: rows, visible: 50, key: &k, value: &v, len: 50, origin, size: 1.0 };
                case.check(&("constant", size));
            }
        }
    }
}

#[test]
fn more_outliers_than_codes() {
    let mut n = Noise(25);
    for form in FORMS {
        for (d, len) in [(64, 64), (80, 33), (256, 64)] {
            let (k, v) = (Owned::new(&mut n, form, d, len, 1.0, 255), Owned::new(&mut n, form, d, len, 1.0, 255));
            let q = n.vec(ROWS[0] * d, 1.0 / (d as f32).sqrt());
            // Residuals add up to twice the size.
            let case =
                Case { q: &q, group: ROWS[0], visible: len, key: &k, value: &v, len, origin: Some(64), size: 2.0 };
            case.check(&"outliers");
        }
    }
}

/// The query that scores `score` on the token, and, since keys are random, far less on others.
fn towards(key: &Owned, token: usize, origin: Option<usize>, score: f64) -> Vec<f32> {
    let mut k: Vec<f64> = (0..key.d).map(|c| key.at(c, token)).collect();
    if let Some(origin) = origin {
        for (pair, f) in k.as_chunks_mut::<2>().0.iter_mut().zip(rope(key.d).inv_freq) {
            let (sin, cos) = ((origin + token) as f64 * f).sin_cos();
            *pair = [pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos];
        }
    }
    let square: f64 = k.iter().map(|x| x * x).sum();
    k.iter().map(|x| (x * score / square) as f32).collect()
}

#[test]
fn all_mass_on_one_token() {
    let mut n = Noise(26);
    for key in FORMS.into_iter().filter(|form| *form != Form::Static(0)) {
        let value = WAYS[n.below(WAYS.len())];
        let (k, v) = (Owned::new(&mut n, key, 64, 64, 1.0, 5), Owned::new(&mut n, value, 64, 64, 1.0, 5));
        for token in [0, 8, 31, 63] {
            for origin in [None, Some(10_000_000)] {
                for score in [1e3, 1e6] {
                    for rows in ROWS {
                        let q = towards(&k, token, origin, score).repeat(rows);
                        let case =
                            Case { q: &q, group: rows, visible: 64, key: &k, value: &v, len: 64, origin, size: 1.0 };
                        case.check(&("one token", token, score));
                    }
                }
            }
        }
    }
}

#[test]
fn very_large_scores_of_both_signs() {
    let mut n = Noise(27);
    for key in FORMS {
        // Scores of hundreds: nearly all mass on one token. The tolerance grows with the keys' size.
        check(&mut n, (key, Form::Static(3)), 64, 64, 3, 3, 60.0, 64);
        check(&mut n, (key, Form::Static(3)), 64, 64, 30, 3, 60.0, 64);
        let k = Owned::new(&mut constant(), key, 64, 64, 1.0, 0);
        let v = Owned::new(&mut n, Form::Token(3, 0, true), 64, 64, 1.0, 5);
        for size in [1e-30f32, -1e-30, 3e4, -3e4] {
            for rows in ROWS {
                // All scores are the same, tiny or of millions: exp sees their differences, which are 0.
                let q = vec![size; rows * 64];
                let case =
                    Case { q: &q, group: rows, visible: 64, key: &k, value: &v, len: 64, origin: None, size: 1.0 };
                case.check(&("the same score", size));
            }
        }
    }
}
