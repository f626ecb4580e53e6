//! Where compressed histories lie on a card: blocks and outliers of a layer, and which of them are whose.

use crate::CudaError;
use crate::device::{Buffer, Device};
use crate::tables::{BLOCK, Tables};

/// Bytes of a token's range in kernels/append.cu.
const RANGE: usize = 20;

/// Blocks and outliers that the histories of a layer share.
pub struct Pool {
    pub(crate) blocks: Buffer,
    pub(crate) arena: Buffer,
    pub(crate) top: Buffer,
    pub(crate) status: Buffer,
    pub(crate) ranges: Buffer,
    pub(crate) free: Vec<u32>,
    pub(crate) outliers: usize,
    pub(crate) chunk: usize,
}

impl Pool {
    /// Room for so many blocks, with so many outliers in all; at most `chunk` tokens are appended at a time.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(
        device: &Device,
        tables: &Tables,
        blocks: usize,
        outliers: usize,
        chunk: usize,
    ) -> Result<Self, CudaError> {
        Ok(Pool {
            blocks: device.poisoned(blocks * tables.block_bytes())?,
            arena: device.poisoned(outliers * 4)?,
            top: device.zeros(4)?,
            status: device.zeros(4)?,
            ranges: device.poisoned(chunk * RANGE)?,
            free: (0..blocks as u32).rev().collect(),
            outliers,
            chunk,
        })
    }

    /// Bytes of blocks and outliers.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes() + self.arena.bytes()
    }

    /// Outliers of full blocks so far.
    ///
    /// # Errors
    /// The card fails.
    pub fn kept(&self, device: &Device) -> Result<usize, CudaError> {
        Ok(device.read::<u32>(&self.top, 1)?[0] as usize)
    }

    /// Whether all that was appended could be stored.
    ///
    /// # Errors
    /// It could not, or the card fails.
    pub fn check(&self, device: &Device) -> Result<(), CudaError> {
        let problem = match device.read::<u32>(&self.status, 1)?[0] {
            0 => return Ok(()),
            1 => "an entry is not a finite fp16 number",
            2 => "a head has more outliers in a block than fit; use a lower share of outliers",
            3 => "no room for more outliers; make a larger pool",
            _ => "an outlier is too far from its dense value for fp16",
        };
        Err(CudaError::Append { problem })
    }
}

/// One sequence's part of a layer.
pub struct History {
    pub(crate) table: Buffer,
    pub(crate) open: Buffer,
    pub(crate) exact: Buffer,
    pub(crate) numbers: Vec<u32>,
    pub(crate) capacity: usize,
    pub(crate) exact_rows: usize,
    pub(crate) exact_capacity: usize,
    pub(crate) tokens: usize,
}

impl History {
    /// Room for so many exact tokens and so many blocks.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(device: &Device, tables: &Tables, exact: usize, blocks: usize) -> Result<Self, CudaError> {
        let (heads, dim) = (tables.kv_heads, tables.dim);
        Ok(History {
            table: device.poisoned(blocks * 4)?,
            open: device.poisoned(heads * 2 * dim * 16 * 4)?,
            exact: device.poisoned(2 * heads * exact * dim * 2)?,
            numbers: Vec::new(),
            capacity: blocks,
            exact_rows: 0,
            exact_capacity: exact,
            tokens: 0,
        })
    }

    /// Exact rows of keys and values, `[2][kv_heads][capacity][dim]` fp16, and how many there are.
    pub(crate) fn exact(&self) -> (&Buffer, usize, usize) {
        (&self.exact, self.exact_rows, self.exact_capacity)
    }

    /// Tokens in blocks.
    pub fn coded(&self) -> usize {
        self.tokens
    }

    /// A record of kernels/device.cuh.
    pub(crate) fn record(&self, pool: &Pool) -> [u64; 6] {
        let last = if self.tokens == 0 { 0 } else { (self.tokens - 1) % BLOCK + 1 };
        [
            self.table.at(),
            pool.arena.at(),
            self.open.at(),
            self.exact.at(),
            self.numbers.len() as u64 | (last as u64) << 32,
            self.exact_rows as u64 | (self.exact_capacity as u64) << 32,
        ]
    }

    /// Takes blocks for so many more tokens from the pool.
    ///
    /// # Errors
    /// There are too few.
    pub fn reserve(&mut self, device: &Device, pool: &mut Pool, tokens: usize) -> Result<(), CudaError> {
        let need = (self.tokens + tokens).div_ceil(BLOCK);
        let more = need.saturating_sub(self.numbers.len());
        if need > self.capacity || more > pool.free.len() {
            return Err(CudaError::Append { problem: "no block is free; make a larger pool" });
        }
        if more > 0 {
            let from = self.numbers.len();
            self.numbers.extend(pool.free.drain(pool.free.len() - more..).rev());
            device.write(&mut self.table, from * 4, &self.numbers[from..])?;
        }
        Ok(())
    }
}
