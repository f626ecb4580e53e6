//! Gemma 3 (text): normed heads, norms before and after attention and MLP, scaled embeddings, five layers with a window
//! and a rope base of their own to one that sees everything.

use super::{Family, Window};
use kvquant_kernels::rowwise::Activation;

pub(super) const GEMMA3: Family = Family {
    gguf: "gemma3",
    hf: "gemma3_text",
    qk_norm: true,
    post_norms: true,
    norm_less_one: true,
    activation: Activation::GeluTanh,
    scaled_embedding: true,
    window: Window::Period(6),
    local_base: Some(10_000.0),
    // The 27B model.
    hidden_scale_layers: Some(62),
    ..Family::PLAIN
};
