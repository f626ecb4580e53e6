//! The forward pass: rows of several sequences through the layers.

use std::sync::Arc;

use kvquant_cache::{Cache, CacheError, CacheShape, LayerAttention, Prefill};
use kvquant_kernels::dispatch::DispatchError;
use kvquant_kernels::rowwise::{add_bias, add_rms_norm, gated, rms_norm, rms_norm_in_place, scale_rows};
use kvquant_kernels::threads;
use kvquant_kernels::weights::{Activations, Weight, matmul_fused};
use kvquant_quant::{FileError, Fingerprint, Quantizer, Spec};

use crate::config::Config;
use crate::source::SourceError;
use crate::workspace::{Stage, Workspace};

/// A model can't be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The cache refused.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The file is broken or not supported.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The quantizer does not fit the model.
    #[error(transparent)]
    Quantizer(#[from] FileError),
    /// The kernel override can't be followed.
    #[error(transparent)]
    Dispatch(#[from] DispatchError),
    /// No tokens to run.
    #[error("the prompt is empty; give at least one token of text")]
    Empty,
    /// Not in the vocabulary.
    #[error("token {id} is beyond the vocabulary of {vocab}")]
    Token {
        /// Token id.
        id: u32,
        /// Tokens that the model has.
        vocab: usize,
    },
    /// More positions than the context has.
    #[error("{stored} tokens in the cache and {new} new ones do not fit into a context of {context}; shorten the text")]
    ContextFull {
        /// Tokens already there.
        stored: usize,
        /// Tokens to add.
        new: usize,
        /// Positions.
        context: usize,
    },
    /// Overflow or NaN inside the model.
    #[error(
        "the hidden state after layer {layer} is not finite: the model's weights are broken, or it needs wider arithmetic"
    )]
    NotFinite {
        /// Layer from 0.
        layer: usize,
    },
    /// Sampling failed.
    #[error(transparent)]
    Sampling(#[from] crate::sampling::SamplingError),
    /// A device that the model runs on failed, or does not do what is asked for.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::TokenizerError),
}

/// Sees the keys and values of a pass: layer, keys (before the rotation), values, as they go into the cache; what it writes
/// there goes in instead.
pub type Watch<'a> = dyn FnMut(usize, &mut [f32], &mut [f32]) + 'a;

/// One layer's weights; rows of q and k, and norms of their heads, in the adjacent rope pairing.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Layer {
    pub attn_norm: Vec<f32>,
    pub q: Weight,
    pub k: Weight,
    pub v: Weight,
    pub q_bias: Option<Vec<f32>>,
    pub k_bias: Option<Vec<f32>>,
    pub v_bias: Option<Vec<f32>>,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub o: Weight,
    pub post_attn_norm: Option<Vec<f32>>,
    pub ffn_norm: Vec<f32>,
    pub gate: Weight,
    pub up: Weight,
    pub down: Weight,
    pub post_ffn_norm: Option<Vec<f32>>,
}

/// A model in memory, weights with the values that they have in the file.
#[derive(Debug)]
pub struct Model {
    /// Shape and constants.
    pub config: Config,
    /// Token embeddings `[vocab, hidden]`.
    pub embed: Arc<Weight>,
    /// Layers, first to last.
    pub layers: Vec<Layer>,
    /// Norm before the head `[hidden]`.
    pub final_norm: Vec<f32>,
    /// Output matrix `[vocab, hidden]`; the embedding again where tied.
    pub head: Arc<Weight>,
    /// Rotary positions and window of every layer.
    pub attention: Vec<LayerAttention>,
    /// What products make of the hidden state; 15-bit integers unless set otherwise.
    pub activations: Activations,
    /// What quantizer files are matched against.
    pub fingerprint: Fingerprint,
}

/// Which rows of a step get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: only the cache is filled.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// One sequence's part in a forward pass.
#[derive(Debug)]
pub struct Step<'a> {
    /// New tokens, at positions from the cache's length on.
    pub tokens: &'a [u32],
    /// The sequence's history.
    pub cache: &'a mut Cache,
    /// Which rows get logits.
    pub logits: Logits,
}

impl Model {
    /// An empty cache for this model.
    ///
    /// # Errors
    /// The quantizer is missing, of another model, or lacks a fit for the spec.
    pub fn new_cache(&self, spec: &Spec, quantizer: Option<&Quantizer>) -> Result<Cache, ForwardError> {
        if let Some(q) = quantizer {
            q.check_model(&self.fingerprint)?;
        }
        Ok(Cache::with_attention(self.cache_shape(), spec, quantizer, &self.attention)?)
    }

    /// The shape of the model's attention.
    pub fn cache_shape(&self) -> CacheShape {
        let c = &self.config;
        CacheShape { layers: c.layers, heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim }
    }

    /// Allows more positions than the model was made for: its text gets worse, its speed can be measured.
    pub fn allow_context(&mut self, tokens: usize) {
        self.config.context = self.config.context.max(tokens);
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self
            .layers
            .iter()
            .map(|l| {
                let matrices = [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down];
                let some = [&l.q_norm, &l.k_norm, &l.post_attn_norm, &l.post_ffn_norm, &l.q_bias, &l.k_bias, &l.v_bias];
                let vectors: usize = some.iter().flat_map(|v| v.iter().map(Vec::len)).sum();
                let floats = vectors + l.attn_norm.len() + l.ffn_norm.len();
                matrices.iter().map(|w| w.bytes()).sum::<usize>() + 4 * floats
            })
            .sum();
        let head = if Arc::ptr_eq(&self.embed, &self.head) { 0 } else { self.head.bytes() };
        layers + self.embed.bytes() + head + 4 * self.final_norm.len()
    }

    /// Runs all sequences' tokens in one pass over the weights. Returns the logits asked for, step after step,
    /// `[rows, vocab]`. On an error every cache is as before.
    ///
    /// # Errors
    /// No tokens, unknown tokens, a full context, or numbers that are not finite.
    pub fn forward(&self, steps: &mut [Step<'_>], prefill: Prefill) -> Result<Vec<f32>, ForwardError> {
        self.forward_watched(steps, prefill, &mut |_, _, _| {})
    }

    /// [`forward`](Model::forward) that shows every layer's keys and values, all steps' rows together.
    ///
    /// # Errors
    /// As [`forward`](Model::forward).
    pub fn forward_watched(
        &self,
        steps: &mut [Step<'_>],
        prefill: Prefill,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<f32>, ForwardError> {
        let mut work = Workspace::new();
        self.pass(&mut work, steps, prefill, watch)?;
        Ok(work.logits)
    }

    /// [`forward`](Model::forward) in buffers that are kept: for passes that follow each other.
    ///
    /// # Errors
    /// As [`forward`](Model::forward).
    pub fn forward_in<'w>(
        &self,
        work: &'w mut Workspace,
        steps: &mut [Step<'_>],
        prefill: Prefill,
    ) -> Result<&'w [f32], ForwardError> {
        self.pass(work, steps, prefill, &mut |_, _, _| {})?;
        Ok(&work.logits)
    }

    fn pass(
        &self,
        work: &mut Workspace,
        steps: &mut [Step<'_>],
        prefill: Prefill,
        watch: &mut Watch<'_>,
    ) -> Result<(), ForwardError> {
        for s in steps.iter() {
            if s.tokens.is_empty() {
                return Err(ForwardError::Empty);
            }
            if let Some(&id) = s.tokens.iter().find(|t| **t as usize >= self.config.vocab) {
                return Err(ForwardError::Token { id, vocab: self.config.vocab });
            }
            let (stored, new, context) = (s.cache.len(), s.tokens.len(), self.config.context);
            if stored + new > context {
                return Err(ForwardError::ContextFull { stored, new, context });
            }
        }
        work.start();
        let result = self
            .layers_of(work, steps, prefill, watch)
            .and_then(|()| steps.iter_mut().try_for_each(|s| Ok(s.cache.commit(s.tokens.len())?)));
        match result {
            Ok(()) => {
                self.logits(work, steps);
                Ok(())
            }
            Err(e) => {
                steps.iter_mut().for_each(|s| s.cache.rollback());
                Err(e)
            }
        }
    }

    /// Leaves the hidden state after the last layer, `[rows, hidden]`, in `work.x`.
    fn layers_of(
        &self,
        work: &mut Workspace,
        steps: &mut [Step<'_>],
        prefill: Prefill,
        watch: &mut Watch<'_>,
    ) -> Result<(), ForwardError> {
        let (c, activations) = (&self.config, self.activations);
        let rows: usize = steps.iter().map(|s| s.tokens.len()).sum();
        let (wide, narrow) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        work.resize(rows, c.hidden, wide, narrow, c.intermediate);
        let w = work;
        let tokens = steps.iter().flat_map(|s| s.tokens);
        for (row, &token) in w.x.chunks_exact_mut(c.hidden).zip(tokens) {
            self.embed.dequant_row(token as usize, row);
        }
        if c.embedding_scale != 1.0 {
            w.x.iter_mut().for_each(|x| *x *= c.embedding_scale);
        }
        w.lap(Stage::Embed);
        if let Some(first) = self.layers.first() {
            rms_norm(&w.x, &first.attn_norm, c.norm_eps, &mut w.normed);
        }
        w.lap(Stage::Norms);
        for (i, l) in self.layers.iter().enumerate() {
            matmul_fused(activations, &[&l.q, &l.k, &l.v], &w.normed, rows, &mut [&mut w.q, &mut w.k, &mut w.v]);
            w.lap(Stage::Qkv);
            add_bias(&mut w.q, &l.q_bias);
            add_bias(&mut w.k, &l.k_bias);
            add_bias(&mut w.v, &l.v_bias);
            rms_norm_in_place(&mut w.q, &l.q_norm, c.norm_eps);
            rms_norm_in_place(&mut w.k, &l.k_norm, c.norm_eps);
            scale_rows(&mut w.q, &c.rotary[c.attention[i].rotary].query_scale);
            watch(i, &mut w.k, &mut w.v);
            w.lap(Stage::Norms);
            extend(i, steps, [&w.q, &w.k, &w.v], [wide, narrow], prefill, &mut w.attended)?;
            w.lap(Stage::Cache);
            l.o.matmul(activations, &w.attended, rows, &mut w.normed);
            w.lap(Stage::Output);
            rms_norm_in_place(&mut w.normed, &l.post_attn_norm, c.norm_eps);
            add_rms_norm(&mut w.x, &mut w.normed, c.hidden, Some(&l.ffn_norm), c.norm_eps);
            w.lap(Stage::Norms);
            matmul_fused(activations, &[&l.gate, &l.up], &w.normed, rows, &mut [&mut w.gate, &mut w.up]);
            w.lap(Stage::GateUp);
            gated(c.family.activation, &mut w.gate, &w.up);
            w.lap(Stage::Gate);
            l.down.matmul(activations, &w.gate, rows, &mut w.normed);
            w.lap(Stage::Down);
            rms_norm_in_place(&mut w.normed, &l.post_ffn_norm, c.norm_eps);
            // The last layer's sum is normed in `logits`, and only where it is asked for.
            let next = self.layers.get(i + 1).map(|l| &l.attn_norm[..]);
            if !add_rms_norm(&mut w.x, &mut w.normed, c.hidden, next, c.norm_eps) {
                return Err(ForwardError::NotFinite { layer: i });
            }
            w.lap(Stage::Norms);
        }
        Ok(())
    }

    /// From the hidden state in `work.x` to `work.logits`: of the rows that are asked for, and no other.
    fn logits(&self, work: &mut Workspace, steps: &[Step<'_>]) {
        let (n, w) = (self.config.hidden, work);
        let (mut at, mut rows) = (0, 0);
        for s in steps {
            let end = at + s.tokens.len();
            let first = match s.logits {
                Logits::None => end,
                Logits::Last => end - 1,
                Logits::All => at,
            };
            let picked = &mut w.normed[rows * n..(rows + end - first) * n];
            rms_norm(&w.x[first * n..end * n], &self.final_norm, self.config.norm_eps, picked);
            (at, rows) = (end, rows + end - first);
        }
        w.logits.resize(rows * self.config.vocab, 0.0);
        self.head.matmul(self.activations, &w.normed[..rows * n], rows, &mut w.logits);
        if let Some(cap) = self.config.logit_cap {
            w.logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        w.lap(Stage::Head);
    }
}

/// Tokens of a history from which all threads may work on one sequence.
const ALONE_FROM: usize = 1024;
/// Turns of all threads from which it does not matter that the last is not full.
const MANY_TURNS: usize = 4;

/// A sequence's part of a layer's work.
struct Share<'a, 'b> {
    step: &'a mut Step<'b>,
    /// Its first row.
    first: usize,
    out: &'a mut [f32],
    done: Result<(), CacheError>,
}

/// A layer's queries, keys and values `[rows, width]` into the caches of their sequences: prompts and what would keep one
/// thread busy longer than the others one after another, each on all threads, then the rest side by side.
fn extend(
    layer: usize,
    steps: &mut [Step<'_>],
    [q, k, v]: [&[f32]; 3],
    [wide, narrow]: [usize; 2],
    prefill: Prefill,
    mut out: &mut [f32],
) -> Result<(), CacheError> {
    if let [s] = steps {
        return s.cache.extend(layer, q, k, v, prefill, out);
    }
    let extend = |share: &mut Share<'_, '_>| {
        let rows = share.first..share.first + share.step.tokens.len();
        let (of_q, of_kv) = (rows.start * wide..rows.end * wide, rows.start * narrow..rows.end * narrow);
        share.done = share.step.cache.extend(layer, &q[of_q], &k[of_kv.clone()], &v[of_kv], prefill, share.out);
    };
    let (mut shares, mut first) = (Vec::with_capacity(steps.len()), 0);
    for step in steps {
        let n = step.tokens.len();
        let (of_step, rest) = out.split_at_mut(n * wide);
        let mut share = Share { step, first, out: of_step, done: Ok(()) };
        if n > 1 {
            extend(&mut share);
            share.done?;
        } else {
            shares.push(share);
        }
        (out, first) = (rest, first + n);
    }
    shares.sort_unstable_by_key(|share| std::cmp::Reverse(share.step.cache.len()));
    let lengths: Vec<usize> = shares.iter().map(|share| share.step.cache.len()).collect();
    let (alone, together) = shares.split_at_mut(alone(&lengths, threads::count()));
    alone.iter_mut().for_each(extend);
    threads::for_each_mut(together, |_, share| extend(share));
    shares.into_iter().try_for_each(|share| share.done)
}

/// How many of some histories, longest first, all threads work on one after another: those that are longer than a thread's share of
/// what is left, and as many as the last turn of side by side would leave threads without.
fn alone(lengths: &[usize], threads: usize) -> usize {
    let is_long = |len: &&usize| **len >= ALONE_FROM;
    let (mut left, mut n) = (lengths.iter().sum::<usize>(), 0);
    for len in lengths.iter().take_while(is_long) {
        if len * threads <= left {
            break;
        }
        (left, n) = (left - len, n + 1);
    }
    let rest = lengths.len() - n;
    if rest / threads < MANY_TURNS {
        n += lengths[n..].iter().take(rest % threads).take_while(is_long).count();
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_histories_go_alone() {
        assert_eq!(alone(&[2000; 8], 2), 0);
        assert_eq!(alone(&[2000; 5], 2), 1, "one is left over");
        assert_eq!(alone(&[2000; 3], 8), 3, "fewer than threads");
        assert_eq!(alone(&[500; 3], 8), 0, "too short for threads");
        assert_eq!(alone(&[30000, 9000, 2000, 2000], 2), 2, "the first would be the last to end, so would the second");
        assert_eq!(alone(&[30000, 2000, 2000, 200], 2), 2);
        assert_eq!(alone(&[2000; 33], 4), 0, "one of nine turns");
        assert_eq!(alone(&[], 2), 0);
    }
}
