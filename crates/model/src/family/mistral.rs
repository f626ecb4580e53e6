//! Mistral: LLaMA with a window over all layers where the configuration has one. Converters write it as `llama`.

use super::Family;

pub(super) const MISTRAL: Family = Family { hf: "mistral", half_split: false, ..Family::PLAIN };
