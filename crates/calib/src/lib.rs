//! Text to quantizer file.
//!
//! ```text
//! windows of ids ──forward, backward──▶ keys, values and their gradients, per layer     gradients, layer, attention
//!                ──percentiles───────▶ thresholds                                        thresholds
//!                ──weighted k-means──▶ signposts                                         kmeans, fit
//!                ──axes, books of all widths, choice──▶ mixed widths                     mixed
//! a quantizer ──forward through it, KL divergence, backward──▶ a better one              tune
//! ```
//!
//! One backward pass serves every spec: bits, outlier share, sinks, weights, RoPE stage and Q-Norm differ only in
//! what is done with the same samples. The gradients are written out by hand for the one shape that all families share, in
//! f32 on dequantized weights, because only those of activations are needed and a tape would keep too much.

mod attention;
mod error;
mod fit;
mod gradients;
mod kmeans;
mod layer;
mod mixed;
mod ops;
mod sample;
mod samples;
#[cfg(test)]
mod testing;
mod thresholds;
mod tune;

pub use error::CalibError;
pub use sample::{sample_windows, sample_windows_from};
pub use tune::{TuneOptions, Tuned, tune};

use std::collections::{BTreeMap, BTreeSet};

use kvquant_model::Model;
use kvquant_quant::{CodebookKind, CodedSpec, Fit, KeyStage, LayerFit, Provenance, Quantizer, Side, Spec};

use crate::fit::SideData;
use crate::gradients::Rotations;
use crate::mixed::Books;
use crate::samples::SideSamples;

/// How far a calibration has come.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// What is being done.
    pub stage: &'a str,
    /// Steps done of it.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
}

/// The memory that [`calibrate`] may take, in bytes, beside the model.
pub const MEMORY_LIMIT: usize = 4 << 30;

/// Calibrates every spec that needs it from one gradient pass over `windows` (token ids, all of one length), within
/// [`MEMORY_LIMIT`].
///
/// Specs may differ in bits, codebook, stage, outliers, weights, sinks, Q-Norm. Those that need no fit are skipped;
/// those that differ only in their recent window share one. `text_name` goes into the provenance.
///
/// # Errors
/// Windows that do not fit the model or each other, too little memory, no spec to fit, values or gradients that
/// are not finite, or a layer that no gradient reaches.
pub fn calibrate(
    model: &Model,
    windows: &[Vec<u32>],
    specs: &[Spec],
    text_name: &str,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Quantizer, CalibError> {
    calibrate_within(model, windows, specs, text_name, MEMORY_LIMIT, progress)
}

/// [`calibrate`] within `memory` bytes, beside the model.
///
/// # Errors
/// As [`calibrate`].
pub fn calibrate_within(
    model: &Model,
    windows: &[Vec<u32>],
    specs: &[Spec],
    text_name: &str,
    memory: usize,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Quantizer, CalibError> {
    let ctx = check_windows(model, windows)?;
    let specs = distinct(specs, ctx)?;
    let need = memory_needed(model, windows.len(), ctx, &specs);
    if need > memory {
        let (need_mib, limit_mib) = (need >> 20, memory >> 20);
        return Err(CalibError::Memory { need_mib, limit_mib, windows: windows.len(), ctx });
    }
    let rotations = Rotations::new(model, ctx);
    let samples = collect(model, windows, &rotations, progress)?;

    let total = samples.len();
    let mut fits: Vec<Fit> =
        specs.iter().map(|s| Fit { spec: Spec::Coded(s.clone()), layers: Vec::with_capacity(samples.len()) }).collect();
    let mut books: BTreeMap<usize, Vec<(Books, Books)>> =
        specs.iter().filter(|s| mean_bits(s).is_some()).map(|s| (s.sinks, Vec::new())).collect();
    for (layer, sides) in samples.into_iter().enumerate() {
        progress(Progress { stage: "codebooks, layer", done: layer, total });
        for (sinks, books) in &mut books {
            let of = |side, samples| Books::new(side_data(model, side, samples, ctx), *sinks);
            books.push((of(Side::Key, &sides.keys), of(Side::Value, &sides.values)));
        }
        let fitted = fit_layer(model, layer, sides, &specs, ctx, &rotations)?;
        let plain = specs.iter().zip(&mut fits).filter(|(s, _)| mean_bits(s).is_none());
        plain.zip(fitted).for_each(|((_, fit), layer)| fit.layers.push(layer));
    }
    for (spec, fit) in specs.iter().zip(&mut fits) {
        if let Some(hundredths) = mean_bits(spec) {
            fit.layers = mixed::fits(&books[&spec.sinks], hundredths);
        }
    }
    progress(Progress { stage: "codebooks, layer", done: total, total });
    let tool = concat!("kvquant ", env!("CARGO_PKG_VERSION")).to_owned();
    let provenance = Provenance { text: text_name.to_owned(), windows: windows.len(), ctx, tool };
    Ok(Quantizer { model: model.fingerprint.clone(), provenance, fits })
}

/// Mean bits in hundredths, where widths differ.
fn mean_bits(spec: &CodedSpec) -> Option<u32> {
    if let CodebookKind::Mix { hundredths } = spec.codebook { Some(hundredths) } else { None }
}

fn side_data(model: &Model, side: Side, samples: &SideSamples, ctx: usize) -> SideData {
    let (values, gradients) = samples.unpack();
    let (kv_heads, head_dim) = (model.config.kv_heads, model.config.head_dim);
    SideData { side, values, gradients, ctx, kv_heads, head_dim }
}

/// Keys and values of one layer.
struct LayerSamples {
    keys: SideSamples,
    values: SideSamples,
}

/// The tokens of a window.
fn check_windows(model: &Model, windows: &[Vec<u32>]) -> Result<usize, CalibError> {
    let ctx = windows.first().map_or(0, Vec::len);
    if ctx < 2 {
        return Err(CalibError::NoWindows { windows: windows.len(), ctx });
    }
    if ctx > model.config.context {
        return Err(CalibError::Context { ctx, context: model.config.context });
    }
    let vocab = model.embed.rows().min(model.head.rows());
    for (window, ids) in windows.iter().enumerate() {
        if ids.len() != ctx {
            return Err(CalibError::WindowLength { window, expected: ctx, got: ids.len() });
        }
        if let Some(position) = ids.iter().position(|id| *id as usize >= vocab) {
            return Err(CalibError::Token { window, position, id: ids[position], vocab });
        }
    }
    Ok(ctx)
}

/// The specs that need a fit, each once; a fit does not depend on the recent window.
fn distinct(specs: &[Spec], ctx: usize) -> Result<Vec<CodedSpec>, CalibError> {
    let (mut kept, mut keys) = (Vec::new(), BTreeSet::new());
    for spec in specs.iter().filter(|s| s.needs_fit()) {
        if spec.sinks() >= ctx {
            return Err(CalibError::Sinks { spec: spec.clone(), ctx });
        }
        if let Spec::Coded(coded) = spec
            && keys.insert(spec.fit_key())
        {
            kept.push(CodedSpec { recent: 0, ..coded.clone() });
        }
    }
    if kept.is_empty() {
        let specs = specs.iter().map(Spec::to_string).collect::<Vec<_>>().join(", ");
        return Err(CalibError::NothingToFit { specs });
    }
    Ok(kept)
}

/// Estimated peak in bytes: all samples, and the larger of one window's passes and one layer's fit.
fn memory_needed(model: &Model, windows: usize, ctx: usize, specs: &[CodedSpec]) -> usize {
    let c = &model.config;
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let samples = 2 * c.layers * windows * ctx * kv * SideSamples::BYTES;
    let kept = c.layers * ctx * (c.hidden + q + c.heads);
    let weights = c.hidden * (2 * q + 2 * kv + 3 * c.intermediate);
    // Alive at the worst moment of a layer's backward pass: gate, up and their gradient; hidden states; heads.
    let graph = ctx * (4 * c.intermediate + 7 * c.hidden + 7 * q + 10 * kv);
    let pass = 4 * (kept + weights + graph) + gradients::head_bytes(c.hidden);
    let sides = if specs.iter().any(|s| s.stage == KeyStage::PostRope) { 2 } else { 1 };
    // Values and gradients as f32, and the columns that thresholds are selected from.
    let fit = 4 * windows * ctx * kv * (2 * sides + 1);
    samples + pass.max(fit)
}

/// The gradient pass over all windows.
fn collect(
    model: &Model,
    windows: &[Vec<u32>],
    rotations: &Rotations,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<LayerSamples>, CalibError> {
    let channels = model.config.kv_heads * model.config.head_dim;
    let tokens = windows.len() * windows.first().map_or(0, Vec::len);
    let mut samples: Vec<LayerSamples> = model
        .layers
        .iter()
        .map(|layer| LayerSamples {
            // A norm after the bias takes its offset away.
            keys: SideSamples::new(
                layer.k_bias.clone().filter(|_| layer.k_norm.is_none()).unwrap_or_default(),
                channels,
                tokens,
            ),
            values: SideSamples::new(layer.v_bias.clone().unwrap_or_default(), channels, tokens),
        })
        .collect();
    for (window, ids) in windows.iter().enumerate() {
        progress(Progress { stage: "gradients, window", done: window, total: windows.len() });
        gradients::window_gradients(model, ids, rotations, &mut |layer, g| {
            let s = &mut samples[layer];
            for (side, to, x, d) in
                [(Side::Key, &mut s.keys, &g.keys, &g.d_keys), (Side::Value, &mut s.values, &g.values, &g.d_values)]
            {
                if !to.push(x, d) {
                    return Err(CalibError::NotFinite { layer, side, window: Some(window) });
                }
                if d.iter().all(|d| *d == 0.0) {
                    return Err(CalibError::NoGradient { layer, side, window });
                }
            }
            Ok(())
        })
        .map_err(|e| match e {
            CalibError::Loss { loss, .. } => CalibError::Loss { window, loss },
            e => e,
        })?;
    }
    progress(Progress { stage: "gradients, window", done: windows.len(), total: windows.len() });
    Ok(samples)
}

/// One layer's fits, in the order of those specs that have one width.
fn fit_layer(
    model: &Model,
    layer: usize,
    samples: LayerSamples,
    specs: &[CodedSpec],
    ctx: usize,
    rotations: &Rotations,
) -> Result<Vec<LayerFit>, CalibError> {
    let specs: Vec<&CodedSpec> = specs.iter().filter(|s| mean_bits(s).is_none()).collect();
    let data = |side, samples| side_data(model, side, samples, ctx);
    let fit_values = data(Side::Value, &samples.values);
    let values = specs.iter().map(|s| fit_values.fit(layer, s)).collect::<Result<Vec<_>, _>>()?;
    drop(fit_values);
    let any = |stage| specs.iter().any(|s| s.stage == stage);
    let before = any(KeyStage::PreRope).then(|| data(Side::Key, &samples.keys));
    let after = any(KeyStage::PostRope).then(|| data(Side::Key, &samples.keys).rotated(rotations.of(model, layer)));
    let mut fits = Vec::with_capacity(specs.len());
    for (spec, values) in specs.iter().zip(values) {
        let stage = match spec.stage {
            KeyStage::PreRope => &before,
            KeyStage::PostRope => &after,
        };
        if let Some(keys) = stage {
            fits.push(LayerFit { keys: keys.fit(layer, spec)?, values });
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{spec, tiny_model};
    use rand::{Rng, SeedableRng};

    fn windows(n: usize, ctx: usize) -> Vec<Vec<u32>> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        (0..n).map(|_| (0..ctx).map(|_| rng.random_range(0..19)).collect()).collect()
    }

    fn silent(_: Progress<'_>) {}

    #[test]
    fn every_spec_is_fitted_once_from_one_pass() {
        let model = tiny_model(true);
        let pre = spec(3, 100);
        let post = CodedSpec { stage: KeyStage::PostRope, ..pre.clone() };
        let again = CodedSpec { recent: 64, ..pre.clone() };
        let two = CodedSpec { qnorm: true, sinks: 0, ..spec(2, 0) };
        let specs: Vec<Spec> = [pre, post, again, two].map(Spec::Coded).into_iter().chain([Spec::Fp16]).collect();
        let mut seen = Vec::new();
        let q = calibrate(&model, &windows(3, 40), &specs, "a text", &mut |p| seen.push((p.stage.to_owned(), p.done)))
            .unwrap();
        assert_eq!(q.fits.iter().map(|f| f.spec.clone()).collect::<Vec<_>>(), [0, 1, 3].map(|i| specs[i].clone()));
        assert_eq!((q.provenance.windows, q.provenance.ctx, q.provenance.text.as_str()), (3, 40, "a text"));
        assert_eq!(q.model, model.fingerprint);
        for fit in &q.fits {
            assert_eq!(fit.layers.len(), 2);
            for layer in &fit.layers {
                assert_eq!((layer.keys.lower.len(), layer.values.lower.len()), (8, 0));
                assert!(layer.keys.encode.len() >= 4 && layer.values.encode.len() >= 4);
            }
        }
        assert_ne!(q.fits[0].layers[0].keys, q.fits[1].layers[0].keys);
        assert_eq!(q.fits[0].layers[0].values, q.fits[1].layers[0].values);
        assert_eq!(seen.len(), 4 + 3);
    }

    #[test]
    fn bad_windows_are_named() {
        let model = tiny_model(false);
        let specs = [Spec::Coded(spec(3, 100))];
        let run = |w: &[Vec<u32>]| calibrate(&model, w, &specs, "t", &mut silent).unwrap_err();
        assert!(matches!(run(&[]), CalibError::NoWindows { windows: 0, .. }));
        assert!(matches!(run(&[vec![1]]), CalibError::NoWindows { windows: 1, ctx: 1 }));
        assert!(matches!(run(&[vec![1, 2], vec![1]]), CalibError::WindowLength { window: 1, expected: 2, got: 1 }));
        assert!(matches!(run(&[vec![1, 19]]), CalibError::Token { window: 0, position: 1, id: 19, vocab: 19 }));
        assert!(matches!(run(&[vec![1; 513]]), CalibError::Context { ctx: 513, context: 512 }));
    }

    #[test]
    fn bad_specs_and_memory_are_named() {
        let model = tiny_model(false);
        let w = windows(2, 8);
        let nothing = calibrate(&model, &w, &[Spec::Fp16], "t", &mut silent).unwrap_err();
        assert!(matches!(nothing, CalibError::NothingToFit { .. }), "{nothing}");
        let sinks = Spec::Coded(CodedSpec { sinks: 8, ..spec(3, 100) });
        let sinks = calibrate(&model, &w, &[sinks], "t", &mut silent).unwrap_err();
        assert!(matches!(sinks, CalibError::Sinks { ctx: 8, .. }), "{sinks}");
        let small = calibrate_within(&model, &w, &[Spec::Coded(spec(3, 100))], "t", 1 << 20, &mut silent).unwrap_err();
        assert!(matches!(small, CalibError::Memory { limit_mib: 1, .. }), "{small}");
    }

    #[test]
    fn a_damaged_model_is_refused() {
        let mut model = tiny_model(false);
        model.final_norm[3] = f32::NAN;
        let specs = [Spec::Coded(spec(3, 100))];
        let error = calibrate(&model, &windows(2, 8), &specs, "t", &mut silent).unwrap_err();
        assert!(matches!(error, CalibError::Loss { window: 0, .. }), "{error}");
        // A head that ignores its input: no gradient reaches the layers.
        model.final_norm.fill(0.0);
        let error = calibrate(&model, &windows(2, 8), &specs, "t", &mut silent).unwrap_err();
        assert!(matches!(error, CalibError::NoGradient { layer: 1, window: 0, .. }), "{error}");
    }
}
