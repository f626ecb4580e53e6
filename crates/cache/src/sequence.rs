//! The cache of one sequence, all layers.

use std::sync::Arc;

use kvquant_kernels::attend::Kernels;
use kvquant_kernels::rope::{BlockTable, Rope, Rotation};
use kvquant_quant::pack::{BLOCK_TOKENS, UNIT_CHANNELS};
use kvquant_quant::{KeyStage, Quantizer, Scope, Side, SideQuantizer, Spec};

use crate::attend::{self, Angles, History};
use crate::block::{Rows, TokenError};
use crate::bytes::Bytes;
use crate::coded::{Layout, Quantizers};
use crate::error::CacheError;
use crate::layer::{Codec, Layer};

/// The shape of a model's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl CacheShape {
    /// Channels of one token's keys, all KV heads together.
    pub fn channels(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// What the tokens of one call see of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefill {
    /// Every key and value that attention reads has gone through the cache (the paper's perplexity tables).
    Quantized,
    /// The call's own tokens are attended in fp16, only the history through the codes (the paper's deployment).
    /// A call of a single token is a decode step and reads that token from the cache.
    Exact,
}

/// One sequence's keys and values.
///
/// A forward pass calls [`extend`](Cache::extend) once a layer and [`commit`](Cache::commit) at its end;
/// [`rollback`](Cache::rollback) undoes one that failed on the way.
#[derive(Debug)]
pub struct Cache {
    shape: CacheShape,
    spec: Spec,
    kernels: Kernels,
    rope: Arc<Rope>,
    table: BlockTable,
    pre_rope: bool,
    sinks: usize,
    layers: Vec<Layer>,
    /// The rotation of the first position of each block, shared by all layers.
    origins: Vec<Rotation>,
    /// The rotation of position 0, where the sinks begin.
    start: Rotation,
    angles: Angles,
    len: usize,
}

impl Cache {
    /// An empty cache. `quantizer` is needed by specs with calibrated thresholds or codebooks.
    ///
    /// # Errors
    /// The shape is not supported, the quantizer is missing, lacks a fit for the spec, or is of another model.
    pub fn new(
        shape: CacheShape,
        spec: &Spec,
        quantizer: Option<&Quantizer>,
        rope: Arc<Rope>,
    ) -> Result<Self, CacheError> {
        check_shape(&shape, spec, &rope)?;
        let channels = shape.channels();
        let fit = match quantizer {
            Some(q) if spec.needs_fit() => Some(q.fit(spec)?),
            None if spec.needs_fit() => return Err(CacheError::NeedsQuantizer { spec: spec.to_string() }),
            _ => None,
        };
        if let Some(fit) = fit
            && fit.layers.len() != shape.layers
        {
            return Err(CacheError::Length { what: "quantizer layers", expected: shape.layers, got: fit.layers.len() });
        }
        let layers = (0..shape.layers)
            .map(|i| {
                let codec = match spec {
                    Spec::Fp16 => None,
                    Spec::Coded(coded) => {
                        let fit = fit.map(|f| &f.layers[i]);
                        let side = |side| {
                            SideQuantizer::new(coded, side, shape.kv_heads, shape.head_dim, fit)
                                .map_err(|source| CacheError::Fit { layer: i, source })
                        };
                        let quantizers = Quantizers { key: side(Side::Key)?, value: side(Side::Value)? };
                        let layout = Layout::new(&quantizers, channels, shape.head_dim);
                        Some(Codec { quantizers, layout })
                    }
                };
                Ok(Layer::new(codec, channels, shape.head_dim, spec.sinks(), spec.recent()))
            })
            .collect::<Result<Vec<_>, CacheError>>()?;
        Ok(Cache {
            shape,
            spec: spec.clone(),
            kernels: Kernels::detect()?,
            table: rope.block_table(),
            start: rope.rotation(0),
            pre_rope: matches!(spec, Spec::Coded(c) if c.stage == KeyStage::PreRope),
            sinks: spec.sinks(),
            layers,
            origins: Vec::new(),
            angles: Angles::default(),
            rope,
            len: 0,
        })
    }

    /// Tokens stored in every layer; those of a forward pass under way do not count before `commit`.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is stored.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How the cache is stored.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The model's attention shape.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Appends `k`, `v` `[tokens, kv_heads, head_dim]` to `layer` and attends with `q` `[tokens, heads, head_dim]`
    /// to everything up to and including each token. `q` and `k` come before RoPE, in the adjacent pairing;
    /// positions follow [`len`](Cache::len). Scores are scaled by 1/sqrt(head_dim). `out` is shaped as `q`.
    ///
    /// # Errors
    /// Wrong lengths; a key or value that is not finite or is beyond fp16. Call `rollback` then.
    pub fn extend(
        &mut self,
        layer: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        prefill: Prefill,
        out: &mut [f32],
    ) -> Result<(), CacheError> {
        let (c, wide) = (self.shape.channels(), self.shape.heads * self.shape.head_dim);
        let n = k.len() / c;
        for (what, expected, got) in [
            ("k", n * c, k.len()),
            ("v", n * c, v.len()),
            ("q", n * wide, q.len()),
            ("attention output", n * wide, out.len()),
        ] {
            if expected != got {
                return Err(CacheError::Length { what, expected, got });
            }
        }
        if n == 0 {
            return Ok(());
        }
        let start = self.len;
        if self.layers[layer].len() != start {
            return Err(CacheError::Uneven { layer, expected: start, got: self.layers[layer].len() });
        }
        self.angles.cover(&self.rope, start, n);
        let blocks = (start + n).saturating_sub(self.sinks).div_ceil(BLOCK_TOKENS);
        for b in self.origins.len()..blocks {
            self.origins.push(self.rope.rotation(self.sinks + b * BLOCK_TOKENS));
        }
        let turned;
        let k = if self.pre_rope {
            k
        } else {
            turned = self.angles.turn(k, c, self.shape.head_dim);
            &turned[..]
        };
        let queries = self.angles.queries(q, self.shape.heads, self.shape.kv_heads, self.shape.head_dim);
        let failed =
            |position: usize| move |(side, source): TokenError| CacheError::Token { layer, position, side, source };
        if prefill == Prefill::Exact && n > 1 {
            let mut own = Vec::with_capacity(n.div_ceil(BLOCK_TOKENS));
            for (i, (k, v)) in k.chunks_exact(c).zip(v.chunks_exact(c)).enumerate() {
                if i.is_multiple_of(BLOCK_TOKENS) {
                    own.push(Rows::with_room(BLOCK_TOKENS.min(n - i), c));
                }
                own.last_mut().expect("opened above").push(k, v).map_err(failed(start + i))?;
            }
            let rotations: Vec<_> = (0..own.len()).map(|b| self.rope.rotation(start + b * BLOCK_TOKENS)).collect();
            attend::exact(&self.history(layer), &own, &rotations, &queries, start, out)?;
            for (i, (k, v)) in k.chunks_exact(c).zip(v.chunks_exact(c)).enumerate() {
                let layer = &mut self.layers[layer];
                layer.push(k, v).map_err(failed(start + i))?;
                layer.seal(start + i).map_err(failed(start + i))?;
            }
            return Ok(());
        }
        let mut at = start;
        while at < start + n {
            let run = self.layers[layer].run_end(at, start + n);
            for i in at - start..run - start {
                let token = i * c..(i + 1) * c;
                self.layers[layer].push(&k[token.clone()], &v[token]).map_err(failed(start + i))?;
            }
            self.layers[layer].seal(at).map_err(failed(at))?;
            let rows = at - start..run - start;
            attend::quantized(
                &self.history(layer),
                &queries,
                rows.clone(),
                at,
                &mut out[rows.start * wide..rows.end * wide],
            )?;
            at = run;
        }
        Ok(())
    }

    fn history(&self, layer: usize) -> History<'_> {
        History {
            layer: &self.layers[layer],
            shape: self.shape,
            kernels: self.kernels,
            table: &self.table,
            start: self.pre_rope.then_some(&self.start),
            origins: self.pre_rope.then_some(&self.origins[..]),
            sinks: self.sinks,
        }
    }

    /// Ends a forward pass: all layers have been extended by `n` tokens.
    ///
    /// # Errors
    /// A layer holds another number of tokens.
    pub fn commit(&mut self, n: usize) -> Result<(), CacheError> {
        let expected = self.len + n;
        if let Some((layer, l)) = self.layers.iter().enumerate().find(|(_, l)| l.len() != expected) {
            return Err(CacheError::Uneven { layer, expected, got: l.len() });
        }
        self.len = expected;
        Ok(())
    }

    /// Undoes a forward pass that failed on the way: every layer back to [`len`](Cache::len).
    pub fn rollback(&mut self) {
        for layer in &mut self.layers {
            layer.truncate(self.len).expect("a block that was pushed has views");
        }
    }

    /// Keeps the first `len` tokens. In a cache with a recent window, tokens that were already quantized stay so.
    ///
    /// # Errors
    /// `len` is above the number of stored tokens.
    pub fn truncate(&mut self, len: usize) -> Result<(), CacheError> {
        if len > self.len {
            return Err(CacheError::Length { what: "truncated cache", expected: self.len, got: len });
        }
        for layer in &mut self.layers {
            layer.truncate(len)?;
        }
        self.origins.truncate(len.saturating_sub(self.sinks).div_ceil(BLOCK_TOKENS));
        self.len = len;
        Ok(())
    }

    /// Bytes held, by part. The rotations of block origins, which follow from the model, are not counted.
    pub fn bytes(&self) -> Bytes {
        let mut all = Bytes::default();
        for layer in &self.layers {
            all += layer.bytes();
        }
        all
    }

    /// 8 * bytes / elements, over all keys and values of the stored tokens; 0 when empty.
    pub fn bits_per_element(&self) -> f64 {
        let elements = 2 * self.shape.layers * self.shape.channels() * self.len;
        if elements == 0 { 0.0 } else { 8.0 * self.bytes().total() as f64 / elements as f64 }
    }
}

fn check_shape(shape: &CacheShape, spec: &Spec, rope: &Rope) -> Result<(), CacheError> {
    let unsupported = |what, got, supported| Err(CacheError::Unsupported { what, got, supported });
    if shape.head_dim == 0 || shape.head_dim > 512 || !shape.head_dim.is_multiple_of(UNIT_CHANNELS) {
        return unsupported("head_dim", shape.head_dim, "multiples of 4 up to 512");
    }
    if shape.kv_heads == 0 || shape.heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
        return unsupported("query heads", shape.heads, "a multiple of the KV heads");
    }
    if rope.head_dim() != shape.head_dim {
        return unsupported("rope pairs", rope.inv_freq.len(), "head_dim / 2");
    }
    if spec.sinks() > BLOCK_TOKENS {
        return unsupported("sinks", spec.sinks(), "0 to 64");
    }
    if let Spec::Coded(c) = spec {
        for scope in [c.keys, c.values] {
            if let Scope::Group(g) = scope
                && (g == 0 || !g.is_multiple_of(UNIT_CHANNELS) || !shape.head_dim.is_multiple_of(g))
            {
                return unsupported("channels of a scale group", g, "multiples of 4 that divide head_dim");
            }
        }
    }
    Ok(())
}
