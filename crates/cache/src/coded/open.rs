//! A block of codes that takes tokens.

use std::ops::Range;

use half::f16;
use kvquant_quant::pack::{BLOCK_TOKENS, OUTLIER_BYTES, UNIT_CHANNELS, pack_unit, set_code, set_codes, sum_of};
use kvquant_quant::{Outlier, TokenCodes};

use super::{CodedBlock, Layout, Parts, SideLayout};
use crate::bytes::Bytes;

/// Up to 64 tokens of keys and values as codes: [`Parts`], each in memory of its own.
#[derive(Debug, Clone)]
pub(crate) struct OpenBlock {
    fixed: Box<[u32]>,
    outliers: Vec<u8>,
}

/// Outliers that an open block makes room for at a time: doubling would leave much of it unused.
const GROW_OUTLIERS: usize = 32;

impl OpenBlock {
    pub fn new(layout: &Layout) -> Self {
        OpenBlock { fixed: vec![0; layout.words].into(), outliers: Vec::new() }
    }

    /// Takes tokens again.
    pub fn again(layout: &Layout, block: &CodedBlock) -> Self {
        let (fixed, outliers) = block.parts(layout).stored(layout);
        OpenBlock { fixed: fixed.into(), outliers: outliers.to_vec() }
    }

    /// What the block is when it takes no more tokens.
    pub fn finish(&self) -> CodedBlock {
        CodedBlock::of(&self.fixed, &self.outliers)
    }

    pub fn parts(&self) -> Parts<'_> {
        Parts { fixed: &self.fixed, outliers: &self.outliers }
    }

    /// A block of `len` tokens from the bytes of its [`stored`](Parts::stored) parts, with all checked that a damaged one
    /// could get wrong.
    pub fn from_parts(layout: &Layout, bytes: &[u8], len: usize) -> Result<Self, &'static str> {
        let (fixed, outliers) = bytes.split_at_checked(4 * layout.words).ok_or("it is of another shape")?;
        let fixed = fixed.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let block = OpenBlock { fixed, outliers: outliers.to_vec() };
        let n = sum_of(&block.parts().bytes()[layout.counts()]);
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
        let scales = layout.places.iter().flat_map(|p| &block.parts().halves()[p.scales.clone()]);
        if !scales.copied().all(finite) || !residuals.as_chunks().0.iter().all(|b| finite(u16::from_le_bytes(*b))) {
            return Err("it holds a number that is not finite");
        }
        Ok(block)
    }

    pub fn len(&self) -> usize {
        self.parts().len()
    }

    fn set_len(&mut self, len: usize) {
        *self.bytes_mut().last_mut().expect("the token count ends the fixed part") = len as u8;
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.fixed)
    }

    /// Outliers before a unit of a side, and in it.
    #[inline]
    fn outlier_range(&self, layout: &Layout, side: usize, units: Range<usize>) -> Range<usize> {
        let bytes = self.parts().bytes();
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
    }

    /// A full block from its tokens' keys and values: what [`push`](CodedBlock::push) makes of them one by one.
    pub fn whole(layout: &Layout, keys: &[TokenCodes], values: &[TokenCodes]) -> CodedBlock {
        assert_eq!((keys.len(), values.len()), (BLOCK_TOKENS, BLOCK_TOKENS), "a block of tokens");
        let mut block = OpenBlock::new(layout);
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
        block.outliers = places;
        block.set_len(BLOCK_TOKENS);
        block.finish()
    }

    /// Where a unit has more outliers than its count can say, which of them stay depends on the order.
    fn one_by_one(layout: &Layout, keys: &[TokenCodes], values: &[TokenCodes]) -> CodedBlock {
        let mut block = OpenBlock::new(layout);
        for (key, value) in keys.iter().zip(values) {
            block.push(layout, key, value);
        }
        block.finish()
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
        let counts = layout.counts();
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

    pub fn bytes(&self, layout: &Layout) -> Bytes {
        layout.bytes(4 * self.fixed.len() + self.outliers.capacity() + size_of::<Self>())
    }
}
