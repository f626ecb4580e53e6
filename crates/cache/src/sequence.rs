//! The cache of one sequence, all layers.

use std::sync::Arc;

use kvquant_kernels::attend::Kernels;
use kvquant_kernels::rope::Rope;
use kvquant_quant::pack::{BLOCK_TOKENS, UNIT_CHANNELS};
use kvquant_quant::{KeyStage, Quantizer, Scope, Side, SideQuantizer, Spec};

use crate::attend::{self, History};
use crate::block::{Block, TokenError, by_block};
use crate::bytes::Bytes;
use crate::coded::{Layout, Quantizers};
use crate::error::CacheError;
use crate::layer::{Codec, Layer};
use crate::online::Online;
use crate::scratch::{self, Attention};
use crate::transform::Transform;
use crate::turns::Turns;

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

/// What a layer's queries see, and how positions turn them.
#[derive(Debug, Clone)]
pub struct LayerAttention {
    /// Rotary positions. Layers that share them should share the `Arc`.
    pub rope: Arc<Rope>,
    /// Tokens that a query sees, itself included; `None` for all.
    pub window: Option<usize>,
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
    pub(crate) shape: CacheShape,
    pub(crate) spec: Spec,
    kernels: Kernels,
    pre_rope: bool,
    pub(crate) sinks: usize,
    pub(crate) layers: Vec<Layer>,
    /// Where widths are mixed: one a layer.
    transforms: Arc<[Transform]>,
    /// One entry for each rope.
    turns: Vec<Turns>,
    /// Which of them a layer uses.
    turns_of: Vec<usize>,
    pub(crate) len: usize,
}

impl Cache {
    /// An empty cache of layers that all see everything. `quantizer` is needed by specs with calibrated thresholds or
    /// codebooks.
    ///
    /// # Errors
    /// The shape is not supported, the quantizer is missing, lacks a fit for the spec, or is of another model.
    pub fn new(
        shape: CacheShape,
        spec: &Spec,
        quantizer: Option<&Quantizer>,
        rope: Arc<Rope>,
    ) -> Result<Self, CacheError> {
        let layers = vec![LayerAttention { rope, window: None }; shape.layers];
        Self::with_attention(shape, spec, quantizer, &layers)
    }

    /// An empty cache whose layers differ in what they see: `attention` has one entry a layer.
    ///
    /// # Errors
    /// As [`Cache::new`]; a window of no tokens; another number of entries than layers.
    pub fn with_attention(
        shape: CacheShape,
        spec: &Spec,
        quantizer: Option<&Quantizer>,
        attention: &[LayerAttention],
    ) -> Result<Self, CacheError> {
        if attention.len() != shape.layers {
            let (expected, got) = (shape.layers, attention.len());
            return Err(CacheError::Length { what: "attention of layers", expected, got });
        }
        let (mut turns, mut turns_of) = (Vec::<Turns>::new(), Vec::new());
        for a in attention {
            check_shape(&shape, spec, a)?;
            let known = turns.iter().position(|t| Arc::ptr_eq(&t.rope, &a.rope) || t.rope == a.rope);
            turns_of.push(known.unwrap_or(turns.len()));
            if known.is_none() {
                turns.push(Turns::new(a.rope.clone()));
            }
        }
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
        let transforms = fit.iter().flat_map(|f| &f.layers).filter_map(|l| {
            let (keys, values) = (l.keys.mixed.as_ref()?, l.values.mixed.as_ref()?);
            Some(Transform::new(keys, values, &shape))
        });
        let transforms = transforms.collect();
        let layers = (0..shape.layers)
            .map(|i| {
                let window = attention[i].window;
                let mut online = None;
                let codec = match spec {
                    Spec::Fp16 => None,
                    Spec::Coded(coded) if coded.online => {
                        let own = Online::new(coded, shape.kv_heads, shape.head_dim);
                        let quantizers =
                            own.placeholder().map_err(|(_, source)| CacheError::Fit { layer: i, source })?;
                        let layout = Layout::new(&quantizers, channels, shape.head_dim);
                        online = Some(own);
                        Some(Arc::new(Codec { quantizers, layout }))
                    }
                    Spec::Coded(coded) => {
                        let fit = fit.map(|f| &f.layers[i]);
                        let side = |side| {
                            SideQuantizer::new(coded, side, shape.kv_heads, shape.head_dim, fit)
                                .map_err(|source| CacheError::Fit { layer: i, source })
                        };
                        let quantizers = Quantizers { key: side(Side::Key)?, value: side(Side::Value)? };
                        let layout = Layout::new(&quantizers, channels, shape.head_dim);
                        Some(Arc::new(Codec { quantizers, layout }))
                    }
                };
                Ok(Layer::new(codec, online, channels, shape.head_dim, spec.sinks(), spec.recent(), window))
            })
            .collect::<Result<Vec<_>, CacheError>>()?;
        Ok(Cache {
            shape,
            spec: spec.clone(),
            kernels: Kernels::detect()?,
            pre_rope: matches!(spec, Spec::Coded(c) if c.stage == KeyStage::PreRope),
            sinks: spec.sinks(),
            layers,
            transforms,
            turns,
            turns_of,
            len: 0,
        })
    }

    /// The same kind of cache over other layers, which hold `len` tokens. Quantizers are shared, not built again.
    pub(crate) fn over(&self, layers: Vec<Layer>, len: usize) -> Cache {
        let mut cache = Cache {
            shape: self.shape,
            spec: self.spec.clone(),
            kernels: self.kernels,
            pre_rope: self.pre_rope,
            sinks: self.sinks,
            layers,
            transforms: self.transforms.clone(),
            turns: self.turns.iter().map(|t| Turns::new(t.rope.clone())).collect(),
            turns_of: self.turns_of.clone(),
            len,
        };
        cache.trim_turns();
        cache
    }

    /// Attends with other kernels than those that were found; for comparing them.
    pub fn set_kernels(&mut self, kernels: Kernels) {
        self.kernels = kernels;
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
        let CacheShape { heads, kv_heads, head_dim: d, .. } = self.shape;
        self.check_lengths(q, k, v, out)?;
        scratch::with(|s| {
            let Some(t) = self.transforms.get(layer) else {
                return self.store_and_attend(layer, q, k, v, prefill, out, &mut s.attention);
            };
            t.turn(q, heads, d, &mut s.q);
            t.turn(k, kv_heads, d, &mut s.k);
            t.project(v, d, &mut s.v);
            self.store_and_attend(layer, &s.q, &s.k, &s.v, prefill, out, &mut s.attention)?;
            self.transforms[layer].restore(out, heads, d, &mut s.q);
            Ok(())
        })
    }

    fn check_lengths(&self, q: &[f32], k: &[f32], v: &[f32], out: &[f32]) -> Result<(), CacheError> {
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
        Ok(())
    }

    /// [`extend`](Cache::extend) with lengths checked and heads transformed.
    fn store_and_attend(
        &mut self,
        layer: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        prefill: Prefill,
        out: &mut [f32],
        attention: &mut Attention,
    ) -> Result<(), CacheError> {
        let Attention { turned, queries, room } = attention;
        let (c, wide) = (self.shape.channels(), self.shape.heads * self.shape.head_dim);
        let n = k.len() / c;
        if n == 0 {
            return Ok(());
        }
        let start = self.len;
        if self.layers[layer].len() != start {
            return Err(CacheError::Uneven { layer, expected: start, got: self.layers[layer].len() });
        }
        let turns = &mut self.turns[self.turns_of[layer]];
        turns.cover(start, n, self.sinks);
        let k = if self.pre_rope {
            k
        } else {
            turns.angles.turn(k, c, self.shape.head_dim, turned);
            turned
        };
        let queries = turns.angles.queries(q, self.shape.heads, self.shape.kv_heads, self.shape.head_dim, queries);
        let failed =
            |position: usize| move |(side, source): TokenError| CacheError::Token { layer, position, side, source };
        if prefill == Prefill::Exact && n > 1 {
            let own = by_block((k, v), c, start, |k, v| Block::exact(k, v, c));
            let own = own.map_err(|(position, e)| failed(position)(e))?;
            let rope = turns.rope.clone();
            let rotations: Vec<_> = (0..own.len()).map(|b| rope.rotation(start + b * BLOCK_TOKENS)).collect();
            attend::exact(&self.history(layer), &own, &rotations, &queries, start, room, out)?;
            let stored = self.layers[layer].store(k, v, start);
            return stored.map_err(|(position, e)| failed(position)(e));
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
                room,
                &mut out[rows.start * wide..rows.end * wide],
            )?;
            at = run;
        }
        Ok(())
    }

    fn history(&self, layer: usize) -> History<'_> {
        let turns = &self.turns[self.turns_of[layer]];
        let layer = &self.layers[layer];
        History {
            layer,
            shape: self.shape,
            kernels: self.kernels,
            table: &turns.table,
            start: self.pre_rope.then_some(&turns.start),
            origins: self.pre_rope.then(|| turns.origins(layer.dropped())),
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
        self.layers.iter_mut().for_each(Layer::trim);
        self.trim_turns();
        Ok(())
    }

    /// Keeps the rotations of the blocks that layers hold.
    pub(crate) fn trim_turns(&mut self) {
        let end = self.len.saturating_sub(self.sinks).div_ceil(BLOCK_TOKENS);
        for (i, turns) in self.turns.iter_mut().enumerate() {
            let of = self.layers.iter().zip(&self.turns_of).filter(|(_, t)| **t == i);
            turns.keep(of.map(|(l, _)| l.dropped()).min().unwrap_or(0), end);
        }
    }

    /// Stores `k`, `v` `[tokens, kv_heads, head_dim]` in `layer` without attending: for keys and values that were computed
    /// elsewhere, and for measurements. Otherwise as [`extend`](Cache::extend).
    ///
    /// # Errors
    /// As [`extend`](Cache::extend).
    pub fn append(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<(), CacheError> {
        let (c, d, kv_heads) = (self.shape.channels(), self.shape.head_dim, self.shape.kv_heads);
        let n = k.len() / c;
        for (what, got) in [("k", k.len()), ("v", v.len())] {
            if n * c != got {
                return Err(CacheError::Length { what, expected: n * c, got });
            }
        }
        let start = self.len;
        let stored = scratch::with(|s| {
            let (mut k, mut v) = (k, v);
            if let Some(t) = self.transforms.get(layer) {
                t.turn(k, kv_heads, d, &mut s.k);
                t.project(v, d, &mut s.v);
                (k, v) = (&s.k, &s.v);
            }
            if !self.pre_rope {
                let turns = &mut self.turns[self.turns_of[layer]];
                turns.cover(start, n, self.sinks);
                turns.angles.turn(k, c, d, &mut s.attention.turned);
                k = &s.attention.turned;
            }
            self.layers[layer].store(k, v, start)
        });
        stored.map_err(|(position, (side, source))| CacheError::Token { layer, position, side, source })
    }

    /// Lengthens the cache to at least `tokens` tokens by copies of its own whole blocks, each in memory of its own: a cache
    /// of realistic content at a depth that no text was computed for, to measure speed.
    ///
    /// # Errors
    /// A layer has no whole block yet.
    pub fn repeat_to(&mut self, tokens: usize) -> Result<(), CacheError> {
        let copies = tokens.saturating_sub(self.len).div_ceil(BLOCK_TOKENS);
        if let Some(layer) = self.layers.iter().position(|l| !l.can_repeat()) {
            let got = self.layers[layer].len();
            return Err(CacheError::Unsupported {
                what: "tokens to repeat",
                got,
                supported: "at least one whole block",
            });
        }
        self.layers.iter_mut().for_each(|l| l.repeat(copies));
        self.len += copies * BLOCK_TOKENS;
        self.trim_turns();
        Ok(())
    }

    /// Undoes a forward pass that failed on the way: every layer back to [`len`](Cache::len).
    pub fn rollback(&mut self) {
        for layer in &mut self.layers {
            layer.truncate(self.len).expect("a block that was pushed has views");
        }
    }

    /// How many tokens [`truncate`](Cache::truncate) can keep, up to `len`: `len` itself, or none where a layer with a
    /// window has let go of what they need.
    pub fn keepable(&self, len: usize) -> usize {
        let len = len.min(self.len);
        if self.layers.iter().all(|l| l.can_truncate(len)) { len } else { 0 }
    }

    /// Keeps the first `len` tokens. In a cache with a recent window, tokens that were already quantized stay so.
    ///
    /// # Errors
    /// `len` is above the number of stored tokens, or below what layers with a window can go back to
    /// ([`keepable`](Cache::keepable)); 0 is always possible.
    pub fn truncate(&mut self, len: usize) -> Result<(), CacheError> {
        if len > self.len {
            return Err(CacheError::Length { what: "truncated cache", expected: self.len, got: len });
        }
        if let Some((layer, l)) = self.layers.iter().enumerate().find(|(_, l)| !l.can_truncate(len)) {
            return Err(CacheError::Window { layer, len, first: l.first() });
        }
        for layer in &mut self.layers {
            layer.truncate(len)?;
        }
        self.len = len;
        self.trim_turns();
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

    /// 8 * bytes / elements, over all keys and values that layers hold (those with a window hold fewer); 0 when empty.
    pub fn bits_per_element(&self) -> f64 {
        let tokens: usize = self.layers.iter().map(|l| l.len() - l.first()).sum();
        let elements = 2 * self.shape.channels() * tokens;
        if elements == 0 { 0.0 } else { 8.0 * self.bytes().total() as f64 / elements as f64 }
    }

    /// Bits per element that an endless context would come to: what the blocks take that are full and no longer change,
    /// headers included; without sinks, the recent window and the open block, whose share vanishes. `None` before the
    /// first such block.
    pub fn bits_at_infinity(&self) -> Option<f64> {
        let blocks = self.layers.iter().map(Layer::finished_bytes);
        let (bytes, tokens) = blocks.fold((0, 0), |all, of| (all.0 + of.0, all.1 + of.1));
        (tokens > 0).then(|| 8.0 * bytes as f64 / (2 * self.shape.channels() * tokens) as f64)
    }
}

fn check_shape(shape: &CacheShape, spec: &Spec, attention: &LayerAttention) -> Result<(), CacheError> {
    let unsupported = |what, got, supported| Err(CacheError::Unsupported { what, got, supported });
    if shape.head_dim == 0 || shape.head_dim > 512 || !shape.head_dim.is_multiple_of(UNIT_CHANNELS) {
        return unsupported("head_dim", shape.head_dim, "multiples of 4 up to 512");
    }
    if shape.kv_heads == 0 || shape.heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
        return unsupported("query heads", shape.heads, "a multiple of the KV heads");
    }
    if attention.rope.head_dim() != shape.head_dim {
        return unsupported("rope pairs", attention.rope.inv_freq.len(), "head_dim / 2");
    }
    if attention.window == Some(0) {
        return unsupported("window", 0, "at least 1 token");
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
