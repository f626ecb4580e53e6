//! Blocks of codes: how they are laid out, and how they are read.

mod open;

use std::ops::Range;

use kvquant_kernels::attend::{CodedView, HeadLut, SideView, TokenScales, ViewError};
use kvquant_kernels::memory::SharedWords;
use kvquant_quant::SideQuantizer;
use kvquant_quant::pack::{BLOCK_TOKENS, OUTLIER_BYTES, UNIT_CHANNELS, sum_of, unit_bytes};

pub(crate) use open::OpenBlock;

use crate::bytes::Bytes;

/// One layer's quantizers.
#[derive(Debug)]
pub(crate) struct Quantizers {
    pub key: SideQuantizer,
    pub value: SideQuantizer,
}

/// How one side of a block is laid out. C = kv_heads * head_dim.
#[derive(Debug, Clone)]
struct SideLayout {
    /// Bits of each unit of 4 places.
    widths: Vec<u8>,
    /// Where each unit's codes begin, in bytes of the side's codes; then where the last ends.
    starts: Vec<usize>,
    /// The channel of each place `[C]`.
    channels: Vec<u16>,
    /// The place of each channel `[C]`.
    places: Vec<u16>,
    head_dim: usize,
    groups: usize,
    group_channels: usize,
    zero_point: bool,
}

impl SideLayout {
    fn new(q: &SideQuantizer, channels: usize, head_dim: usize) -> Self {
        let lut = q.lut();
        let channel = |place: usize| match lut.order.get(place) {
            Some(&c) => (place / head_dim * head_dim) as u16 + c,
            None => place as u16,
        };
        let channels: Vec<u16> = (0..channels).map(channel).collect();
        let mut places = vec![0; channels.len()];
        for (place, &c) in channels.iter().enumerate() {
            places[c as usize] = place as u16;
        }
        let sizes = lut.widths.iter().map(|&b| unit_bytes(b as u32));
        let starts = [0]
            .into_iter()
            .chain(sizes.scan(0, |end, size| {
                *end += size;
                Some(*end)
            }))
            .collect();
        SideLayout {
            widths: lut.widths.clone(),
            starts,
            channels,
            places,
            head_dim,
            groups: q.groups(),
            group_channels: q.group_channels(),
            zero_point: q.groups() > 0 && q.has_zero_point(),
        }
    }

    fn code_bytes(&self) -> usize {
        *self.starts.last().expect("the end is always there")
    }

    fn scales(&self) -> usize {
        self.groups * BLOCK_TOKENS
    }

    fn zeros(&self) -> usize {
        if self.zero_point { self.scales() } else { 0 }
    }

    fn units(&self) -> usize {
        self.widths.len()
    }
}

/// The layouts of both sides, the same for every block of a layer, and where their parts lie.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    key: SideLayout,
    value: SideLayout,
    places: [Place; 2],
    words: usize,
}

/// Where one side's parts lie in a block: codes and counts in bytes, scales in halves.
#[derive(Debug, Clone)]
struct Place {
    codes: Range<usize>,
    scales: Range<usize>,
    counts: Range<usize>,
}

impl Layout {
    pub fn new(q: &Quantizers, channels: usize, head_dim: usize) -> Self {
        let (key, value) = (SideLayout::new(&q.key, channels, head_dim), SideLayout::new(&q.value, channels, head_dim));
        let (k, v) = (&key, &value);
        // Units are 32 bytes a bit, so that halves begin on a half.
        let (k_codes, codes) = (k.code_bytes(), k.code_bytes() + v.code_bytes());
        let (k_scales, v_scales) = (k.scales() + k.zeros(), v.scales() + v.zeros());
        let (halves, bytes) = (codes / 2, codes + 2 * (k_scales + v_scales));
        let places = [
            Place { codes: 0..k_codes, scales: halves..halves + k_scales, counts: bytes..bytes + k.units() },
            Place {
                codes: k_codes..codes,
                scales: halves + k_scales..halves + k_scales + v_scales,
                counts: bytes + k.units()..bytes + k.units() + v.units(),
            },
        ];
        let words = (places[1].counts.end + 1).div_ceil(4);
        Layout { key, value, places, words }
    }

    /// Where a head's keys and values lie in every block, and how they decode.
    pub fn head<'a>(&'a self, q: &'a Quantizers, head: usize) -> Result<HeadSides<'a>, ViewError> {
        let side = |l: &'a SideLayout, place: &Place, q: &'a SideQuantizer| -> Result<HeadSide<'a>, ViewError> {
            let (lut, d) = (q.lut(), l.head_dim);
            let of_head = head * d..(head + 1) * d;
            let units = of_head.start / UNIT_CHANNELS..of_head.end / UNIT_CHANNELS;
            // A scale group is the whole token (all heads read the same one) or a part of one head.
            let group_channels = (l.groups > 0).then_some(l.group_channels.min(d));
            let scales = group_channels.map(|g| {
                let a_head = if l.group_channels > d { 0 } else { d / g };
                let first = head * a_head;
                let groups = first * BLOCK_TOKENS..(first + a_head.max(1)) * BLOCK_TOKENS;
                let from = |start: usize| start + groups.start..start + groups.end;
                let zero = from(place.scales.start + l.scales());
                (from(place.scales.start), if l.zero_point { zero } else { 0..0 })
            });
            let tables = if lut.per_channel { of_head.clone() } else { 0..1 };
            let (tables, steps) = (&lut.tables[tables.clone()], &lut.steps[tables]);
            let order = lut.order.get(of_head).unwrap_or(&[]);
            let counts = place.counts.start + units.start..place.counts.start + units.end;
            Ok(HeadSide {
                lut: HeadLut::new(&l.widths[units.clone()], tables, steps, order, group_channels)?,
                codes: place.codes.start + l.starts[units.start]..place.codes.start + l.starts[units.end],
                before: self.places[0].counts.start..counts.start,
                counts,
                scales,
            })
        };
        Ok(HeadSides {
            key: side(&self.key, &self.places[0], &q.key)?,
            value: side(&self.value, &self.places[1], &q.value)?,
            counts: self.counts(),
            words: self.words,
        })
    }

    /// The counts of outliers of both sides.
    fn counts(&self) -> Range<usize> {
        self.places[0].counts.start..self.places[1].counts.end
    }

    /// Bytes of a block without its outliers.
    pub fn fixed_bytes(&self) -> usize {
        4 * self.words
    }

    /// What a block's bytes, which are `all`, hold.
    fn bytes(&self, all: usize) -> Bytes {
        let codes = self.places[1].codes.end;
        let scales = self.places.iter().map(|p| 2 * p.scales.len()).sum();
        Bytes { codes, scales, outliers: all - codes - scales, ..Bytes::default() }
    }
}

/// Where the parts of a head lie in every block.
pub(crate) struct HeadSides<'a> {
    key: HeadSide<'a>,
    value: HeadSide<'a>,
    /// Counts of all heads, both sides.
    counts: Range<usize>,
    /// Words of a block's fixed part.
    words: usize,
}

/// One side of a head: where its parts lie in a block, codes and counts in bytes, scales in halves.
struct HeadSide<'a> {
    lut: HeadLut<'a>,
    codes: Range<usize>,
    counts: Range<usize>,
    /// Counts of the units before.
    before: Range<usize>,
    /// Scales and zero points, where tokens have them.
    scales: Option<(Range<usize>, Range<usize>)>,
}

/// Where the outliers of the next head begin, keys and values, and how many the block has.
pub(crate) struct Starts {
    next: [usize; 2],
    all: usize,
}

/// The data of a block of up to 64 tokens of keys and values as codes.
///
/// ```text
/// fixed     key codes   [C / 4 units] of widths[unit] * 32 bytes     unit layout: kvquant_quant::pack
///           value codes likewise
///           key scales  [groups][64] fp16, then zero points [groups][64] fp16   (per-token scopes only)
///           value scales likewise
///           counts      [C / 4] u8 for keys, then for values: outliers of each unit
///           tokens      u8
/// outliers  a byte each, unit by unit, keys first: place_in_unit * 64 + token; then in the same order
///           fp16(exact value - dense value), low byte first
/// ```
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    fixed: &'a [u32],
    /// What lies behind the last is no outlier.
    outliers: &'a [u8],
}

impl<'a> Parts<'a> {
    fn bytes(self) -> &'a [u8] {
        bytemuck::cast_slice(self.fixed)
    }

    fn halves(self) -> &'a [u16] {
        bytemuck::cast_slice(self.fixed)
    }

    fn len(self) -> usize {
        *self.bytes().last().expect("the token count ends the fixed part") as usize
    }

    /// Both parts, the second without what lies behind its last outlier.
    pub fn stored(self, layout: &Layout) -> (&'a [u32], &'a [u8]) {
        (self.fixed, &self.outliers[..OUTLIER_BYTES * sum_of(&self.bytes()[layout.counts()])])
    }

    /// One head's keys and values. `starts` is none for the first head that is asked for, and afterwards says where the outliers
    /// of the next one begin.
    #[inline(always)]
    pub fn views(
        self,
        of: &'a HeadSides<'a>,
        starts: &mut Option<Starts>,
    ) -> Result<(SideView<'a>, SideView<'a>), ViewError> {
        let bytes = self.bytes();
        let Starts { next: [of_keys, of_values], all } = starts.get_or_insert_with(|| {
            let next = [&of.key, &of.value].map(|side| sum_of(&bytes[side.before.clone()]));
            Starts { next, all: sum_of(&bytes[of.counts.clone()]) }
        });
        Ok((self.view(&of.key, of_keys, *all)?, self.view(&of.value, of_values, *all)?))
    }

    /// A side whose outliers, of `all` of the block, begin at `first`, which moves to their end.
    #[inline(always)]
    fn view(self, of: &'a HeadSide<'a>, first: &mut usize, all: usize) -> Result<SideView<'a>, ViewError> {
        let (bytes, halves) = (self.bytes(), self.halves());
        let (places, residuals) = self.outliers.split_at(all);
        let (places, residuals) = (&places[*first..], &residuals.as_chunks().0[*first..]);
        let scales = of.scales.clone().map(|(scale, zero)| TokenScales { scale: &halves[scale], zero: &halves[zero] });
        let (codes, counts) = (&bytes[of.codes.clone()], &bytes[of.counts.clone()]);
        let (view, n) = CodedView::with_first(&of.lut, codes, scales, counts, places, residuals)?;
        *first += n;
        Ok(SideView::Coded(view))
    }
}

/// 64 tokens of keys and values as codes, which no longer change: [`Parts`] in one piece, filled up to a word. One that is shared
/// is cloned without its data.
#[derive(Debug, Clone)]
pub(crate) struct CodedBlock(SharedWords);

impl CodedBlock {
    fn of(fixed: &[u32], outliers: &[u8]) -> Self {
        let words = SharedWords::new(fixed.len() + outliers.len().div_ceil(4), |to| {
            let (to_fixed, to_outliers) = to.split_at_mut(fixed.len());
            to_fixed.copy_from_slice(fixed);
            bytemuck::cast_slice_mut(to_outliers)[..outliers.len()].copy_from_slice(outliers);
        });
        CodedBlock(words)
    }

    fn split(&self, words: usize) -> Parts<'_> {
        let (fixed, outliers) = self.0.split_at(words);
        Parts { fixed, outliers: bytemuck::cast_slice(outliers) }
    }

    /// Its data.
    pub fn parts(&self, layout: &Layout) -> Parts<'_> {
        self.split(layout.words)
    }

    /// [`Parts::views`]
    #[inline(always)]
    pub fn views<'a>(
        &'a self,
        of: &'a HeadSides<'a>,
        starts: &mut Option<Starts>,
    ) -> Result<(SideView<'a>, SideView<'a>), ViewError> {
        self.split(of.words).views(of, starts)
    }

    /// Counts of outliers, and of tokens.
    pub fn index(&self, layout: &Layout) -> &[u8] {
        &bytemuck::cast_slice(&self.0[..layout.words])[layout.counts().start..]
    }

    /// All of its data.
    pub fn words(&self) -> &[u32] {
        &self.0
    }

    /// A copy that shares nothing.
    pub fn copied(&self) -> Self {
        CodedBlock(SharedWords::new(self.0.len(), |to| to.copy_from_slice(&self.0)))
    }

    /// How many hold its data.
    pub fn holders(&self) -> usize {
        self.0.holders()
    }

    pub fn bytes(&self, layout: &Layout) -> Bytes {
        let words = size_of_val(&*self.0);
        Bytes { index: self.0.bytes() - words, ..layout.bytes(words) }
    }
}
