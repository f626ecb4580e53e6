//! One layer's history: sink rows, then blocks.

use std::ops::Range;
use std::sync::Arc;

use kvquant_kernels::threads;
use kvquant_quant::TokenCodes;
use kvquant_quant::pack::BLOCK_TOKENS;

use crate::block::{Block, COUNTS, Context, Rows, TokenError, by_block};
use crate::bytes::Bytes;
use crate::coded::{CodedBlock, Layout, OpenBlock, Quantizers};
use crate::online::{FIRST_BLOCKS, Online};

/// How many blocks the list of a layer grows by, so that its spare room stays small.
const GROW_BLOCKS: usize = 16;

/// Codes and layouts of a layer of a quantized cache.
#[derive(Debug)]
pub(crate) struct Codec {
    /// Those of all blocks, unless the layer makes its own.
    pub quantizers: Quantizers,
    pub layout: Layout,
}

impl Codec {
    /// A full block from keys and values `[64, kv_heads, head_dim]`, or the token that can't be stored.
    fn block(&self, k: &[f32], v: &[f32], channels: usize) -> Result<CodedBlock, (usize, TokenError)> {
        whole_block(&self.quantizers, &self.layout, k, v, channels)
    }
}

fn whole_block(
    quantizers: &Quantizers,
    layout: &Layout,
    k: &[f32],
    v: &[f32],
    channels: usize,
) -> Result<CodedBlock, (usize, TokenError)> {
    let mut keys = vec![TokenCodes::default(); BLOCK_TOKENS];
    let mut values = keys.clone();
    for (t, (k, v)) in k.chunks_exact(channels).zip(v.chunks_exact(channels)).enumerate() {
        quantize(quantizers, k, v, &mut keys[t], &mut values[t]).map_err(|e| (t, e))?;
    }
    Ok(OpenBlock::whole(layout, &keys, &values))
}

#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Shared by all caches of a model and spec.
    codec: Option<Arc<Codec>>,
    /// Where quantizers come from the tokens.
    online: Option<Online>,
    channels: usize,
    head_dim: usize,
    sinks: usize,
    recent: usize,
    /// Tokens that a query sees, itself included; `None` for all.
    window: Option<usize>,
    sink: Rows,
    /// Blocks that were let go at the front.
    dropped: usize,
    /// Shared with other sequences and with a store of prefixes.
    blocks: Vec<Block>,
    len: usize,
    key_codes: TokenCodes,
    value_codes: TokenCodes,
}

impl Layer {
    pub fn new(
        codec: Option<Arc<Codec>>,
        online: Option<Online>,
        channels: usize,
        head_dim: usize,
        sinks: usize,
        recent: usize,
        window: Option<usize>,
    ) -> Self {
        Layer {
            codec,
            online,
            channels,
            head_dim,
            sinks,
            recent,
            window,
            sink: Rows::with_room(sinks, channels),
            dropped: 0,
            blocks: Vec::new(),
            len: 0,
            key_codes: TokenCodes::default(),
            value_codes: TokenCodes::default(),
        }
    }

    /// An empty layer of the same kind.
    pub fn fresh(&self) -> Self {
        let (codec, online) = (self.codec.clone(), self.online.as_ref().map(Online::fresh));
        Layer::new(codec, online, self.channels, self.head_dim, self.sinks, self.recent, self.window)
    }

    /// Takes over a history of `len` tokens, which ends with a block.
    pub fn resume(&mut self, sink: Rows, dropped: usize, blocks: Vec<Block>, len: usize) {
        (self.sink, self.dropped, self.blocks, self.len) = (sink, dropped, blocks, len);
    }

    /// Whether quantized blocks come before exact ones, as sealing leaves them, and an open block is one that takes
    /// tokens.
    pub fn is_sealed_in_order(&self) -> bool {
        let exact = |b: &Block| self.codec.is_some() && matches!(b, Block::Rows(_));
        self.blocks.is_sorted_by_key(exact)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn sink(&self) -> &Rows {
        &self.sink
    }

    /// Those that are kept, the first of them after [`dropped`](Layer::dropped) others.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    pub fn window(&self) -> Option<usize> {
        self.window
    }

    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// The first position that is kept.
    pub fn first(&self) -> usize {
        match self.dropped {
            0 if self.len > self.sinks && self.sink.len(self.channels) < self.sinks => self.sinks,
            0 => 0,
            n => self.sinks + n * BLOCK_TOKENS,
        }
    }

    /// Whether all that a query at position `len` sees would be kept if the layer were cut to `len` tokens.
    pub fn can_truncate(&self, len: usize) -> bool {
        let hidden = self.window.map_or(0, |w| (len + 1).saturating_sub(w));
        len == 0 || hidden >= self.first()
    }

    /// Lets go of whole blocks before the window. One block more is kept, so that the last tokens can be taken back.
    pub fn trim(&mut self) {
        let Some(hidden) = self.window.and_then(|w| (self.len + 1).checked_sub(w.saturating_add(BLOCK_TOKENS))) else {
            return;
        };
        if hidden >= self.sinks {
            self.sink = Rows::default();
            let blocks = (hidden - self.sinks) / BLOCK_TOKENS;
            if blocks > self.dropped {
                self.blocks.drain(..blocks - self.dropped);
                self.dropped = blocks;
            }
        }
    }

    /// What is needed to read block `b` of those that are kept, and the others of its [`same_tables`](Layer::same_tables).
    pub fn context(&self, b: usize) -> Context<'_> {
        let own = self.online.as_ref().and_then(|o| o.of(self.dropped + b));
        Context {
            channels: self.channels,
            head_dim: self.head_dim,
            codec: self.codec.as_ref().map(|c| (&c.layout, own.unwrap_or(&c.quantizers))),
        }
    }

    /// The blocks around `b` that the same tables decode.
    pub fn same_tables(&self, b: usize) -> Range<usize> {
        let of_epoch = self.online.as_ref().map_or(0..usize::MAX, |o| o.epoch_of(self.dropped + b));
        of_epoch.start.saturating_sub(self.dropped)..of_epoch.end.saturating_sub(self.dropped)
    }

    /// Whether blocks can't be read without what this very layer learned.
    pub fn is_online(&self) -> bool {
        self.online.is_some()
    }

    /// The position up to which tokens from `start` on may be appended and attended in one go, at most `end`:
    /// no further than the open block, and no block may leave the recent window on the way. So the state that
    /// a query sees depends on its position alone.
    pub fn run_end(&self, start: usize, end: usize) -> usize {
        if start < self.sinks {
            return self.sinks.min(end);
        }
        let place = (start - self.sinks) % BLOCK_TOKENS;
        let mut run = BLOCK_TOKENS - place;
        if self.codec.is_some() && self.recent > 0 {
            // A block is sealed for queries at places p with p - recent + 1 = 0 (mod 64).
            let seal = (self.recent - 1) % BLOCK_TOKENS;
            let ahead = (seal + BLOCK_TOKENS - place) % BLOCK_TOKENS;
            if ahead > 0 {
                run = run.min(ahead);
            }
        }
        (start + run).min(end)
    }

    /// Appends one token `[kv_heads, head_dim]`.
    pub fn push(&mut self, k: &[f32], v: &[f32]) -> Result<(), TokenError> {
        if self.len < self.sinks {
            self.sink.push(k, v)?;
            self.len += 1;
            return Ok(());
        }
        if (self.len - self.sinks).is_multiple_of(BLOCK_TOKENS) {
            if self.blocks.len() == self.blocks.capacity() {
                self.blocks.reserve_exact(GROW_BLOCKS);
            }
            self.blocks.push(match &self.codec {
                Some(codec) if self.recent == 0 => Block::Open(OpenBlock::new(&codec.layout).into()),
                _ => Block::Rows(Rows::with_room(BLOCK_TOKENS, self.channels).into()),
            });
        }
        let last = self.blocks.last_mut().expect("a block was opened above");
        let pushed = match (last, &self.codec) {
            (Block::Open(open), Some(codec)) => {
                quantize(&codec.quantizers, k, v, &mut self.key_codes, &mut self.value_codes).map(|()| {
                    Arc::make_mut(open).push(&codec.layout, &self.key_codes, &self.value_codes);
                })
            }
            (Block::Rows(rows), _) => Arc::make_mut(rows).push(k, v),
            _ => unreachable!("the last block takes tokens until it is full"),
        };
        if let Err(e) = pushed {
            if (self.len - self.sinks).is_multiple_of(BLOCK_TOKENS) {
                self.blocks.pop();
            }
            return Err(e);
        }
        self.len += 1;
        if (self.len - self.sinks).is_multiple_of(BLOCK_TOKENS) {
            let last = self.blocks.last_mut().expect("a block was filled above");
            match last {
                Block::Open(open) => *last = Block::Coded(open.finish()),
                Block::Rows(rows) if self.codec.is_none() => *last = Block::Tile(rows.tile(self.channels)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Appends tokens `[tokens, kv_heads, head_dim]` from position `start` on, and quantizes what leaves the recent window.
    pub fn store(&mut self, k: &[f32], v: &[f32], start: usize) -> Result<(), (usize, TokenError)> {
        let (c, n) = (self.channels, k.len() / self.channels);
        let mut done = 0;
        while done < n {
            let open = (self.len.max(self.sinks) - self.sinks) % BLOCK_TOKENS;
            let whole = (n - done) / BLOCK_TOKENS;
            if self.len >= self.sinks && open == 0 && whole > 0 && self.recent == 0 {
                let part = done * c..(done + whole * BLOCK_TOKENS) * c;
                self.store_whole(&k[part.clone()], &v[part], start + done)?;
                done += whole * BLOCK_TOKENS;
                continue;
            }
            let token = done * c..(done + 1) * c;
            self.push(&k[token.clone()], &v[token])
                .and_then(|()| self.seal(start + done))
                .map_err(|e| (start + done, e))?;
            done += 1;
        }
        Ok(())
    }

    /// Whole blocks, side by side on all threads.
    fn store_whole(&mut self, k: &[f32], v: &[f32], start: usize) -> Result<(), (usize, TokenError)> {
        let blocks = by_block((k, v), self.channels, start, |k, v| match &self.codec {
            Some(codec) => codec.block(k, v, self.channels).map(Block::Coded),
            None => Block::exact(k, v, self.channels),
        })?;
        self.len += blocks.len() * BLOCK_TOKENS;
        self.blocks.reserve_exact(blocks.len().next_multiple_of(GROW_BLOCKS));
        self.blocks.extend(blocks);
        Ok(())
    }

    /// Blocks that no longer change, from the first on.
    fn finished(&self) -> usize {
        self.blocks.iter().take_while(|b| b.is_final()).count()
    }

    /// Bytes of the blocks that no longer change, headers included, and their tokens.
    pub fn finished_bytes(&self) -> (usize, usize) {
        let n = self.finished();
        let data: usize = self.blocks[..n].iter().map(|b| b.bytes(&self.context(0)).total()).sum();
        (data + n * size_of::<Block>(), n * BLOCK_TOKENS)
    }

    /// Blocks to [`repeat`](Layer::repeat): finished, and of the tables that those behind them would have.
    fn repeatable(&self) -> Range<usize> {
        let first = self.online.as_ref().map_or(0, Online::last_epoch);
        first.saturating_sub(self.dropped)..self.finished()
    }

    /// Whether there is a block to repeat.
    pub fn can_repeat(&self) -> bool {
        !self.repeatable().is_empty()
    }

    /// Puts in copies of finished blocks behind them.
    pub fn repeat(&mut self, copies: usize) {
        self.len += copies * BLOCK_TOKENS;
        if self.window.is_some_and(|w| self.blocks.len() * BLOCK_TOKENS > w) {
            // What the window sees is already there; it moves on.
            self.dropped += copies;
            return;
        }
        let of = self.repeatable();
        let more: Vec<_> = (0..copies).map(|i| self.blocks[of.start + i % of.len()].copied()).collect();
        self.blocks.splice(of.end..of.end, more);
    }

    /// Quantizes the blocks that have left the recent window of a query at `position`.
    pub fn seal(&mut self, position: usize) -> Result<(), TokenError> {
        let Some(codec) = &self.codec else { return Ok(()) };
        if self.recent == 0 || position + 1 < self.sinks + self.recent {
            return Ok(());
        }
        let left = (position + 1 - self.recent - self.sinks) / BLOCK_TOKENS;
        if self.online.as_ref().is_some_and(|o| !o.is_ready(left)) {
            return Ok(());
        }
        // Sealed blocks are a prefix: look only behind the last of them.
        let from = self.blocks.iter().rposition(|b| matches!(b, Block::Coded(_))).map_or(0, |i| i + 1);
        let to = left.saturating_sub(self.dropped).min(self.blocks.len());
        if let Some(online) = self.online.as_mut().filter(|_| from < to) {
            let blocks = &self.blocks[from..to];
            online.begin(|| {
                let rows = blocks.iter().filter_map(|b| if let Block::Rows(r) = b { Some(r.floats()) } else { None });
                let (k, v): (Vec<_>, Vec<_>) = rows.unzip();
                (k.concat(), v.concat())
            });
        }
        for b in from..to {
            let Block::Rows(rows) = &self.blocks[b] else { continue };
            let (k, v) = rows.floats();
            let coded = match &mut self.online {
                None => codec.block(&k, &v, self.channels),
                Some(online) => {
                    let quantizers = online.follow(self.dropped + b, &k, &v)?;
                    whole_block(&quantizers, &codec.layout, &k, &v, self.channels)
                }
            };
            self.blocks[b] = Block::Coded(coded.map_err(|(_, e)| e)?);
        }
        Ok(())
    }

    pub fn truncate(&mut self, len: usize) -> Result<(), kvquant_kernels::attend::ViewError> {
        if len >= self.len {
            return Ok(());
        }
        self.len = len;
        if len == 0 {
            (self.dropped, self.sink) = (0, Rows::with_room(self.sinks, self.channels));
            self.online = self.online.as_ref().map(Online::fresh);
        }
        self.sink.truncate(len.min(self.sinks), self.channels);
        let kept = len.saturating_sub(self.sinks);
        self.blocks.truncate(kept.div_ceil(BLOCK_TOKENS).saturating_sub(self.dropped));
        if !kept.is_multiple_of(BLOCK_TOKENS)
            && let Some(mut last) = self.blocks.pop()
        {
            let cx = self.context(self.blocks.len());
            let cut = last.truncate(&cx, kept % BLOCK_TOKENS, self.recent > 0);
            self.blocks.push(last);
            cut?;
        }
        Ok(())
    }

    pub fn bytes(&self) -> Bytes {
        let mut all = Bytes { exact: self.sink.bytes(), ..Bytes::default() };
        for block in &self.blocks {
            all += block.bytes(&self.context(0));
        }
        all.index += self.blocks.capacity() * size_of::<Block>();
        all.index += self.online.as_ref().map_or(0, Online::bytes);
        all
    }

    /// Bytes that `tokens` tokens take, about; outliers a quarter above the share that the spec asks for.
    pub fn bytes_for(&self, tokens: usize, outlier_share: f64) -> usize {
        let header = size_of::<Block>() + COUNTS;
        let rows = |n: usize| 4 * n * self.channels;
        // A window keeps a block more than it sees, and the open one.
        let kept = self.window.map_or(tokens, |w| tokens.min(w.saturating_add(3 * BLOCK_TOKENS)));
        let blocks = kept.saturating_sub(self.sinks).div_ceil(BLOCK_TOKENS);
        let exact = if self.recent > 0 { (self.recent.div_ceil(BLOCK_TOKENS) + 1).min(blocks) } else { 0 };
        // A layer that knows nothing yet keeps more of them.
        let (exact, tables) = match &self.online {
            Some(online) if blocks > FIRST_BLOCKS => (exact.max(FIRST_BLOCKS + 1).min(blocks), online.first_bytes()),
            Some(_) => (blocks, 0),
            None => (exact, 0),
        };
        let block = match &self.codec {
            None => rows(BLOCK_TOKENS),
            Some(codec) => {
                let elements = (2 * self.channels * BLOCK_TOKENS) as f64;
                codec.layout.fixed_bytes() + (elements * outlier_share * 1.25 * 3.0) as usize
            }
        };
        rows(self.sinks.min(tokens)) + (blocks - exact) * block + exact * rows(BLOCK_TOKENS) + blocks * header + tables
    }

    /// How many hold each block that is kept.
    pub fn holders(&self) -> impl Iterator<Item = usize> {
        self.blocks.iter().map(Block::holders)
    }

    /// Bytes of the blocks that others hold as well.
    pub fn shared_bytes(&self) -> usize {
        let shared = self.blocks.iter().filter(|b| b.holders() > 1);
        shared.map(|b| b.bytes(&self.context(0)).total()).sum()
    }
}

fn quantize(
    quantizers: &Quantizers,
    k: &[f32],
    v: &[f32],
    key: &mut TokenCodes,
    value: &mut TokenCodes,
) -> Result<(), TokenError> {
    use kvquant_quant::Side;
    // A side a thread: their bounds come from memory.
    let mut sides = [(&quantizers.key, k, key, Ok(())), (&quantizers.value, v, value, Ok(()))];
    threads::for_each_mut(&mut sides, |_, (quantizer, x, codes, done)| *done = quantizer.quantize(x, codes));
    let [(.., key), (.., value)] = sides;
    key.map_err(|e| (Side::Key, e))?;
    value.map_err(|e| (Side::Value, e))
}
