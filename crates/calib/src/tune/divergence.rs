//! KL divergence between the predictions of two hidden states, and its gradient.

use kvquant_kernels::linalg::gemm;
use kvquant_kernels::rowwise::exp;
use kvquant_model::Model;
use rayon::prelude::*;

use crate::gradients::{HEAD_ROWS, LOGIT_BYTES, dequant_rows};
use crate::ops;

/// Mean over positions of KL(teacher || student) of the last layer's outputs `[tokens, hidden]`, in nats, and its gradient
/// with respect to the student's (empty unless wanted).
pub(super) fn divergence(model: &Model, student: &[f32], teacher: &[f32], gradient: bool) -> (f64, Vec<f32>) {
    let (hidden, vocab, eps) = (model.config.hidden, model.head.rows(), model.config.norm_eps);
    let threads = rayon::current_num_threads();
    let tokens = student.len() / hidden;
    let normed = [student, teacher].map(|x| ops::rms_norm(x, &model.final_norm, eps));
    let mut d_normed = vec![0.0; if gradient { student.len() } else { 0 }];
    let chunk = (LOGIT_BYTES / 8 / vocab).clamp(1, tokens);
    let mut logits = [vec![0.0; chunk * vocab], vec![0.0; chunk * vocab]];
    let mut weights = vec![0.0; HEAD_ROWS.min(vocab) * hidden];
    let mut sum = 0.0;
    for from in (0..tokens).step_by(chunk) {
        let rows = chunk.min(tokens - from);
        for at in (0..vocab).step_by(HEAD_ROWS) {
            let w = dequant_rows(&model.head, at, &mut weights);
            for (normed, logits) in normed.iter().zip(&mut logits) {
                let (n, a) = (w.len() / hidden, &normed[from * hidden..]);
                gemm(rows, n, hidden, 1.0, a, hidden, 1, w, 1, hidden, 0.0, &mut logits[at..], vocab, threads);
            }
        }
        let [of_student, of_teacher] = &mut logits;
        let scale = 1.0 / tokens as f32;
        sum += of_student[..rows * vocab]
            .par_chunks_mut(vocab)
            .zip(of_teacher[..rows * vocab].par_chunks_mut(vocab))
            .map(|(s, t)| position(s, t, model.config.logit_cap, scale))
            .sum::<f64>();
        if !gradient {
            continue;
        }
        for at in (0..vocab).step_by(HEAD_ROWS) {
            let w = dequant_rows(&model.head, at, &mut weights);
            let (n, c) = (w.len() / hidden, &mut d_normed[from * hidden..]);
            gemm(rows, hidden, n, 1.0, &of_student[at..], vocab, 1, w, hidden, 1, 1.0, c, hidden, threads);
        }
    }
    let mut d = vec![0.0; d_normed.len()];
    if gradient {
        ops::rms_norm_back(student, &model.final_norm, eps, &d_normed, &mut d);
    }
    (sum / tokens as f64, d)
}

/// KL(teacher || student) of two rows of logits; the student's become its gradient times `scale`.
fn position(student: &mut [f32], teacher: &mut [f32], cap: Option<f32>, scale: f32) -> f64 {
    // d (cap tanh(x / cap)) / dx = 1 - tanh^2
    let slopes = cap.map(|cap| {
        let squash = |x: &mut f32| {
            let tanh = (*x / cap).tanh();
            *x = cap * tanh;
            1.0 - tanh * tanh
        };
        teacher.iter_mut().for_each(|x| {
            squash(x);
        });
        student.iter_mut().map(squash).collect::<Vec<f32>>()
    });
    let (zs, zt) = (log_sum(student), log_sum(teacher));
    let mut kl = 0.0;
    for (s, t) in student.chunks_mut(512).zip(teacher.chunks(512)) {
        let mut part = 0.0f32;
        for (s, t) in s.iter_mut().zip(t) {
            let (p, q) = (exp(t - zt), exp(*s - zs));
            part += p * ((t - zt) - (*s - zs));
            *s = scale * (q - p);
        }
        kl += f64::from(part);
    }
    if let Some(slopes) = slopes {
        student.iter_mut().zip(slopes).for_each(|(d, slope)| *d *= slope);
    }
    kl
}

fn log_sum(x: &[f32]) -> f32 {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = x.chunks(256).map(|c| f64::from(c.iter().map(|v| exp(v - max)).sum::<f32>())).sum();
    max + sum.ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, slope, tiny_gemma, tiny_model};

    #[test]
    fn the_gradient_is_the_slope_of_the_divergence() {
        for model in [tiny_model(true), tiny_gemma()] {
            let n = 3 * model.config.hidden;
            let (student, teacher) = (noise(n, 1), noise(n, 2));
            let (kl, d) = divergence(&model, &student, &teacher, true);
            assert!(kl > 1e-3 && divergence(&model, &student, &student, false).0.abs() < 1e-6);
            for i in 0..n {
                let want = slope(&student, i, 1e-2, |x| divergence(&model, x, &teacher, false).0);
                assert!((f64::from(d[i]) - want).abs() < 1e-4 + 1e-2 * want.abs(), "{i}: {} {want}", d[i]);
            }
        }
    }
}
