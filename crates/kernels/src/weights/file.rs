//! Blocks as GGUF has them, taken apart into codes and scales. Every format: a block of weights shares a scale d
//! (fp16), some also a minimum m; the k-quants have super-blocks of 256 with scales of 6 bits or less inside.

use super::{WeightError, WeightType};
use WeightType::*;

/// A matrix `[rows = outputs, cols = inputs]` as a file has it, rows contiguous.
#[derive(Debug, Clone)]
pub struct FileWeight {
    pub(super) ty: WeightType,
    pub(super) rows: usize,
    pub(super) cols: usize,
    data: Vec<u8>,
}

impl FileWeight {
    /// Takes a tensor's bytes as GGUF stores them.
    ///
    /// # Errors
    /// The length does not follow from shape and type.
    pub fn new(ty: WeightType, rows: usize, cols: usize, data: Vec<u8>) -> Result<Self, WeightError> {
        let (weights, bytes) = ty.block();
        if cols == 0 || !cols.is_multiple_of(weights) {
            return Err(WeightError::Columns { cols, block: weights, ty: ty.name() });
        }
        let expected = (cols / weights).checked_mul(bytes).and_then(|b| b.checked_mul(rows)).unwrap_or(usize::MAX);
        if data.len() != expected {
            return Err(WeightError::Length { rows, cols, ty: ty.name(), expected, got: data.len() });
        }
        Ok(FileWeight { ty, rows, cols, data })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Some rows in some order: row i of the result is row `order[i]`.
    pub fn select(&self, order: &[usize]) -> Self {
        let data = order.iter().flat_map(|&r| self.row(r)).copied().collect();
        FileWeight { rows: order.len(), data, ..*self }
    }

    /// Bytes of one row.
    pub(super) fn row(&self, row: usize) -> &[u8] {
        let n = self.data.len() / self.rows;
        &self.data[row * n..(row + 1) * n]
    }
}

/// One block of a file, its codes in the order of columns.
pub(super) struct Block {
    pub codes: [u8; 256],
    /// Bits of the fp16 scale d.
    pub d: u16,
    /// Bits of the fp16 minimum, or of the scale of minima.
    pub m: u16,
    /// Scales of the groups of a super-block; Q2_K keeps both nibbles, Q3_K and Q6_K signed bytes.
    pub scales: [u8; 16],
    /// Minima of the groups of Q4_K and Q5_K.
    pub mins: [u8; 16],
}

impl Block {
    pub const EMPTY: Block = Block { codes: [0; 256], d: 0, m: 0, scales: [0; 16], mins: [0; 16] };

    /// Reads the block `b` of a type with codes.
    pub fn read(&mut self, ty: WeightType, b: &[u8]) {
        let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        self.d = match ty {
            Q2K => half(80),
            Q3K => half(108),
            Q6K => half(208),
            _ => half(0),
        };
        self.m = match ty {
            Q4_1 | Q5_1 | Q4K | Q5K => half(2),
            Q2K => half(82),
            _ => 0,
        };
        match ty {
            F32 | F16 | Bf16 => unreachable!("floats have no codes"),
            Q4_0 => self.nibbles(&b[2..], 0),
            Q4_1 => self.nibbles(&b[4..], 0),
            Q5_0 => self.nibbles(&b[6..], word(2)),
            Q5_1 => self.nibbles(&b[8..], word(4)),
            // Signed in the file.
            Q8_0 => self.codes[..32].iter_mut().zip(&b[2..]).for_each(|(c, b)| *c = b ^ 0x80),
            Q2K => {
                self.scales.copy_from_slice(&b[..16]);
                self.each_quarter(|n, q, l| b[16 + n * 32 + l] >> (2 * q) & 3);
            }
            Q3K => {
                let (high, low, s) = (&b[..32], &b[32..96], &b[96..108]);
                self.scales = std::array::from_fn(|i| q3k_scale(s, i));
                self.each_quarter(|n, q, l| (low[n * 32 + l] >> (2 * q) & 3) | (high[l] >> (n * 4 + q) & 1) << 2);
            }
            Q4K => {
                self.six_bits(&b[4..16]);
                self.each_half(&b[16..], |_, _| 0);
            }
            Q5K => {
                self.six_bits(&b[4..16]);
                let high = &b[16..48];
                self.each_half(&b[48..], |g, l| (high[l] >> g & 1) << 4);
            }
            Q6K => {
                self.scales.copy_from_slice(&b[192..208]);
                self.each_quarter(|n, q, l| {
                    let low = b[n * 64 + q % 2 * 32 + l] >> (q / 2 * 4) & 15;
                    low | (b[128 + n * 32 + l] >> (2 * q) & 3) << 4
                });
            }
        }
    }

    /// 32 codes in 16 bytes, low nibbles first; bit j of `high` is the fifth of code j.
    fn nibbles(&mut self, b: &[u8], high: u32) {
        for j in 0..16 {
            self.codes[j] = (b[j] & 15) | ((high >> j & 1) as u8) << 4;
            self.codes[j + 16] = (b[j] >> 4) | ((high >> (j + 16) & 1) as u8) << 4;
        }
    }

    /// Codes of halves n, quarters q of them, and 32 columns l.
    fn each_quarter(&mut self, code: impl Fn(usize, usize, usize) -> u8) {
        for (i, c) in self.codes.iter_mut().enumerate() {
            *c = code(i / 128, i / 32 % 4, i % 32);
        }
    }

    /// Codes of 8 groups g of 32, whose low nibbles lie in pairs of groups.
    fn each_half(&mut self, b: &[u8], high: impl Fn(usize, usize) -> u8) {
        for (i, c) in self.codes.iter_mut().enumerate() {
            let (g, l) = (i / 32, i % 32);
            *c = (b[g / 2 * 32 + l] >> (g % 2 * 4) & 15) | high(g, l);
        }
    }

    /// 8 scales and minima of 6 bits each in 12 bytes.
    fn six_bits(&mut self, s: &[u8]) {
        for g in 0..8 {
            (self.scales[g], self.mins[g]) = if g < 4 {
                (s[g] & 63, s[g + 4] & 63)
            } else {
                (s[g + 4] & 15 | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4)
            };
        }
    }
}

/// Scale i of 16 of 6 bits, less 32: the low nibbles in 8 bytes, then 2 high bits each in 4 bytes.
fn q3k_scale(s: &[u8], i: usize) -> u8 {
    let nibble = if i < 8 { s[i] & 15 } else { s[i - 8] >> 4 };
    (nibble | (s[8 + i % 4] >> (2 * (i / 4)) & 3) << 4).wrapping_sub(32)
}
