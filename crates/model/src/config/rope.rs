//! Angles of the rotary positions with the scaling that the model asks for.

use super::{Config, Keys, unsupported};
use crate::gguf::GgufError;

/// Per-pair divisors of the frequencies: how converters store llama3-style scaling.
pub(super) const FACTORS: &str = "rope_freqs.weight";
const DIMS: &str = "rope.dimension_count";
const BASE: &str = "rope.freq_base";
const SCALING: &str = "rope.scaling.type";

/// Radians per position of every channel pair, `head_dim / 2` of them.
pub(super) fn inv_freq(r: &Keys<'_>, config: &Config) -> Result<Vec<f64>, GgufError> {
    let head_dim = config.head_dim;
    let dims = r.size_or(DIMS, head_dim)?;
    if dims > head_dim || !dims.is_multiple_of(2) {
        return Err(r.field(DIMS, format!("an even number up to the head dimension {head_dim}"), dims));
    }
    // With dims < head_dim the pairs would be (i, i + dims/2), which the permutation at load does not undo.
    if config.half_split_rope && dims != head_dim {
        let supported = format!("{head_dim}, the whole head, for {}", config.architecture);
        return Err(unsupported(r.g, &r.key(DIMS), dims, &supported));
    }
    let base = match r.g.opt_float(&r.key(BASE))? {
        Some(base) => r.positive_value(BASE, base)?,
        None => 10_000.0,
    };
    let scale = linear_factor(r)?;
    let factors = match r.g.tensor(FACTORS) {
        None => vec![1.0; dims / 2],
        Some(_) => r.g.vector(FACTORS, dims / 2)?,
    };
    if let Some((i, f)) = factors.iter().enumerate().find(|(_, f)| **f <= 0.0) {
        return Err(GgufError::Field {
            path: r.g.path.clone(),
            field: format!("{FACTORS}, entry {i}"),
            expected: "a number above 0".to_owned(),
            got: f.to_string(),
        });
    }
    let turning = (0..dims / 2).zip(&factors).map(|(i, factor)| {
        let plain = base.powf(-2.0 * i as f64 / dims as f64);
        plain / (scale * f64::from(*factor))
    });
    Ok(turning.chain(std::iter::repeat(0.0)).take(head_dim / 2).collect())
}

/// What positions are divided by.
fn linear_factor(r: &Keys<'_>) -> Result<f64, GgufError> {
    const FACTOR: &str = "rope.scaling.factor";
    const OLD_FACTOR: &str = "rope.scale_linear";
    const SUPPORTED: &str = "none, linear, and llama3-style factors in the tensor rope_freqs.weight";
    if let Some(f) = r.g.opt_float(&r.key("rope.scaling.attn_factor"))?.filter(|f| *f != 1.0) {
        return Err(unsupported(r.g, &r.key("rope.scaling.attn_factor"), f, "1"));
    }
    // A factor without a type is linear: that is what it was before there were types.
    match r.g.opt_str(&r.key(SCALING))?.unwrap_or("linear") {
        "none" => Ok(1.0),
        "linear" => {
            for name in [FACTOR, OLD_FACTOR] {
                if let Some(f) = r.g.opt_float(&r.key(name))? {
                    return r.positive_value(name, f);
                }
            }
            Ok(1.0)
        }
        other => Err(unsupported(r.g, &r.key(SCALING), other, SUPPORTED)),
    }
}
