//! Qwen2 and Qwen2.5: q, k and v have biases, those of k with channels in the hundreds.

use super::{Bias, Family, Window};

pub(super) const QWEN2: Family =
    Family { gguf: "qwen2", hf: "qwen2", bias: Bias::Required, window: Window::From, ..Family::PLAIN };
