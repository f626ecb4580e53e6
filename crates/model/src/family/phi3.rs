//! Phi-3, Phi-3.5 and Phi-4 (also mini): fused projections; with longrope, two sets of frequencies; in Phi-4-mini only
//! a part of each head turns.

use super::Family;

pub(super) const PHI3: Family = Family { gguf: "phi3", hf: "phi3", fused: true, ..Family::PLAIN };
