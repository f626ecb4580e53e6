//! Quantizers that a layer makes for itself while it runs, for models that nobody calibrated.
//!
//! A block is quantized when it is whole, with thresholds that know its own tokens too. Neighbouring blocks share their
//! tables: an epoch is a run of blocks of one set, and ends when the thresholds have moved away from those that it began with.

use std::ops::Range;
use std::sync::Arc;

use kvquant_quant::{CodedSpec, LayerFit, Rule, RunningRanges, Scope, Side, SideFit, SideQuantizer, universal};

use crate::block::TokenError;
use crate::coded::Quantizers;

/// Blocks whose tokens give the first thresholds; they stay exact until then.
pub(crate) const FIRST_BLOCKS: usize = 4;
/// Thresholds that have moved this far, as a share of the range, are worth new tables; at once where they moved `FAR`,
/// else after `LEAST_BLOCKS`, since a set of tables is about as large as three blocks.
const MOVED: f32 = 0.08;
const FAR: f32 = 0.3;
const LEAST_BLOCKS: usize = 32;

/// A run of blocks with the same tables.
#[derive(Debug, Clone)]
struct Epoch {
    /// Its first block.
    first: usize,
    quantizers: Arc<Quantizers>,
}

/// What a layer knows of its own keys and values.
#[derive(Debug, Clone)]
pub(crate) struct Online {
    spec: CodedSpec,
    kv_heads: usize,
    head_dim: usize,
    /// Keys and values; `None` before the first blocks are there.
    ranges: Option<[RunningRanges; 2]>,
    epochs: Vec<Epoch>,
}

impl Online {
    pub fn new(spec: &CodedSpec, kv_heads: usize, head_dim: usize) -> Self {
        Online { spec: spec.clone(), kv_heads, head_dim, ranges: None, epochs: Vec::new() }
    }

    /// An empty one of the same kind.
    pub fn fresh(&self) -> Self {
        Online::new(&self.spec, self.kv_heads, self.head_dim)
    }

    /// Quantizers of the right shape, for a layout; their thresholds are nobody's.
    pub fn placeholder(&self) -> Result<Quantizers, TokenError> {
        let channels = self.kv_heads * self.head_dim;
        let unit = RunningRanges::new(&vec![1.0; channels], channels, 0);
        self.quantizers(&[unit.clone(), unit])
    }

    fn quantizers(&self, ranges: &[RunningRanges; 2]) -> Result<Quantizers, TokenError> {
        let fit = |side: Side, scope: Scope, ranges: &RunningRanges| {
            let book = universal(side, self.spec.bits).unwrap_or_default();
            let (lower, upper) = match scope {
                Scope::Channel => (ranges.lower().to_vec(), ranges.upper().to_vec()),
                Scope::Token | Scope::Group(_) => (Vec::new(), Vec::new()),
            };
            SideFit { lower, upper, encode: book.clone(), decode: book, mixed: None }
        };
        let fit = LayerFit {
            keys: fit(Side::Key, self.spec.keys, &ranges[0]),
            values: fit(Side::Value, self.spec.values, &ranges[1]),
        };
        let side = |side| {
            SideQuantizer::new(&self.spec, side, self.kv_heads, self.head_dim, Some(&fit)).map_err(|e| (side, e))
        };
        Ok(Quantizers { key: side(Side::Key)?, value: side(Side::Value)? })
    }

    /// Whether blocks can be quantized, when so many of them are whole.
    pub fn is_ready(&self, whole: usize) -> bool {
        self.ranges.is_some() || whole >= FIRST_BLOCKS
    }

    /// Takes the first thresholds from tokens `[tokens, kv_heads, head_dim]`, once.
    pub fn begin(&mut self, tokens: impl FnOnce() -> (Vec<f32>, Vec<f32>)) {
        if self.ranges.is_none() {
            let (k, v) = tokens();
            let of = |x: &[f32]| RunningRanges::new(x, self.kv_heads * self.head_dim, self.spec.outliers);
            self.ranges = Some([of(&k), of(&v)]);
        }
    }

    /// Follows block `block`, keys and values `[64, kv_heads, head_dim]`, and says what it is to be quantized with.
    pub fn follow(&mut self, block: usize, k: &[f32], v: &[f32]) -> Result<Arc<Quantizers>, TokenError> {
        let ranges = self.ranges.as_mut().expect("the first blocks came before");
        // The first blocks gave the percentiles.
        if block >= FIRST_BLOCKS {
            ranges[0].follow(k);
            ranges[1].follow(v);
        }
        // What a truncation took back.
        self.epochs.retain(|e| e.first <= block);
        let ranges = self.ranges.as_ref().expect("set above");
        if let Some(epoch) = self.epochs.last() {
            let sides = [&epoch.quantizers.key, &epoch.quantizers.value];
            let moved = sides.into_iter().zip(ranges).map(|(q, r)| match q.rule() {
                Rule::Channel { lower, upper, .. } => r.distance(lower, upper),
                _ => 0.0,
            });
            let moved = moved.fold(0.0, f32::max);
            if moved < MOVED || (moved < FAR && block < epoch.first + LEAST_BLOCKS) {
                return Ok(epoch.quantizers.clone());
            }
        }
        let quantizers = Arc::new(self.quantizers(ranges)?);
        self.epochs.retain(|e| e.first < block);
        self.epochs.push(Epoch { first: block, quantizers: quantizers.clone() });
        Ok(quantizers)
    }

    /// What a block was quantized with; `None` before any was.
    pub fn of(&self, block: usize) -> Option<&Quantizers> {
        let after = self.epochs.partition_point(|e| e.first <= block);
        Some(&self.epochs.get(after.saturating_sub(1))?.quantizers)
    }

    /// The blocks around `block` that have its tables.
    pub fn epoch_of(&self, block: usize) -> Range<usize> {
        let after = self.epochs.partition_point(|e| e.first <= block);
        // Blocks before the first epoch are read as it says.
        let first = if after > 1 { self.epochs[after - 1].first } else { 0 };
        first..self.epochs.get(after.max(1)).map_or(usize::MAX, |e| e.first)
    }

    /// The first block of the last epoch.
    pub fn last_epoch(&self) -> usize {
        self.epochs.last().map_or(0, |e| e.first)
    }

    /// Bytes of tables and thresholds.
    pub fn bytes(&self) -> usize {
        let tables = |q: &Quantizers| q.key.table_bytes() + q.value.table_bytes();
        let ranges = self.ranges.as_ref().map_or(0, |r| 8 * (r[0].lower().len() + r[1].lower().len()));
        self.epochs.iter().map(|e| tables(&e.quantizers)).sum::<usize>() + ranges
    }

    /// Bytes that the first epoch will take.
    pub fn first_bytes(&self) -> usize {
        let first = |q: Quantizers| q.key.table_bytes() + q.value.table_bytes();
        self.placeholder().map_or(0, first) + 16 * self.kv_heads * self.head_dim
    }
}
