//! What a family needs to run, from the metadata, with every contradiction between metadata and tensors refused.
//!
//! A key or tensor that would change the result and is not implemented is an error that names it: a model that runs
//! and is subtly wrong is worse than one that is refused.

mod rope;
mod tensors;

use crate::gguf::{Gguf, GgufError, Value};

/// Shapes and constants of a decoder: pre-norm attention with rotary positions and grouped KV heads, gated MLP (SiLU).
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// As in the file: `llama` or `qwen2`.
    pub architecture: String,
    /// For people.
    pub name: String,
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head, of keys and of values; even.
    pub head_dim: usize,
    /// Rows of the embedding, which is the number of ids.
    pub vocab: usize,
    /// Positions that the model was made for.
    pub context: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Radians per position of every channel pair, with the model's scaling: `head_dim / 2` entries, 0 for pairs that do
    /// not turn.
    pub inv_freq: Vec<f64>,
    /// q and k rows come in the (i, i + D/2) pairing and are permuted at load.
    pub half_split_rope: bool,
    /// The q, k and v projections have biases.
    pub qkv_bias: bool,
}

/// (architecture, half-split rope pairing, biases: required or as found)
const FAMILIES: &[(&str, bool, bool)] = &[("llama", false, false), ("qwen2", true, true)];

const MAX_HEAD_DIM: usize = 512;

/// Keys (after `ARCH.`) that change the result, the value that changes nothing.
const NEUTRAL: &[(&str, f64)] = &[
    ("expert_count", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("attention.scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
];

impl Config {
    /// Reads and checks the metadata against the tensor table.
    ///
    /// # Errors
    /// For an architecture or a feature that is not implemented (naming what is), a missing or contradictory key, and a
    /// tensor that is missing, superfluous or of another shape.
    pub fn from_gguf(g: &Gguf) -> Result<Self, GgufError> {
        let architecture = g.str("general.architecture")?.to_owned();
        let Some((_, half_split_rope, needs_bias)) = FAMILIES.iter().find(|f| f.0 == architecture) else {
            let names: Vec<&str> = FAMILIES.iter().map(|f| f.0).collect();
            return Err(unsupported(g, "general.architecture", &architecture, &names.join(", ")));
        };
        let r = Keys { g, prefix: &architecture };
        r.refuse_features()?;

        let layers = r.size("block_count")?;
        let hidden = r.size("embedding_length")?;
        let intermediate = r.size("feed_forward_length")?;
        let context = r.size("context_length")?;
        r.refuse_window(context)?;
        let heads = r.size("attention.head_count")?;
        let kv_heads = r.size_or("attention.head_count_kv", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of the {heads} query heads");
            return Err(r.field("attention.head_count_kv", expected, kv_heads));
        }
        let head_dim = r.head_dim(hidden, heads)?;
        let norm_eps = r.positive("attention.layer_norm_rms_epsilon")?;
        let vocab = r.vocab(hidden)?;
        let bias = *needs_bias || g.tensor("blk.0.attn_q.bias").is_some();

        let mut config = Self {
            name: g.opt_str("general.name")?.unwrap_or(&architecture).to_owned(),
            architecture: architecture.clone(),
            layers,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context,
            norm_eps: norm_eps as f32,
            inv_freq: Vec::new(),
            half_split_rope: *half_split_rope,
            qkv_bias: bias,
        };
        // Before anything is sized by head_dim: the tensors, which lie in the file, bound it.
        tensors::check(g, &config)?;
        config.inv_freq = rope::inv_freq(&r, &config)?;
        Ok(config)
    }
}

fn unsupported(g: &Gguf, field: &str, got: impl ToString, supported: &str) -> GgufError {
    g.unsupported(field, got.to_string(), supported)
}

/// The keys of one architecture.
struct Keys<'a> {
    g: &'a Gguf,
    prefix: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn field(&self, name: &str, expected: impl Into<String>, got: impl ToString) -> GgufError {
        GgufError::Field {
            path: self.g.path.clone(),
            field: self.key(name),
            expected: expected.into(),
            got: got.to_string(),
        }
    }

    /// A count that is at least 1 and leaves room for products.
    fn sized(&self, name: &str, value: u64) -> Result<usize, GgufError> {
        match u32::try_from(value) {
            Ok(v) if v > 0 => Ok(v as usize),
            _ => Err(self.field(name, "1 to 2^32 - 1", value)),
        }
    }

    fn size(&self, name: &str) -> Result<usize, GgufError> {
        self.sized(name, self.g.uint(&self.key(name))?)
    }

    fn size_or(&self, name: &str, default: usize) -> Result<usize, GgufError> {
        self.g.opt_uint(&self.key(name))?.map_or(Ok(default), |v| self.sized(name, v))
    }

    fn positive_value(&self, name: &str, value: f64) -> Result<f64, GgufError> {
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(self.field(name, "a finite number above 0", value))
    }

    fn positive(&self, name: &str) -> Result<f64, GgufError> {
        self.positive_value(name, self.g.float(&self.key(name))?)
    }

    fn refuse_features(&self) -> Result<(), GgufError> {
        for (name, neutral) in NEUTRAL {
            let key = self.key(name);
            let got = match self.g.get(&key) {
                None => continue,
                Some(Value::U64(v)) => *v as f64,
                Some(Value::I64(v)) => *v as f64,
                Some(Value::F64(v)) => *v,
                Some(other) => return Err(unsupported(self.g, &key, other.kind(), &neutral.to_string())),
            };
            if got != *neutral {
                return Err(unsupported(self.g, &key, got, &format!("{neutral}, or no such key")));
            }
        }
        if self.g.opt_bool(&self.key("attention.causal"))? == Some(false) {
            return Err(unsupported(self.g, &self.key("attention.causal"), false, "causal decoders"));
        }
        if let Some(parts) = self.g.opt_uint("split.count")?.filter(|n| *n > 1) {
            return Err(unsupported(self.g, "split.count", parts, "one file: join the parts of the model first"));
        }
        Ok(())
    }

    fn refuse_window(&self, context: usize) -> Result<(), GgufError> {
        let key = self.key("attention.sliding_window");
        match self.g.opt_uint(&key)? {
            Some(w) if w != 0 && w < context as u64 => {
                Err(unsupported(self.g, &key, w, &format!("full attention (0, or at least the context {context})")))
            }
            _ => Ok(()),
        }
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, GgufError> {
        const KEY: &str = "attention.key_length";
        const VALUE: &str = "attention.value_length";
        let whole = hidden.is_multiple_of(heads).then_some(hidden / heads);
        let default = |name: &str| {
            whole.ok_or_else(|| {
                let expected = format!("the key, as hidden size {hidden} is not a multiple of {heads} heads");
                self.field(name, expected, "nothing")
            })
        };
        let length = |name: &str| match self.g.opt_uint(&self.key(name))? {
            Some(v) => self.sized(name, v),
            None => default(name),
        };
        let (k, v) = (length(KEY)?, length(VALUE)?);
        if k != v {
            let supported = format!("heads with keys and values of the same length, here {KEY} = {k}");
            return Err(unsupported(self.g, &self.key(VALUE), v, &supported));
        }
        // The cache packs units of 4 channels.
        if !k.is_multiple_of(4) || k > MAX_HEAD_DIM {
            return Err(unsupported(self.g, &self.key(KEY), k, &format!("multiples of 4 up to {MAX_HEAD_DIM}")));
        }
        Ok(k)
    }

    /// Rows of the embedding, which the tokens and the metadata must agree with.
    fn vocab(&self, hidden: usize) -> Result<usize, GgufError> {
        const EMBED: &str = "token_embd.weight";
        let g = self.g;
        let info = g
            .tensor(EMBED)
            .ok_or_else(|| GgufError::MissingTensor { path: g.path.clone(), tensor: EMBED.to_owned() })?;
        let (Some(cols), Some(rows)) = (info.dims.first(), info.dims.get(1)) else {
            return Err(GgufError::Shape {
                path: g.path.clone(),
                tensor: EMBED.to_owned(),
                expected: vec![hidden as u64, g.strings("tokenizer.ggml.tokens").map_or(0, <[String]>::len) as u64],
                got: info.dims.clone(),
            });
        };
        debug_assert!(*cols > 0, "the reader refuses empty dims");
        let vocab = self.sized("embedding rows", *rows)?;
        let agree = |field: String, got: u64| {
            if got == *rows {
                return Ok(());
            }
            let expected = format!("{rows}, the rows of {EMBED}");
            Err(GgufError::Field { path: g.path.clone(), field, expected, got: got.to_string() })
        };
        if let Some(Value::Strings(tokens)) = g.get("tokenizer.ggml.tokens") {
            agree("number of tokenizer.ggml.tokens".to_owned(), tokens.len() as u64)?;
        }
        if let Some(stated) = g.opt_uint(&self.key("vocab_size"))? {
            agree(self.key("vocab_size"), stated)?;
        }
        Ok(vocab)
    }
}
