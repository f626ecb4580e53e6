//! Metadata by GGUF's names, in GGUF files and in `config.json`, and what of it is refused.

use kvquant_kernels::rowwise::Activation;

use crate::family::Family;
use crate::gguf::Value;
use crate::source::{Fields, Source, SourceError};

/// GGUF keys (after `ARCH.`) that change the result, the value that changes nothing.
const NEUTRAL: &[(&str, f64)] = &[
    ("expert_count", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("attention.scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
];

/// The same of `config.json`.
const NEUTRAL_JSON: &[(&str, f64)] =
    &[("num_experts", 0.0), ("num_local_experts", 0.0), ("attn_logit_softcapping", 0.0)];

/// Switches of `config.json`, and how they must stand.
const SWITCHES: &[(&str, bool)] = &[("use_bidirectional_attention", false), ("is_causal", true)];

/// The keys of one model.
pub(super) struct Keys<'a> {
    pub source: &'a Source,
    pub family: &'static Family,
}

impl<'a> Keys<'a> {
    pub fn fields(&self) -> &'a dyn Fields {
        self.source.fields()
    }

    /// The file's own name of what GGUF calls `ARCH.name`.
    pub fn key(&self, name: &str) -> String {
        if matches!(self.source, Source::Gguf(_)) {
            return format!("{}.{name}", self.family.gguf);
        }
        let json = match name {
            "block_count" => "num_hidden_layers",
            "embedding_length" => "hidden_size",
            "feed_forward_length" => "intermediate_size",
            "context_length" => "max_position_embeddings",
            "attention.head_count" => "num_attention_heads",
            "attention.head_count_kv" => "num_key_value_heads",
            "attention.key_length" => "head_dim",
            "attention.layer_norm_rms_epsilon" => "rms_norm_eps",
            "attention.sliding_window" => "sliding_window",
            "attention.sliding_window_pattern" => "sliding_window_pattern",
            other => other,
        };
        json.to_owned()
    }

    pub fn field(&self, name: &str, expected: impl Into<String>, got: impl ToString) -> SourceError {
        self.fields().field(&self.key(name), &expected.into(), &got.to_string())
    }

    pub fn unsupported(&self, name: &str, got: impl ToString, supported: impl Into<String>) -> SourceError {
        self.fields().unsupported(&self.key(name), &got.to_string(), &supported.into())
    }

    /// A count that is at least 1 and leaves room for products.
    pub fn sized(&self, name: &str, value: u64) -> Result<usize, SourceError> {
        match u32::try_from(value) {
            Ok(v) if v > 0 => Ok(v as usize),
            _ => Err(self.field(name, "1 to 2^32 - 1", value)),
        }
    }

    pub fn size(&self, name: &str) -> Result<usize, SourceError> {
        self.sized(name, self.fields().uint(&self.key(name))?)
    }

    pub fn size_or(&self, name: &str, default: usize) -> Result<usize, SourceError> {
        self.fields().opt_uint(&self.key(name))?.map_or(Ok(default), |v| self.sized(name, v))
    }

    pub fn positive_value(&self, name: &str, value: f64) -> Result<f64, SourceError> {
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(self.field(name, "a finite number above 0", value))
    }

    pub fn positive(&self, name: &str) -> Result<f64, SourceError> {
        self.positive_value(name, self.fields().float(&self.key(name))?)
    }

    /// A number above 0; nothing where the key is missing or 0.
    pub fn opt_positive(&self, name: &str) -> Result<Option<f64>, SourceError> {
        let stated = self.fields().opt_float(&self.key(name))?.filter(|v| *v != 0.0);
        stated.map(|v| self.positive_value(name, v)).transpose()
    }

    pub fn refuse_features(&self) -> Result<(), SourceError> {
        let gguf = matches!(self.source, Source::Gguf(_));
        for (name, neutral) in if gguf { NEUTRAL } else { NEUTRAL_JSON } {
            let got = match self.fields().get(&self.key(name)) {
                None => continue,
                Some(Value::U64(v)) => *v as f64,
                Some(Value::I64(v)) => *v as f64,
                Some(Value::F64(v)) => *v,
                Some(other) => return Err(self.unsupported(name, other.kind(), neutral.to_string())),
            };
            if got != *neutral {
                return Err(self.unsupported(name, got, format!("{neutral}, or no such key")));
            }
        }
        if gguf { self.refuse_gguf() } else { self.refuse_json() }
    }

    fn refuse_gguf(&self) -> Result<(), SourceError> {
        if self.fields().opt_bool(&self.key("attention.causal"))? == Some(false) {
            return Err(self.unsupported("attention.causal", false, "causal decoders"));
        }
        Ok(())
    }

    fn refuse_json(&self) -> Result<(), SourceError> {
        for (name, needed) in SWITCHES {
            if self.fields().opt_bool(name)?.is_some_and(|v| v != *needed) {
                return Err(self.unsupported(name, !needed, needed.to_string()));
            }
        }
        if let Some(method) = self.fields().opt_str("quantization_config.quant_method")? {
            let supported = "weights in f32, f16 or bf16; for quantized weights use a GGUF file";
            return Err(self.unsupported("quantization_config.quant_method", method, supported));
        }
        for name in ["hidden_act", "hidden_activation"] {
            let names = activation_names(self.family.activation);
            if let Some(got) = self.fields().opt_str(name)?.filter(|got| !names.contains(got)) {
                return Err(self.unsupported(name, got, format!("{} for {}", names.join(", "), self.family.hf)));
            }
        }
        Ok(())
    }
}

/// What configurations call it.
fn activation_names(activation: Activation) -> &'static [&'static str] {
    match activation {
        Activation::Silu => &["silu", "swish"],
        Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu_new"],
    }
}
