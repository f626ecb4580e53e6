//! GGUF to a model in memory.

use std::path::Path;
use std::sync::Arc;

use kvquant_kernels::rope::Rope;
use kvquant_kernels::weights::Weight;
use kvquant_quant::Fingerprint;
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::forward::{ForwardError, Layer, Model};
use crate::gguf::Gguf;

impl Model {
    /// Loads a GGUF file; `progress(done, total)` counts layers.
    ///
    /// # Errors
    /// The file is broken, or the model is not supported.
    pub fn load(path: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<(Self, Gguf), ForwardError> {
        let g = Gguf::open(path)?;
        let config = Config::from_gguf(&g)?;
        let c = &config;
        let embed = Arc::new(g.weight("token_embd.weight", c.vocab, c.hidden)?);
        // A file without an output matrix ties it to the embedding.
        let head = match g.tensor("output.weight") {
            Some(_) => Arc::new(g.weight("output.weight", c.vocab, c.hidden)?),
            None => embed.clone(),
        };
        let mut layers = Vec::with_capacity(c.layers);
        for i in 0..c.layers {
            progress(i, c.layers);
            layers.push(layer(&g, c, i)?);
        }
        progress(c.layers, c.layers);
        let mut hash = Sha256::new();
        for layer in &layers {
            layer.attn_norm.iter().for_each(|x| hash.update(x.to_le_bytes()));
        }
        let fingerprint = Fingerprint {
            architecture: c.architecture.clone(),
            layers: c.layers,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            norms_sha256: hash.finalize().iter().map(|b| format!("{b:02x}")).collect(),
        };
        let final_norm = g.vector("output_norm.weight", c.hidden)?;
        let rope = Arc::new(Rope { inv_freq: c.inv_freq.clone() });
        Ok((Model { config, embed, layers, final_norm, head, rope, fingerprint }, g))
    }
}

fn layer(g: &Gguf, c: &Config, i: usize) -> Result<Layer, ForwardError> {
    let name = |part: &str| format!("blk.{i}.{part}");
    let (wide, narrow) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let turned = |w: Weight| if c.half_split_rope { w.permute_rows(&to_adjacent(w.rows(), c.head_dim)) } else { w };
    let bias = |part: &str, n: usize| if c.qkv_bias { g.vector(&name(part), n).map(Some) } else { Ok(None) };
    let turned_bias = |b: Option<Vec<f32>>| match b {
        Some(b) if c.half_split_rope => Some(to_adjacent(b.len(), c.head_dim).into_iter().map(|r| b[r]).collect()),
        other => other,
    };
    Ok(Layer {
        attn_norm: g.vector(&name("attn_norm.weight"), c.hidden)?,
        q: turned(g.weight(&name("attn_q.weight"), wide, c.hidden)?),
        k: turned(g.weight(&name("attn_k.weight"), narrow, c.hidden)?),
        v: g.weight(&name("attn_v.weight"), narrow, c.hidden)?,
        q_bias: turned_bias(bias("attn_q.bias", wide)?),
        k_bias: turned_bias(bias("attn_k.bias", narrow)?),
        v_bias: bias("attn_v.bias", narrow)?,
        o: g.weight(&name("attn_output.weight"), c.hidden, wide)?,
        ffn_norm: g.vector(&name("ffn_norm.weight"), c.hidden)?,
        gate: g.weight(&name("ffn_gate.weight"), c.intermediate, c.hidden)?,
        up: g.weight(&name("ffn_up.weight"), c.intermediate, c.hidden)?,
        down: g.weight(&name("ffn_down.weight"), c.hidden, c.intermediate)?,
    })
}

/// Row order that turns half-split rope pairs (i, i + D/2) of every head into adjacent ones (2i, 2i + 1).
fn to_adjacent(rows: usize, head_dim: usize) -> Vec<usize> {
    let half = head_dim / 2;
    (0..rows).map(|r| r / head_dim * head_dim + r % head_dim / 2 + if r % 2 == 1 { half } else { 0 }).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn pairs_become_neighbours_head_by_head() {
        assert_eq!(super::to_adjacent(8, 4), [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
