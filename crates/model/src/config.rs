//! What a family needs to run, from GGUF metadata.

use crate::gguf::{Gguf, GgufError, Value};

/// One supported architecture.
struct Family {
    /// `general.architecture`
    name: &'static str,
    /// RoPE pairs (i, i + D/2) in the file; the rows are permuted to (2i, 2i + 1) at load.
    half_split_rope: bool,
    /// q, k and v have biases.
    qkv_bias: bool,
}

const FAMILIES: [Family; 2] = [
    // GGUF conversion has already permuted LLaMA's q and k rows to adjacent pairs.
    Family { name: "llama", half_split_rope: false, qkv_bias: false },
    Family { name: "qwen2", half_split_rope: true, qkv_bias: true },
];

/// A model's shape and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Family.
    pub architecture: String,
    /// The name that the file gives itself.
    pub name: String,
    /// Layers.
    pub layers: usize,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens.
    pub vocab: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    /// Of RMS norms.
    pub norm_eps: f32,
    /// Radians per position of every channel pair `[head_dim / 2]`, scaling included; 0: does not turn.
    pub inv_freq: Vec<f64>,
    /// q and k rows come in the (i, i + D/2) pairing and are permuted at load.
    pub half_split_rope: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
}

/// Larger than any model's; keeps products from overflowing.
const MOST: u64 = 1 << 24;

impl Config {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// The architecture or a feature is not supported (the error says what is), an entry is missing, or entries
    /// contradict each other.
    pub fn from_gguf(g: &Gguf) -> Result<Self, GgufError> {
        let arch = g.str("general.architecture")?.to_string();
        let known: Vec<_> = FAMILIES.iter().map(|f| f.name).collect();
        let family = FAMILIES.iter().find(|f| f.name == arch);
        let family = family.ok_or_else(|| g.unsupported("general.architecture", format!("`{arch}`"), known.join(", ")))?;
        let key = |k: &str| format!("{arch}.{k}");
        let number = |k: &str| -> Result<usize, GgufError> {
            let k = key(k);
            match g.uint(&k)? {
                n if n == 0 || n > MOST => Err(g.field(&k, format!("is {n}, not within 1 to {MOST}"))),
                n => Ok(n as usize),
            }
        };
        let number_or = |k: &str, default: usize| if g.metadata.contains_key(&key(k)) { number(k) } else { Ok(default) };
        for (k, what) in [
            ("expert_count", "models without experts (MoE)"),
            ("attn_logit_softcapping", "models without soft-capping"),
            ("final_logit_softcapping", "models without soft-capping"),
            ("logit_scale", "models without a logit scale"),
            ("embedding_scale", "models without an embedding scale"),
            ("attention.scale", "a scale of 1/sqrt(head_dim)"),
        ] {
            if let Some(v) = g.metadata.get(&key(k))
                && !matches!(v, Value::U64(0) | Value::I64(0))
                && *v != Value::F64(0.0)
            {
                return Err(g.unsupported(&key(k), format!("{v:?}"), what));
            }
        }
        let (layers, hidden, heads) = (number("block_count")?, number("embedding_length")?, number("attention.head_count")?);
        let kv_heads = number_or("attention.head_count_kv", heads)?;
        let head_dim = number_or("attention.key_length", hidden / heads)?;
        if number_or("attention.value_length", head_dim)? != head_dim {
            return Err(g.unsupported(&key("attention.value_length"), "unlike key_length", "equal key and value lengths"));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(g.field(&key("attention.head_count_kv"), format!("{kv_heads} does not divide {heads} heads")));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(4) || head_dim > 512 {
            return Err(g.unsupported(&key("attention.key_length"), head_dim.to_string(), "multiples of 4 up to 512"));
        }
        let context = number("context_length")?;
        let window = number_or("attention.sliding_window", context)?;
        if window < context {
            return Err(g.unsupported(&key("attention.sliding_window"), window.to_string(), "full attention"));
        }
        let vocab = match g.tensor("token_embd.weight") {
            Some(t) if t.dims.len() == 2 && t.dims[1] <= MOST => t.dims[1] as usize,
            _ => return Err(g.field("tensor token_embd.weight", "is missing or is no matrix")),
        };
        if let Some(Value::Strings(tokens)) = g.metadata.get("tokenizer.ggml.tokens")
            && tokens.len() > vocab
        {
            return Err(g.field("tokenizer.ggml.tokens", format!("{} tokens, but {vocab} embeddings", tokens.len())));
        }
        let eps_key = key("attention.layer_norm_rms_epsilon");
        let norm_eps = g.float(&eps_key)? as f32;
        if !(0.0..1.0).contains(&norm_eps) {
            return Err(g.field(&eps_key, format!("is {norm_eps}")));
        }
        Ok(Config {
            name: g.str("general.name").unwrap_or(&arch).to_string(),
            layers,
            hidden,
            intermediate: number("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context,
            norm_eps,
            inv_freq: frequencies(g, &arch, head_dim)?,
            half_split_rope: family.half_split_rope,
            qkv_bias: family.qkv_bias,
            architecture: arch,
        })
    }
}

/// base^(-2i/n) for the n channels that turn, with linear scaling or llama3's per-pair divisors.
fn frequencies(g: &Gguf, arch: &str, head_dim: usize) -> Result<Vec<f64>, GgufError> {
    let key = |k: &str| format!("{arch}.rope.{k}");
    let get = |k: &str, default: f64| {
        let k = key(k);
        let x = if g.metadata.contains_key(&k) { g.float(&k)? } else { default };
        if x > 0.0 { Ok(x) } else { Err(g.field(&k, format!("is {x}, not above 0"))) }
    };
    let base = get("freq_base", 10_000.0)?;
    let count = key("dimension_count");
    let turning = if g.metadata.contains_key(&count) { g.uint(&count)? as usize } else { head_dim };
    if turning == 0 || turning > head_dim || turning % 2 == 1 {
        return Err(g.field(&key("dimension_count"), format!("is {turning} of {head_dim} channels")));
    }
    if turning < head_dim && FAMILIES.iter().any(|f| f.name == arch && f.half_split_rope) {
        return Err(g.unsupported(&key("dimension_count"), turning.to_string(), format!("all {head_dim} channels")));
    }
    let divisor = match g.metadata.get(&key("scaling.type")) {
        None => get("scale_linear", 1.0)?,
        Some(Value::String(s)) if s == "none" => 1.0,
        Some(Value::String(s)) if s == "linear" => get("scaling.factor", 1.0)?,
        Some(other) => {
            return Err(g.unsupported(&key("scaling.type"), format!("{other:?}"), "none, linear, llama3 (rope_freqs.weight)"));
        }
    };
    let pairs = turning / 2;
    let divisors = match g.tensor("rope_freqs.weight") {
        Some(_) => g.vector("rope_freqs.weight", pairs)?,
        None => vec![1.0; pairs],
    };
    if let Some(bad) = divisors.iter().find(|d| **d <= 0.0) {
        return Err(g.field("tensor rope_freqs.weight", format!("holds {bad}")));
    }
    Ok((0..head_dim / 2)
        .map(|i| match divisors.get(i) {
            Some(d) => base.powf(-2.0 * i as f64 / turning as f64) / divisor / *d as f64,
            None => 0.0,
        })
        .collect())
}
