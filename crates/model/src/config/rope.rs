//! Angles of the rotary positions with the scaling that the model asks for.

use std::f64::consts::TAU;

use super::{Attention, Config, Keys, Tensors};
use crate::source::{Source, SourceError};

/// Per-pair divisors of the frequencies: how converters store llama3-style scaling.
pub(super) const FACTORS: &str = "rope_freqs.weight";
/// Longrope's two sets of them.
pub(super) const LONG: &str = "rope_factors_long.weight";
pub(super) const SHORT: &str = "rope_factors_short.weight";
const DIMS: &str = "rope.dimension_count";
const SUPPORTED: &str = "none (default), linear, dynamic, yarn, llama3, longrope";

/// How positions turn the queries and keys of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Radians per position of every channel pair, with the model's scaling: `head_dim / 2` entries, 0 for pairs that do
    /// not turn.
    pub inv_freq: Vec<f64>,
    /// What a head's queries are multiplied by, channel by channel, beside 1 / sqrt(head_dim); empty for nothing. It
    /// holds a scale of the model's own and what some scalings multiply cos and sin with.
    pub query_scale: Vec<f32>,
}

/// A scaling of the frequencies.
#[derive(Debug, Clone, PartialEq)]
enum Scaling {
    None,
    Linear(f64),
    /// Divisors pair by pair.
    Factors(Vec<f64>),
    /// The base grows with the context, from `trained` positions on.
    Dynamic {
        factor: f64,
        trained: f64,
    },
    Yarn {
        factor: f64,
        trained: f64,
        fast: f64,
        slow: f64,
        truncate: bool,
        attention: Option<f64>,
    },
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        trained: f64,
    },
    /// Divisors for contexts up to `trained`, and beyond.
    Long {
        short: Vec<f64>,
        long: Vec<f64>,
        trained: f64,
        attention: Option<f64>,
    },
}

/// Sets what the config says of rotations, and its context.
pub(super) fn read(
    r: &Keys<'_>,
    c: &mut Config,
    windows: &[Option<usize>],
    wanted: Option<usize>,
) -> Result<(), SourceError> {
    let d = c.head_dim;
    c.rope_dims = dims(r, d)?;
    let (base, scaling) = match r.source {
        Source::Gguf(_) => (first_base(r, &["rope.freq_base"])?, gguf_scaling(r, c)?),
        Source::Folder(_) => {
            let names = ["rope_parameters.full_attention.rope_theta", "rope_parameters.rope_theta", "rope_theta"];
            (first_base(r, &names)?, json_scaling(r, c)?)
        }
    };
    let stated = c.context;
    c.context = scaling.context(stated, wanted);
    let (inv_freq, attention) = scaling.apply(base.unwrap_or(10_000.0), c.rope_dims, c.context, stated);
    let own = query_scale(r, c)?;
    c.rotary = vec![rotary(inv_freq, own, attention, d)];
    let local = match r.family.local_base {
        Some(default) if windows.iter().any(Option::is_some) => {
            let names = match r.source {
                Source::Gguf(_) => &["rope.freq_base_swa"][..],
                Source::Folder(_) => &["rope_parameters.sliding_attention.rope_theta", "rope_local_base_freq"],
            };
            let kind = "rope_parameters.sliding_attention.rope_type";
            if let Some(got) = r.fields().opt_str(kind)?.filter(|t| *t != "default") {
                return Err(r.unsupported(kind, got, "default, for layers with a window"));
            }
            let local = first_base(r, names)?.unwrap_or(default);
            let (inv_freq, _) = Scaling::None.apply(local, c.rope_dims, c.context, stated);
            c.rotary.push(rotary(inv_freq, own, 1.0, d));
            1
        }
        _ => 0,
    };
    c.attention =
        windows.iter().map(|w| Attention { rotary: if w.is_some() { local } else { 0 }, window: *w }).collect();
    Ok(())
}

/// `own`: beside 1 / sqrt(head_dim); `attention`: what cos and sin are multiplied with, in queries and in keys.
fn rotary(mut inv_freq: Vec<f64>, own: f64, attention: f64, head_dim: usize) -> Rotary {
    let turning = inv_freq.len();
    inv_freq.resize(head_dim / 2, 0.0);
    let scale = |pair: usize| (own * if pair < turning { attention * attention } else { 1.0 }) as f32;
    let mut query_scale: Vec<f32> = (0..head_dim).map(|c| scale(c / 2)).collect();
    if query_scale.iter().all(|s| *s == 1.0) {
        query_scale.clear();
    }
    Rotary { inv_freq, query_scale }
}

fn dims(r: &Keys<'_>, head_dim: usize) -> Result<usize, SourceError> {
    let (name, dims) = match r.source {
        Source::Gguf(_) => (DIMS, r.size_or(DIMS, head_dim)?),
        Source::Folder(_) => {
            let mut found = ("partial_rotary_factor", 1.0);
            for name in ["partial_rotary_factor", "rope_parameters.partial_rotary_factor"] {
                if let Some(share) = r.opt_positive(name)? {
                    found = (name, share);
                }
            }
            (found.0, (head_dim as f64 * found.1) as usize)
        }
    };
    if dims == 0 || dims > head_dim || !dims.is_multiple_of(2) {
        return Err(r.field(name, format!("an even number of channels up to the head dimension {head_dim}"), dims));
    }
    Ok(dims)
}

/// The first of several keys that is there.
fn first_base(r: &Keys<'_>, names: &[&str]) -> Result<Option<f64>, SourceError> {
    for name in names {
        if let Some(base) = r.fields().opt_float(&r.key(name))? {
            return r.positive_value(name, base).map(Some);
        }
    }
    Ok(None)
}

/// The model's own scale of scores, over 1 / sqrt(head_dim).
fn query_scale(r: &Keys<'_>, c: &Config) -> Result<f64, SourceError> {
    let scalar = match r.source {
        Source::Gguf(_) if r.family.hidden_scale_layers == Some(c.layers) => Some(c.hidden as f64 / c.heads as f64),
        Source::Gguf(_) => None,
        Source::Folder(_) => r.opt_positive("query_pre_attn_scalar")?,
    };
    Ok(scalar.map_or(1.0, |s| (c.head_dim as f64 / s).sqrt()))
}

fn gguf_scaling(r: &Keys<'_>, c: &Config) -> Result<Scaling, SourceError> {
    let tensors = Tensors { source: r.source, family: r.family };
    let factors = |name: &str| -> Result<Vec<f64>, SourceError> {
        let all = tensors.vector(name, c.rope_dims / 2)?;
        match all.iter().position(|f| *f <= 0.0) {
            None => Ok(all.into_iter().map(f64::from).collect()),
            Some(i) => Err(r.fields().field(&format!("{name}, entry {i}"), "a number above 0", &all[i].to_string())),
        }
    };
    const KIND: &str = "rope.scaling.type";
    const ATTENTION: &str = "rope.scaling.attn_factor";
    let kind = r.fields().opt_str(&r.key(KIND))?;
    let attention = r.opt_positive(ATTENTION)?;
    let factor = match r.opt_positive("rope.scaling.factor")? {
        Some(f) => f,
        None => r.opt_positive("rope.scale_linear")?.unwrap_or(1.0),
    };
    let trained = r.opt_positive("rope.scaling.original_context_length")?.unwrap_or(c.context as f64);
    if kind == Some("yarn") {
        let number = |name: &str, default| Ok(r.opt_positive(name)?.unwrap_or(default));
        let (fast, slow) = (number("rope.scaling.yarn_beta_fast", 32.0)?, number("rope.scaling.yarn_beta_slow", 1.0)?);
        for (name, neutral) in [("rope.scaling.yarn_ext_factor", 1.0), ("rope.scaling.yarn_log_multiplier", 0.0)] {
            if let Some(got) = r.fields().opt_float(&r.key(name))?.filter(|v| *v != neutral && *v != -1.0) {
                return Err(r.unsupported(name, got, format!("{neutral}, or no such key")));
            }
        }
        let attention = Some(attention.unwrap_or(1.0) * mscale(factor));
        return Ok(Scaling::Yarn { factor, trained, fast, slow, truncate: true, attention });
    }
    if kind == Some("longrope") || tensors.shape(LONG).is_some() {
        let attention = Some(attention.unwrap_or(1.0));
        return Ok(Scaling::Long { short: factors(SHORT)?, long: factors(LONG)?, trained, attention });
    }
    if let Some(got) = attention.filter(|f| *f != 1.0) {
        return Err(r.unsupported(ATTENTION, got, "1, but for yarn and longrope"));
    }
    match kind {
        _ if tensors.shape(FACTORS).is_some() => Ok(Scaling::Factors(factors(FACTORS)?)),
        Some("none") => Ok(Scaling::None),
        // A factor without a type is linear: that is what it was before there were types.
        None | Some("linear") => Ok(Scaling::Linear(factor)),
        Some(other) => Err(r.unsupported(KIND, other, "none, linear, yarn, longrope, and llama3 as rope_freqs.weight")),
    }
}

fn json_scaling(r: &Keys<'_>, c: &Config) -> Result<Scaling, SourceError> {
    // As newer configurations nest it, as some do for layers of both kinds, as older ones do.
    const PREFIXES: [&str; 3] = ["rope_parameters.full_attention", "rope_parameters", "rope_scaling"];
    let of = |prefix: &&&str, name: &str| format!("{prefix}.{name}");
    let kind_of = |p: &&str| ["rope_type", "type"].iter().map(|n| of(&p, n)).find(|k| r.fields().get(k).is_some());
    let Some((prefix, kind)) = PREFIXES.iter().find_map(|p| kind_of(p).map(|k| (p, k))) else {
        return Ok(Scaling::None);
    };
    let name = |n: &str| of(&prefix, n);
    let needed = |n: &str| r.positive(&name(n));
    let optional = |n: &str| r.opt_positive(&name(n));
    let stated = c.context as f64;
    // Some configurations have it outside.
    let trained = || match optional("original_max_position_embeddings")? {
        Some(n) => Ok::<_, SourceError>(Some(n)),
        None => r.opt_positive("original_max_position_embeddings"),
    };
    Ok(match r.fields().str(&kind)? {
        "default" => Scaling::None,
        "linear" => Scaling::Linear(needed("factor")?),
        "dynamic" => Scaling::Dynamic { factor: needed("factor")?, trained: stated },
        "llama3" => {
            let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            if low >= high {
                return Err(r.field(&name("high_freq_factor"), format!("more than low_freq_factor, {low}"), high));
            }
            let trained = needed("original_max_position_embeddings")?;
            Scaling::Llama3 { factor: needed("factor")?, low, high, trained }
        }
        "yarn" => {
            let trained = trained()?.unwrap_or(stated);
            let factor = optional("factor")?.unwrap_or(stated / trained);
            let attention = match (optional("attention_factor")?, optional("mscale")?, optional("mscale_all_dim")?) {
                (Some(stated), ..) => stated,
                (None, Some(m), Some(all)) => scaled_mscale(factor, m) / scaled_mscale(factor, all),
                _ => mscale(factor),
            };
            let (fast, slow) = (optional("beta_fast")?.unwrap_or(32.0), optional("beta_slow")?.unwrap_or(1.0));
            let truncate = r.fields().opt_bool(&name("truncate"))?.unwrap_or(true);
            Scaling::Yarn { factor, trained, fast, slow, truncate, attention: Some(attention) }
        }
        "longrope" | "su" => {
            let factors = |n: &str| -> Result<Vec<f64>, SourceError> {
                let key = name(n);
                let all = r.fields().opt_floats(&key)?.unwrap_or_default();
                if all.len() != c.rope_dims / 2 || !all.iter().all(|f| f.is_finite() && *f > 0.0) {
                    let expected = format!("{} numbers above 0, one for each channel pair that turns", c.rope_dims / 2);
                    return Err(r.field(&key, expected, format!("{all:?}")));
                }
                Ok(all)
            };
            let trained = trained()?.unwrap_or(stated);
            let grown = optional("factor")?.unwrap_or(stated / trained);
            let attention = match optional("attention_factor")? {
                Some(stated) => stated,
                None if grown <= 1.0 => 1.0,
                None => (1.0 + grown.ln() / trained.ln()).sqrt(),
            };
            let (short, long) = (factors("short_factor")?, factors("long_factor")?);
            Scaling::Long { short, long, trained, attention: Some(attention) }
        }
        other => return Err(r.unsupported(&kind, other, SUPPORTED)),
    })
}

/// What YaRN multiplies cos and sin with.
fn mscale(factor: f64) -> f64 {
    scaled_mscale(factor, 1.0)
}

fn scaled_mscale(factor: f64, by: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 }
}

impl Scaling {
    /// Positions to be used, of `stated` ones, when `wanted` are asked for.
    fn context(&self, stated: usize, wanted: Option<usize>) -> usize {
        let beyond = |trained: f64| wanted.is_some_and(|w| w as f64 > trained);
        match self {
            Scaling::Yarn { factor, trained, .. } => stated.max((factor * trained) as usize),
            Scaling::Dynamic { factor, trained } if beyond(*trained) => {
                let most = (factor * trained) as usize;
                wanted.unwrap_or(stated).min(most.max(stated))
            }
            Scaling::Long { trained, .. } if !beyond(*trained) => stated.min(*trained as usize),
            _ => stated,
        }
    }

    /// Radians per position of the `dims / 2` pairs that turn, and what cos and sin are multiplied with.
    fn apply(&self, base: f64, dims: usize, context: usize, stated: usize) -> (Vec<f64>, f64) {
        let pairs = dims / 2;
        let plain = |base: f64| (0..pairs).map(move |i| base.powf(-2.0 * i as f64 / dims as f64));
        let over = |factors: &[f64]| plain(base).zip(factors).map(|(f, by)| f / by).collect::<Vec<f64>>();
        match self {
            Scaling::None => (plain(base).collect(), 1.0),
            Scaling::Linear(factor) => (plain(base).map(|f| f / factor).collect(), 1.0),
            Scaling::Factors(factors) => (over(factors), 1.0),
            Scaling::Dynamic { factor, trained } => {
                let grown = (factor * context.max(stated) as f64 / trained - (factor - 1.0)).max(1.0);
                // One pair alone has no base to grow.
                let power = if dims > 2 { dims as f64 / (dims as f64 - 2.0) } else { 0.0 };
                (plain(base * grown.powf(power)).collect(), 1.0)
            }
            Scaling::Yarn { factor, trained, fast, slow, truncate, attention } => {
                // The pair that turns this often over the trained length.
                let at = |turns: f64| dims as f64 * (trained / (turns * TAU)).ln() / (2.0 * base.ln());
                let (mut low, mut high) = (at(*fast), at(*slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramped = plain(base).enumerate().map(|(i, f)| {
                    let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * slow + f * (1.0 - slow)
                });
                (ramped.collect(), attention.unwrap_or(1.0))
            }
            Scaling::Llama3 { factor, low, high, trained } => {
                let scaled = plain(base).map(|f| {
                    let turns = trained * f / TAU;
                    let fast = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * (1.0 - fast) + f * fast
                });
                (scaled.collect(), 1.0)
            }
            Scaling::Long { short, long, trained, attention } => {
                let factors = if context as f64 > *trained { long } else { short };
                (over(factors), attention.unwrap_or(1.0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_follow_the_scaling() {
        let long = Scaling::Long { short: vec![1.0], long: vec![2.0], trained: 4096.0, attention: None };
        assert_eq!((long.context(131_072, None), long.context(131_072, Some(4096))), (4096, 4096));
        assert_eq!(long.context(131_072, Some(4097)), 131_072);
        assert_eq!(long.apply(1e4, 2, 4096, 131_072).0, [1.0]);
        assert_eq!(long.apply(1e4, 2, 131_072, 131_072).0, [0.5]);
        let dynamic = Scaling::Dynamic { factor: 4.0, trained: 2048.0 };
        assert_eq!((dynamic.context(2048, None), dynamic.context(2048, Some(5000))), (2048, 5000));
        assert_eq!(dynamic.context(2048, Some(1 << 20)), 8192);
        assert_eq!(dynamic.apply(1e4, 8, 2048, 2048), Scaling::None.apply(1e4, 8, 2048, 2048));
        let yarn =
            |trained| Scaling::Yarn { factor: 4.0, trained, fast: 32.0, slow: 1.0, truncate: true, attention: None };
        assert_eq!((yarn(32_768.0).context(32_768, None), yarn(1024.0).context(32_768, None)), (131_072, 32_768));
    }

    #[test]
    fn llama3_keeps_fast_pairs_and_slows_the_others() {
        let s = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, trained: 8192.0 };
        let (got, _) = s.apply(5e5, 128, 131_072, 131_072);
        let (plain, _) = Scaling::None.apply(5e5, 128, 131_072, 131_072);
        assert_eq!(got[0], plain[0]);
        assert_eq!(got[63], plain[63] / 8.0);
        assert!(got.iter().zip(&plain).all(|(g, p)| *g <= *p && *g >= p / 8.0));
    }

    #[test]
    fn scales_of_cos_and_sin_act_on_what_turns() {
        let r = rotary(vec![1.0], 0.5, 2.0, 4);
        assert_eq!((r.inv_freq, r.query_scale), (vec![1.0, 0.0], vec![2.0, 2.0, 0.5, 0.5]));
        assert!(rotary(vec![1.0], 1.0, 1.0, 2).query_scale.is_empty());
    }
}
