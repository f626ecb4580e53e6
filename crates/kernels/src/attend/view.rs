//! Borrowed views of one KV head's part of a block. They bind codes, tables and lengths, so that a safe call
//! cannot mismatch them: every constructor checks all sizes once, and the kernels rely on it.

use std::ops::Range;

use kvquant_quant::Table;
use kvquant_quant::pack::{BLOCK_TOKENS, MAX_BITS, UNIT_CHANNELS, VECTOR, sum_of, unit_bytes};

use crate::rope::Rotation;

pub(super) const TOKENS: usize = BLOCK_TOKENS;
/// Channels of a head, at most: as many units as a mask has bits.
const MOST_CHANNELS: usize = UNIT_CHANNELS * u128::BITS as usize;
/// Codes (and f32 places) in a unit.
#[cfg(target_arch = "x86_64")]
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

#[inline]
fn expect(part: &'static str, expected: usize, got: usize) -> Result<(), ViewError> {
    if expected == got { Ok(()) } else { Err(ViewError { part, expected, got }) }
}

/// How one head's side decodes, the same in every block: a part of [`kvquant_quant::Lut`], checked once.
#[derive(Debug, Clone, Copy)]
pub struct HeadLut<'a> {
    /// Bits of the codes of each unit `[head_dim / 4]`.
    pub(super) widths: &'a [u8],
    /// By place `[head_dim]`; one for all where tokens have scales.
    pub(super) tables: &'a [Table],
    /// Likewise. Both channels of a pair of keys share a step.
    pub(super) steps: &'a [f32],
    /// The channel that each place holds `[head_dim]`; empty where they are the same.
    pub(super) order: &'a [u16],
    #[cfg(target_arch = "x86_64")]
    pairs: Pairs,
    /// Channels that share a per-token scale; none where scales are static.
    group_channels: Option<usize>,
    /// Where a run of units of one width ends that begins at a unit.
    run_ends: [u8; MOST_CHANNELS / UNIT_CHANNELS],
    /// Bytes of a block's codes.
    code_bytes: usize,
}

/// RoPE pairs of a head whose places have another order.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Pairs {
    /// Whether a unit holds two whole pairs.
    whole: [bool; MOST_CHANNELS / UNIT_CHANNELS],
    /// The pairs of all other units, the first `count`.
    apart: [u8; MOST_CHANNELS / 2],
    count: usize,
}

#[cfg(target_arch = "x86_64")]
impl Pairs {
    fn new(order: &[u16]) -> Self {
        let mut pairs =
            Pairs { whole: [false; MOST_CHANNELS / UNIT_CHANNELS], apart: [0; MOST_CHANNELS / 2], count: 0 };
        let is_pair = |two: &[u16; 2]| two[0].is_multiple_of(2) && two[1] == two[0] + 1;
        for (u, unit) in order.as_chunks::<UNIT_CHANNELS>().0.iter().enumerate() {
            if unit.as_chunks().0.iter().all(is_pair) {
                pairs.whole[u] = true;
                continue;
            }
            for c in unit.iter().filter(|c| *c % 2 == 0) {
                pairs.apart[pairs.count] = (c / 2) as u8;
                pairs.count += 1;
            }
        }
        pairs
    }
}

impl<'a> HeadLut<'a> {
    /// Binds the parts: `tables`, `steps` and `order` by place `[head_dim]`, where no `order` is the channels' own and one
    /// table serves all where tokens have scales, one for each `group_channels` channels.
    ///
    /// # Errors
    /// A part's size does not follow from the `widths` `[head_dim / 4]`.
    pub fn new(
        widths: &'a [u8],
        tables: &'a [Table],
        steps: &'a [f32],
        order: &'a [u16],
        group_channels: Option<usize>,
    ) -> Result<Self, ViewError> {
        let head_dim = widths.len() * UNIT_CHANNELS;
        if head_dim > MOST_CHANNELS {
            return Err(ViewError { part: "channels (at most)", expected: MOST_CHANNELS, got: head_dim });
        }
        if let Some(&b) = widths.iter().find(|&&b| b as u32 > MAX_BITS) {
            return Err(ViewError { part: "bits (0 to 7)", expected: MAX_BITS as usize, got: b as usize });
        }
        expect("tables", if group_channels.is_some() { 1 } else { head_dim }, tables.len())?;
        expect("steps", tables.len(), steps.len())?;
        if !order.is_empty() {
            expect("order", head_dim, order.len())?;
            let mut seen = [0u64; MOST_CHANNELS / 64];
            for &c in order {
                let word = seen.get_mut(c as usize / 64).filter(|_| (c as usize) < head_dim);
                let of_another = word.is_none_or(|w| std::mem::replace(w, *w | 1 << (c % 64)) >> (c % 64) & 1 == 1);
                if of_another {
                    return Err(ViewError {
                        part: "order (channels of the head)",
                        expected: head_dim,
                        got: c as usize,
                    });
                }
            }
        }
        if let Some(group) = group_channels {
            if group == 0 || !group.is_multiple_of(UNIT_CHANNELS) || !head_dim.is_multiple_of(group) {
                return Err(ViewError { part: "channels of a scale group", expected: head_dim, got: group });
            }
            if !order.is_empty() && group != head_dim {
                return Err(ViewError { part: "scale group of reordered channels", expected: head_dim, got: group });
            }
        }
        let code_bytes = widths.iter().map(|&b| unit_bytes(b as u32)).sum();
        let (mut run_ends, mut end) = ([0; MOST_CHANNELS / UNIT_CHANNELS], widths.len() as u8);
        for u in (0..widths.len()).rev() {
            if widths.get(u + 1).is_some_and(|next| *next != widths[u]) {
                end = u as u8 + 1;
            }
            run_ends[u] = end;
        }
        Ok(HeadLut {
            widths,
            run_ends,
            tables,
            steps,
            order,
            #[cfg(target_arch = "x86_64")]
            pairs: Pairs::new(order),
            group_channels,
            code_bytes,
        })
    }

    /// Channels of the head.
    pub fn head_dim(&self) -> usize {
        self.widths.len() * UNIT_CHANNELS
    }
}

/// Scales of the tokens of a block. A dense value is `scale * lut + zero`.
#[derive(Debug, Clone, Copy)]
pub struct TokenScales<'a> {
    /// fp16 bits `[groups, 64]`
    pub scale: &'a [u16],
    /// fp16 bits `[groups, 64]`; empty where scales have no zero point.
    pub zero: &'a [u16],
}

/// Values kept apart, unit by unit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outliers<'a> {
    /// How many each unit has `[head_dim / 4]`.
    pub counts: &'a [u8],
    /// `place_in_unit * 64 + token`
    pub places: &'a [u8],
    /// fp16, low byte first, added to the dense value.
    pub residuals: &'a [[u8; 2]],
}

/// Packed codes of one head and side of a block.
///
/// ```text
/// codes     unit after unit of 4 places x 64 tokens, widths[unit] * 32 bytes each  (kvquant_quant::pack)
/// value     steps[place] * tables[place].value(bits, code)                             (kvquant_quant::lut)
///           then, where the side has them, * scale[group][token] + zero[group][token]
///           then + residual, where the entry is an outlier
/// ```
#[derive(Debug, Clone, Copy)]
pub struct CodedView<'a> {
    pub(super) lut: &'a HeadLut<'a>,
    pub(super) codes: &'a [u8],
    pub(super) scales: Option<TokenScales<'a>>,
    pub(super) outliers: Outliers<'a>,
}

/// Units of one width, one after another.
pub(super) struct Run<'a> {
    pub bits: u32,
    pub units: Range<usize>,
    /// `[units][bits]`
    pub vectors: &'a [[u8; VECTOR]],
    /// Where the vectors begin in the side's codes.
    pub start: usize,
}

impl<'a> CodedView<'a> {
    /// Binds the parts.
    ///
    /// # Errors
    /// A part's size does not follow from the head's widths and groups, and the outlier counts.
    #[inline]
    pub fn new(
        lut: &'a HeadLut<'a>,
        codes: &'a [u8],
        scales: Option<TokenScales<'a>>,
        outliers: Outliers<'a>,
    ) -> Result<Self, ViewError> {
        let Outliers { counts, places, residuals } = outliers;
        let (view, n) = CodedView::with_first(lut, codes, scales, counts, places, residuals)?;
        expect("outliers", n, places.len())?;
        expect("residuals", n, residuals.len())?;
        Ok(view)
    }

    /// Binds the parts, of which the outliers are the first in lists that go on behind them; and how many those are.
    ///
    /// # Errors
    /// A part's size does not follow from the head's widths and groups, or the lists end too early.
    #[inline]
    pub fn with_first(
        lut: &'a HeadLut<'a>,
        codes: &'a [u8],
        scales: Option<TokenScales<'a>>,
        counts: &'a [u8],
        places: &'a [u8],
        residuals: &'a [[u8; 2]],
    ) -> Result<(Self, usize), ViewError> {
        expect("codes", lut.code_bytes, codes.len())?;
        let groups = lut.group_channels.map_or(0, |g| lut.head_dim() / g);
        expect("scale", groups * TOKENS, scales.map_or(0, |s| s.scale.len()))?;
        if let Some(s) = scales
            && !s.zero.is_empty()
        {
            expect("zero", s.scale.len(), s.zero.len())?;
        }
        expect("outlier counts", lut.widths.len(), counts.len())?;
        let n = sum_of(counts);
        let (Some(places), Some(residuals)) = (places.get(..n), residuals.get(..n)) else {
            return Err(ViewError { part: "outliers", expected: n, got: places.len().min(residuals.len()) });
        };
        Ok((CodedView { lut, codes, scales, outliers: Outliers { counts, places, residuals } }, n))
    }

    /// Channels of the head.
    #[inline(always)]
    pub(super) fn head_dim(&self) -> usize {
        self.lut.head_dim()
    }

    /// Each unit's width and codes.
    #[inline(always)]
    pub(super) fn units(&self) -> impl Iterator<Item = (u32, &'a [u8])> {
        let (mut rest, widths) = (self.codes, self.lut.widths);
        widths.iter().map(move |&b| {
            let (unit, next) = rest.split_at(unit_bytes(b as u32));
            rest = next;
            (b as u32, unit)
        })
    }

    /// Runs of units of one width.
    #[inline(always)]
    pub(super) fn runs(&self) -> impl Iterator<Item = Run<'a>> {
        let (mut rest, mut first, lut) = (self.codes, 0, self.lut);
        std::iter::from_fn(move || {
            let bits = *lut.widths.get(first)? as u32;
            let n = lut.run_ends[first] as usize - first;
            let (codes, next) = rest.split_at(unit_bytes(bits) * n);
            let (units, start) = (first..first + n, self.codes.len() - rest.len());
            (rest, first) = (next, units.end);
            Some(Run { bits, units, vectors: codes.as_chunks::<VECTOR>().0, start })
        })
    }

    /// The vectors of another side's run in this one, whose widths are the same.
    #[inline(always)]
    pub(super) fn vectors_of(&self, run: &Run<'_>) -> &'a [[u8; VECTOR]] {
        self.codes[run.start..][..size_of_val(run.vectors)].as_chunks().0
    }

    /// Whether the other decodes by the very same tables and groups.
    pub(super) fn decodes_as(&self, other: &Self) -> bool {
        let has_zero = |v: &Self| v.scales.is_some_and(|s| !s.zero.is_empty());
        std::ptr::eq(self.lut, other.lut) && has_zero(self) == has_zero(other)
    }

    /// Channels that share a per-token scale, or a part of the work: all of the head where scales are static.
    #[inline(always)]
    pub(super) fn group_channels(&self) -> usize {
        self.lut.group_channels.unwrap_or(self.head_dim())
    }

    /// Of a run's units, where places have another order: their tables, their channels, and whether they hold two whole RoPE
    /// pairs.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn ordered_units(
        &self,
        run: &Run<'_>,
    ) -> (&'a [[Table; UNIT_CHANNELS]], &'a [[u16; UNIT_CHANNELS]], &'a [bool]) {
        let (lut, first, n) = (self.lut, run.units.start, run.units.len());
        let tables = &lut.tables.as_chunks().0[first..][..n];
        (tables, &lut.order.as_chunks().0[first..][..n], &lut.pairs.whole[first..][..n])
    }

    /// The RoPE pairs of all other units.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn apart(&self) -> &[u8] {
        &self.lut.pairs.apart[..self.lut.pairs.count]
    }

    /// The table and step of a place.
    #[inline(always)]
    pub(super) fn table(&self, place: usize) -> (&'a Table, f32) {
        let i = if self.lut.tables.len() == 1 { 0 } else { place };
        (&self.lut.tables[i], self.lut.steps[i])
    }

    /// The tables of a unit whose first place is given.
    #[inline(always)]
    pub(super) fn four_tables(&self, place: usize) -> [&'a Table; UNIT_CHANNELS] {
        match self.lut.tables[place.min(self.lut.tables.len() - 1)..].first_chunk::<UNIT_CHANNELS>() {
            Some([a, b, c, d]) => [a, b, c, d],
            None => [&self.lut.tables[0]; UNIT_CHANNELS],
        }
    }

    /// The channel at a place.
    #[inline(always)]
    pub(super) fn channel(&self, place: usize) -> usize {
        self.lut.order.get(place).map_or(place, |&c| c as usize)
    }

    /// Channel, token and residual (fp16 bits) of every outlier.
    #[inline(always)]
    pub(super) fn each_outlier(&self) -> impl Iterator<Item = (usize, usize, u16)> {
        let o = self.outliers;
        let units = o.counts.iter().enumerate().flat_map(|(u, &n)| std::iter::repeat_n(u * UNIT_CHANNELS, n as usize));
        let lut = self.lut;
        units.zip(o.places).zip(o.residuals).map(move |((first, &p), &bits)| {
            let place = first + p as usize / TOKENS;
            let channel = lut.order.get(place).map_or(place, |&c| c as usize);
            (channel, p as usize % TOKENS, u16::from_le_bytes(bits))
        })
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
    #[inline]
    pub fn head_dim(&self) -> usize {
        match self {
            SideView::Rows { head_dim, .. } => *head_dim,
            SideView::Tile { data } => data.len() / TOKENS,
            SideView::Coded(c) => c.head_dim(),
        }
    }

    #[inline]
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
            SideView::Coded(c) => expect("head_dim of codes", head_dim, c.head_dim()),
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
    #[inline]
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
