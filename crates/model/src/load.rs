//! A model's files to a model in memory.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use kvquant_cache::LayerAttention;
use kvquant_kernels::rope::Rope;
use kvquant_kernels::weights::{Activations, FileWeight, Weight};
use kvquant_quant::Fingerprint;
use sha2::{Digest, Sha256};

use crate::config::{Config, Tensors};
use crate::forward::{ForwardError, Layer, Model};
use crate::source::Source;

impl Model {
    /// Loads a GGUF file or a Hugging Face folder; `progress(done, total)` counts layers.
    ///
    /// # Errors
    /// The files are broken, or the model is not supported.
    pub fn load(path: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<(Self, Source), ForwardError> {
        Self::load_for(path, None, progress)
    }

    /// [`load`](Model::load) for texts of `context` tokens: some models rotate long texts otherwise than short ones
    /// (longrope, dynamic NTK). Without, such a model is made for texts up to the length that it was trained with first.
    ///
    /// # Errors
    /// As [`load`](Model::load).
    pub fn load_for(
        path: &Path,
        context: Option<usize>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Self, Source), ForwardError> {
        let source = Source::open(path)?;
        let config = Config::read(&source, context)?;
        let c = &config;
        let t = Tensors { source: &source, family: c.family };
        let embed = Arc::new(t.weight("token_embd.weight", c.vocab, c.hidden)?);
        let head = if t.tied() { embed.clone() } else { Arc::new(t.weight("output.weight", c.vocab, c.hidden)?) };
        let mut layers = Vec::with_capacity(c.layers);
        for i in 0..c.layers {
            progress(i, c.layers);
            layers.push(layer(&t, c, i)?);
        }
        progress(c.layers, c.layers);
        let mut hash = Sha256::new();
        for layer in &layers {
            layer.attn_norm.iter().for_each(|x| hash.update(x.to_le_bytes()));
        }
        let fingerprint = Fingerprint {
            architecture: c.family.gguf.to_owned(),
            layers: c.layers,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            norms_sha256: hash.finalize().iter().map(|b| format!("{b:02x}")).collect(),
        };
        let final_norm = t.norm("output_norm.weight", c.hidden)?;
        let ropes: Vec<Arc<Rope>> = c.rotary.iter().map(|r| Arc::new(Rope { inv_freq: r.inv_freq.clone() })).collect();
        let attention =
            c.attention.iter().map(|a| LayerAttention { rope: ropes[a.rotary].clone(), window: a.window }).collect();
        Ok((
            Model {
                config,
                embed,
                layers,
                final_norm,
                head,
                attention,
                activations: Activations::default(),
                fingerprint,
            },
            source,
        ))
    }
}

fn layer(t: &Tensors<'_>, c: &Config, i: usize) -> Result<Layer, ForwardError> {
    let name = |part: &str| format!("blk.{i}.{part}");
    let (wide, narrow) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let pack = |w: FileWeight| -> Result<Weight, ForwardError> { Ok(w.pack()?) };
    // Rows of a matrix, or some of them, in the order that this program has them.
    let order = |rows: Range<usize>, turns: bool| -> Vec<usize> {
        let first = rows.start;
        if turns && c.half_split { to_adjacent(rows.len(), c).map(|r| first + r).collect() } else { rows.collect() }
    };
    let turned = |v: Vec<f32>| order(0..v.len(), true).into_iter().map(|r| v[r]).collect::<Vec<f32>>();
    let [q, k, v] = if c.family.fused {
        let all = t.file_weight(&name("attn_qkv.weight"), wide + 2 * narrow, c.hidden)?;
        let of = |rows: Range<usize>, turns| pack(all.select(&order(rows, turns)));
        [of(0..wide, true)?, of(wide..wide + narrow, true)?, of(wide + narrow..wide + 2 * narrow, false)?]
    } else {
        let of = |part: &str, rows| t.file_weight(&name(part), rows, c.hidden);
        let turned = |w: FileWeight| if c.half_split { w.select(&order(0..w.rows(), true)) } else { w };
        [
            pack(turned(of("attn_q.weight", wide)?))?,
            pack(turned(of("attn_k.weight", narrow)?))?,
            pack(of("attn_v.weight", narrow)?)?,
        ]
    };
    let mlp = c.intermediate;
    let [gate, up] = if c.family.fused {
        let all = t.file_weight(&name("ffn_up.weight"), 2 * mlp, c.hidden)?;
        [pack(all.select(&order(0..mlp, false)))?, pack(all.select(&order(mlp..2 * mlp, false)))?]
    } else {
        [t.weight(&name("ffn_gate.weight"), mlp, c.hidden)?, t.weight(&name("ffn_up.weight"), mlp, c.hidden)?]
    };
    let bias = |part: &str, n: usize| if c.qkv_bias { t.vector(&name(part), n).map(Some) } else { Ok(None) };
    let norm = |there: bool, part: &str, n: usize| if there { t.norm(&name(part), n).map(Some) } else { Ok(None) };
    let (heads, posts) = (c.family.qk_norm, c.family.post_norms);
    Ok(Layer {
        attn_norm: t.norm(&name("attn_norm.weight"), c.hidden)?,
        q,
        k,
        v,
        q_bias: bias("attn_q.bias", wide)?.map(turned),
        k_bias: bias("attn_k.bias", narrow)?.map(turned),
        v_bias: bias("attn_v.bias", narrow)?,
        q_norm: norm(heads, "attn_q_norm.weight", c.head_dim)?.map(turned),
        k_norm: norm(heads, "attn_k_norm.weight", c.head_dim)?.map(turned),
        o: t.weight(&name("attn_output.weight"), c.hidden, wide)?,
        post_attn_norm: norm(posts, "post_attention_norm.weight", c.hidden)?,
        ffn_norm: t.norm(&name("ffn_norm.weight"), c.hidden)?,
        gate,
        up,
        down: t.weight(&name("ffn_down.weight"), c.hidden, mlp)?,
        post_ffn_norm: norm(posts, "post_ffw_norm.weight", c.hidden)?,
    })
}

/// Row order that turns the pairs (i, i + n/2) of the n channels of every head that rotate into neighbours (2i, 2i + 1).
fn to_adjacent(rows: usize, c: &Config) -> impl Iterator<Item = usize> {
    let (d, n) = (c.head_dim, c.rope_dims);
    (0..rows).map(move |r| {
        let (head, channel) = (r / d * d, r % d);
        let from = if channel < n { channel / 2 + channel % 2 * (n / 2) } else { channel };
        head + from
    })
}
