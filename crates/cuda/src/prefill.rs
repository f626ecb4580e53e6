//! Attention of many query rows: over fp16 rows, and over compressed history, section by section.
#![allow(unsafe_code)]

use cudarc::driver::DeviceRepr;

use crate::CudaError;
use crate::dense::{DenseOut, dense};
use crate::device::{Buffer, Device, Queue};
use crate::exact::ExactCache;
use crate::layer::{BLOCK, History, Pool, Rows, Tables, Turns, query_scale, store_rows};
use crate::modules::{Build, Source};

/// Blocks that there is room for as rows: one half of the room is decoded while the other is attended to.
pub(crate) const SECTION: usize = 384;

/// Query rows of a prefill step and their states.
pub struct Prefill {
    q: Buffer,
    out: Buffer,
    sums: Buffer,
    queries: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    started: bool,
}

#[repr(C)]
struct PrefillArgs {
    pointers: [u64; 4],
    numbers: [u32; 9],
}
// SAFETY: plain numbers in the order of kernels/prefill.cu.
unsafe impl DeviceRepr for PrefillArgs {}

/// Rows that keys and values are read from.
struct Section<'a> {
    /// In a buffer from a byte on.
    rows: (&'a Buffer, usize),
    keys: usize,
    capacity: usize,
    /// Keys that query 0 sees, each later one one more; negative where the first queries see none.
    visible: isize,
}

impl Prefill {
    /// Queries `[queries][heads][dim]` f32, turned by `angles`.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(
        device: &Device,
        q: &Buffer,
        angles: &Buffer,
        queries: usize,
        heads: usize,
        kv_heads: usize,
        dim: usize,
    ) -> Result<Self, CudaError> {
        let mut new = Self::room(device, queries, heads, kv_heads, dim)?;
        new.load(device, q, angles, queries)?;
        Ok(new)
    }

    /// Room for so many queries, which [`load`](Prefill::load) brings.
    pub(crate) fn room(
        device: &Device,
        queries: usize,
        heads: usize,
        kv_heads: usize,
        dim: usize,
    ) -> Result<Self, CudaError> {
        let rows = queries * heads;
        let [q, out, sums] = [rows * dim * 2, rows * dim * 4, rows * 8];
        let (q, out, sums) = (device.poisoned(q)?, device.poisoned(out)?, device.poisoned(sums)?);
        Ok(Prefill { q, out, sums, queries: 0, heads, kv_heads, dim, started: false })
    }

    /// Begins anew with other queries, as in [`new`](Prefill::new).
    pub(crate) fn load(
        &mut self,
        device: &Device,
        q: &Buffer,
        angles: &Buffer,
        queries: usize,
    ) -> Result<(), CudaError> {
        let (dim, heads) = (self.dim, self.heads);
        if self.q.bytes() < queries * heads * dim * 2 {
            return Err(CudaError::Append { problem: "more queries than there is room for" });
        }
        let place = Rows { dim, heads, first: 0, capacity: queries };
        store_rows(device, q, None, angles, &self.q, query_scale(dim), &place, queries, None)?;
        (self.queries, self.started) = (queries, false);
        Ok(())
    }

    /// Forgets the states.
    pub fn restart(&mut self) {
        self.started = false;
    }

    /// The result, `[heads][queries][dim]` f32, after the last section.
    pub fn out(&self) -> &Buffer {
        &self.out
    }

    fn section(&mut self, device: &Device, s: &Section<'_>, last: bool) -> Result<(), CudaError> {
        let (rows, from) = s.rows;
        if rows.bytes() < from + 2 * self.kv_heads * s.capacity * self.dim * 2 || s.keys > s.capacity {
            return Err(CudaError::Append { problem: "fewer rows than keys" });
        }
        // Queries, and keys and values twice.
        let keys = if self.dim > 128 { 32 } else { 64 };
        let shared = (128 + 4 * keys) * self.dim * 2;
        let f = device.function(&Build::plain(Source::Prefill, self.dim), "prefill", shared)?;
        let n = |x: usize| x as u32;
        let args = PrefillArgs {
            pointers: [self.q.at(), rows.at() + from as u64, self.out.at(), self.sums.at()],
            numbers: [
                n(self.queries),
                n(self.queries),
                n(s.keys),
                n(s.capacity),
                n(self.heads / self.kv_heads),
                n(self.kv_heads),
                // Beyond either end it means all or none.
                s.visible.clamp(-(1 << 30), 1 << 30) as i32 as u32,
                !self.started as u32,
                last as u32,
            ],
        };
        // SAFETY: the argument of `prefill`; rows checked above, queries and states are ours.
        unsafe { device.launch_with(&f, [self.queries.div_ceil(128), self.heads, 1], 256, shared, &args) }?;
        self.started = true;
        Ok(())
    }

    /// Attends to all of an fp16 cache; with `causal`, its last rows are the queries' own tokens.
    ///
    /// # Errors
    /// The card fails.
    pub fn attend_exact(
        &mut self,
        device: &Device,
        cache: &ExactCache,
        causal: bool,
        last: bool,
    ) -> Result<(), CudaError> {
        let visible = if causal { cache.tokens as isize + 1 - self.queries as isize } else { cache.tokens as isize };
        let s = Section { rows: (&cache.rows, 0), keys: cache.tokens, capacity: cache.capacity, visible };
        self.section(device, &s, last)
    }

    /// Attends to all of a compressed history, through `rows`, room for `blocks` blocks.
    ///
    /// # Errors
    /// The card fails.
    pub fn attend_coded(
        &mut self,
        device: &Device,
        tables: &Tables,
        pool: &Pool,
        history: &History,
        turns: &Turns,
        rows: &Buffer,
        blocks: usize,
        last: bool,
    ) -> Result<(), CudaError> {
        let all = history.exact().1 + history.coded();
        self.attend_seen(device, tables, pool, history, turns, rows, blocks, all, last)
    }

    /// [`attend_coded`](Prefill::attend_coded) where query 0 sees the first `seen` tokens of the history, and each later one
    /// sees one more: with the queries' own tokens in the history.
    pub(crate) fn attend_seen(
        &mut self,
        device: &Device,
        tables: &Tables,
        pool: &Pool,
        history: &History,
        turns: &Turns,
        rows: &Buffer,
        blocks: usize,
        seen: usize,
        last: bool,
    ) -> Result<(), CudaError> {
        let (exact, exact_rows, exact_capacity) = history.exact();
        let tokens = history.coded();
        if exact_rows > 0 {
            let s = Section { rows: (exact, 0), keys: exact_rows, capacity: exact_capacity, visible: seen as isize };
            self.section(device, &s, last && tokens == 0)?;
        }
        let record = device.upload(&history.record(pool))?;
        let half = (blocks / 2).max(1);
        let all = tokens.div_ceil(BLOCK);
        let bytes = if all <= half { 0 } else { 2 * tables.channels() * half * BLOCK * 2 };
        // Blocks are decoded beside the attention to those before, on what it leaves free.
        let mut attended = vec![device.mark(Queue::Main)?];
        let mut sections = || -> Result<(), CudaError> {
            for (i, first) in (0..all).step_by(half).enumerate() {
                let (n, from) = (half.min(all - first), i % 2 * bytes);
                device.after(Queue::Side, &attended[i.saturating_sub(1)])?;
                let out = DenseOut::Halves(rows, from);
                dense(device, Queue::Side, tables, pool, (history, &record), turns, out, first, n, half * BLOCK)?;
                device.after(Queue::Main, &device.mark(Queue::Side)?)?;
                let keys = (tokens - first * BLOCK).min(n * BLOCK);
                let visible = seen as isize - (exact_rows + first * BLOCK) as isize;
                let s = Section { rows: (rows, from), keys, capacity: half * BLOCK, visible };
                self.section(device, &s, last && first + n == all)?;
                attended.push(device.mark(Queue::Main)?);
            }
            Ok(())
        };
        let done = sections();
        // Whatever comes next, buffers that go back to the card among it, comes after the side queue's work.
        device.after(Queue::Main, &device.mark(Queue::Side)?)?;
        done
    }
}
