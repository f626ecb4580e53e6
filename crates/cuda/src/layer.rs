//! A layer's compressed histories on a card: append and decode attention.
//!
//! Layout of blocks, units and outliers: kernels/layout.cuh and kernels/device.cuh.
#![allow(unsafe_code)]

use cudarc::driver::DeviceRepr;

use crate::CudaError;
use crate::device::{Arg, Buffer, Device, Start};
use crate::modules::{Build, DecodeShape, Source, group_of};
use crate::pool::RECORD_BYTES;
pub use crate::pool::{History, Pool};
pub use crate::tables::{BLOCK, Tables, Turns};

#[repr(C)]
struct AppendArgs {
    pointers: [u64; 16],
    arena_size: u32,
    first: u32,
    tokens: u32,
    keep: u32,
    extremes: u32,
    _end: u32,
}
// SAFETY: plain numbers in the order of kernels/append.cu, whose structure ends in four bytes of padding.
unsafe impl DeviceRepr for AppendArgs {}

#[repr(C)]
struct DecodeArgs {
    pointers: [u64; 13],
    value_step: f32,
    heads: u32,
    kv_heads: u32,
    splits: u32,
    passes: u32,
    share: u32,
}
// SAFETY: plain numbers in the order of kernels/decode.cu.
unsafe impl DeviceRepr for DecodeArgs {}

#[repr(C)]
struct MergeArgs {
    pointers: [u64; 3],
    splits: u32,
    halves: u32,
}
// SAFETY: plain numbers in the order of kernels/merge.cu.
unsafe impl DeviceRepr for MergeArgs {}

/// Appends tokens `[tokens][kv_heads][dim]` f32, keys before RoPE, as codes.
///
/// # Errors
/// No room, or the card fails. What can't be quantized shows in `Pool::check`.
pub fn append(
    device: &Device,
    tables: &Tables,
    pool: &mut Pool,
    history: &mut History,
    keys: &Buffer,
    values: &Buffer,
    tokens: usize,
) -> Result<(), CudaError> {
    append_from(device, tables, pool, history, [keys, values], 0, tokens, None)
}

/// [`append`] of the rows from `first_row` on. A single token's place is read on the card where the history's record with it lies
/// there, from a byte of a buffer on.
pub(crate) fn append_from(
    device: &Device,
    tables: &Tables,
    pool: &mut Pool,
    history: &mut History,
    [keys, values]: [&Buffer; 2],
    first_row: usize,
    tokens: usize,
    record: Option<(&Buffer, usize)>,
) -> Result<(), CudaError> {
    let channels = tables.channels();
    let needed = (first_row + tokens) * channels * 4;
    if record.is_some_and(|(b, from)| b.bytes() < from + RECORD_BYTES) {
        return Err(CudaError::Append { problem: "a record lies beyond its buffer" });
    }
    if tokens == 0 || tokens > pool.chunk || keys.bytes().min(values.bytes()) < needed {
        return Err(CudaError::Append { problem: "more tokens than the pool's chunk, or fewer rows than tokens" });
    }
    let skipped = (first_row * channels * 4) as u64;
    let (keys_at, values_at) = (keys.at() + skipped, values.at() + skipped);
    history.reserve(device, pool, tokens)?;
    let build = Build::append(tables.bits, tables.dim, channels);
    // As kernels/append.cu counts them.
    let range_threads = match channels {
        4096.. => 1024,
        2048.. => 512,
        _ => (2 * tables.dim).max(256),
    };
    let first = history.tokens;
    let args = AppendArgs {
        pointers: [
            keys_at,
            values_at,
            pool.ranges.at(),
            tables.bounds.at(),
            tables.lower.at(),
            tables.upper.at(),
            tables.key_posts.at(),
            tables.value_bounds.at(),
            tables.value_posts.at(),
            pool.blocks.at(),
            history.table.at(),
            pool.arena.at(),
            history.open.at(),
            pool.top.at(),
            pool.status.at(),
            record.map_or(0, |(b, from)| b.at() + from as u64),
        ],
        arena_size: pool.outliers as u32,
        first: first as u32,
        tokens: tokens as u32,
        keep: tables.keep as u32,
        extremes: tables.extremes as u32,
        _end: 0,
    };
    if tokens == 1 {
        let f = device.function(&build, "append_one", 0)?;
        // SAFETY: as for `append` below; the one token's rows exist (checked above).
        unsafe { device.launch_early(&f, [1, tables.kv_heads, 2], range_threads, 0, &args) }?;
        history.tokens += 1;
        return Ok(());
    }
    let of_ranges = [
        Arg::Long(values_at),
        Arg::Long(pool.ranges.at()),
        Arg::Word(tables.extremes as u32),
        Arg::Long(pool.status.at()),
    ];
    let f = device.function(&build, "ranges", 0)?;
    // SAFETY: the arguments of `ranges`; one block of threads a token, whose rows and range exist (checked above).
    unsafe { device.launch(&f, [tokens, 1, 1], range_threads, &of_ranges, Start::After) }?;
    let f = device.function(&build, "append", 0)?;
    let touched = (first + tokens).div_ceil(BLOCK) - first / BLOCK;
    // SAFETY: the argument of `append`; the table names blocks of the pool for all tokens (reserved above), outliers stay
    // within arena_size and the open list.
    unsafe { device.launch_with(&f, [touched, tables.kv_heads, 2], tables.dim * 2, 0, &args) }?;
    history.tokens += tokens;
    Ok(())
}

/// Stores tokens as exact rows before the first block: keys turned by `angles` `[tokens][dim / 2]`.
///
/// # Errors
/// No room, or the card fails.
pub fn append_exact(
    device: &Device,
    tables: &Tables,
    history: &mut History,
    keys: &Buffer,
    values: &Buffer,
    angles: &Buffer,
    tokens: usize,
) -> Result<(), CudaError> {
    if history.tokens > 0 || history.exact_rows + tokens > history.exact_capacity {
        return Err(CudaError::Append {
            problem: "exact rows come before all codes, and only as many as were planned",
        });
    }
    let place =
        Rows { dim: tables.dim, heads: tables.kv_heads, first: history.exact_rows, capacity: history.exact_capacity };
    store_rows(device, keys, Some(values), angles, &history.exact, 1.0, &place, tokens, None)?;
    history.exact_rows += tokens;
    Ok(())
}

/// Where rows go: `[heads][capacity][dim]`, from row `first` on.
pub(crate) struct Rows {
    pub dim: usize,
    pub heads: usize,
    pub first: usize,
    pub capacity: usize,
}

/// Writes `[tokens][heads][dim]` f32 as fp16 rows, turned and scaled; behind their table that of values, if there are any, as they
/// are. A single token's place is read on the card where `after` says how many rows there are with it.
pub(crate) fn store_rows(
    device: &Device,
    x: &Buffer,
    values: Option<&Buffer>,
    angles: &Buffer,
    out: &Buffer,
    scale: f32,
    rows: &Rows,
    tokens: usize,
    after: Option<&Buffer>,
) -> Result<(), CudaError> {
    let n = tokens * rows.heads * rows.dim / 2;
    let tables = if values.is_some() { 2 } else { 1 };
    let given = x.bytes().min(values.map_or(usize::MAX, Buffer::bytes));
    let room = out.bytes() / (tables * rows.heads * rows.dim * 2);
    if given < n * 8 || angles.bytes() < tokens * rows.dim * 4 || rows.first + tokens > rows.capacity.min(room) {
        return Err(CudaError::Append { problem: "fewer rows than tokens" });
    }
    let f = device.function(&Build::plain(Source::Rows, rows.dim), "store_rows", 0)?;
    let args = [
        Arg::Long(x.at()),
        Arg::Long(values.map_or(0, Buffer::at)),
        Arg::Long(angles.at()),
        Arg::Long(out.at()),
        Arg::Long(after.map_or(0, Buffer::at)),
        Arg::Float(scale),
        Arg::Word(rows.heads as u32),
        Arg::Word(rows.first as u32),
        Arg::Word(rows.capacity as u32),
        Arg::Word(n as u32),
    ];
    // SAFETY: the arguments of `store_rows`; sizes checked above.
    unsafe { device.launch(&f, [n.div_ceil(256), tables, 1], 256, &args, Start::Early) }
}

/// Queries `[tokens][heads][dim]` turned by `angles` `[tokens][dim / 2]` and scaled for the decode kernels, in f32.
///
/// # Errors
/// The card fails.
pub fn turn_queries(
    device: &Device,
    x: &Buffer,
    angles: &Buffer,
    out: &Buffer,
    dim: usize,
    heads: usize,
    tokens: usize,
) -> Result<(), CudaError> {
    let n = tokens * heads * dim / 2;
    if x.bytes().min(out.bytes()) < n * 8 || angles.bytes() < tokens * dim * 4 {
        return Err(CudaError::Append { problem: "fewer query rows than tokens" });
    }
    let f = device.function(&Build::plain(Source::Rows, dim), "turn_queries", 0)?;
    let args = [
        Arg::Long(x.at()),
        Arg::Long(angles.at()),
        Arg::Long(out.at()),
        Arg::Float(query_scale(dim)),
        Arg::Word(heads as u32),
        Arg::Word(n as u32),
    ];
    // SAFETY: the arguments of `turn_queries`; sizes checked above.
    unsafe { device.launch(&f, [n.div_ceil(256), 1, 1], 256, &args, Start::After) }
}

/// Scores come in units of log2 e.
pub(crate) fn query_scale(dim: usize) -> f32 {
    std::f32::consts::LOG2_E / (dim as f32).sqrt()
}

/// Partial states of a decode step, and their merge.
pub(crate) struct Parts {
    pub parts: Buffer,
    pub sums: Buffer,
    pub splits: usize,
    rows: usize,
    dim: usize,
}

impl Parts {
    pub fn new(device: &Device, rows: usize, splits: usize, dim: usize) -> Result<Self, CudaError> {
        Ok(Parts {
            parts: device.poisoned(rows * splits * dim * 4)?,
            sums: device.poisoned(rows * splits * 8)?,
            splits,
            rows,
            dim,
        })
    }

    /// Room for so many splits from now on.
    pub fn resize(&mut self, device: &Device, splits: usize) -> Result<(), CudaError> {
        if self.sums.bytes() < self.rows * splits * 8 {
            *self = Parts::new(device, self.rows, splits, self.dim)?;
        }
        self.splits = splits;
        Ok(())
    }

    pub fn merge(&self, device: &Device, out: Out<'_>) -> Result<(), CudaError> {
        let (out, halves) = match out {
            Out::Floats(out) => (out, false),
            Out::Halves(out) => (out, true),
        };
        if out.bytes() < self.rows * self.dim * if halves { 2 } else { 4 } {
            return Err(CudaError::Append { problem: "no room for attention's output" });
        }
        let f = device.function(&Build::plain(Source::Merge, self.dim), "merge", 0)?;
        let pointers = [self.parts.at(), self.sums.at(), out.at()];
        let args = MergeArgs { pointers, splits: self.splits as u32, halves: halves.into() };
        // SAFETY: the argument of `merge`; `out` has room (checked above), the rest is ours.
        unsafe { device.launch_early(&f, [self.rows, 1, 1], self.dim, 0, &args) }
    }
}

/// Where attention's output `[sequences][heads][dim]` goes.
#[derive(Clone, Copy)]
pub(crate) enum Out<'a> {
    /// As f32.
    Floats(&'a Buffer),
    /// As fp16, which products read.
    Halves(&'a Buffer),
}

/// Parts that a history is split into: the least time of the slowest multiprocessor, where a block of threads starts in
/// the time of `start` of its steps.
pub(crate) fn choose_splits(at_once: usize, tasks: usize, steps: usize, warps: usize, start: f64) -> usize {
    let time = |s: usize| {
        let waves = (tasks * s).div_ceil(at_once) as f64;
        waves * (steps.div_ceil(s).div_ceil(warps) as f64 + start) + 0.02 * s as f64
    };
    // One less than merge has room for: a smaller one may come.
    let most = steps.div_ceil(warps).clamp(1, 255);
    (1..=most).min_by(|a, b| time(*a).total_cmp(&time(*b))).unwrap_or(1)
}

/// Blocks of a history that processors take which one wave of equal splits leaves idle: each of them one task's after the
/// other's, and all are done when the others are. None where that takes less than half a block from each warp of the others.
fn tail(processors: usize, tasks: usize, splits: usize, blocks: usize, warps: usize) -> usize {
    // A block of threads starts and ends in the time of so many blocks for each of its warps.
    const START: f64 = 1.5;
    let idle = processors.saturating_sub(tasks * splits);
    if idle == 0 {
        return 0;
    }
    let (each, turns) = (blocks as f64 / splits as f64, tasks.div_ceil(idle) as f64);
    let tail = (each - turns * START * warps as f64) / (turns + 1.0 / splits as f64);
    if tail / (splits as f64) < warps as f64 / 2.0 { 0 } else { tail as usize }
}

/// Sequences that decode a token together.
pub struct Batch {
    records: Buffer,
    step: DecodeStep,
}

impl Batch {
    /// A batch of histories of one pool, with so many query heads. It decodes with the turns that it is made with.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(
        device: &Device,
        tables: &Tables,
        pool: &Pool,
        turns: &Turns,
        histories: &[&History],
        heads: usize,
    ) -> Result<Self, CudaError> {
        let records: Vec<u64> = histories.iter().flat_map(|h| h.record(pool)).collect();
        let mut step = DecodeStep::new(device, tables, turns.fast, heads, histories.len())?;
        step.follow(device, histories.iter().map(|h| h.numbers.len()).max().unwrap_or(0))?;
        Ok(Batch { records: device.upload(&records)?, step })
    }

    /// Attention of one query token a sequence: `q` `[sequences][heads][dim]` from `turn_queries`, `out` the same shape.
    ///
    /// # Errors
    /// The card fails.
    pub fn decode(
        &self,
        device: &Device,
        tables: &Tables,
        pool: &Pool,
        turns: &Turns,
        q: &Buffer,
        out: &Buffer,
    ) -> Result<(), CudaError> {
        self.step.decode(device, tables, pool, turns, (&self.records, 0), q, Out::Floats(out))
    }
}

/// The kernel of a decode step and what it works in, for layers of one shape, one after the other.
pub(crate) struct DecodeStep {
    parts: Parts,
    /// What a split has of a history, in 2^-32; the last one what is left.
    share: u32,
    shape: DecodeShape,
    sequences: usize,
    heads: usize,
}

impl DecodeStep {
    /// `fast` is the most of the layers' [`Turns::fast`].
    pub fn new(
        device: &Device,
        tables: &Tables,
        fast: usize,
        heads: usize,
        sequences: usize,
    ) -> Result<Self, CudaError> {
        if heads == 0 || !heads.is_multiple_of(tables.kv_heads) || sequences == 0 {
            return Err(CudaError::Unsupported {
                what: format!("{heads} query heads on {} KV heads", tables.kv_heads),
                supported: "multiples of the KV heads, for at least one sequence",
            });
        }
        let group = group_of(heads / tables.kv_heads);
        let shape = DecodeShape::new(tables.bits, tables.dim, group, fast, device.info().shared);
        if shape.shared > device.info().shared {
            return Err(CudaError::Unsupported {
                what: format!("{} bits, head dimension {}, {group} query heads a KV head", tables.bits, tables.dim),
                supported: "what fits the shared memory of the card",
            });
        }
        let parts = Parts::new(device, sequences * heads, 1, tables.dim)?;
        Ok(DecodeStep { parts, share: 0, shape, sequences, heads })
    }

    /// Splits histories of so many blocks anew.
    pub fn follow(&mut self, device: &Device, blocks: usize) -> Result<(), CudaError> {
        let tasks = self.heads / self.shape.group * self.sequences;
        let (processors, warps, blocks) = (device.info().processors, self.shape.warps, blocks.max(1));
        let splits = choose_splits(processors, tasks, blocks, warps, 2.0);
        // Blocks of threads start in the order of their splits within a sequence only.
        let tail = if self.sequences == 1 { tail(processors, tasks, splits, blocks, warps) } else { 0 };
        // Rounded down, which the kernel rounds up again; all of a history is 2^-32 less.
        let share = ((blocks - tail) as u128) << 32;
        self.share = u32::try_from(share / (splits * blocks) as u128).unwrap_or(u32::MAX);
        self.parts.resize(device, splits + usize::from(tail > 0))
    }

    /// What its launches were told that may change from step to step.
    pub fn key(&self) -> [u64; 4] {
        let Parts { parts, sums, splits, .. } = &self.parts;
        [parts.at(), sums.at(), *splits as u64, self.share.into()]
    }

    /// [`Batch::decode`] of the histories whose records lie in a buffer from a byte on.
    pub fn decode(
        &self,
        device: &Device,
        tables: &Tables,
        pool: &Pool,
        turns: &Turns,
        (records, from): (&Buffer, usize),
        q: &Buffer,
        out: Out<'_>,
    ) -> Result<(), CudaError> {
        let floats = self.sequences * self.heads * tables.dim;
        if q.bytes() < floats * 4 || records.bytes() < from + self.sequences * RECORD_BYTES {
            return Err(CudaError::Append { problem: "fewer query rows or records than sequences" });
        }
        let shape = self.shape;
        let f = device.function(&Build::decode(tables.bits, tables.dim, shape), "decode", shape.shared)?;
        let args = DecodeArgs {
            pointers: [
                pool.blocks.at(),
                records.at() + from as u64,
                q.at(),
                turns.origins.at(),
                turns.turn.at(),
                turns.by_pair.at(),
                turns.series.at(),
                turns.basis.at(),
                tables.key_steps.at(),
                tables.value_steps.at(),
                tables.units.at(),
                self.parts.parts.at(),
                self.parts.sums.at(),
            ],
            value_step: tables.value_step,
            heads: self.heads as u32,
            kv_heads: tables.kv_heads as u32,
            splits: self.parts.splits as u32,
            passes: (self.heads / tables.kv_heads / shape.group) as u32,
            share: self.share,
        };
        let grid = [self.heads / shape.group, self.parts.splits, self.sequences];
        // SAFETY: the argument of `decode`; the records were made from this layer's histories, whose tables name blocks of
        // the pool; parts have room for every split.
        unsafe { device.launch_early(&f, grid, shape.warps * 32, shape.shared, &args) }?;
        self.parts.merge(device, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_the_card() {
        // 32 heads on 132 multiprocessors: 4 parts each are one wave.
        assert_eq!(choose_splits(132, 32, 2048, 16, 2.0), 4);
        // 3 heads: 44 parts would be no faster than 43, whose warps have three blocks at most too.
        assert_eq!(choose_splits(132, 3, 2048, 16, 2.0), 43);
        assert_eq!(choose_splits(132, 32, 1, 16, 2.0), 1);
        assert_eq!(choose_splits(132, 32, 0, 16, 2.0), 1);
        // Four processors of 132 are left: each has eight heads, and starts eight times.
        assert_eq!(tail(132, 32, 4, 2048, 16), 38);
        assert_eq!(tail(132, 32, 4, 16384, 16), 473);
        assert_eq!(tail(132, 8, 16, 16384, 12), 479);
        // None is left; a start takes longer than what there is; too little to gain.
        assert_eq!([tail(132, 3, 44, 2048, 16), tail(132, 32, 4, 512, 16), tail(132, 8, 16, 2048, 12)], [0, 0, 0]);
    }
}
