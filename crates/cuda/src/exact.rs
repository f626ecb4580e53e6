//! The base line: an fp16 cache, decoded by a kernel of the same shape.
#![allow(unsafe_code)]

use cudarc::driver::DeviceRepr;

use crate::CudaError;
use crate::device::{Buffer, Device};
use crate::layer::{Out, Parts, Rows, choose_splits, store_rows};
use crate::modules::{Build, group_of};

/// fp16 rows `[2][kv_heads][capacity][dim]`, keys turned.
pub struct ExactCache {
    pub(crate) rows: Buffer,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) capacity: usize,
    pub(crate) tokens: usize,
}

#[repr(C)]
struct ExactArgs {
    pointers: [u64; 5],
    next: u64,
    numbers: [u32; 6],
}
// SAFETY: plain numbers in the order of kernels/exact.cu.
unsafe impl DeviceRepr for ExactArgs {}

impl ExactCache {
    /// Room for so many tokens.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(device: &Device, kv_heads: usize, dim: usize, capacity: usize) -> Result<Self, CudaError> {
        let rows = device.poisoned(2 * kv_heads * capacity * dim * 2)?;
        Ok(ExactCache { rows, kv_heads, dim, capacity, tokens: 0 })
    }

    /// Room for so many tokens from now on.
    pub(crate) fn grow(&mut self, device: &Device, capacity: usize) -> Result<(), CudaError> {
        let mut all = ExactCache::new(device, self.kv_heads, self.dim, capacity.max(self.tokens))?;
        let row = self.dim * 2;
        for head in 0..2 * self.kv_heads {
            let (from, to) = (head * self.capacity * row, head * all.capacity * row);
            device.copy(&self.rows, from, &mut all.rows, to, self.tokens * row)?;
        }
        all.tokens = self.tokens;
        *self = all;
        Ok(())
    }

    /// Appends `[tokens][kv_heads][dim]` f32, keys turned by `angles`. A single token's place is read on the card where `after` says how
    /// many there are with it.
    ///
    /// # Errors
    /// No room.
    pub fn append(
        &mut self,
        device: &Device,
        keys: &Buffer,
        values: &Buffer,
        angles: &Buffer,
        tokens: usize,
        after: Option<&Buffer>,
    ) -> Result<(), CudaError> {
        let place = Rows { dim: self.dim, heads: self.kv_heads, first: self.tokens, capacity: self.capacity };
        store_rows(device, keys, Some(values), angles, &self.rows, 1.0, &place, tokens, after)?;
        self.tokens += tokens;
        Ok(())
    }
}

/// Warps of a block of threads in kernels/exact.cu.
fn warps(dim: usize, group: usize) -> usize {
    if group * dim > 1024 { 4 } else { 8 }
}

/// Decode attention over an fp16 cache.
pub struct ExactDecode {
    parts: Parts,
    group: usize,
    heads: usize,
}

impl ExactDecode {
    /// What its launches were told that may change from step to step.
    pub(crate) fn key(&self) -> [u64; 3] {
        [self.parts.parts.at(), self.parts.sums.at(), self.parts.splits as u64]
    }

    /// For so many query heads.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(device: &Device, cache: &ExactCache, heads: usize) -> Result<Self, CudaError> {
        let group = group_of(heads / cache.kv_heads);
        let mut new = ExactDecode { parts: Parts::new(device, heads, 1, cache.dim)?, group, heads };
        new.follow(device, cache, cache.tokens)?;
        Ok(new)
    }

    /// Splits a history that will have so many tokens anew; for all layers of one shape.
    pub(crate) fn follow(&mut self, device: &Device, cache: &ExactCache, tokens: usize) -> Result<(), CudaError> {
        let step = 256 / cache.dim * if self.group > 2 { 4 } else { 8 };
        let warps = warps(cache.dim, self.group);
        let at_a_time = if self.group > 4 && warps > 4 { 1 } else { 2 };
        let (steps, tasks) = (tokens.div_ceil(step), self.heads / self.group);
        let splits = choose_splits(at_a_time * device.info().processors, tasks, steps, warps, 2.0);
        self.parts.resize(device, splits)
    }

    /// Attention of one token: `q` `[heads][dim]` f32. How many tokens there are is read on the card where `after` says so.
    ///
    /// # Errors
    /// The card fails.
    pub fn decode(
        &self,
        device: &Device,
        cache: &ExactCache,
        q: &Buffer,
        out: Out<'_>,
        after: Option<&Buffer>,
    ) -> Result<(), CudaError> {
        if q.bytes() < self.heads * cache.dim * 4 || cache.tokens == 0 {
            return Err(CudaError::Append { problem: "fewer query rows than heads, or no history" });
        }
        let f = device.function(&Build::exact(cache.dim, self.group), "exact_decode", 0)?;
        let passes = self.heads / cache.kv_heads / self.group;
        let args = ExactArgs {
            pointers: [
                cache.rows.at(),
                q.at(),
                self.parts.parts.at(),
                self.parts.sums.at(),
                after.map_or(0, Buffer::at),
            ],
            next: 0,
            numbers: [self.heads, cache.kv_heads, self.parts.splits, passes, cache.tokens, cache.capacity]
                .map(|n| n as u32),
        };
        let threads = 32 * warps(cache.dim, self.group);
        // SAFETY: the argument of `exact_decode`; it reads rows below `tokens` and writes the parts.
        unsafe { device.launch_early(&f, [self.parts.splits, self.heads / self.group, 1], threads, 0, &args) }?;
        self.parts.merge(device, out)
    }
}
