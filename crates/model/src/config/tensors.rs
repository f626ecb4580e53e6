//! The tensors that a family has: all of them, in the right shapes, and no other.

use std::collections::BTreeSet;

use super::{Config, rope, unsupported};
use crate::gguf::{Gguf, GgufError};

/// Every tensor of the family is there, and none that the forward pass would pass over in silence.
pub(super) fn check(g: &Gguf, c: &Config) -> Result<(), GgufError> {
    let hidden = c.hidden as u64;
    let mlp = c.intermediate as u64;
    let width = |heads: usize| -> Result<u64, GgufError> {
        (heads as u64).checked_mul(c.head_dim as u64).ok_or_else(|| GgufError::Field {
            path: g.path.clone(),
            field: format!("{}.attention.key_length", c.architecture),
            expected: "heads x head dimension below 2^64".to_owned(),
            got: c.head_dim.to_string(),
        })
    };
    let (q, kv) = (width(c.heads)?, width(c.kv_heads)?);
    // One entry a layer in the file, so that a layer count from nowhere ends at the first layer that is not there.
    let mut layer: Vec<(&str, Vec<u64>)> = vec![
        ("attn_norm.weight", vec![hidden]),
        ("attn_q.weight", vec![hidden, q]),
        ("attn_k.weight", vec![hidden, kv]),
        ("attn_v.weight", vec![hidden, kv]),
        ("attn_output.weight", vec![q, hidden]),
        ("ffn_norm.weight", vec![hidden]),
        ("ffn_gate.weight", vec![hidden, mlp]),
        ("ffn_up.weight", vec![hidden, mlp]),
        ("ffn_down.weight", vec![mlp, hidden]),
    ];
    if c.qkv_bias {
        layer.extend([("attn_q.bias", vec![q]), ("attn_k.bias", vec![kv]), ("attn_v.bias", vec![kv])]);
    }
    let mut known: BTreeSet<String> = [rope::FACTORS.to_owned()].into();
    let mut expect = |name: String, dims: &[u64], needed: bool| -> Result<(), GgufError> {
        match g.tensor(&name) {
            None if needed => return Err(GgufError::MissingTensor { path: g.path.clone(), tensor: name }),
            Some(t) if !same(&t.dims, dims) => {
                return Err(GgufError::Shape {
                    path: g.path.clone(),
                    tensor: name,
                    expected: dims.to_vec(),
                    got: t.dims.clone(),
                });
            }
            _ => {}
        }
        known.insert(name);
        Ok(())
    };
    expect("token_embd.weight".to_owned(), &[hidden, c.vocab as u64], true)?;
    expect("output_norm.weight".to_owned(), &[hidden], true)?;
    // Without a head of its own, the model uses the embedding.
    expect("output.weight".to_owned(), &[hidden, c.vocab as u64], false)?;
    for i in 0..c.layers {
        for (name, dims) in &layer {
            expect(format!("blk.{i}.{name}"), dims, true)?;
        }
    }
    match g.tensors.iter().find(|t| !known.contains(&t.name)) {
        None => Ok(()),
        Some(t) => {
            let supported = format!("the tensors of a plain {} model with {} blocks", c.architecture, c.layers);
            Err(unsupported(g, "tensor", &t.name, &supported))
        }
    }
}

fn same(got: &[u64], expected: &[u64]) -> bool {
    got.len() >= expected.len()
        && got.iter().zip(expected).all(|(a, b)| a == b)
        && got[expected.len()..].iter().all(|d| *d == 1)
}
