//! Signposts and ranges tuned with the cache in the loop.
//!
//! ```text
//! a window ──forward, exact──▶ hidden states ──head──▶ p
//!          ──forward, every key and value quantized──▶ hidden states ──head──▶ q
//! KL(p || q) ──backward, straight through the quantizers──▶ gradients of what codes decode to ──Adam──▶ the fit
//! ```
//!
//! Calibration weighs each value's error by its own gradient, as if errors were small and alone; at 2 and 3 bits they are
//! neither. Here the loss sees all of them together. What a code decodes to is a signpost, so the gradient of a
//! signpost is the sum over the values that it stands for; choosing codes has none and is passed straight through. Widths,
//! transforms and bounds of outliers of mixed caches stay.

mod divergence;
mod side;

use std::cell::RefCell;

use kvquant_model::Model;
use kvquant_quant::{CodebookKind, CodedSpec, Fit, KeyStage, LayerFit, QuantError, Quantizer, Side, Spec, TokenCodes};

use crate::gradients::{Rotations, embed};
use crate::layer::{DenseLayer, Kept};
use crate::{CalibError, Progress};
use divergence::divergence;
use side::TunedSide;

/// How to tune.
#[derive(Debug, Clone, Copy)]
pub struct TuneOptions {
    /// Steps, of one window each.
    pub steps: usize,
    /// The first step's size, as a share of the distance between signposts; it falls to 0.
    pub rate: f32,
    /// Windows at the end that are measured on and never tuned on.
    pub held_out: usize,
    /// Steps from one measurement to the next.
    pub measure_every: usize,
}

/// What tuning brought: mean KL divergence from exact keys and values on the held-out windows, in nats.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// The spec.
    pub spec: Spec,
    /// Before the first step.
    pub before: f64,
    /// Of the fit that is kept: the best that was measured.
    pub after: f64,
    /// The step at which it was measured; 0 is the fit as it was.
    pub best_step: usize,
}

/// Tunes the fits of `specs` in `quantizer`, in place, on `windows` (token ids, all of one length).
///
/// # Errors
/// A spec other than `mix` and `nuq` (before RoPE, without Q-Norm) or without a fit, too few windows, or a divergence that is
/// not finite.
pub fn tune(
    model: &Model,
    windows: &[Vec<u32>],
    quantizer: &mut Quantizer,
    specs: &[Spec],
    options: &TuneOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Tuned>, CalibError> {
    let ctx = crate::check_windows(model, windows)?;
    let needed = options.held_out + 1;
    if options.held_out == 0 || windows.len() < needed {
        return Err(CalibError::TuneWindows { windows: windows.len(), needed: needed.max(2) });
    }
    quantizer.check_model(&model.fingerprint)?;
    let rotations = Rotations::new(model, ctx);
    let (train, held_out) = windows.split_at(windows.len() - options.held_out);
    let mut all = Vec::new();
    for spec in specs {
        let Spec::Coded(coded) = spec else { return Err(CalibError::NotTunable { spec: spec.clone() }) };
        let known = matches!(coded.codebook, CodebookKind::Nuq | CodebookKind::Mix { .. });
        if !known || coded.online || coded.qnorm || coded.stage == KeyStage::PostRope {
            return Err(CalibError::NotTunable { spec: spec.clone() });
        }
        if coded.sinks >= ctx {
            return Err(CalibError::Sinks { spec: spec.clone(), ctx });
        }
        let key = quantizer.fit(spec)?.spec.clone();
        let fit = quantizer.fits.iter_mut().find(|f| f.spec == key).expect("it was found just now");
        all.push(tune_fit(model, coded, fit, &rotations, [train, held_out], options, progress)?);
    }
    Ok(all)
}

fn tune_fit(
    model: &Model,
    spec: &CodedSpec,
    fit: &mut Fit,
    rotations: &Rotations,
    [train, held_out]: [&[Vec<u32>]; 2],
    options: &TuneOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Tuned, CalibError> {
    let mut layers: Vec<TunedLayer> = fit.layers.iter().map(|l| TunedLayer::new(model, spec, l)).collect();
    let stage = format!("tuning {}, step", Spec::Coded(spec.clone()));
    let teachers: Vec<Vec<f32>> = held_out.iter().map(|ids| exact_states(model, ids, rotations)).collect();
    let measure = |layers: &[TunedLayer]| -> Result<f64, CalibError> {
        let mut sum = 0.0;
        for (ids, teacher) in held_out.iter().zip(&teachers) {
            let (states, _) = forward(model, ids, rotations, layers)?;
            sum += divergence(model, &states, teacher, false).0;
        }
        Ok(sum / held_out.len() as f64)
    };
    let before = measure(&layers)?;
    let mut tuned = Tuned { spec: Spec::Coded(spec.clone()), before, after: before, best_step: 0 };
    for step in 0..options.steps {
        progress(Progress { stage: &stage, done: step, total: options.steps });
        let ids = &train[step % train.len()];
        let teacher = exact_states(model, ids, rotations);
        let (states, kept) = forward(model, ids, rotations, &layers)?;
        let (loss, d) = divergence(model, &states, &teacher, true);
        if !loss.is_finite() {
            return Err(CalibError::Loss { window: step % train.len(), loss });
        }
        backward(model, kept, d, rotations, &mut layers)?;
        // Half a cosine from the full rate to none.
        let left = (1.0 + (std::f32::consts::PI * step as f32 / options.steps as f32).cos()) / 2.0;
        layers.iter_mut().flat_map(|l| &mut l.sides).for_each(|s| s.step(options.rate * left));
        let done = step + 1;
        if done.is_multiple_of(options.measure_every.max(1)) || done == options.steps {
            let now = measure(&layers)?;
            if now < tuned.after {
                (tuned.after, tuned.best_step) = (now, done);
                for (layer, to) in layers.iter().zip(&mut fit.layers) {
                    *to = layer.fit();
                }
            }
        }
    }
    progress(Progress { stage: &stage, done: options.steps, total: options.steps });
    Ok(tuned)
}

/// Keys and values of one layer.
struct TunedLayer {
    sides: [TunedSide; 2],
    sinks: usize,
}

impl TunedLayer {
    fn new(model: &Model, spec: &CodedSpec, fit: &LayerFit) -> Self {
        let (kv_heads, head_dim) = (model.config.kv_heads, model.config.head_dim);
        let side = |side, fit| TunedSide::new(spec, side, kv_heads, head_dim, fit);
        TunedLayer { sides: [side(Side::Key, &fit.keys), side(Side::Value, &fit.values)], sinks: spec.sinks }
    }

    fn fit(&self) -> LayerFit {
        let [keys, values] = &self.sides;
        LayerFit { keys: keys.fit().clone(), values: values.fit().clone() }
    }

    /// Replaces keys and values by what the cache would give back; their codes.
    fn quantize(&self, k: &mut [f32], v: &mut [f32]) -> Result<[Vec<TokenCodes>; 2], (Side, QuantError)> {
        let [keys, values] = &self.sides;
        let codes = keys.quantize(k, self.sinks).map_err(|e| (Side::Key, e))?;
        Ok([codes, values.quantize(v, self.sinks).map_err(|e| (Side::Value, e))?])
    }
}

/// The last layer's output with exact keys and values `[tokens, hidden]`.
fn exact_states(model: &Model, ids: &[u32], rotations: &Rotations) -> Vec<f32> {
    let mut x = embed(model, ids);
    for (i, layer) in model.layers.iter().enumerate() {
        x = DenseLayer::new(&model.config, i, layer).forward(x, rotations.of(model, i), &|_, _| {}).0;
    }
    x
}

/// The same through the quantizers, and what the backward pass needs.
fn forward(
    model: &Model,
    ids: &[u32],
    rotations: &Rotations,
    layers: &[TunedLayer],
) -> Result<(Vec<f32>, Vec<Kept>), CalibError> {
    let mut x = embed(model, ids);
    let mut all = Vec::with_capacity(layers.len());
    for (i, (layer, tuned)) in model.layers.iter().zip(layers).enumerate() {
        let failed = RefCell::new(None);
        let edit = |k: &mut [f32], v: &mut [f32]| {
            if let Err(e) = tuned.quantize(k, v) {
                *failed.borrow_mut() = Some(e);
            }
        };
        let (out, kept) = DenseLayer::new(&model.config, i, layer).forward(x, rotations.of(model, i), &edit);
        if let Some((side, source)) = failed.into_inner() {
            return Err(CalibError::Quantizer { layer: i, side, source });
        }
        all.push(kept);
        x = out;
    }
    Ok((x, all))
}

/// Gradients of all signposts and ranges, from that of the last layer's output.
fn backward(
    model: &Model,
    mut kept: Vec<Kept>,
    mut d: Vec<f32>,
    rotations: &Rotations,
    layers: &mut [TunedLayer],
) -> Result<(), CalibError> {
    for (i, (layer, tuned)) in model.layers.iter().zip(layers).enumerate().rev() {
        let Some(keep) = kept.pop() else { break };
        let codes = RefCell::new(None);
        let edit = |k: &mut [f32], v: &mut [f32]| *codes.borrow_mut() = Some(tuned.quantize(k, v));
        let grads = DenseLayer::new(&model.config, i, layer).backward(&keep, d, rotations.of(model, i), &edit);
        let codes = codes.into_inner().expect("the backward pass forms keys and values again");
        let codes = codes.map_err(|(side, source)| CalibError::Quantizer { layer: i, side, source })?;
        let sinks = tuned.sinks;
        for ((side, codes), d) in tuned.sides.iter_mut().zip(&codes).zip([&grads.d_keys, &grads.d_values]) {
            side.gather(codes, d, sinks);
        }
        d = grads.d_input;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
