//! What distinguishes the families of decoders: one description each, and the table of them.
//!
//! All are pre-norm decoders with rotary positions, grouped KV heads and a gated MLP. A family says where it departs
//! from that; docs/adding-a-model.md says how to add one.

mod gemma3;
mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;

use kvquant_kernels::rowwise::Activation;

/// Every family, in the order in which GGUF architectures are looked up.
pub const FAMILIES: [&Family; 6] =
    [&llama::LLAMA, &mistral::MISTRAL, &qwen2::QWEN2, &qwen3::QWEN3, &gemma3::GEMMA3, &phi3::PHI3];

/// Where a family departs from the plain decoder.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// `general.architecture` in GGUF files; the family's name in quantizer files.
    pub gguf: &'static str,
    /// `model_type` in `config.json`.
    pub hf: &'static str,
    /// q and k rows of GGUF files pair channels (i, i + D/2), as those of folders always do; otherwise the converter
    /// has made neighbours of them.
    pub half_split: bool,
    /// Biases of the q, k and v projections.
    pub bias: Bias,
    /// RMS norm of every head of q and k before the rotation.
    pub qk_norm: bool,
    /// Norms of the outputs of attention and MLP, before they are added.
    pub post_norms: bool,
    /// q, k, v are one tensor, and so are gate and up.
    pub fused: bool,
    /// Folders hold norm weights less 1. (GGUF files hold them whole.)
    pub norm_less_one: bool,
    /// Of the MLP's gate.
    pub activation: Activation,
    /// Embeddings are multiplied by the square root of the hidden size.
    pub scaled_embedding: bool,
    /// Which layers see a window only.
    pub window: Window,
    /// Rope base of layers with a window, where it differs from that of the others and no file states it.
    pub local_base: Option<f64>,
    /// In models of this many layers, GGUF files leave unsaid that scores are scaled by hidden size over heads instead
    /// of the head dimension.
    pub hidden_scale_layers: Option<usize>,
}

/// Biases of the q, k and v projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// All three or none.
    AsFound,
    /// All three.
    Required,
}

/// Which layers see a window only, where a file gives its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// All.
    All,
    /// All but every n-th, unless the file says otherwise.
    Period(usize),
    /// Those from `max_window_layers` on, if `use_sliding_window`; GGUF files can't say so.
    From,
}

impl Family {
    /// The plain decoder.
    const PLAIN: Family = Family {
        gguf: "llama",
        hf: "llama",
        half_split: true,
        bias: Bias::AsFound,
        qk_norm: false,
        post_norms: false,
        fused: false,
        norm_less_one: false,
        activation: Activation::Silu,
        scaled_embedding: false,
        window: Window::All,
        local_base: None,
        hidden_scale_layers: None,
    };

    /// The family of a GGUF architecture.
    pub fn of_gguf(architecture: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|f| f.gguf == architecture).copied()
    }

    /// The family of a folder's `model_type`.
    pub fn of_hf(model_type: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|f| f.hf == model_type).copied()
    }

    /// The name in a folder of a tensor that GGUF calls `name`.
    pub fn hf_name(&self, name: &str) -> String {
        let whole = match name {
            "token_embd.weight" => Some("model.embed_tokens.weight"),
            "output_norm.weight" => Some("model.norm.weight"),
            "output.weight" => Some("lm_head.weight"),
            _ => None,
        };
        let part = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let (None, Some((layer, part))) = (whole, part) else { return whole.unwrap_or(name).to_owned() };
        let (stem, kind) = part.rsplit_once('.').unwrap_or((part, ""));
        let stem = match stem {
            "attn_norm" => "input_layernorm",
            "attn_q" => "self_attn.q_proj",
            "attn_k" => "self_attn.k_proj",
            "attn_v" => "self_attn.v_proj",
            "attn_qkv" => "self_attn.qkv_proj",
            "attn_output" => "self_attn.o_proj",
            "attn_q_norm" => "self_attn.q_norm",
            "attn_k_norm" => "self_attn.k_norm",
            "post_attention_norm" => "post_attention_layernorm",
            "ffn_norm" if self.post_norms => "pre_feedforward_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            "post_ffw_norm" => "post_feedforward_layernorm",
            "ffn_gate" => "mlp.gate_proj",
            "ffn_up" if self.fused => "mlp.gate_up_proj",
            "ffn_up" => "mlp.up_proj",
            "ffn_down" => "mlp.down_proj",
            other => other,
        };
        format!("model.layers.{layer}.{stem}.{kind}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_both_names() {
        let name = |n: &str| llama::LLAMA.hf_name(n);
        assert_eq!(name("output.weight"), "lm_head.weight");
        assert_eq!(name("blk.12.attn_q.bias"), "model.layers.12.self_attn.q_proj.bias");
        assert_eq!(name("blk.0.ffn_norm.weight"), "model.layers.0.post_attention_layernorm.weight");
        let name = |n: &str| gemma3::GEMMA3.hf_name(n);
        assert_eq!(name("blk.0.ffn_norm.weight"), "model.layers.0.pre_feedforward_layernorm.weight");
        assert_eq!(name("blk.0.attn_k_norm.weight"), "model.layers.0.self_attn.k_norm.weight");
        assert_eq!(phi3::PHI3.hf_name("blk.3.ffn_up.weight"), "model.layers.3.mlp.gate_up_proj.weight");
    }

    #[test]
    fn families_are_found_by_both_names() {
        for f in FAMILIES {
            assert_eq!(Family::of_hf(f.hf), Some(f));
            assert_eq!(Family::of_gguf(f.gguf).map(|g| g.gguf), Some(f.gguf));
        }
        assert_eq!(Family::of_gguf("mistral"), None);
        assert_eq!(Family::of_hf("mixtral"), None);
    }
}
