//! A block in any of its forms, and the exact ones.

use std::sync::Arc;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use kvquant_kernels::attend::{Kernels, SideView, ViewError};
use kvquant_kernels::memory::SharedWords;
use kvquant_kernels::threads;
use kvquant_quant::pack::BLOCK_TOKENS;
use kvquant_quant::{QuantError, Side, fits_half};

use crate::bytes::Bytes;
use crate::coded::{CodedBlock, HeadSides, Layout, OpenBlock, Quantizers, Starts};

/// Keys and values of tokens in fp16, token by token: `[tokens, kv_heads, head_dim]`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rows {
    k: Vec<u16>,
    v: Vec<u16>,
}

/// A full block in fp16, channel by channel, so that tokens lie along a vector: keys `[kv_heads, head_dim, 64]`, then values.
#[derive(Debug, Clone)]
pub(crate) struct Tile(SharedWords);

/// A block. What it holds is reference counted: a clone shares it, and one that is written to is copied first if others hold it.
/// Where it lies is said by the layer's list itself: nothing else has to be read, from where no CPU looks ahead, to find it.
#[derive(Debug, Clone)]
pub(crate) enum Block {
    /// Open fp16 block, or part of the recent window.
    Rows(Arc<Rows>),
    /// Full block of an fp16 cache.
    Tile(Tile),
    /// Open block of codes.
    Open(Arc<OpenBlock>),
    /// Full block of codes.
    Coded(CodedBlock),
}

// A block's place is part of the bits that are reported.
const _: () = assert!(size_of::<Block>() <= 24);

/// Bytes of the counts of who holds a block.
pub(crate) const COUNTS: usize = 2 * size_of::<usize>();

/// What keeps a token from being stored, by side.
pub(crate) type TokenError = (Side, QuantError);

fn to_half(side: Side, x: &[f32], out: &mut Vec<u16>) -> Result<(), TokenError> {
    if let Some(channel) = x.iter().position(|v| !fits_half(*v)) {
        return Err((side, QuantError::NotFinite { channel, value: x[channel] }));
    }
    let before = out.len();
    out.resize(before + x.len(), 0);
    out[before..].reinterpret_cast_mut::<f16>().convert_from_f32_slice(x);
    Ok(())
}

impl Rows {
    /// Room for `tokens` tokens of `channels` channels.
    pub fn with_room(tokens: usize, channels: usize) -> Self {
        Rows { k: Vec::with_capacity(tokens * channels), v: Vec::with_capacity(tokens * channels) }
    }

    /// Keys and values as stored.
    pub fn halves(&self) -> (&[u16], &[u16]) {
        (&self.k, &self.v)
    }

    /// Rows of keys and values of the same length.
    pub fn from_halves(k: Vec<u16>, v: Vec<u16>) -> Self {
        Rows { k, v }
    }

    pub fn len(&self, channels: usize) -> usize {
        self.v.len() / channels
    }

    /// Tokens `[tokens, channels]`, or the one that can't be stored.
    pub fn of(k: &[f32], v: &[f32], channels: usize) -> Result<Self, (usize, TokenError)> {
        let mut rows = Rows::with_room(k.len() / channels, channels);
        for (t, (k, v)) in k.chunks_exact(channels).zip(v.chunks_exact(channels)).enumerate() {
            rows.push(k, v).map_err(|e| (t, e))?;
        }
        Ok(rows)
    }

    /// Adds one token; nothing is kept of one that fails.
    pub fn push(&mut self, k: &[f32], v: &[f32]) -> Result<(), TokenError> {
        let before = self.k.len();
        to_half(Side::Key, k, &mut self.k)?;
        to_half(Side::Value, v, &mut self.v).inspect_err(|_| self.k.truncate(before))
    }

    pub fn truncate(&mut self, len: usize, channels: usize) {
        self.k.truncate(len * channels);
        self.v.truncate(len * channels);
    }

    /// All tokens as f32.
    pub fn floats(&self) -> (Vec<f32>, Vec<f32>) {
        let wide = |halves: &[u16]| halves.iter().map(|&bits| f16::from_bits(bits).to_f32()).collect();
        (wide(&self.k), wide(&self.v))
    }

    pub fn views(&self, of: &Head<'_>) -> (SideView<'_>, SideView<'_>) {
        let side = |data| SideView::Rows { data, stride: of.channels, head_dim: of.head_dim };
        let first = (of.head * of.head_dim).min(self.v.len());
        (side(&self.k[first..]), side(&self.v[first..]))
    }

    pub fn bytes(&self) -> usize {
        2 * (self.k.capacity() + self.v.capacity())
    }

    /// The full block channel by channel.
    pub fn tile(&self, channels: usize) -> Tile {
        let turn = |rows: &[u16], tile: &mut [u16]| {
            // 32 channels at a time, so that a line of either side is in L1 until it is done.
            for first in (0..channels).step_by(32) {
                for (t, row) in rows.chunks_exact(channels).enumerate() {
                    for (c, &x) in (first..).zip(&row[first..channels.min(first + 32)]) {
                        tile[c * BLOCK_TOKENS + t] = x;
                    }
                }
            }
        };
        Tile::filled(self.k.len(), |k, v| {
            turn(&self.k, k);
            turn(&self.v, v);
        })
    }
}

impl Tile {
    /// A tile whose sides, `[kv_heads, head_dim, 64]` of `len` entries, are written by `fill`.
    fn filled(len: usize, fill: impl FnOnce(&mut [u16], &mut [u16])) -> Self {
        Tile(SharedWords::new(len, |words| {
            let (k, v) = bytemuck::cast_slice_mut(words).split_at_mut(len);
            fill(k, v);
        }))
    }

    /// Keys and values as stored.
    pub fn halves(&self) -> (&[u16], &[u16]) {
        let all: &[u16] = bytemuck::cast_slice(&self.0);
        all.split_at(all.len() / 2)
    }

    /// A tile of keys and values, each `[kv_heads, head_dim, 64]`.
    pub fn from_halves(k: &[u16], v: &[u16]) -> Self {
        Tile::filled(k.len(), |to_k, to_v| {
            to_k.copy_from_slice(k);
            to_v.copy_from_slice(v);
        })
    }

    fn rows(&self, channels: usize) -> Rows {
        let turn = |tile: &[u16]| {
            (0..BLOCK_TOKENS).flat_map(|t| (0..channels).map(move |c| tile[c * BLOCK_TOKENS + t])).collect()
        };
        let (k, v) = self.halves();
        Rows { k: turn(k), v: turn(v) }
    }
}

/// What a block needs of its layer to be read.
pub(crate) struct Context<'a> {
    pub channels: usize,
    pub head_dim: usize,
    /// `None` for an fp16 cache.
    pub codec: Option<(&'a Layout, &'a Quantizers)>,
}

/// A KV head of a layer, as all its blocks are read.
pub(crate) struct Head<'a> {
    head: usize,
    channels: usize,
    head_dim: usize,
    /// `None` for an fp16 cache.
    coded: Option<HeadSides<'a>>,
}

impl Head<'_> {
    #[inline(always)]
    fn coded(&self) -> &HeadSides<'_> {
        self.coded.as_ref().expect("coded blocks exist only in a cache with quantizers")
    }
}

impl<'a> Context<'a> {
    fn layout(&self) -> &'a Layout {
        self.codec.expect("a coded block has a codec").0
    }

    /// What is common to a head's part of every block.
    ///
    /// # Errors
    /// The layer's tables do not fit its widths.
    pub fn head(&self, head: usize) -> Result<Head<'a>, ViewError> {
        let coded = self.codec.map(|(layout, quantizers)| layout.head(quantizers, head)).transpose()?;
        Ok(Head { head, channels: self.channels, head_dim: self.head_dim, coded })
    }
}

/// What `block` makes of each 64 tokens of `[tokens, channels]`, on all threads, the last fewer; `start` is the first one's position,
/// and an error's is that of the token that can't be stored.
pub(crate) fn by_block<T: Send>(
    (k, v): (&[f32], &[f32]),
    channels: usize,
    start: usize,
    block: impl Fn(&[f32], &[f32]) -> Result<T, (usize, TokenError)> + Sync,
) -> Result<Vec<T>, (usize, TokenError)> {
    let part = BLOCK_TOKENS * channels;
    let blocks = threads::map(k.len().div_ceil(part), |b| {
        let tokens = b * part..((b + 1) * part).min(k.len());
        block(&k[tokens.clone()], &v[tokens]).map_err(|(t, e)| (start + b * BLOCK_TOKENS + t, e))
    });
    blocks.into_iter().collect()
}

impl Block {
    /// Up to 64 tokens `[tokens, channels]` in fp16, or the one that can't be stored.
    pub fn exact(k: &[f32], v: &[f32], channels: usize) -> Result<Self, (usize, TokenError)> {
        let rows = Rows::of(k, v, channels)?;
        let full = rows.len(channels) == BLOCK_TOKENS;
        Ok(if full { Block::Tile(rows.tile(channels)) } else { Block::Rows(rows.into()) })
    }

    pub fn len(&self, channels: usize) -> usize {
        match self {
            Block::Rows(r) => r.len(channels),
            Block::Tile(_) | Block::Coded(_) => BLOCK_TOKENS,
            Block::Open(c) => c.len(),
        }
    }

    /// Whether it takes no more tokens, and stays in the form that it has.
    pub fn is_final(&self) -> bool {
        matches!(self, Block::Tile(_) | Block::Coded(_))
    }

    /// How many hold its data.
    pub fn holders(&self) -> usize {
        match self {
            Block::Rows(rows) => Arc::strong_count(rows),
            Block::Tile(Tile(data)) => data.holders(),
            Block::Open(open) => Arc::strong_count(open),
            Block::Coded(coded) => coded.holders(),
        }
    }

    /// A copy of a final block that shares nothing.
    pub fn copied(&self) -> Self {
        match self {
            Block::Tile(tile) => {
                let (k, v) = tile.halves();
                Block::Tile(Tile::from_halves(k, v))
            }
            Block::Coded(coded) => Block::Coded(coded.copied()),
            Block::Rows(rows) => Block::Rows(Arc::new(Rows::clone(rows))),
            Block::Open(open) => Block::Open(Arc::new(OpenBlock::clone(open))),
        }
    }

    /// A head's keys and values. `starts` is none for the first head that is asked for, and afterwards says where the outliers
    /// of the next one begin.
    #[inline(always)]
    pub fn views<'a>(
        &'a self,
        of: &'a Head<'a>,
        starts: &mut Option<Starts>,
    ) -> Result<(SideView<'a>, SideView<'a>), ViewError> {
        match self {
            Block::Rows(r) => Ok(r.views(of)),
            Block::Tile(t) => {
                let n = of.head_dim * BLOCK_TOKENS;
                let at = of.head * n..(of.head + 1) * n;
                let (k, v) = t.halves();
                Ok((SideView::Tile { data: &k[at.clone()] }, SideView::Tile { data: &v[at] }))
            }
            Block::Open(c) => c.parts().views(of.coded(), starts),
            Block::Coded(c) => c.views(of.coded(), starts),
        }
    }

    /// Asks for what [`views`](Block::views) will read.
    pub fn prefetch_index(&self, cx: &Context<'_>, kernels: Kernels) {
        if let (Block::Coded(c), Some((layout, _))) = (self, cx.codec) {
            kernels.prefetch_few(c.index(layout));
        }
    }

    /// Asks for all of a coded block.
    pub fn prefetch(&self, kernels: Kernels) {
        if let Block::Coded(c) = self {
            kernels.prefetch_lines(c.words());
        }
    }

    /// Cuts the block to `len` tokens. A coded block of a cache with a recent window becomes fp16 rows of its
    /// decoded values, so that tokens that follow enter it exactly.
    pub fn truncate(&mut self, cx: &Context<'_>, len: usize, window: bool) -> Result<(), ViewError> {
        match self {
            Block::Rows(r) => Arc::make_mut(r).truncate(len, cx.channels),
            Block::Tile(tile) => {
                let mut rows = tile.rows(cx.channels);
                rows.truncate(len, cx.channels);
                *self = Block::Rows(rows.into());
            }
            Block::Coded(_) | Block::Open(_) if window => *self = Block::Rows(self.decoded(cx, len)?.into()),
            Block::Coded(c) => {
                let mut open = OpenBlock::again(cx.layout(), c);
                open.truncate(cx.layout(), len);
                *self = Block::Open(open.into());
            }
            Block::Open(open) => Arc::make_mut(open).truncate(cx.layout(), len),
        }
        Ok(())
    }

    fn decoded(&self, cx: &Context<'_>, len: usize) -> Result<Rows, ViewError> {
        let (c, d) = (cx.channels, cx.head_dim);
        let scalar = Kernels::available()[0];
        let mut tile = vec![0.0; d * BLOCK_TOKENS];
        let mut rows = Rows { k: vec![0; len * c], v: vec![0; len * c] };
        for head in 0..c / d {
            let of = cx.head(head)?;
            let (k, v) = self.views(&of, &mut None)?;
            for (view, to) in [(k, &mut rows.k), (v, &mut rows.v)] {
                scalar.dequant(&view, len, &mut tile);
                for t in 0..len {
                    for i in 0..d {
                        to[t * c + head * d + i] = f16::from_f32(tile[i * BLOCK_TOKENS + t]).to_bits();
                    }
                }
            }
        }
        Ok(rows)
    }

    pub fn bytes(&self, cx: &Context<'_>) -> Bytes {
        let exact = |exact, index| Bytes { exact, index, ..Bytes::default() };
        match self {
            Block::Rows(r) => exact(r.bytes() + size_of::<Rows>(), COUNTS),
            Block::Tile(Tile(data)) => exact(size_of_val(&**data), data.bytes() - size_of_val(&**data)),
            Block::Open(open) => Bytes { index: COUNTS, ..open.bytes(cx.layout()) },
            Block::Coded(c) => c.bytes(cx.layout()),
        }
    }
}
