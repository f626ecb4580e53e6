//! Times of append, decode and prefill against an fp16 cache and the copy bandwidth.
//!
//! Histories are quantized noise with 1 % of outliers. Calls rotate over so many of them that the second-level cache holds
//! none; times are medians between device events.
#![allow(unsafe_code)]

use serde::Serialize;

use crate::CudaError;
use crate::device::{Arg, Buffer, Device, Start};
use crate::exact::{ExactCache, ExactDecode};
use crate::layer::{BLOCK, Batch, History, Out, Pool, Tables, Turns, append, turn_queries};
use crate::modules::{Build, Source};
use crate::prefill::{Prefill, SECTION};
use crate::synthetic::{NOISE_REACH, frequencies, quantizers};

/// Heads of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Whose.
    pub name: &'static str,
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Channels of a head.
    pub dim: usize,
    /// Layers.
    pub layers: usize,
}

/// The shapes that are measured.
pub const SHAPES: [Shape; 3] = [
    Shape { name: "llama2-7b", kv_heads: 32, group: 1, dim: 128, layers: 32 },
    Shape { name: "llama3-8b", kv_heads: 8, group: 4, dim: 128, layers: 32 },
    Shape { name: "smollm2", kv_heads: 3, group: 3, dim: 64, layers: 30 },
];

/// Tokens appended at a time while a history is made.
const CHUNK: usize = 8192;
/// Query rows of the prefill benches.
const QUERIES: usize = 1024;

/// A time.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// copy, decode, append, prefill, capacity
    pub what: &'static str,
    /// Model.
    pub shape: &'static str,
    /// How the cache is stored.
    pub cache: String,
    /// Tokens of the history.
    pub tokens: usize,
    /// Of one layer.
    pub seconds: f64,
    /// That must move.
    pub bytes: usize,
    /// Histories that calls rotate over.
    pub copies: usize,
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Models.
    pub shapes: Vec<Shape>,
    /// Bits of codes; 16 is fp16.
    pub bits: Vec<usize>,
    /// Lengths of histories.
    pub tokens: Vec<usize>,
    /// Decode attention.
    pub decode: bool,
    /// Appending.
    pub append: bool,
    /// Prefill attention.
    pub prefill: bool,
}

fn fill(device: &Device, out: &Buffer, seed: u32) -> Result<(), CudaError> {
    let f = device.function(&Build::plain(Source::Copy, 128), "noise", 0)?;
    let args = [Arg::Long(out.at()), Arg::Long(out.bytes() as u64 / 4), Arg::Word(seed), Arg::Float(1.0)];
    // SAFETY: the arguments of `noise`; it writes so many floats as the buffer has.
    unsafe { device.launch(&f, [4 * device.info().processors, 1, 1], 512, &args, Start::After) }
}

/// Bytes a second that a copy reads and writes, by a kernel.
///
/// # Errors
/// The card fails.
pub fn copy(device: &Device) -> Result<Row, CudaError> {
    let bytes = 1usize << 30;
    let buffers = [device.poisoned(bytes)?, device.poisoned(bytes)?, device.poisoned(bytes)?, device.poisoned(bytes)?];
    buffers.iter().try_for_each(|b| fill(device, b, 7))?;
    let f = device.function(&Build::plain(Source::Copy, 128), "copy", 0)?;
    let mut best = f64::INFINITY;
    for blocks in [8, 16, 64] {
        let seconds = device.time(11, 2, |i| {
            let args = [
                Arg::Long(buffers[i % 2 * 2].at()),
                Arg::Long(buffers[i % 2 * 2 + 1].at()),
                Arg::Long(bytes as u64 / 16),
            ];
            // SAFETY: the arguments of `copy`; both buffers have so many pieces of 16 bytes.
            unsafe { device.launch(&f, [blocks * device.info().processors, 1, 1], 256, &args, Start::After) }
        })?;
        best = best.min(seconds);
    }
    Ok(Row { what: "copy", shape: "", cache: String::new(), tokens: 0, seconds: best, bytes: 2 * bytes, copies: 2 })
}

/// A layer with histories of one length.
struct Coded {
    tables: Tables,
    pool: Pool,
    histories: Vec<History>,
    turns: Turns,
}

impl Coded {
    fn new(
        device: &Device,
        s: &Shape,
        bits: usize,
        tokens: usize,
        copies: usize,
        more: usize,
    ) -> Result<Self, CudaError> {
        let channels = s.kv_heads * s.dim;
        let (lower, upper) = (vec![-NOISE_REACH; channels], vec![NOISE_REACH; channels]);
        let (k, v) = quantizers(bits, s.kv_heads, s.dim, lower, upper)?;
        let tables = Tables::new(device, &k, &v, s.kv_heads, s.dim)?;
        let each = (tokens + more).div_ceil(BLOCK);
        // 1 % of keys and values, rounded up to whole pieces, and some more.
        let outliers = copies * each * (BLOCK * channels * 2 / 92 + 4 * s.kv_heads * 2);
        let chunk = CHUNK.min(tokens.max(more));
        let mut pool = Pool::new(device, &tables, copies * each, outliers, chunk)?;
        let turns = Turns::new(device, &frequencies(s.dim), 0, each)?;
        let (keys, values) = (device.poisoned(chunk * channels * 4)?, device.poisoned(chunk * channels * 4)?);
        let mut histories = Vec::with_capacity(copies);
        for copy in 0..copies {
            let mut h = History::new(device, &tables, 0, each)?;
            for from in (0..tokens).step_by(chunk) {
                let seed = (copy * 1_000 + from / chunk) as u32 * 2;
                fill(device, &keys, seed)?;
                fill(device, &values, seed + 1)?;
                append(device, &tables, &mut pool, &mut h, &keys, &values, chunk.min(tokens - from))?;
            }
            histories.push(h);
        }
        pool.check(device)?;
        Ok(Coded { tables, pool, histories, turns })
    }

    /// Bytes of one history.
    fn bytes(&self, device: &Device) -> Result<usize, CudaError> {
        let blocks: usize = self.histories.iter().map(|h| h.coded().div_ceil(BLOCK)).sum();
        let all = blocks * self.tables.block_bytes() + 4 * self.pool.kept(device)?;
        Ok(all / self.histories.len())
    }
}

fn exact_cache(device: &Device, s: &Shape, tokens: usize) -> Result<ExactCache, CudaError> {
    let mut cache = ExactCache::new(device, s.kv_heads, s.dim, tokens)?;
    let channels = s.kv_heads * s.dim;
    let chunk = CHUNK.min(tokens);
    let (keys, values) = (device.poisoned(chunk * channels * 4)?, device.poisoned(chunk * channels * 4)?);
    let angles: Vec<[f32; 2]> =
        (0..chunk).flat_map(|p| crate::tables::angles(&frequencies(s.dim), p as f64).collect::<Vec<_>>()).collect();
    let angles = device.upload(&angles)?;
    for from in (0..tokens).step_by(chunk) {
        fill(device, &keys, from as u32)?;
        fill(device, &values, from as u32 + 1)?;
        cache.append(device, &keys, &values, &angles, chunk.min(tokens - from), None)?;
    }
    Ok(cache)
}

/// Histories that together are several times the cache.
fn copies_for(device: &Device, bytes: usize) -> usize {
    (4 * device.info().cache).div_ceil(bytes.max(1)).clamp(1, 256)
}

/// Calls between two events: about a millisecond.
fn each(bytes: usize) -> usize {
    (3_000_000_000 / bytes.max(1)).clamp(1, 100)
}

fn name(bits: usize) -> String {
    if bits == 16 { "fp16".into() } else { format!("nuq{bits}-1%") }
}

fn queries(device: &Device, s: &Shape, tokens: usize) -> Result<(Buffer, Buffer), CudaError> {
    let heads = s.kv_heads * s.group;
    let x = device.poisoned(heads * s.dim * 4)?;
    fill(device, &x, 99)?;
    let angles: Vec<[f32; 2]> = crate::tables::angles(&frequencies(s.dim), tokens as f64).collect();
    let q = device.poisoned(heads * s.dim * 4)?;
    turn_queries(device, &x, &device.upload(&angles)?, &q, s.dim, heads, 1)?;
    Ok((q, device.poisoned(heads * s.dim * 4)?))
}

/// Measures a plan; `seen` hears of each row. What does not fit the card's memory is left out, and `left_out` told.
///
/// # Errors
/// The card fails.
pub fn run(
    device: &Device,
    plan: &Plan,
    seen: &mut dyn FnMut(&Row),
    left_out: &mut dyn FnMut(String),
) -> Result<Vec<Row>, CudaError> {
    let mut rows = Vec::new();
    for s in &plan.shapes {
        for &tokens in &plan.tokens {
            for &bits in &plan.bits {
                let raw = tokens * s.kv_heads * s.dim * 2 * bits / 8;
                let copies = copies_for(device, raw);
                let inputs = 2 * CHUNK * s.kv_heads * s.dim * 4;
                if raw * copies * 5 / 4 + inputs + (1 << 30) > device.free_memory()? {
                    left_out(format!("{} with {} at {tokens} tokens: more than the free memory", s.name, name(bits)));
                    continue;
                }
                let mut add = |what, seconds, bytes| {
                    let row = Row { what, shape: s.name, cache: name(bits), tokens, seconds, bytes, copies };
                    seen(&row);
                    rows.push(row);
                };
                if bits == 16 {
                    exact(device, s, tokens, copies, plan, &mut add)?
                } else {
                    coded(device, s, bits, tokens, copies, plan, &mut add)?
                }
            }
        }
    }
    Ok(rows)
}

type Add<'a> = dyn FnMut(&'static str, f64, usize) + 'a;

fn exact(
    device: &Device,
    s: &Shape,
    tokens: usize,
    copies: usize,
    plan: &Plan,
    add: &mut Add<'_>,
) -> Result<(), CudaError> {
    let heads = s.kv_heads * s.group;
    let bytes = tokens * s.kv_heads * s.dim * 4;
    let caches: Vec<ExactCache> = (0..copies).map(|_| exact_cache(device, s, tokens)).collect::<Result<_, _>>()?;
    if plan.decode {
        let (q, out) = queries(device, s, tokens)?;
        let steps: Vec<ExactDecode> =
            caches.iter().map(|c| ExactDecode::new(device, c, heads)).collect::<Result<_, _>>()?;
        let seconds = device.time(15, each(bytes), |i| {
            steps[i % copies].decode(device, &caches[i % copies], &q, Out::Floats(&out), None)
        })?;
        add("decode", seconds, bytes);
    }
    if plan.prefill {
        let (q, angles) = prefill_queries(device, s, tokens)?;
        let mut step = Prefill::new(device, &q, &angles, QUERIES, heads, s.kv_heads, s.dim)?;
        let seconds = device.time(5, 1, |i| {
            step.restart();
            step.attend_exact(device, &caches[i % copies], false, true)
        })?;
        add("prefill", seconds, bytes);
    }
    Ok(())
}

fn prefill_queries(device: &Device, s: &Shape, tokens: usize) -> Result<(Buffer, Buffer), CudaError> {
    let heads = s.kv_heads * s.group;
    let q = device.poisoned(QUERIES * heads * s.dim * 4)?;
    fill(device, &q, 98)?;
    let f = frequencies(s.dim);
    let angles: Vec<[f32; 2]> =
        (tokens..tokens + QUERIES).flat_map(|p| crate::tables::angles(&f, p as f64).collect::<Vec<_>>()).collect();
    Ok((q, device.upload(&angles)?))
}

fn coded(
    device: &Device,
    s: &Shape,
    bits: usize,
    tokens: usize,
    copies: usize,
    plan: &Plan,
    add: &mut Add<'_>,
) -> Result<(), CudaError> {
    let heads = s.kv_heads * s.group;
    let more = if plan.append { 4 * 1024 } else { 0 };
    let mut layer = Coded::new(device, s, bits, tokens, copies, more)?;
    let bytes = layer.bytes(device)?;
    if plan.decode {
        let (q, out) = queries(device, s, tokens)?;
        let batches: Vec<Batch> = layer
            .histories
            .iter()
            .map(|h| Batch::new(device, &layer.tables, &layer.pool, &layer.turns, &[h], heads))
            .collect::<Result<_, _>>()?;
        let seconds = device.time(15, each(bytes), |i| {
            batches[i % copies].decode(device, &layer.tables, &layer.pool, &layer.turns, &q, &out)
        })?;
        add("decode", seconds, bytes);
    }
    if plan.prefill {
        let (q, angles) = prefill_queries(device, s, tokens)?;
        let mut step = Prefill::new(device, &q, &angles, QUERIES, heads, s.kv_heads, s.dim)?;
        let rows = device.poisoned(2 * s.kv_heads * SECTION * BLOCK * s.dim * 2)?;
        let Coded { tables, pool, histories, turns } = &layer;
        let seconds = device.time(5, 1, |i| {
            step.restart();
            step.attend_coded(device, tables, pool, &histories[i % copies], turns, &rows, SECTION, true)
        })?;
        add("prefill", seconds, bytes);
    }
    if plan.append {
        let channels = s.kv_heads * s.dim;
        let row = |seed| -> Result<Buffer, CudaError> {
            let b = device.poisoned(channels * 4)?;
            fill(device, &b, seed)?;
            Ok(b)
        };
        let inputs: Vec<(Buffer, Buffer)> =
            (0..16).map(|i| Ok((row(500 + 2 * i)?, row(501 + 2 * i)?))).collect::<Result<_, CudaError>>()?;
        let Coded { tables, pool, histories, .. } = &mut layer;
        for h in histories.iter_mut() {
            h.reserve(device, pool, 3 * 1024)?;
        }
        let seconds = device.time(15, 60, |i| {
            let (k, v) = &inputs[i % 16];
            append(device, tables, pool, &mut histories[i % copies], k, v, 1)
        })?;
        add("append 1", seconds, channels * 8);
        pool.check(device)?;
        let n = 512;
        let (k, v) = (device.poisoned(n * channels * 4)?, device.poisoned(n * channels * 4)?);
        fill(device, &k, 3)?;
        fill(device, &v, 4)?;
        if pool_chunk_allows(tokens, n) {
            // Copies may be one: two calls of each run must fit what was reserved.
            let seconds = device.time(3, 1, |i| append(device, tables, pool, &mut histories[i % copies], &k, &v, n))?;
            add("append 512", seconds, n * channels * 8);
            pool.check(device)?;
        }
    }
    Ok(())
}

fn pool_chunk_allows(tokens: usize, n: usize) -> bool {
    CHUNK.min(tokens) >= n
}

/// All layers of a model resident at once, and a decode step over all of them: seconds a step.
///
/// # Errors
/// The card fails or its memory is short.
pub fn capacity(device: &Device, s: &Shape, bits: usize, tokens: usize) -> Result<Row, CudaError> {
    let heads = s.kv_heads * s.group;
    let before = device.free_memory()?;
    let layers: Vec<Coded> =
        (0..s.layers).map(|_| Coded::new(device, s, bits, tokens, 1, 0)).collect::<Result<_, _>>()?;
    let bytes = before - device.free_memory()?;
    let (q, out) = queries(device, s, tokens)?;
    let batches: Vec<Batch> = layers
        .iter()
        .map(|l| Batch::new(device, &l.tables, &l.pool, &l.turns, &[&l.histories[0]], heads))
        .collect::<Result<_, _>>()?;
    let seconds = device.time(5, s.layers, |i| {
        let l = &layers[i % s.layers];
        batches[i % s.layers].decode(device, &l.tables, &l.pool, &l.turns, &q, &out)
    })? * s.layers as f64;
    Ok(Row { what: "capacity", shape: s.name, cache: name(bits), tokens, seconds, bytes, copies: 1 })
}
