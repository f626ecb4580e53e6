//! Borrowed views of one KV head's part of a block. They bind codes, tables and lengths, so that a safe call
//! cannot mismatch them: every constructor checks all sizes once, and the kernels rely on it.

use half::f16;
use kvquant_quant::pack::{BLOCK_TOKENS, UNIT_CHANNELS, unit_words};

use crate::rope::Rotation;

pub(super) const TOKENS: usize = BLOCK_TOKENS;
/// Codes (and f32 places) in a unit.
pub(super) const UNIT: usize = UNIT_CHANNELS * BLOCK_TOKENS;

/// A block's parts do not fit each other.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("cache block: {part} has {got} entries, expected {expected}")]
pub struct ViewError {
    /// Which part.
    pub part: &'static str,
    /// What it should have.
    pub expected: usize,
    /// What it has.
    pub got: usize,
}

fn expect(part: &'static str, expected: usize, got: usize) -> Result<(), ViewError> {
    if expected == got { Ok(()) } else { Err(ViewError { part, expected, got }) }
}

/// Packed codes of one head and side of a block.
///
/// ```text
/// codes     [head_dim / 4 units][bits words][8 lanes] u32   (layout of a unit: kvquant_quant::pack)
/// lut       [head_dim][2^bits] f32 (static, scale and zero inside)  or  [2^bits] (then scale and zero by token)
/// scale     [groups][64] fp16 bits, empty when static;  zero likewise, empty when scales have no zero point
/// counts    [head_dim / 4] u8: outliers of each unit, then, unit after unit:
/// outliers  [u8; 3]: channel_in_unit * 64 + token, then the fp16 residual, low byte first, added to the dense value
/// ```
#[derive(Debug, Clone, Copy)]
pub struct CodedView<'a> {
    pub(super) bits: u32,
    pub(super) head_dim: usize,
    pub(super) codes: &'a [u32],
    pub(super) lut: &'a [f32],
    pub(super) per_channel: bool,
    pub(super) scale: &'a [u16],
    pub(super) zero: &'a [u16],
    pub(super) group_channels: usize,
    pub(super) counts: &'a [u8],
    pub(super) outliers: &'a [[u8; 3]],
}

impl<'a> CodedView<'a> {
    /// Binds the parts. `group_channels` is how many channels of this head share a per-token scale
    /// (`head_dim` when the whole token does).
    ///
    /// # Errors
    /// A part's size does not follow from `bits`, `head_dim` and the outlier counts.
    pub fn new(
        bits: u32,
        head_dim: usize,
        codes: &'a [u32],
        lut: &'a [f32],
        per_channel: bool,
        scale: &'a [u16],
        zero: &'a [u16],
        group_channels: usize,
        counts: &'a [u8],
        outliers: &'a [[u8; 3]],
    ) -> Result<Self, ViewError> {
        if !(2..=4).contains(&bits) {
            return Err(ViewError { part: "bits (2, 3 or 4)", expected: 3, got: bits as usize });
        }
        let units = head_dim / UNIT_CHANNELS;
        expect("head_dim (a multiple of 4)", units * UNIT_CHANNELS, head_dim)?;
        expect("codes", units * unit_words(bits), codes.len())?;
        let signposts = 1usize << bits;
        expect("lut", if per_channel { head_dim * signposts } else { signposts }, lut.len())?;
        if per_channel {
            expect("scale", 0, scale.len())?;
            expect("zero", 0, zero.len())?;
        } else {
            if group_channels == 0
                || !group_channels.is_multiple_of(UNIT_CHANNELS)
                || !head_dim.is_multiple_of(group_channels)
            {
                return Err(ViewError { part: "channels of a scale group", expected: head_dim, got: group_channels });
            }
            expect("scale", head_dim / group_channels * TOKENS, scale.len())?;
            if !zero.is_empty() {
                expect("zero", scale.len(), zero.len())?;
            }
        }
        expect("outlier counts", units, counts.len())?;
        expect("outliers", counts.iter().map(|&c| c as usize).sum(), outliers.len())?;
        Ok(CodedView { bits, head_dim, codes, lut, per_channel, scale, zero, group_channels, counts, outliers })
    }

    /// Codes of a unit.
    pub(super) fn unit(&self, unit: usize) -> &'a [u32] {
        let words = unit_words(self.bits);
        &self.codes[unit * words..(unit + 1) * words]
    }

    /// Places (below 256, by their type) and residuals of the outliers `first .. end`.
    pub(super) fn outliers(&self, first: usize, end: usize) -> impl Iterator<Item = (usize, f32)> {
        self.outliers[first..end]
            .iter()
            .map(|&[place, low, high]| (place as usize, f16::from_le_bytes([low, high]).to_f32()))
    }

    /// The table of a channel of this head.
    pub(super) fn lut(&self, channel: usize) -> &'a [f32] {
        let n = 1usize << self.bits;
        if self.per_channel { &self.lut[channel * n..(channel + 1) * n] } else { self.lut }
    }
}

/// One head's keys or values in a block.
#[derive(Debug, Clone, Copy)]
pub enum SideView<'a> {
    /// fp16 bits, token by token: token t's head at `data[t * stride..][..head_dim]`.
    Rows {
        /// From this head's first channel of the first token on.
        data: &'a [u16],
        /// Entries from a token to the next.
        stride: usize,
        /// Channels of a head.
        head_dim: usize,
    },
    /// fp16 bits `[head_dim, 64]`, channel by channel.
    Tile {
        /// `[head_dim, 64]`
        data: &'a [u16],
    },
    /// Packed codes.
    Coded(CodedView<'a>),
}

impl SideView<'_> {
    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        match self {
            SideView::Rows { head_dim, .. } => *head_dim,
            SideView::Tile { data } => data.len() / TOKENS,
            SideView::Coded(c) => c.head_dim,
        }
    }

    fn check(&self, head_dim: usize, len: usize) -> Result<(), ViewError> {
        match self {
            SideView::Rows { data, stride, head_dim: d } => {
                expect("head_dim of rows", head_dim, *d)?;
                let need = if len == 0 { 0 } else { (len - 1) * stride + head_dim };
                if data.len() < need {
                    return Err(ViewError { part: "rows", expected: need, got: data.len() });
                }
                Ok(())
            }
            SideView::Tile { data } => expect("tile", head_dim * TOKENS, data.len()),
            SideView::Coded(c) => expect("head_dim of codes", head_dim, c.head_dim),
        }
    }
}

/// One KV head's keys and values in a block.
#[derive(Debug, Clone, Copy)]
pub struct BlockView<'a> {
    pub(super) key: SideView<'a>,
    pub(super) value: SideView<'a>,
    pub(super) len: usize,
    /// The rotation of the block's first position, where keys are kept before RoPE.
    pub(super) origin: Option<&'a Rotation>,
}

impl<'a> BlockView<'a> {
    /// Binds both sides and the rotation of the block's first position (`None`: keys are kept rotated).
    ///
    /// # Errors
    /// The sides or the rotation differ in shape, or `len` is above 64.
    pub fn new(
        key: SideView<'a>,
        value: SideView<'a>,
        len: usize,
        origin: Option<&'a Rotation>,
    ) -> Result<Self, ViewError> {
        let head_dim = key.head_dim();
        if len > TOKENS {
            return Err(ViewError { part: "tokens of a block", expected: TOKENS, got: len });
        }
        if head_dim == 0 || !head_dim.is_multiple_of(UNIT_CHANNELS) {
            return Err(ViewError { part: "head_dim (a multiple of 4)", expected: UNIT_CHANNELS, got: head_dim });
        }
        key.check(head_dim, len)?;
        value.check(head_dim, len)?;
        if let Some(r) = origin {
            expect("rotation", head_dim / 2, r.cos.len())?;
            expect("rotation", head_dim / 2, r.sin.len())?;
        }
        Ok(BlockView { key, value, len, origin })
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.key.head_dim()
    }

    /// Tokens in the block.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the block has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
