//! Qwen3 (dense): every head of q and k is normed before the rotation; the cache holds keys after the norm.

use super::{Family, Window};

pub(super) const QWEN3: Family =
    Family { gguf: "qwen3", hf: "qwen3", qk_norm: true, window: Window::From, ..Family::PLAIN };
