//! Sequences with a common beginning share its blocks.
//!
//! A [`Segment`] is one block of every layer, 64 tokens of history, as reference-counted parts. A cache gives out the
//! segments that it will not write to any more; another cache of the same kind resumes from a run of them. What keys a
//! segment (tokens, model, spec) and when it is let go is up to whoever keeps them.

use std::sync::Arc;

use kvquant_quant::Spec;
use kvquant_quant::pack::BLOCK_TOKENS;

use crate::block::{Block, Rows};
use crate::error::CacheError;
use crate::layer::Layer;
use crate::sequence::Cache;

/// 64 tokens of every layer; before the first block, the sinks.
#[derive(Debug, Clone)]
pub struct Segment {
    parts: Parts,
    bytes: usize,
}

#[derive(Debug, Clone)]
enum Parts {
    Sinks(Arc<[Rows]>),
    Blocks(Box<[Block]>),
}

impl Segment {
    /// Bytes of its data.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn of_sinks(rows: Vec<Rows>) -> Self {
        let bytes = rows.iter().map(Rows::bytes).sum();
        Segment { parts: Parts::Sinks(rows.into()), bytes }
    }

    /// A segment of blocks, one a layer; `None` where one of them is not final.
    pub(crate) fn of_blocks(empty: &Cache, blocks: Vec<Block>) -> Option<Self> {
        if blocks.len() != empty.layers.len() || !blocks.iter().all(Block::is_final) {
            return None;
        }
        let bytes = blocks.iter().zip(&empty.layers).map(|(b, l)| b.bytes(&l.context(0)).total()).sum();
        Some(Segment { parts: Parts::Blocks(blocks.into()), bytes })
    }

    /// How many hold it at most, over all layers, whoever keeps it among them.
    pub fn holders(&self) -> usize {
        match &self.parts {
            Parts::Sinks(rows) => Arc::strong_count(rows),
            Parts::Blocks(blocks) => blocks.iter().map(Block::holders).max().unwrap_or(0),
        }
    }
}

impl Cache {
    /// An empty cache of the same kind; quantizers are shared.
    pub fn fresh(&self) -> Cache {
        self.over(self.layers.iter().map(|l| l.fresh()).collect(), 0)
    }

    /// A second sequence with the same history. Blocks are shared until one of both writes to them.
    pub fn fork(&self) -> Cache {
        let mut other = self.over(self.layers.clone(), self.len);
        // Layers in the middle of a forward pass hold more than was committed.
        other.rollback();
        other
    }

    /// Segment `i`: 0 is the sinks (none of a spec without), then block by block. `None` while the cache may still
    /// write to it, where it is not in its final form (a block in the recent window), where a layer with a
    /// window has let it go, and where only this cache has the tables to read it.
    pub fn segment(&self, i: usize) -> Option<Segment> {
        let Some(block) = i.checked_sub(1) else {
            let all: Vec<Rows> = self.layers.iter().map(|l| l.sink().clone()).collect();
            let held = |r: &Rows| r.len(self.shape.channels()) == self.sinks;
            return all.iter().all(held).then(|| Segment::of_sinks(all));
        };
        if self.layers.iter().any(Layer::is_online) {
            return None;
        }
        let mut bytes = 0;
        let blocks = self.layers.iter().map(|l| {
            let b = l.blocks().get(block.checked_sub(l.dropped())?)?;
            bytes += b.bytes(&l.context(0)).total();
            b.is_final().then(|| b.clone())
        });
        let blocks = blocks.collect::<Option<_>>()?;
        (self.sinks + (block + 1) * BLOCK_TOKENS <= self.len).then_some(Segment { parts: Parts::Blocks(blocks), bytes })
    }

    /// Tokens that the first `n` segments hold.
    pub fn segment_tokens(&self, n: usize) -> usize {
        if n == 0 { 0 } else { self.sinks + (n - 1) * BLOCK_TOKENS }
    }

    /// An empty cache of the same kind that continues after `segments`, which are the segments 0, 1, .. of caches of
    /// this kind over the same tokens. Layers with a window hold those that a query may still see.
    ///
    /// # Errors
    /// The segments are of another kind of cache, or do not begin with the sinks.
    pub fn resume(&self, segments: &[Segment]) -> Result<Cache, CacheError> {
        let wrong = |expected, got| CacheError::Length { what: "segments of a shared prefix", expected, got };
        let len = self.segment_tokens(segments.len());
        let mut layers: Vec<_> = self.layers.iter().map(|l| l.fresh()).collect();
        let Some((first, rest)) = segments.split_first() else { return Ok(self.over(layers, 0)) };
        let Parts::Sinks(sinks) = &first.parts else { return Err(wrong(0, 1)) };
        if sinks.len() != layers.len() {
            return Err(wrong(layers.len(), sinks.len()));
        }
        let lists = rest.iter().map(|s| match &s.parts {
            Parts::Blocks(b) if b.len() == layers.len() => Ok(b),
            Parts::Blocks(b) => Err(wrong(layers.len(), b.len())),
            Parts::Sinks(_) => Err(wrong(1, 2)),
        });
        let lists = lists.collect::<Result<Vec<_>, _>>()?;
        for (i, layer) in layers.iter_mut().enumerate() {
            let blocks = lists.iter().map(|b| b[i].clone()).collect();
            layer.resume(sinks[i].clone(), 0, blocks, len);
            layer.trim();
        }
        Ok(self.over(layers, len))
    }

    /// Bytes of the blocks that others hold as well; [`bytes`](Cache::bytes) counts them too.
    pub fn shared_bytes(&self) -> usize {
        self.layers.iter().map(|l| l.shared_bytes()).sum()
    }

    /// Bytes that a history of `tokens` tokens takes, about: how many outliers there are depends on the text.
    pub fn bytes_for(&self, tokens: usize) -> usize {
        let share = match &self.spec {
            Spec::Fp16 => 0.0,
            // Mixed widths have no share; what calibration never saw is rare.
            Spec::Coded(c) => c.outliers.max(25) as f64 / 10_000.0,
        };
        self.layers.iter().map(|l| l.bytes_for(tokens, share)).sum()
    }

    /// How many hold each block of the layer that holds the most blocks, this cache included.
    pub fn holders(&self) -> Vec<usize> {
        self.layers.iter().max_by_key(|l| l.blocks().len()).map_or(Vec::new(), |l| l.holders().collect())
    }
}
