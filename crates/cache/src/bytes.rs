//! Where the bytes go.

/// Bytes that a cache holds, by part, padding and unused capacity included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Packed codes.
    pub codes: usize,
    /// Per-token scales and zero points.
    pub scales: usize,
    /// Outliers: residual, index, and the counts of every unit.
    pub outliers: usize,
    /// Sinks, recent window and fp16 blocks.
    pub exact: usize,
    /// What finds a block: its header in the layer's list, how many hold it, what fills up its memory. Of a cache that
    /// makes its own tables (`+online`), these too.
    pub index: usize,
}

impl Bytes {
    /// All parts.
    pub fn total(&self) -> usize {
        self.codes + self.scales + self.outliers + self.exact + self.index
    }
}

impl std::ops::AddAssign for Bytes {
    fn add_assign(&mut self, b: Bytes) {
        self.codes += b.codes;
        self.scales += b.scales;
        self.outliers += b.outliers;
        self.exact += b.exact;
        self.index += b.index;
    }
}
