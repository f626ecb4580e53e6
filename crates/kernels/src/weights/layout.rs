//! How packed weights lie in memory, the same on every CPU.
//!
//! Rows are taken 16 at a time (a panel), columns 32 at a time (a block; 8 vectors k of 4 columns). A vector is one
//! line of 64 bytes: byte 4 r + j is the code of row r, column 4 k + j, which is what 8-bit dot products of any CPU
//! take: 4 columns of 16, 8 or 4 rows at once, against 4 activations that all rows share.
//!
//! ```text
//! vector k      row 0        row 1              row 15
//!            | c0 c1 c2 c3 | c0 c1 c2 c3 | .. | c0 c1 c2 c3 |     columns 4k .. 4k + 3
//!
//! A block's codes of W bits are W lines: a plane of 2, 4 or 8 bits, then one of the 1 or 2 upper bits.
//! A plane of w bits is w lines: vector k is in line k % w, at bits w * (k / w) of every byte.
//!
//! 4 bits     line 0: vectors 0 | 4 << 4    line 1: 1 | 5 << 4    line 2: 2 | 6 << 4    line 3: 3 | 7 << 4
//! 5 bits     as above, then one line whose bit k is the upper bit of vector k
//! 6 bits     as above, then two lines: line i has the upper bits of vectors i, i + 2, i + 4, i + 6
//! ```
//!
//! A panel is its blocks in order. Scales lie apart, panel after panel, each a whole number of lines; every array is
//! by row:
//!
//! ```text
//! Half         per block: 16 fp16 d
//! HalfMin      per block: 16 fp16 d, 16 fp16 m
//! Signed       per 8 blocks: 16 fp16 d; per 16 columns: 16 i8 scales
//! BytesMin     per 8 blocks: 16 fp16 d, 16 fp16 m; per block: 16 u8 scales, 16 u8 minima
//! NibblesMin   per 8 blocks: 16 fp16 d, 16 fp16 m; per 16 columns: 16 bytes, scale in the low nibble, minimum above
//! ```
//!
//! Floats keep their type: per column 16 of them.

use half::{bf16, f16};

use super::WeightType;
pub(super) use crate::memory::Line;

/// Rows of a panel.
pub(super) const ROWS: usize = 16;
/// Columns of a block.
pub(super) const BLOCK: usize = 32;
/// Blocks that share what a k-quant's super-block shares.
pub(super) const SUPER: usize = 8;

/// What scales a block has; see the drawing above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    Half,
    HalfMin,
    Signed,
    BytesMin,
    NibblesMin,
}

/// A weight is `d * (code - center) + m`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Bits of the lower plane.
    pub low: usize,
    /// Bits of the upper plane.
    pub high: usize,
    /// The code of 0; 0 or a power of two.
    pub center: i32,
    pub scales: Scales,
}

impl Layout {
    /// Bits of a code, and lines of a block.
    pub const fn bits(&self) -> usize {
        self.low + self.high
    }

    /// Parts of a block with scales of their own.
    pub const fn groups(&self) -> usize {
        match self.scales {
            Scales::Signed | Scales::NibblesMin => 2,
            _ => 1,
        }
    }

    /// Whether m may differ from 0.
    pub const fn min(&self) -> bool {
        !matches!(self.scales, Scales::Half | Scales::Signed)
    }

    /// Bytes from one block's, or super-block's, scales to the next.
    pub const fn scale_stride(&self) -> usize {
        match self.scales {
            Scales::Half => 32,
            Scales::HalfMin => 64,
            Scales::Signed => 32 + 16 * 2 * SUPER,
            Scales::BytesMin => 64 + 32 * SUPER,
            Scales::NibblesMin => 64 + 16 * 2 * SUPER,
        }
    }

    /// Lines of a panel's scales.
    pub const fn scale_lines(&self, blocks: usize) -> usize {
        let n = match self.scales {
            Scales::Half | Scales::HalfMin => blocks,
            _ => blocks.div_ceil(SUPER),
        };
        (n * self.scale_stride()).div_ceil(64)
    }

    /// Line and shift of vector k in a plane of `bits`.
    pub const fn place(bits: usize, k: usize) -> (usize, usize) {
        (k % bits, bits * (k / bits))
    }

    /// The twin of all unpacking: code of row r and column c of a block.
    #[inline(always)]
    pub fn code(&self, block: &[Line], r: usize, c: usize) -> i32 {
        let (k, byte) = (c / 4, 4 * r + c % 4);
        let (line, shift) = Self::place(self.low, k);
        let mut code = (block[line].0[byte] >> shift) as u32 & ((1 << self.low) - 1);
        if self.high > 0 {
            let (line, shift) = Self::place(self.high, k);
            code |= ((block[self.low + line].0[byte] >> shift) as u32 & ((1 << self.high) - 1)) << self.low;
        }
        code as i32
    }

    /// The weight of row r and column c of a block whose group there has this scale and minimum.
    #[inline(always)]
    pub fn weight(&self, block: &[Line], (d, m): (f32, f32), r: usize, c: usize) -> f32 {
        let product = d * (self.code(block, r, c) - self.center) as f32;
        if self.min() { product + m } else { product }
    }

    /// The twin of all scales: (d, m) of row r in group g of block b.
    pub fn scale(&self, scales: &[u8], b: usize, g: usize, r: usize) -> (f32, f32) {
        let stride = self.scale_stride();
        let half = |of: &[u8], at: usize| f16::from_le_bytes([of[at + 2 * r], of[at + 2 * r + 1]]).to_f32();
        match self.scales {
            Scales::Half => (half(&scales[b * stride..], 0), 0.0),
            Scales::HalfMin => (half(&scales[b * stride..], 0), half(&scales[b * stride..], 32)),
            Scales::Signed => {
                let s = &scales[b / SUPER * stride..];
                (half(s, 0) * s[32 + 16 * (b % SUPER * 2 + g) + r] as i8 as f32, 0.0)
            }
            Scales::BytesMin => {
                let s = &scales[b / SUPER * stride..];
                let at = 64 + 32 * (b % SUPER) + r;
                (half(s, 0) * s[at] as f32, -(half(s, 32) * s[at + 16] as f32))
            }
            Scales::NibblesMin => {
                let s = &scales[b / SUPER * stride..];
                let both = s[64 + 16 * (b % SUPER * 2 + g) + r];
                (half(s, 0) * (both & 15) as f32, -(half(s, 32) * (both >> 4) as f32))
            }
        }
    }
}

/// A type's layout, known while compiling.
pub(super) trait Format {
    const L: Layout;
}

macro_rules! formats {
    ($($name:ident: $low:literal + $high:literal bits, center $center:literal, $scales:ident;)*) => {
        $(
            pub(super) struct $name;
            impl Format for $name {
                const L: Layout = Layout { low: $low, high: $high, center: $center, scales: Scales::$scales };
            }
        )*
    };
}

formats! {
    Q40: 4 + 0 bits, center 8, Half;
    Q41: 4 + 0 bits, center 0, HalfMin;
    Q50: 4 + 1 bits, center 16, Half;
    Q51: 4 + 1 bits, center 0, HalfMin;
    Q80: 8 + 0 bits, center 128, Half;
    Q2K: 2 + 0 bits, center 0, NibblesMin;
    Q3K: 2 + 1 bits, center 4, Signed;
    Q4K: 4 + 0 bits, center 0, BytesMin;
    Q5K: 4 + 1 bits, center 0, BytesMin;
    Q6K: 4 + 2 bits, center 32, Signed;
}

/// Runs `$body` with `$F` as the format of a type with codes.
macro_rules! with_format {
    ($ty:expr, $F:ident => $body:expr, floats => $floats:expr) => {{
        use $crate::weights::WeightType as T;
        use $crate::weights::layout as l;
        match $ty {
            T::F32 | T::F16 | T::Bf16 => $floats,
            T::Q4_0 => {
                type $F = l::Q40;
                $body
            }
            T::Q4_1 => {
                type $F = l::Q41;
                $body
            }
            T::Q5_0 => {
                type $F = l::Q50;
                $body
            }
            T::Q5_1 => {
                type $F = l::Q51;
                $body
            }
            T::Q8_0 => {
                type $F = l::Q80;
                $body
            }
            T::Q2K => {
                type $F = l::Q2K;
                $body
            }
            T::Q3K => {
                type $F = l::Q3K;
                $body
            }
            T::Q4K => {
                type $F = l::Q4K;
                $body
            }
            T::Q5K => {
                type $F = l::Q5K;
                $body
            }
            T::Q6K => {
                type $F = l::Q6K;
                $body
            }
        }
    }};
}
pub(super) use with_format;

/// The layout of a type; none for floats.
pub(super) fn layout(ty: WeightType) -> Option<Layout> {
    with_format!(ty, F => Some(F::L), floats => None)
}

/// Lines of codes, or floats, and of scales of one panel.
pub(super) fn panel_lines(ty: WeightType, cols: usize) -> (usize, usize) {
    match layout(ty) {
        Some(l) => (cols / BLOCK * l.bits(), l.scale_lines(cols / BLOCK)),
        None => ((cols * ROWS * ty.block().1).div_ceil(64), 0),
    }
}

/// A float of the file as f32.
pub(super) fn float(ty: WeightType, b: &[u8]) -> f32 {
    match ty {
        WeightType::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        WeightType::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
        WeightType::Bf16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        _ => unreachable!("a type with codes"),
    }
}
