//! A block of codes.

use std::ops::Range;

use half::f16;
use kvquant_kernels::attend::{CodedView, SideView, ViewError};
use kvquant_quant::pack::{BLOCK_TOKENS, UNIT_CHANNELS, clear_code, set_code, unit_words};
use kvquant_quant::{Outlier, SideQuantizer, TokenCodes};

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
    bits: u32,
    channels: usize,
    head_dim: usize,
    groups: usize,
    group_channels: usize,
    zero_point: bool,
}

impl SideLayout {
    fn new(q: &SideQuantizer, channels: usize, head_dim: usize) -> Self {
        SideLayout {
            bits: q.lut().bits,
            channels,
            head_dim,
            groups: q.groups(),
            group_channels: q.group_channels(),
            zero_point: q.groups() > 0 && q.has_zero_point(),
        }
    }

    fn code_words(&self) -> usize {
        self.channels / UNIT_CHANNELS * unit_words(self.bits)
    }

    fn scales(&self) -> usize {
        self.groups * BLOCK_TOKENS
    }

    fn zeros(&self) -> usize {
        if self.zero_point { self.scales() } else { 0 }
    }

    fn units(&self) -> usize {
        self.channels / UNIT_CHANNELS
    }
}

/// The layouts of both sides, the same for every block of a layer, and where their parts lie.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    key: SideLayout,
    value: SideLayout,
}

/// Where one side's parts lie in a block: codes in words; scales and counts in halves and bytes of the words behind.
struct Place {
    codes: Range<usize>,
    scales: Range<usize>,
    counts: Range<usize>,
}

impl Layout {
    pub fn new(q: &Quantizers, channels: usize, head_dim: usize) -> Self {
        Layout {
            key: SideLayout::new(&q.key, channels, head_dim),
            value: SideLayout::new(&q.value, channels, head_dim),
        }
    }

    fn places(&self) -> [Place; 2] {
        let (k, v) = (&self.key, &self.value);
        let codes = k.code_words() + v.code_words();
        // 64 tokens a group: an even number of halves, so that bytes begin on a word.
        let (k_scales, v_scales) = (k.scales() + k.zeros(), v.scales() + v.zeros());
        let (halves, bytes) = (2 * codes, 4 * codes + 2 * (k_scales + v_scales));
        [
            Place { codes: 0..k.code_words(), scales: halves..halves + k_scales, counts: bytes..bytes + k.units() },
            Place {
                codes: k.code_words()..codes,
                scales: halves + k_scales..halves + k_scales + v_scales,
                counts: bytes + k.units()..bytes + k.units() + v.units(),
            },
        ]
    }

    fn words(&self) -> usize {
        (self.places()[1].counts.end + 1).div_ceil(4)
    }
}

/// Up to 64 tokens of keys and values as codes.
///
/// ```text
/// fixed     key codes   [C / 4 units][bits][8] u32     unit layout: kvquant_quant::pack
///           value codes likewise
///           key scales  [groups][64] fp16, then zero points [groups][64] fp16   (per-token scopes only)
///           value scales likewise
///           counts      [C / 4] u8 for keys, then for values: outliers of each unit
///           tokens      u8
/// outliers  [place, residual low, residual high] an outlier, unit by unit, keys first
///           place = channel_in_unit * 64 + token;  residual = fp16(exact value - dense value)
/// ```
#[derive(Debug, Clone)]
pub(crate) struct CodedBlock {
    fixed: Box<[u32]>,
    outliers: Vec<[u8; 3]>,
}

// A block's header is part of the bits that are reported.
const _: () = assert!(size_of::<CodedBlock>() <= 40);
/// Outliers that an open block makes room for at a time: doubling would leave much of it unused.
const GROW_OUTLIERS: usize = 32;

impl CodedBlock {
    pub fn new(layout: &Layout) -> Self {
        CodedBlock { fixed: vec![0; layout.words()].into(), outliers: Vec::new() }
    }

    pub fn len(&self) -> usize {
        *bytemuck::cast_slice::<u32, u8>(&self.fixed).last().expect("the token count ends the block") as usize
    }

    fn set_len(&mut self, len: usize) {
        *self.bytes_mut().last_mut().expect("the token count ends the block") = len as u8;
    }

    fn halves(&self) -> &[u16] {
        bytemuck::cast_slice(&self.fixed)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.fixed)
    }

    /// Outliers before a unit of a side, and in it.
    fn outlier_range(&self, places: &[Place; 2], side: usize, units: Range<usize>) -> Range<usize> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.fixed);
        let sum = |range: Range<usize>| bytes[range].iter().map(|&c| c as usize).sum::<usize>();
        let counts = &places[side].counts;
        let keys = if side == 1 { sum(places[0].counts.clone()) } else { 0 };
        let first = keys + sum(counts.start..counts.start + units.start);
        first..first + sum(counts.start + units.start..counts.start + units.end)
    }

    pub fn push(&mut self, layout: &Layout, key: &TokenCodes, value: &TokenCodes) {
        let places = layout.places();
        for (side, (l, codes)) in [(&layout.key, key), (&layout.value, value)].into_iter().enumerate() {
            self.set(l, &places, side, codes);
        }
        self.set_len(self.len() + 1);
        if self.len() == BLOCK_TOKENS {
            self.outliers.shrink_to_fit();
        }
    }

    fn set(&mut self, l: &SideLayout, places: &[Place; 2], side: usize, codes: &TokenCodes) {
        let (token, place) = (self.len(), &places[side]);
        let words = unit_words(l.bits);
        let units = self.fixed[place.codes.clone()].chunks_exact_mut(words);
        for (unit, four) in units.zip(codes.codes.as_chunks::<UNIT_CHANNELS>().0) {
            for (i, &code) in four.iter().enumerate() {
                set_code(unit, l.bits, i, token, code);
            }
        }
        let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut self.fixed);
        let (scales, zeros) = halves[place.scales.clone()].split_at_mut(l.scales());
        for (group, s) in scales.chunks_exact_mut(BLOCK_TOKENS).zip(&codes.scale) {
            group[token] = s.to_bits();
        }
        for (group, z) in zeros.chunks_exact_mut(BLOCK_TOKENS).zip(&codes.zero) {
            group[token] = z.to_bits();
        }
        for o in &codes.outliers {
            self.insert(places, side, token, *o);
        }
    }

    fn insert(&mut self, places: &[Place; 2], side: usize, token: usize, o: Outlier) {
        let unit = o.channel as usize / UNIT_CHANNELS;
        let [low, high] = o.residual.to_le_bytes();
        let entry = [(o.channel as usize % UNIT_CHANNELS * BLOCK_TOKENS + token) as u8, low, high];
        let range = self.outlier_range(places, side, unit..unit + 1);
        let at = places[side].counts.start + unit;
        if self.bytes_mut()[at] < u8::MAX {
            self.bytes_mut()[at] += 1;
            if self.outliers.len() == self.outliers.capacity() {
                self.outliers.reserve_exact(GROW_OUTLIERS);
            }
            self.outliers.insert(range.end, entry);
            return;
        }
        // A unit of 256 entries counts at most 255 outliers: the smallest residual gives way.
        let size = |e: &[u8; 3]| f16::from_le_bytes([e[1], e[2]]).to_f32().abs();
        if let Some(least) = self.outliers[range].iter_mut().min_by(|a, b| size(a).total_cmp(&size(b)))
            && size(least) < size(&entry)
        {
            *least = entry;
        }
    }

    pub fn truncate(&mut self, layout: &Layout, len: usize) {
        let places = layout.places();
        let mut kept = Vec::with_capacity(self.outliers.len());
        for (side, l) in [&layout.key, &layout.value].into_iter().enumerate() {
            for unit in 0..l.units() {
                let of_unit = self.outlier_range(&places, side, unit..unit + 1);
                kept.push(
                    self.outliers[of_unit]
                        .iter()
                        .filter(|e| (e[0] as usize) % BLOCK_TOKENS < len)
                        .copied()
                        .collect::<Vec<_>>(),
                );
            }
        }
        let counts = places[0].counts.start..places[1].counts.end;
        for (count, kept) in self.bytes_mut()[counts].iter_mut().zip(&kept) {
            *count = kept.len() as u8;
        }
        self.outliers.clear();
        self.outliers.extend(kept.into_iter().flatten());
        for (l, place) in [&layout.key, &layout.value].into_iter().zip(&places) {
            for unit in self.fixed[place.codes.clone()].chunks_exact_mut(unit_words(l.bits)) {
                for (i, t) in (0..UNIT_CHANNELS).flat_map(|i| (len..BLOCK_TOKENS).map(move |t| (i, t))) {
                    clear_code(unit, l.bits, i, t);
                }
            }
            let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut self.fixed);
            for group in halves[place.scales.clone()].chunks_exact_mut(BLOCK_TOKENS) {
                group[len..].fill(0);
            }
        }
        self.set_len(len);
    }

    /// One head's keys and values.
    pub fn views<'a>(
        &'a self,
        layout: &Layout,
        q: &'a Quantizers,
        head: usize,
    ) -> Result<(SideView<'a>, SideView<'a>), ViewError> {
        let places = layout.places();
        Ok((self.view(&layout.key, &places, 0, &q.key, head)?, self.view(&layout.value, &places, 1, &q.value, head)?))
    }

    fn view<'a>(
        &'a self,
        l: &SideLayout,
        places: &[Place; 2],
        side: usize,
        q: &'a SideQuantizer,
        head: usize,
    ) -> Result<SideView<'a>, ViewError> {
        let place = &places[side];
        let units = l.head_dim / UNIT_CHANNELS;
        let words = units * unit_words(l.bits);
        let codes = &self.fixed[place.codes.clone()][head * words..(head + 1) * words];
        let bytes: &[u8] = bytemuck::cast_slice(&self.fixed);
        let counts = &bytes[place.counts.clone()][head * units..(head + 1) * units];
        let outliers = self.outlier_range(places, side, head * units..(head + 1) * units);
        let (scale, zero) = self.halves()[place.scales.clone()].split_at(l.scales());
        // A scale group is the whole token (all heads read the same one) or a part of one head.
        let group_channels = l.group_channels.min(l.head_dim);
        let groups = if l.groups == 0 {
            0..0
        } else {
            let a_head = if l.group_channels > l.head_dim { 0 } else { l.head_dim / group_channels };
            let first = head * a_head;
            first * BLOCK_TOKENS..(first + a_head.max(1)) * BLOCK_TOKENS
        };
        let lut = q.lut();
        let table = if lut.per_channel {
            let n = l.head_dim << lut.bits;
            &lut.table[head * n..(head + 1) * n]
        } else {
            &lut.table[..]
        };
        let zero = if zero.is_empty() { zero } else { &zero[groups.clone()] };
        let outliers = &self.outliers[outliers];
        let coded = CodedView::new(
            l.bits,
            l.head_dim,
            codes,
            table,
            lut.per_channel,
            &scale[groups],
            zero,
            group_channels,
            counts,
            outliers,
        )?;
        Ok(SideView::Coded(coded))
    }

    /// The header is counted with the layer's list of blocks.
    pub fn bytes(&self, layout: &Layout) -> Bytes {
        let places = layout.places();
        let codes = 4 * places[1].codes.end;
        let scales = places.iter().map(|p| 2 * p.scales.len()).sum();
        let outliers = 4 * self.fixed.len() - codes - scales + 3 * self.outliers.capacity();
        Bytes { codes, scales, outliers, ..Bytes::default() }
    }
}
