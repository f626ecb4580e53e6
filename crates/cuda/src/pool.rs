//! Where compressed histories lie on a card: blocks and outliers of a layer, and which of them are whose.

use std::sync::Arc;

use crate::CudaError;
use crate::device::{Buffer, Device};
use crate::tables::{BLOCK, Tables};

/// Bytes of a token's range in kernels/append.cu.
const RANGE: usize = 20;
/// Bytes of a history's record in kernels/device.cuh.
pub(crate) const RECORD_BYTES: usize = 48;

/// Entries of the arena that a full block may take: what fits the lists of its heads (OPEN_OUTLIERS of kernels/device.cuh).
pub(crate) fn most_outliers(tables: &Tables) -> usize {
    tables.kv_heads * 2 * tables.dim * 16
}

/// Blocks and outliers that the histories of a layer share.
pub struct Pool {
    pub(crate) blocks: Buffer,
    pub(crate) arena: Buffer,
    pub(crate) top: Buffer,
    pub(crate) status: Arc<Buffer>,
    pub(crate) ranges: Buffer,
    pub(crate) free: Vec<u32>,
    pub(crate) outliers: usize,
    pub(crate) chunk: usize,
    /// Blocks, free or not.
    pub(crate) count: usize,
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
        Self::with_status(device, tables, blocks, outliers, chunk, Arc::new(device.zeros(4)?))
    }

    /// [`Pool::new`] that tells of what can't be stored in a word that pools share.
    pub(crate) fn with_status(
        device: &Device,
        tables: &Tables,
        blocks: usize,
        outliers: usize,
        chunk: usize,
        status: Arc<Buffer>,
    ) -> Result<Self, CudaError> {
        Ok(Pool {
            blocks: device.poisoned(blocks * tables.block_bytes())?,
            arena: device.poisoned(outliers * 4)?,
            top: device.zeros(4)?,
            status,
            ranges: device.poisoned(chunk * RANGE)?,
            free: (0..blocks as u32).rev().collect(),
            outliers,
            chunk,
            count: blocks,
        })
    }

    /// Bytes of blocks and outliers.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes() + self.arena.bytes()
    }

    /// More room: as many more blocks, as many more outliers.
    pub(crate) fn grow(
        &mut self,
        device: &Device,
        tables: &Tables,
        blocks: usize,
        outliers: usize,
    ) -> Result<(), CudaError> {
        if blocks > 0 {
            let (size, have) = (tables.block_bytes(), self.count);
            let mut all = device.poisoned((have + blocks) * size)?;
            device.copy(&self.blocks, 0, &mut all, 0, have * size)?;
            self.blocks = all;
            self.count += blocks;
            self.free.splice(..0, (have as u32..self.count as u32).rev());
        }
        if outliers > 0 {
            let mut all = device.poisoned((self.outliers + outliers) * 4)?;
            device.copy(&self.arena, 0, &mut all, 0, self.outliers * 4)?;
            self.arena = all;
            self.outliers += outliers;
        }
        Ok(())
    }

    /// Outliers of full blocks so far.
    ///
    /// # Errors
    /// The card fails.
    pub fn kept(&self, device: &Device) -> Result<usize, CudaError> {
        Ok(device.read::<u32>(&self.top, 1)?[0] as usize)
    }

    /// Begins the arena anew, once no history has outliers in it.
    pub(crate) fn forget_outliers(&mut self, device: &Device) -> Result<(), CudaError> {
        device.write(&mut self.top, 0, &[0u32])
    }

    /// Whether all that was appended could be stored.
    ///
    /// # Errors
    /// It could not, or the card fails.
    pub fn check(&self, device: &Device) -> Result<(), CudaError> {
        Self::explain(device.read::<u32>(&self.status, 1)?[0])
    }

    /// What a status says.
    pub(crate) fn explain(status: u32) -> Result<(), CudaError> {
        let problem = match status {
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

    /// Blocks that are taken.
    pub(crate) fn blocks(&self) -> usize {
        self.numbers.len()
    }

    /// Bytes beside the blocks: exact rows, and the outliers of a block that is not full.
    pub(crate) fn fixed_bytes(&self) -> usize {
        let exact = self.exact.bytes().checked_div(self.exact_capacity).unwrap_or(0) * self.exact_rows;
        exact + if self.tokens.is_multiple_of(BLOCK) { 0 } else { self.open.bytes() }
    }

    /// Exact rows of keys and values, `[2][kv_heads][capacity][dim]` fp16, and how many there are.
    pub(crate) fn exact(&self) -> (&Buffer, usize, usize) {
        (&self.exact, self.exact_rows, self.exact_capacity)
    }

    /// Tokens in blocks.
    pub fn coded(&self) -> usize {
        self.tokens
    }

    /// Keeps the first tokens: exact ones, and whole blocks.
    pub(crate) fn truncate(&mut self, pool: &mut Pool, exact: usize, blocks: usize) {
        self.exact_rows = self.exact_rows.min(exact);
        self.tokens = self.tokens.min(blocks * BLOCK);
        let used = self.tokens.div_ceil(BLOCK);
        // Blocks may have been reserved for tokens that did not come.
        pool.free.extend(self.numbers.drain(used..).rev());
    }

    /// A record of kernels/device.cuh.
    pub(crate) fn record(&self, pool: &Pool) -> [u64; 6] {
        self.record_after(pool, 0, 0)
    }

    /// The record as it will be after so many more exact tokens and tokens in blocks, which are reserved.
    pub(crate) fn record_after(&self, pool: &Pool, exact: usize, coded: usize) -> [u64; 6] {
        let tokens = self.tokens + coded;
        let last = if tokens == 0 { 0 } else { (tokens - 1) % BLOCK + 1 };
        [
            self.table.at(),
            pool.arena.at(),
            self.open.at(),
            self.exact.at(),
            tokens.div_ceil(BLOCK) as u64 | (last as u64) << 32,
            (self.exact_rows + exact) as u64 | (self.exact_capacity as u64) << 32,
        ]
    }

    /// Where all of it lies, and how much room there is.
    pub(crate) fn places(&self, pool: &Pool) -> [u64; 6] {
        let places = [&self.table, &self.open, &self.exact, &pool.blocks, &pool.arena].map(Buffer::at);
        let [table, open, exact, blocks, arena] = places;
        [table, open, exact, blocks, arena, pool.outliers as u64]
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
