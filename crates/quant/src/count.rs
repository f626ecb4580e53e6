//! Codes as counts: the code of a value is how many midpoints lie below it. A piece of values at a time, whose counts stay
//! in the first cache while midpoints pass, in loops of a kind that compilers make vectors of.

/// Values of a piece.
const PIECE: usize = 64;

/// `codes[c]` = how many of `bounds[..][c]` lie below `x[c]`.
pub(crate) fn below(x: &[f32], bounds: &[Vec<f32>], codes: &mut [u8]) {
    for (i, (x, codes)) in x.chunks(PIECE).zip(codes.chunks_mut(PIECE)).enumerate() {
        let mut counts = [0u32; PIECE];
        for all in bounds {
            for ((n, x), bound) in counts.iter_mut().zip(x).zip(&all[i * PIECE..]) {
                *n += u32::from(x > bound);
            }
        }
        codes.iter_mut().zip(counts).for_each(|(code, n)| *code = n as u8);
    }
}

/// `codes[c]` = how many of `middles` lie below `(x[c] - zero) * inverse`.
pub(crate) fn below_scaled(x: &[f32], zero: f32, inverse: f32, middles: &[f32], codes: &mut [u8]) {
    for (x, codes) in x.chunks(PIECE).zip(codes.chunks_mut(PIECE)) {
        let (mut counts, mut values) = ([0u32; PIECE], [0.0; PIECE]);
        values.iter_mut().zip(x).for_each(|(to, v)| *to = (v - zero) * inverse);
        for m in middles {
            for (n, v) in counts.iter_mut().zip(&values[..x.len()]) {
                *n += u32::from(v > m);
            }
        }
        codes.iter_mut().zip(counts).for_each(|(code, n)| *code = n as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counts_are_counts(
            x in prop::collection::vec(-3f32..3.0, 1..70),
            middles in prop::collection::vec(-2f32..2.0, 0..16),
            (zero, inverse) in (-1f32..1.0, 0f32..2.0),
        ) {
            // A value may lie on a bound: it is not above it.
            let bounds: Vec<Vec<f32>> =
                middles.iter().map(|m| x.iter().enumerate().map(|(c, v)| if c % 5 == 0 { *v } else { m + c as f32 / 9.0 }).collect()).collect();
            let (mut codes, mut scaled) = (vec![9; x.len()], vec![9; x.len()]);
            below(&x, &bounds, &mut codes);
            below_scaled(&x, zero, inverse, &middles, &mut scaled);
            for (c, v) in x.iter().enumerate() {
                prop_assert_eq!(codes[c] as usize, bounds.iter().filter(|b| *v > b[c]).count());
                prop_assert_eq!(scaled[c] as usize, middles.iter().filter(|m| (v - zero) * inverse > **m).count());
            }
        }
    }
}
