//! Two rows of logits to the numbers of a position.

use kvquant_kernels::rowwise::exp;
use rayon::prelude::*;

/// What one position says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Score {
    /// -ln p(next token), in nats.
    pub nll: f64,
    /// KL(reference || this), in nats.
    pub kld: f64,
    /// Whether the most likely token is the reference's.
    pub agrees: bool,
}

/// Scores rows of logits `[rows, vocab]` against the reference's; `next[row]` is the token that follows, if any is
/// scored there.
pub(crate) fn score(logits: &[f32], reference: &[f32], vocab: usize, next: &[Option<u32>]) -> Vec<Score> {
    logits
        .par_chunks(vocab)
        .zip(reference.par_chunks(vocab))
        .zip(next)
        .filter_map(|((l, r), next)| next.map(|id| position(l, r, id as usize)))
        .collect()
}

/// The most likely token of a row.
pub(crate) fn best(row: &[f32]) -> usize {
    normaliser(row).0
}

/// Most likely token and ln sum exp.
fn normaliser(x: &[f32]) -> (usize, f64) {
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (i, &v) in x.iter().enumerate() {
        if v > max {
            (best, max) = (i, v);
        }
    }
    // Pieces of 512 are summed in f32, which vectorizes; the pieces in f64.
    let sum: f64 = x.chunks(512).map(|c| lanes(c, |v| exp(v - max)) as f64).sum();
    (best, max as f64 + sum.ln())
}

fn lanes(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for c in chunks {
        for (s, v) in sums.iter_mut().zip(c) {
            *s += f(*v);
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|v| f(*v)).sum::<f32>()
}

fn position(logits: &[f32], reference: &[f32], next: usize) -> Score {
    let ((best, z), (best_r, z_r)) = (normaliser(logits), normaliser(reference));
    // KL = sum p_r (ln p_r - ln p) = sum p_r (r - l) + z - z_r
    let (shift, mut kld) = (z_r as f32, 0.0f64);
    for (l, r) in logits.chunks(512).zip(reference.chunks(512)) {
        let mut sums = [0.0f32; 16];
        let ((l, l_rest), (r, r_rest)) = (l.as_chunks::<16>(), r.as_chunks::<16>());
        for (l, r) in l.iter().zip(r) {
            for i in 0..16 {
                sums[i] += exp(r[i] - shift) * (r[i] - l[i]);
            }
        }
        let rest: f32 = l_rest.iter().zip(r_rest).map(|(l, r)| exp(r - shift) * (r - l)).sum();
        kld += (sums.iter().sum::<f32>() + rest) as f64;
    }
    Score { nll: z - logits[next] as f64, kld: (kld + z - z_r).max(0.0), agrees: best == best_r }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_follow_their_definitions() {
        let vocab = 1037;
        let row =
            |seed: usize| -> Vec<f32> { (0..vocab).map(|i| ((i * 7919 + seed * 31) % 2003) as f32 / 150.0).collect() };
        let (l, r) = (row(1), row(40));
        let p = |x: &[f32]| -> Vec<f64> {
            let sum: f64 = x.iter().map(|v| (*v as f64).exp()).sum();
            x.iter().map(|v| (*v as f64).exp() / sum).collect()
        };
        let (pl, pr) = (p(&l), p(&r));
        let kld: f64 = pl.iter().zip(&pr).map(|(a, b)| b * (b / a).ln()).sum();
        let got = score(&[l.clone(), r.clone()].concat(), &[r.clone(), r.clone()].concat(), vocab, &[Some(5), Some(5)]);
        assert!((got[0].nll + pl[5].ln()).abs() < 1e-5, "{} {}", got[0].nll, -pl[5].ln());
        assert!((got[0].kld - kld).abs() < 1e-4 * kld, "{} {kld}", got[0].kld);
        assert!(!got[0].agrees && got[1].agrees);
        assert!(got[1].kld < 1e-6);
        assert_eq!(score(&l, &r, vocab, &[None]), []);
    }
}
