//! A block of codes.

use std::ops::Range;

use half::f16;
use kvquant_kernels::attend::{CodedView, HeadLut, Outliers, SideView, TokenScales, ViewError};
use kvquant_kernels::memory::prefer_large_pages;
use kvquant_quant::pack::{
    BLOCK_TOKENS, OUTLIER_BYTES, UNIT_CHANNELS, pack_unit, set_code, set_codes, sum_of, unit_bytes,
};
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
    pub fn head<'a>(&'a self, q: &'a Quantizers, head: usize) -> Result<[HeadSide<'a>; 2], ViewError> {
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
        Ok([side(&self.key, &self.places[0], &q.key)?, side(&self.value, &self.places[1], &q.value)?])
    }

    /// Bytes of a block without its outliers.
    pub fn fixed_bytes(&self) -> usize {
        4 * self.words
    }
}

/// One side of a head: where its parts lie in a block, codes and counts in bytes, scales in halves.
pub(crate) struct HeadSide<'a> {
    lut: HeadLut<'a>,
    codes: Range<usize>,
    counts: Range<usize>,
    /// Counts of the units before.
    before: Range<usize>,
    /// Scales and zero points, where tokens have them.
    scales: Option<(Range<usize>, Range<usize>)>,
}

/// Up to 64 tokens of keys and values as codes.
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
#[derive(Debug, Clone)]
pub(crate) struct CodedBlock {
    fixed: Box<[u32]>,
    outliers: Vec<u8>,
}

// A block's header is part of the bits that are reported.
const _: () = assert!(size_of::<CodedBlock>() <= 40);
/// Outliers that an open block makes room for at a time: doubling would leave much of it unused.
const GROW_OUTLIERS: usize = 32;

impl CodedBlock {
    pub fn new(layout: &Layout) -> Self {
        let fixed: Box<[u32]> = vec![0; layout.words].into();
        prefer_large_pages(&fixed);
        CodedBlock { fixed, outliers: Vec::new() }
    }

    /// What is stored: the fixed part, and the outliers.
    pub fn parts(&self) -> (&[u32], &[u8]) {
        (&self.fixed, &self.outliers)
    }

    /// A block of `len` tokens from the bytes of its [`parts`](CodedBlock::parts), with all checked that a damaged one
    /// could get wrong.
    pub fn from_parts(layout: &Layout, bytes: &[u8], len: usize) -> Result<Self, &'static str> {
        let (fixed, outliers) = bytes.split_at_checked(4 * layout.words).ok_or("it is of another shape")?;
        let fixed = fixed.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let block = CodedBlock { fixed, outliers: outliers.to_vec() };
        let counts = layout.places[0].counts.start..layout.places[1].counts.end;
        let n = sum_of(&block.bytes_of()[counts]);
        if block.len() != len {
            return Err("it holds another number of tokens");
        }
        if outliers.len() != OUTLIER_BYTES * n {
            return Err("it holds another number of outliers");
        }
        let (places, residuals) = outliers.split_at(n);
        if places.iter().any(|&p| p as usize % BLOCK_TOKENS >= len) {
            return Err("an outlier is behind its end");
        }
        let finite = |half: u16| half & 0x7c00 != 0x7c00;
        let scales = layout.places.iter().flat_map(|p| &block.halves()[p.scales.clone()]);
        if !scales.copied().all(finite) || !residuals.as_chunks().0.iter().all(|b| finite(u16::from_le_bytes(*b))) {
            return Err("it holds a number that is not finite");
        }
        Ok(block)
    }

    pub fn len(&self) -> usize {
        *self.bytes_of().last().expect("the token count ends the block") as usize
    }

    fn set_len(&mut self, len: usize) {
        *self.bytes_mut().last_mut().expect("the token count ends the block") = len as u8;
    }

    fn halves(&self) -> &[u16] {
        bytemuck::cast_slice(&self.fixed)
    }

    fn bytes_of(&self) -> &[u8] {
        bytemuck::cast_slice(&self.fixed)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.fixed)
    }

    /// Counts of outliers, and of tokens.
    pub fn index(&self, layout: &Layout) -> &[u8] {
        &self.bytes_of()[layout.places[0].counts.start..]
    }

    /// Outliers before a unit of a side, and in it.
    #[inline]
    fn outlier_range(&self, layout: &Layout, side: usize, units: Range<usize>) -> Range<usize> {
        let bytes = self.bytes_of();
        let sum = |range: Range<usize>| sum_of(&bytes[range]);
        let counts = &layout.places[side].counts;
        let keys = if side == 1 { sum(layout.places[0].counts.clone()) } else { 0 };
        let first = keys + sum(counts.start..counts.start + units.start);
        first..first + sum(counts.start + units.start..counts.start + units.end)
    }

    pub fn push(&mut self, layout: &Layout, key: &TokenCodes, value: &TokenCodes) {
        for (side, (l, codes)) in [(&layout.key, key), (&layout.value, value)].into_iter().enumerate() {
            self.set(layout, l, side, codes);
        }
        self.set_len(self.len() + 1);
        if self.len() == BLOCK_TOKENS {
            self.outliers.shrink_to_fit();
        }
    }

    /// A full block from its tokens' keys and values: what [`push`](CodedBlock::push) makes of them one by one.
    pub fn whole(layout: &Layout, keys: &[TokenCodes], values: &[TokenCodes]) -> Self {
        assert_eq!((keys.len(), values.len()), (BLOCK_TOKENS, BLOCK_TOKENS), "a block of tokens");
        let mut block = CodedBlock::new(layout);
        let (mut places, mut residuals) = (Vec::new(), Vec::new());
        for (side, (l, tokens)) in [(&layout.key, keys), (&layout.value, values)].into_iter().enumerate() {
            let mut lists = vec![Vec::new(); l.units()];
            for (t, o) in tokens.iter().enumerate().flat_map(|(t, codes)| codes.outliers.iter().map(move |o| (t, o))) {
                let place = l.places[o.channel as usize] as usize;
                let entry = (place % UNIT_CHANNELS * BLOCK_TOKENS + t) as u8;
                lists[place / UNIT_CHANNELS].push((entry, o.residual.to_le_bytes()));
            }
            if lists.iter().any(|list| list.len() > u8::MAX as usize) {
                return Self::one_by_one(layout, keys, values);
            }
            block.set_all(layout, l, side, tokens);
            let counts = &mut block.bytes_mut()[layout.places[side].counts.clone()];
            for (count, list) in counts.iter_mut().zip(&lists) {
                *count = list.len() as u8;
            }
            places.extend(lists.iter().flatten().map(|(place, _)| *place));
            residuals.extend(lists.iter().flatten().flat_map(|(_, residual)| *residual));
        }
        places.append(&mut residuals);
        places.shrink_to_fit();
        block.outliers = places;
        block.set_len(BLOCK_TOKENS);
        block
    }

    /// Where a unit has more outliers than its count can say, which of them stay depends on the order.
    fn one_by_one(layout: &Layout, keys: &[TokenCodes], values: &[TokenCodes]) -> Self {
        let mut block = CodedBlock::new(layout);
        for (key, value) in keys.iter().zip(values) {
            block.push(layout, key, value);
        }
        block
    }

    /// Codes and scales of all tokens of a side.
    fn set_all(&mut self, layout: &Layout, l: &SideLayout, side: usize, tokens: &[TokenCodes]) {
        let place = &layout.places[side];
        let all = &mut self.bytes_mut()[place.codes.clone()];
        let mut rows = [[0u8; BLOCK_TOKENS]; UNIT_CHANNELS];
        for ((unit, &bits), channels) in
            l.starts.windows(2).zip(&l.widths).zip(l.channels.as_chunks::<UNIT_CHANNELS>().0)
        {
            let channels = channels.map(|c| c as usize);
            for (t, codes) in tokens.iter().enumerate() {
                for (row, &c) in rows.iter_mut().zip(&channels) {
                    row[t] = codes.codes[c];
                }
            }
            pack_unit(bits as u32, rows.each_ref(), &mut all[unit[0]..unit[1]]);
        }
        let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut self.fixed);
        let (scales, zeros) = halves[place.scales.clone()].split_at_mut(l.scales());
        for (t, codes) in tokens.iter().enumerate() {
            for (group, s) in scales.chunks_exact_mut(BLOCK_TOKENS).zip(&codes.scale) {
                group[t] = s.to_bits();
            }
            for (group, z) in zeros.chunks_exact_mut(BLOCK_TOKENS).zip(&codes.zero) {
                group[t] = z.to_bits();
            }
        }
    }

    fn set(&mut self, layout: &Layout, l: &SideLayout, side: usize, codes: &TokenCodes) {
        let (token, place) = (self.len(), &layout.places[side]);
        let all = &mut self.bytes_mut()[place.codes.clone()];
        for ((unit, &bits), channels) in
            l.starts.windows(2).zip(&l.widths).zip(l.channels.as_chunks::<UNIT_CHANNELS>().0)
        {
            set_codes(&mut all[unit[0]..unit[1]], bits as u32, token, channels.map(|c| codes.codes[c as usize]));
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
            self.insert(layout, l, side, token, *o);
        }
    }

    fn insert(&mut self, layout: &Layout, l: &SideLayout, side: usize, token: usize, o: Outlier) {
        let place = l.places[o.channel as usize] as usize;
        let unit = place / UNIT_CHANNELS;
        let entry = (place % UNIT_CHANNELS * BLOCK_TOKENS + token) as u8;
        let bits = o.residual.to_le_bytes();
        let range = self.outlier_range(layout, side, unit..unit + 1);
        let (at, n) = (layout.places[side].counts.start + unit, self.outliers.len() / OUTLIER_BYTES);
        if self.bytes_mut()[at] < u8::MAX {
            self.bytes_mut()[at] += 1;
            if self.outliers.len() == self.outliers.capacity() {
                self.outliers.reserve_exact(OUTLIER_BYTES * GROW_OUTLIERS);
            }
            // Behind the unit's last place, and behind its last residual, which lies one further by now.
            self.outliers.insert(range.end, entry);
            let residual = n + 1 + 2 * range.end;
            self.outliers.splice(residual..residual, bits);
            return;
        }
        // A unit of 256 entries counts at most 255 outliers: the smallest residual gives way.
        let (places, residuals) = self.outliers.split_at_mut(n);
        let residuals = residuals.as_chunks_mut::<2>().0;
        let size = |bits: [u8; 2]| f16::from_le_bytes(bits).to_f32().abs();
        if let Some(least) = range.min_by(|&a, &b| size(residuals[a]).total_cmp(&size(residuals[b])))
            && size(residuals[least]) < size(bits)
        {
            (places[least], residuals[least]) = (entry, bits);
        }
    }

    pub fn truncate(&mut self, layout: &Layout, len: usize) {
        let n = self.outliers.len() / OUTLIER_BYTES;
        let (old, residuals) = self.outliers.split_at(n);
        let residuals = residuals.as_chunks::<2>().0;
        let (mut places, mut kept, mut first) = (Vec::new(), Vec::new(), 0);
        let counts = layout.places[0].counts.start..layout.places[1].counts.end;
        let fixed: &mut [u8] = bytemuck::cast_slice_mut(&mut self.fixed);
        for count in &mut fixed[counts] {
            let (before, of_unit) = (places.len(), first..first + *count as usize);
            first = of_unit.end;
            for i in of_unit.filter(|&i| (old[i] as usize) % BLOCK_TOKENS < len) {
                places.push(old[i]);
                kept.extend(residuals[i]);
            }
            *count = (places.len() - before) as u8;
        }
        places.append(&mut kept);
        self.outliers = places;
        for (l, place) in [&layout.key, &layout.value].into_iter().zip(&layout.places) {
            let codes = &mut self.bytes_mut()[place.codes.clone()];
            for (unit, &bits) in l.starts.windows(2).zip(&l.widths) {
                for (i, t) in (0..UNIT_CHANNELS).flat_map(|i| (len..BLOCK_TOKENS).map(move |t| (i, t))) {
                    set_code(&mut codes[unit[0]..unit[1]], bits as u32, i, t, 0);
                }
            }
            let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut self.fixed);
            for group in halves[place.scales.clone()].chunks_exact_mut(BLOCK_TOKENS) {
                group[len..].fill(0);
            }
        }
        self.set_len(len);
    }

    /// One head's keys and values. `outliers` is none for the first head that is asked for, and afterwards says where those
    /// of the next one begin.
    #[inline(always)]
    pub fn views<'a>(
        &'a self,
        [key, value]: &'a [HeadSide<'a>; 2],
        outliers: &mut Option<[usize; 2]>,
    ) -> Result<(SideView<'a>, SideView<'a>), ViewError> {
        let bytes = self.bytes_of();
        let [of_keys, of_values] = outliers.get_or_insert_with(|| {
            let before = |of: &HeadSide<'_>| sum_of(&bytes[of.before.clone()]);
            [before(key), before(value)]
        });
        Ok((self.view(key, of_keys)?, self.view(value, of_values)?))
    }

    /// A side whose outliers begin at `first`, which moves to their end.
    #[inline(always)]
    fn view<'a>(&'a self, of: &'a HeadSide<'a>, first: &mut usize) -> Result<SideView<'a>, ViewError> {
        let (bytes, halves) = (self.bytes_of(), self.halves());
        let counts = &bytes[of.counts.clone()];
        let range = *first..*first + sum_of(counts);
        *first = range.end;
        let (places, residuals) = self.outliers.split_at(self.outliers.len() / OUTLIER_BYTES);
        let outliers = Outliers { counts, places: &places[range.clone()], residuals: &residuals.as_chunks().0[range] };
        let scales = of.scales.clone().map(|(scale, zero)| TokenScales { scale: &halves[scale], zero: &halves[zero] });
        Ok(SideView::Coded(CodedView::new(&of.lut, &bytes[of.codes.clone()], scales, outliers)?))
    }

    /// The header is counted with the layer's list of blocks.
    pub fn bytes(&self, layout: &Layout) -> Bytes {
        let codes = layout.places[1].codes.end;
        let scales = layout.places.iter().map(|p| 2 * p.scales.len()).sum();
        let outliers = 4 * self.fixed.len() - codes - scales + self.outliers.capacity();
        Bytes { codes, scales, outliers, ..Bytes::default() }
    }
}
