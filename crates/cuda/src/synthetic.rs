//! Random histories and quantizers for them.

use kvquant_quant::{
    CodebookKind, CodedSpec, FisherWeights, KeyStage, LayerFit, QuantError, Scope, Side, SideFit, SideQuantizer,
    normal_float,
};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Where 1 % of `kernels/copy.cu`'s noise of size 1 lies outside.
pub(crate) const NOISE_REACH: f32 = 2.4446;

/// About normal.
pub(crate) fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (a, b): (f32, f32) = (rng.random(), rng.random());
    (-2.0 * a.max(1e-9).ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

/// nuqB-1% with given thresholds of keys.
pub(crate) fn quantizers(
    bits: usize,
    kv_heads: usize,
    dim: usize,
    lower: Vec<f32>,
    upper: Vec<f32>,
) -> Result<(SideQuantizer, SideQuantizer), QuantError> {
    let spec = CodedSpec {
        bits: bits as u32,
        codebook: CodebookKind::Nuq,
        outliers: 100,
        keys: Scope::Channel,
        values: Scope::Token,
        stage: KeyStage::PreRope,
        sinks: 0,
        recent: 0,
        qnorm: false,
        weights: FisherWeights::FisherScale2,
        zero_point: true,
        online: false,
    };
    let encode = normal_float(bits as u32);
    // Multiples of a 126th of the largest, so that the decode kernel's 8 bits hold them.
    let step = 0.983 / 126.0;
    let decode: Vec<f32> = encode.iter().map(|x| ((0.98 * x + 0.003) / step).round() * step).collect();
    let side = |lower, upper| SideFit { lower, upper, encode: encode.clone(), decode: decode.clone(), mixed: None };
    let fit = LayerFit { keys: side(lower, upper), values: side(Vec::new(), Vec::new()) };
    let make = |s| SideQuantizer::new(&spec, s, kv_heads, dim, Some(&fit));
    Ok((make(Side::Key)?, make(Side::Value)?))
}

/// RoPE's usual frequencies.
pub(crate) fn frequencies(dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| 500_000f64.powf(-2.0 * i as f64 / dim as f64)).collect()
}
