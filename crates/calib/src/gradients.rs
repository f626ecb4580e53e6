//! The gradient of the language-model loss with respect to every key and value of a window.
//!
//! Loss: mean over the window's `tokens - 1` predictions of the cross entropy of the next token. A different
//! scaling (a sum, say) would multiply every gradient by one constant, which no weighted mean notices.
//!
//! The forward pass keeps each layer's input and attention output; layers are dequantized one at a time, and the
//! head runs over chunks of positions, so that neither all logits nor all f32 weights are ever held.

use kvquant_kernels::linalg::gemm;
use kvquant_kernels::rope::{Rope, Rotation};
use kvquant_kernels::rowwise::exp;
use kvquant_kernels::weights::Weight;
use kvquant_model::Model;
use rayon::prelude::*;

use crate::layer::{DenseLayer, LayerGrads};
use crate::{CalibError, ops};

/// Bytes of logits held at a time.
pub(crate) const LOGIT_BYTES: usize = 64 << 20;
/// Rows of the head dequantized at a time.
pub(crate) const HEAD_ROWS: usize = 4096;

/// Bytes that the head takes beside its input and gradient.
pub(crate) fn head_bytes(hidden: usize) -> usize {
    LOGIT_BYTES + 4 * HEAD_ROWS * hidden
}

/// A window's rotations: one list of positions for each of the model's ropes.
pub(crate) struct Rotations(Vec<Vec<Rotation>>);

impl Rotations {
    pub(crate) fn new(model: &Model, tokens: usize) -> Self {
        let of = |inv_freq: &[f64]| {
            let rope = Rope { inv_freq: inv_freq.to_vec() };
            (0..tokens).map(|p| rope.rotation(p)).collect()
        };
        Rotations(model.config.rotary.iter().map(|r| of(&r.inv_freq)).collect())
    }

    /// Those of a layer.
    pub(crate) fn of(&self, model: &Model, layer: usize) -> &[Rotation] {
        &self.0[model.config.attention[layer].rotary]
    }
}

/// Changes keys and values of a layer before they are used.
#[cfg(test)]
pub(crate) type Edit<'a> = &'a dyn Fn(usize, &mut [f32], &mut [f32]);

/// The loss of one window (0 is set for its index in errors); `on_layer(layer, gradients)` is called from the last layer to the first.
///
/// # Errors
/// The loss is not finite, or `on_layer` fails.
pub(crate) fn window_gradients(
    model: &Model,
    tokens: &[u32],
    rotations: &Rotations,
    on_layer: &mut dyn FnMut(usize, &LayerGrads) -> Result<(), CalibError>,
) -> Result<f64, CalibError> {
    let mut x = embed(model, tokens);
    let mut kept = Vec::with_capacity(model.layers.len());
    for (i, layer) in model.layers.iter().enumerate() {
        let dense = DenseLayer::new(&model.config, i, layer);
        let (out, keep) = dense.forward(x, rotations.of(model, i), &|_, _| {});
        kept.push(keep);
        x = out;
    }
    let (loss, mut d) = head(model, &x, tokens, true);
    if !loss.is_finite() {
        return Err(CalibError::Loss { window: 0, loss });
    }
    for (i, layer) in model.layers.iter().enumerate().rev() {
        let Some(keep) = kept.pop() else { break };
        let grads = DenseLayer::new(&model.config, i, layer).backward(&keep, d, rotations.of(model, i), &|_, _| {});
        on_layer(i, &grads)?;
        d = grads.d_input;
    }
    Ok(loss)
}

/// The loss alone, with keys and values edited on the way.
#[cfg(test)]
pub(crate) fn window_loss(model: &Model, tokens: &[u32], rotations: &Rotations, edit: Edit<'_>) -> f64 {
    let mut x = embed(model, tokens);
    for (i, layer) in model.layers.iter().enumerate() {
        x = DenseLayer::new(&model.config, i, layer).forward(x, rotations.of(model, i), &|k, v| edit(i, k, v)).0;
    }
    head(model, &x, tokens, false).0
}

/// `[tokens, hidden]`
pub(crate) fn embed(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let hidden = model.config.hidden;
    let mut x = vec![0.0; tokens.len() * hidden];
    x.par_chunks_mut(hidden).zip(tokens).for_each(|(row, id)| {
        model.embed.dequant_row(*id as usize, row);
        row.iter_mut().for_each(|x| *x *= model.config.embedding_scale);
    });
    x
}

/// Loss, and its gradient with respect to the last layer's output `[tokens, hidden]` (empty unless wanted).
fn head(model: &Model, x: &[f32], tokens: &[u32], gradient: bool) -> (f64, Vec<f32>) {
    let (hidden, vocab, eps) = (model.config.hidden, model.head.rows(), model.config.norm_eps);
    let threads = rayon::current_num_threads();
    let predictions = tokens.len() - 1;
    let normed = ops::rms_norm(x, &model.final_norm, eps);
    let mut d_normed = vec![0.0; if gradient { x.len() } else { 0 }];
    let chunk = (LOGIT_BYTES / 4 / vocab).clamp(1, predictions);
    let mut logits = vec![0.0; chunk * vocab];
    let mut weights = vec![0.0; HEAD_ROWS.min(vocab) * hidden];
    let mut loss = 0.0;
    for from in (0..predictions).step_by(chunk) {
        let rows = chunk.min(predictions - from);
        let logits = &mut logits[..rows * vocab];
        for at in (0..vocab).step_by(HEAD_ROWS) {
            let w = dequant_rows(&model.head, at, &mut weights);
            let (n, a) = (w.len() / hidden, &normed[from * hidden..]);
            gemm(rows, n, hidden, 1.0, a, hidden, 1, w, 1, hidden, 0.0, &mut logits[at..], vocab, threads);
        }
        let targets = &tokens[from + 1..from + 1 + rows];
        let scale = 1.0 / predictions as f32;
        let losses: Vec<f64> = logits
            .par_chunks_mut(vocab)
            .zip(targets)
            .map(|(row, target)| capped_cross_entropy(row, model.config.logit_cap, *target as usize, scale))
            .collect();
        loss += losses.iter().sum::<f64>();
        if !gradient {
            continue;
        }
        for at in (0..vocab).step_by(HEAD_ROWS) {
            let w = dequant_rows(&model.head, at, &mut weights);
            let (n, c) = (w.len() / hidden, &mut d_normed[from * hidden..]);
            gemm(rows, hidden, n, 1.0, &logits[at..], vocab, 1, w, hidden, 1, 1.0, c, hidden, threads);
        }
    }
    let mut d = vec![0.0; d_normed.len()];
    if gradient {
        ops::rms_norm_back(x, &model.final_norm, eps, &d_normed, &mut d);
    }
    (loss / predictions as f64, d)
}

/// Rows `at..` of the head, as many as fit in `out`.
pub(crate) fn dequant_rows<'a>(head: &Weight, at: usize, out: &'a mut [f32]) -> &'a [f32] {
    let cols = head.cols();
    let rows = (out.len() / cols).min(head.rows() - at);
    let out = &mut out[..rows * cols];
    out.par_chunks_mut(cols).enumerate().for_each(|(i, row)| head.dequant_row(at + i, row));
    out
}

/// [`cross_entropy`] of logits x that become cap * tanh(x / cap) first.
fn capped_cross_entropy(row: &mut [f32], cap: Option<f32>, target: usize, scale: f32) -> f64 {
    let Some(cap) = cap else { return cross_entropy(row, target, scale) };
    row.iter_mut().for_each(|x| *x = (*x / cap).tanh());
    let tanh = row.to_vec();
    row.iter_mut().for_each(|x| *x *= cap);
    let loss = cross_entropy(row, target, scale);
    row.iter_mut().zip(tanh).for_each(|(d, t)| *d *= 1.0 - t * t);
    loss
}

/// Cross entropy of one row of logits, which become their gradient times `scale`.
fn cross_entropy(row: &mut [f32], target: usize, scale: f32) -> f64 {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m });
    let at_target = f64::from(row[target]);
    let mut sum = 0f64;
    for part in row.chunks_mut(256) {
        part.iter_mut().for_each(|x| *x = exp(*x - max));
        sum += f64::from(part.iter().sum::<f32>());
    }
    let factor = scale / sum as f32;
    row.iter_mut().for_each(|x| *x *= factor);
    row[target] -= scale;
    f64::from(max) + sum.ln() - at_target
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, slope, tiny_gemma, tiny_model};

    #[test]
    fn cross_entropy_gradient() {
        let logits = noise(7, 1);
        let mut grad = logits.clone();
        cross_entropy(&mut grad, 2, 0.5);
        for i in 0..7 {
            let want = 0.5 * slope(&logits, i, 1e-2, |x| cross_entropy(&mut x.to_vec(), 2, 1.0));
            assert!((f64::from(grad[i]) - want).abs() < 1e-4, "{i}: {} {want}", grad[i]);
        }
        let mut grad = logits.clone();
        capped_cross_entropy(&mut grad, Some(1.2), 2, 0.5);
        for i in 0..7 {
            let loss = |x: &[f32]| capped_cross_entropy(&mut x.to_vec(), Some(1.2), 2, 1.0);
            let want = 0.5 * slope(&logits, i, 1e-2, loss);
            assert!((f64::from(grad[i]) - want).abs() < 1e-4, "capped, {i}: {} {want}", grad[i]);
        }
    }

    /// Every key and value of a whole model: the gradient is the slope of the loss.
    #[test]
    fn key_and_value_gradients_are_slopes_of_the_loss() {
        for model in [tiny_model(false), tiny_model(true), tiny_gemma()] {
            let tokens = [3, 9, 1, 14, 7];
            let rotations = Rotations::new(&model, tokens.len());
            let mut all = Vec::new();
            let loss = window_gradients(&model, &tokens, &rotations, &mut |i, g| {
                all.push((i, g.keys.clone(), g.d_keys.clone(), g.values.clone(), g.d_values.clone()));
                Ok(())
            })
            .unwrap();
            assert_eq!(loss, window_loss(&model, &tokens, &rotations, &|_, _, _| {}));
            assert_eq!(all.iter().map(|g| g.0).collect::<Vec<_>>(), [1, 0]);
            let mut largest = 0f64;
            for (layer, keys, d_keys, values, d_values) in &all {
                for (is_key, x, d) in [(true, keys, d_keys), (false, values, d_values)] {
                    for i in 0..x.len() {
                        let want = slope(x, i, 5e-3, |x| {
                            window_loss(&model, &tokens, &rotations, &|l, k, v| {
                                if l == *layer {
                                    if is_key { k.copy_from_slice(x) } else { v.copy_from_slice(x) }
                                }
                            })
                        });
                        largest = largest.max(want.abs());
                        let error = (f64::from(d[i]) - want).abs();
                        assert!(error < 1e-4 + 1e-2 * want.abs(), "layer {layer}, keys {is_key}, {i}: {} {want}", d[i]);
                    }
                }
            }
            assert!(largest > 1e-2, "{largest}: the model is too flat to test anything");
        }
    }
}
