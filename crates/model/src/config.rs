//! What a family needs to run.
use crate::gguf::{Gguf, GgufError};
#[derive(Debug, Clone, PartialEq)]
pub struct Config { pub architecture: String, pub name: String, pub layers: usize, pub hidden: usize, pub intermediate: usize, pub heads: usize, pub kv_heads: usize, pub head_dim: usize, pub vocab: usize, pub context: usize, pub norm_eps: f32, pub inv_freq: Vec<f64>, /** q and k rows come in the (i, i + D/2) pairing and are permuted at load */ pub half_split_rope: bool, pub qkv_bias: bool }
impl Config { pub fn from_gguf(_g: &Gguf) -> Result<Self, GgufError> { todo!() } }
