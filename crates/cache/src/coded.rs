//! A block of codes.

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
}

/// One side of a block.
///
/// ```text
/// codes     [C / 4 units][bits][8] u32     unit layout: kvquant_quant::pack
/// scales    [groups][64] fp16 | [groups][64] fp16 zero points     (per-token scopes only)
/// counts    [C / 4] u8                     outliers of each unit
/// index     u8 a outlier, unit by unit     channel_in_unit * 64 + token
/// residual  fp16 a outlier                 exact value - dense value
/// ```
#[derive(Debug, Clone)]
struct CodedSide {
    codes: Box<[u32]>,
    scales: Box<[u16]>,
    counts: Box<[u8]>,
    index: Vec<u8>,
    residual: Vec<u16>,
}

impl CodedSide {
    fn new(layout: &SideLayout) -> Self {
        CodedSide {
            codes: vec![0; layout.code_words()].into(),
            scales: vec![0; layout.scales() + layout.zeros()].into(),
            counts: vec![0; layout.channels / UNIT_CHANNELS].into(),
            index: Vec::new(),
            residual: Vec::new(),
        }
    }

    fn set(&mut self, layout: &SideLayout, token: usize, codes: &TokenCodes) {
        let words = unit_words(layout.bits);
        for (unit, four) in self.codes.chunks_exact_mut(words).zip(codes.codes.as_chunks::<UNIT_CHANNELS>().0) {
            for (i, &code) in four.iter().enumerate() {
                set_code(unit, layout.bits, i, token, code);
            }
        }
        for (g, s) in codes.scale.iter().enumerate() {
            self.scales[g * BLOCK_TOKENS + token] = s.to_bits();
        }
        for (g, z) in codes.zero.iter().enumerate().take(layout.zeros() / BLOCK_TOKENS) {
            self.scales[layout.scales() + g * BLOCK_TOKENS + token] = z.to_bits();
        }
        for o in &codes.outliers {
            self.insert(token, *o);
        }
    }

    fn insert(&mut self, token: usize, o: Outlier) {
        let (unit, place) = (o.channel as usize / UNIT_CHANNELS, o.channel as usize % UNIT_CHANNELS * BLOCK_TOKENS + token);
        let first: usize = self.counts[..unit].iter().map(|&c| c as usize).sum();
        let end = first + self.counts[unit] as usize;
        if self.counts[unit] < u8::MAX {
            self.counts[unit] += 1;
            self.index.insert(end, place as u8);
            self.residual.insert(end, o.residual.to_bits());
            return;
        }
        // A unit of 256 entries counts at most 255 outliers: the smallest residual gives way.
        let size = |bits: u16| f16::from_bits(bits).to_f32().abs();
        if let Some(least) = (first..end).min_by(|&a, &b| size(self.residual[a]).total_cmp(&size(self.residual[b])))
            && size(self.residual[least]) < o.residual.to_f32().abs()
        {
            self.index[least] = place as u8;
            self.residual[least] = o.residual.to_bits();
        }
    }

    fn truncate(&mut self, layout: &SideLayout, len: usize) {
        for unit in self.codes.chunks_exact_mut(unit_words(layout.bits)) {
            for i in 0..UNIT_CHANNELS {
                for t in len..BLOCK_TOKENS {
                    clear_code(unit, layout.bits, i, t);
                }
            }
        }
        for group in self.scales.chunks_exact_mut(BLOCK_TOKENS) {
            group[len..].fill(0);
        }
        let (mut from, mut to) = (0, 0);
        for count in &mut self.counts {
            let mut kept = 0;
            for o in from..from + *count as usize {
                if (self.index[o] as usize) % BLOCK_TOKENS < len {
                    self.index[to] = self.index[o];
                    self.residual[to] = self.residual[o];
                    to += 1;
                    kept += 1;
                }
            }
            from += *count as usize;
            *count = kept;
        }
        self.index.truncate(to);
        self.residual.truncate(to);
    }

    fn view<'a>(&'a self, l: &SideLayout, q: &'a SideQuantizer, head: usize) -> Result<SideView<'a>, ViewError> {
        let units = l.head_dim / UNIT_CHANNELS;
        let words = units * unit_words(l.bits);
        let counts = &self.counts[head * units..(head + 1) * units];
        let first: usize = self.counts[..head * units].iter().map(|&c| c as usize).sum();
        let end = first + counts.iter().map(|&c| c as usize).sum::<usize>();
        let (scale, zero) = self.scales.split_at(l.scales());
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
        Ok(SideView::Coded(CodedView::new(
            l.bits,
            l.head_dim,
            &self.codes[head * words..(head + 1) * words],
            table,
            lut.per_channel,
            &scale[groups.clone()],
            if zero.is_empty() { zero } else { &zero[groups] },
            group_channels,
            counts,
            &self.index[first..end],
            &self.residual[first..end],
        )?))
    }

    fn bytes(&self) -> Bytes {
        Bytes {
            codes: self.codes.len() * 4,
            scales: self.scales.len() * 2,
            outliers: self.counts.len() + self.index.capacity() + self.residual.capacity() * 2,
            ..Bytes::default()
        }
    }
}

/// The layouts of both sides, the same for every block of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    key: SideLayout,
    value: SideLayout,
}

impl Layout {
    pub fn new(q: &Quantizers, channels: usize, head_dim: usize) -> Self {
        Layout { key: SideLayout::new(&q.key, channels, head_dim), value: SideLayout::new(&q.value, channels, head_dim) }
    }
}

/// Up to 64 tokens of keys and values as codes.
#[derive(Debug, Clone)]
pub(crate) struct CodedBlock {
    sides: Box<(CodedSide, CodedSide)>,
    len: u8,
}

impl CodedBlock {
    pub fn new(layout: &Layout) -> Self {
        CodedBlock { sides: Box::new((CodedSide::new(&layout.key), CodedSide::new(&layout.value))), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len as usize
    }

    pub fn push(&mut self, layout: &Layout, key: &TokenCodes, value: &TokenCodes) {
        let (k, v) = &mut *self.sides;
        k.set(&layout.key, self.len as usize, key);
        v.set(&layout.value, self.len as usize, value);
        self.len += 1;
        if self.len as usize == BLOCK_TOKENS {
            for side in [k, v] {
                side.index.shrink_to_fit();
                side.residual.shrink_to_fit();
            }
        }
    }

    pub fn truncate(&mut self, layout: &Layout, len: usize) {
        let (k, v) = &mut *self.sides;
        k.truncate(&layout.key, len);
        v.truncate(&layout.value, len);
        self.len = len as u8;
    }

    /// One head's keys and values.
    pub fn views<'a>(&'a self, layout: &Layout, q: &'a Quantizers, head: usize) -> Result<(SideView<'a>, SideView<'a>), ViewError> {
        Ok((self.sides.0.view(&layout.key, &q.key, head)?, self.sides.1.view(&layout.value, &q.value, head)?))
    }

    pub fn bytes(&self) -> Bytes {
        let mut all = self.sides.0.bytes();
        all += self.sides.1.bytes();
        all.index += size_of::<(CodedSide, CodedSide)>();
        all
    }
}
