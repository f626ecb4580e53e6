//! Rotations by one rope, shared by the layers that use it.

use std::sync::Arc;

use kvquant_kernels::rope::{BlockTable, Rope, Rotation};
use kvquant_quant::pack::BLOCK_TOKENS;

use crate::attend::Angles;

#[derive(Debug)]
pub(crate) struct Turns {
    pub rope: Arc<Rope>,
    pub table: BlockTable,
    /// The rotation of position 0, where the sinks begin.
    pub start: Rotation,
    pub angles: Angles,
    /// The rotations of the first positions of the blocks from `first` on.
    origins: Vec<Rotation>,
    first: usize,
}

impl Turns {
    pub fn new(rope: Arc<Rope>) -> Self {
        let (table, start) = (rope.block_table(), rope.rotation(0));
        Turns { rope, table, start, angles: Angles::default(), origins: Vec::new(), first: 0 }
    }

    /// Makes ready for a call's positions `start .. start + n`, in blocks that begin after `sinks` tokens.
    pub fn cover(&mut self, start: usize, n: usize, sinks: usize) {
        self.angles.cover(&self.rope, start, n);
        let blocks = (start + n).saturating_sub(sinks).div_ceil(BLOCK_TOKENS);
        for b in self.first + self.origins.len()..blocks {
            self.origins.push(self.rope.rotation(sinks + b * BLOCK_TOKENS));
        }
    }

    /// Rotations of the blocks from `block` on.
    pub fn origins(&self, block: usize) -> &[Rotation] {
        &self.origins[block - self.first..]
    }

    /// Keeps those of the blocks `first .. end`.
    pub fn keep(&mut self, first: usize, end: usize) {
        if first < self.first {
            // What lies before was let go; it is made again from the start.
            self.origins.clear();
            self.first = first;
        }
        self.origins.drain(..(first - self.first).min(self.origins.len()));
        self.first = first;
        self.origins.truncate(end.saturating_sub(first));
    }
}
