//! The tensors that a family has: all of them, in the right shapes, and no other. Named as in GGUF.

use std::collections::BTreeSet;

use kvquant_kernels::weights::{FileWeight, Weight};

use super::{Config, rope};
use crate::ForwardError;
use crate::family::Family;
use crate::source::{Source, SourceError};

/// A source's tensors by their GGUF names.
#[derive(Clone, Copy)]
pub(crate) struct Tensors<'a> {
    pub source: &'a Source,
    pub family: &'static Family,
}

impl Tensors<'_> {
    /// The source's own name.
    pub fn name(&self, name: &str) -> String {
        match self.source {
            Source::Gguf(_) => name.to_owned(),
            Source::Folder(_) => self.family.hf_name(name),
        }
    }

    /// Rows first.
    pub fn shape(&self, name: &str) -> Option<Vec<u64>> {
        self.source.shape(&self.name(name))
    }

    /// As the file has it.
    pub fn file_weight(&self, name: &str, rows: usize, cols: usize) -> Result<FileWeight, SourceError> {
        self.source.weight(&self.name(name), rows, cols)
    }

    /// As products take it.
    pub fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, ForwardError> {
        Ok(self.file_weight(name, rows, cols)?.pack()?)
    }

    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, SourceError> {
        self.source.vector(&self.name(name), len)
    }

    /// The weights of an RMS norm, whole.
    pub fn norm(&self, name: &str, len: usize) -> Result<Vec<f32>, SourceError> {
        let mut w = self.vector(name, len)?;
        if self.family.norm_less_one && matches!(self.source, Source::Folder(_)) {
            w.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(w)
    }

    pub fn missing(&self, name: &str) -> SourceError {
        SourceError::MissingTensor { path: self.source.fields().path().to_owned(), tensor: self.name(name) }
    }

    pub fn shape_error(&self, name: &str, expected: &[u64], got: &[u64]) -> SourceError {
        SourceError::Shape {
            path: self.source.fields().path().to_owned(),
            tensor: self.name(name),
            expected: expected.to_vec(),
            got: got.to_vec(),
        }
    }

    /// Whether the output matrix is the embedding.
    pub fn tied(&self) -> bool {
        let stated = self.source.fields().opt_bool("tie_word_embeddings");
        self.shape("output.weight").is_none()
            || matches!(self.source, Source::Folder(_)) && matches!(stated, Ok(Some(true)))
    }

    /// Every tensor of the family is there, and none that the forward pass would pass over in silence.
    pub fn check(&self, c: &Config) -> Result<(), SourceError> {
        let hidden = c.hidden as u64;
        let mut known = BTreeSet::new();
        let mut expect = |name: &str, shape: &[u64], needed: bool| -> Result<(), SourceError> {
            match self.shape(name) {
                None if needed => return Err(self.missing(name)),
                Some(got) if !same(&got, shape) => return Err(self.shape_error(name, shape, &got)),
                _ => {}
            }
            known.insert(self.name(name));
            Ok(())
        };
        expect("token_embd.weight", &[c.vocab as u64, hidden], true)?;
        expect("output_norm.weight", &[hidden], true)?;
        // Without a head of its own, the model uses the embedding.
        let untied = matches!(self.source, Source::Folder(_))
            && self.source.fields().opt_bool("tie_word_embeddings")? == Some(false);
        expect("output.weight", &[c.vocab as u64, hidden], untied)?;
        // One entry a layer in the file, so that a layer count from nowhere ends at the first layer that is not there.
        let layer = self.layer(c);
        for i in 0..c.layers {
            for (name, shape) in &layer {
                expect(&format!("blk.{i}.{name}"), shape, true)?;
            }
        }
        if let Source::Gguf(_) = self.source {
            known.extend([rope::FACTORS, rope::LONG, rope::SHORT].map(str::to_owned));
        }
        let ours = |name: &&str| !known.contains(*name) && !name.ends_with("rotary_emb.inv_freq");
        if let Some(name) = self.source.tensor_names().into_iter().find(ours) {
            let supported = format!("the tensors of a plain {} model with {} blocks", self.family.hf, c.layers);
            return Err(self.source.fields().unsupported("tensor", name, &supported));
        }
        let (head, embed) = (self.name("output.weight"), self.name("token_embd.weight"));
        if let Source::Folder(f) = self.source
            && self.tied()
            && self.shape("output.weight").is_some()
            && !f.same(&head, &embed)?
        {
            let expected = format!("the same weights as {embed}, as tie_word_embeddings is true");
            return Err(self.source.fields().field(&format!("tensor {head}"), &expected, "others"));
        }
        Ok(())
    }

    /// Names and shapes of a layer's tensors.
    fn layer(&self, c: &Config) -> Vec<(&'static str, Vec<u64>)> {
        let (hidden, mlp, d) = (c.hidden as u64, c.intermediate as u64, c.head_dim as u64);
        // Sizes are below 2^32 each.
        let (q, kv) = (c.heads as u64 * d, c.kv_heads as u64 * d);
        let mut layer = vec![("attn_norm.weight", vec![hidden])];
        if self.family.fused {
            layer.push(("attn_qkv.weight", vec![q + 2 * kv, hidden]));
        } else {
            layer.extend([
                ("attn_q.weight", vec![q, hidden]),
                ("attn_k.weight", vec![kv, hidden]),
                ("attn_v.weight", vec![kv, hidden]),
            ]);
        }
        layer.extend([("attn_output.weight", vec![hidden, q]), ("ffn_norm.weight", vec![hidden])]);
        if self.family.fused {
            layer.push(("ffn_up.weight", vec![2 * mlp, hidden]));
        } else {
            layer.extend([("ffn_gate.weight", vec![mlp, hidden]), ("ffn_up.weight", vec![mlp, hidden])]);
        }
        layer.push(("ffn_down.weight", vec![hidden, mlp]));
        if c.qkv_bias {
            layer.extend([("attn_q.bias", vec![q]), ("attn_k.bias", vec![kv]), ("attn_v.bias", vec![kv])]);
        }
        if self.family.qk_norm {
            layer.extend([("attn_q_norm.weight", vec![d]), ("attn_k_norm.weight", vec![d])]);
        }
        if self.family.post_norms {
            layer.extend([("post_attention_norm.weight", vec![hidden]), ("post_ffw_norm.weight", vec![hidden])]);
        }
        layer
    }
}

/// The same but for leading ones.
fn same(got: &[u64], expected: &[u64]) -> bool {
    let extra = got.len().saturating_sub(expected.len());
    got.len() >= expected.len() && got[extra..] == *expected && got[..extra].iter().all(|d| *d == 1)
}
