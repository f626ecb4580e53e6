//! LLaMA 1, 2, 3, 3.1, 3.2, and what has its shape: SmolLM2, Vicuna, TinyLlama, Yi. GGUF files of Mistral are of this
//! architecture too.

use super::Family;

pub(super) const LLAMA: Family = Family { half_split: false, ..Family::PLAIN };
