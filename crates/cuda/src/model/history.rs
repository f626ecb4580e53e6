//! The caches of a sequence's layers on a card: what is stored, and attention over it.

use std::sync::Arc;

use kvquant_cache::Prefill as Sight;
use kvquant_quant::{CodebookKind, CodedSpec, Fit, KeyStage, Scope, Side, SideQuantizer, Spec};

use super::GpuModel;
use super::work::Work;
use crate::CudaError;
use crate::device::{Buffer, Device};
use crate::exact::{ExactCache, ExactDecode};
use crate::layer::{BLOCK, DecodeStep, History, Out, Pool, Tables, Turns, append_exact, append_from};
use crate::pool::{RECORD_BYTES, most_outliers};
use crate::prefill::SECTION;

/// Tokens that are quantized by one call of the kernels.
const CHUNK: usize = 4096;
/// Tokens that a cache has room for at first; it doubles.
const ROOM: usize = 1024;

const NO_DENSE: CudaError = CudaError::Append { problem: "no rows to decode blocks into" };

/// Tokens after which the work of a step is split anew between the processors, so that a recorded step serves for as many.
const SPLIT_ANEW: usize = 256;

/// The caches of all layers.
pub(super) enum Kept {
    Exact(Box<Exact>),
    Coded(Box<Coded>),
}

pub(super) struct Exact {
    layers: Vec<ExactCache>,
    decode: ExactDecode,
    /// How many tokens each layer has after a step of one token.
    after: Buffer,
}

pub(super) struct Coded {
    sinks: usize,
    layers: Vec<CodedLayer>,
    /// One for each rotation of the model.
    turns: Vec<Turns>,
    decode: DecodeStep,
    /// What the decode kernel is told of each layer's history.
    records: Buffer,
}

struct CodedLayer {
    tables: Tables,
    pool: Pool,
    history: History,
    /// Outliers that the arena holds at most.
    outliers: usize,
}

/// What the kernels do not do, by name.
pub(super) fn check_spec(spec: &Spec) -> Result<(), CudaError> {
    let Spec::Coded(c) = spec else { return Ok(()) };
    let refused = |part: &str| {
        Err(CudaError::Unsupported {
            what: format!("{part} (of {spec})"),
            supported: "fp16, and nuq, int and nf of 2 to 4 bits with -P% and +sinkN, for example nuq3-1%+sink1",
        })
    };
    match c {
        CodedSpec { codebook: CodebookKind::Mix { .. }, .. } => refused("mixed widths"),
        CodedSpec { online: true, .. } => refused("+online"),
        CodedSpec { recent: 1.., .. } => refused("+recent"),
        CodedSpec { stage: KeyStage::PostRope, .. } => refused("+postrope"),
        CodedSpec { keys: Scope::Group(_), .. } => refused("-g"),
        CodedSpec { keys: Scope::Token, .. } => refused("+ktoken"),
        CodedSpec { values: Scope::Channel, .. } => refused("+vchannel"),
        _ => Ok(()),
    }
}

impl Kept {
    pub fn new(model: &GpuModel, spec: &Spec, fit: Option<&Fit>, status: &Arc<Buffer>) -> Result<Self, CudaError> {
        let (device, c) = (model.device(), &model.config);
        let Spec::Coded(coded) = spec else {
            let layers = (0..c.layers)
                .map(|_| ExactCache::new(device, c.kv_heads, c.head_dim, ROOM))
                .collect::<Result<Vec<_>, _>>()?;
            let decode = ExactDecode::new(device, &layers[0], c.heads)?;
            return Ok(Kept::Exact(Box::new(Exact { layers, decode, after: device.zeros(4)? })));
        };
        let blocks = c.context.div_ceil(BLOCK);
        let sinks = spec.sinks();
        let layers = (0..c.layers)
            .map(|i| {
                let fit = fit.and_then(|f| f.layers.get(i));
                let side = |side| SideQuantizer::new(coded, side, c.kv_heads, c.head_dim, fit);
                let tables = Tables::new(device, &side(Side::Key)?, &side(Side::Value)?, c.kv_heads, c.head_dim)?;
                let chunk = CHUNK.min(c.context);
                let pool = Pool::with_status(device, &tables, ROOM / BLOCK, ROOM, chunk, status.clone())?;
                let history = History::new(device, &tables, sinks, blocks)?;
                Ok(CodedLayer { tables, pool, history, outliers: 0 })
            })
            .collect::<Result<Vec<_>, CudaError>>()?;
        let turns = c.rotary.iter().map(|r| Turns::new(device, &r.inv_freq, sinks, blocks));
        let turns = turns.collect::<Result<Vec<_>, _>>()?;
        let fast = turns.iter().map(|t| t.fast).max().unwrap_or(0);
        let decode = DecodeStep::new(device, &layers[0].tables, fast, c.heads, 1)?;
        let records = device.zeros(c.layers * RECORD_BYTES)?;
        Ok(Kept::Coded(Box::new(Coded { sinks, layers, turns, decode, records })))
    }

    /// Makes ready for a pass of `n` tokens after the first `start`.
    pub fn reserve(&mut self, device: &Device, start: usize, n: usize) -> Result<(), CudaError> {
        match self {
            Kept::Exact(e) => {
                let Exact { layers, decode, after } = &mut **e;
                for l in layers.iter_mut().filter(|l| l.capacity < start + n) {
                    l.grow(device, (start + n).next_power_of_two())?;
                }
                if n > 1 {
                    return Ok(());
                }
                device.write(after, 0, &[start as u32 + 1])?;
                decode.follow(device, &layers[0], (start + 1).next_multiple_of(SPLIT_ANEW))
            }
            Kept::Coded(c) => c.reserve(device, start, n),
        }
    }

    /// Stores keys and values of `n` tokens, `work.k` and `work.v`, in a layer and attends with `work.q`. What comes out is
    /// in `work.attended` for a single token, else in `work.prefill`.
    pub fn extend(
        &mut self,
        device: &Device,
        layer: usize,
        rotary: usize,
        start: usize,
        n: usize,
        sight: Sight,
        work: &mut Work,
    ) -> Result<(), CudaError> {
        match self {
            Kept::Exact(e) => {
                let Exact { layers, decode, after } = &mut **e;
                let (cache, after) = (&mut layers[layer], (n == 1).then_some(&*after));
                cache.append(device, &work.k, &work.v, &work.angles[rotary], n, after)?;
                if n == 1 {
                    return decode.decode(device, cache, &work.q, Out::Halves(&work.attended), after);
                }
                work.prefill.load(device, &work.q, &work.angles[rotary], n)?;
                work.prefill.attend_exact(device, cache, true, true)
            }
            Kept::Coded(c) => c.extend(device, layer, rotary, start, n, sight, work),
        }
    }

    /// What the launches of a step of one token were told, once it was reserved, that may be other in the next step; nothing where
    /// that token goes to no place that is read on the card.
    pub fn step_key(&self) -> Option<Vec<u64>> {
        match self {
            Kept::Exact(e) => {
                let layers = e.layers.iter().flat_map(|l| [l.rows.at(), l.capacity as u64]);
                Some(layers.chain(e.decode.key()).collect())
            }
            Kept::Coded(c) => {
                let is_coded = |l: &CodedLayer| l.history.exact().1 == c.sinks;
                let layers = c.layers.iter().flat_map(|l| l.history.places(&l.pool));
                c.layers.iter().all(is_coded).then(|| layers.chain(c.decode.key()).collect())
            }
        }
    }

    /// Takes note of the token that a repeated step has stored.
    pub fn stored_one(&mut self) {
        match self {
            Kept::Exact(e) => e.layers.iter_mut().for_each(|l| l.tokens += 1),
            Kept::Coded(c) => c.layers.iter_mut().for_each(|l| l.history.tokens += 1),
        }
    }

    /// How many of the first `len` tokens can be kept: codes are let go block by block.
    pub fn keepable(&self, held: usize, len: usize) -> usize {
        let len = len.min(held);
        match self {
            Kept::Exact(_) => len,
            Kept::Coded(_) if len == held => len,
            Kept::Coded(c) => len.min(c.sinks) + len.saturating_sub(c.sinks) / BLOCK * BLOCK,
        }
    }

    /// Keeps the first `len` tokens, what `keepable` gave.
    pub fn truncate(&mut self, device: &Device, len: usize) -> Result<(), CudaError> {
        match self {
            Kept::Exact(e) => e.layers.iter_mut().for_each(|l| l.tokens = l.tokens.min(len)),
            Kept::Coded(c) => {
                for l in &mut c.layers {
                    l.history.truncate(&mut l.pool, len.min(c.sinks), len.saturating_sub(c.sinks) / BLOCK);
                    if l.history.coded() == 0 {
                        // Only this history has outliers there.
                        l.pool.forget_outliers(device)?;
                        l.outliers = 0;
                    }
                }
            }
        }
        Ok(())
    }

    /// Bytes of all that is stored, and bits per element of an endless context. Room that is not used yet is left out.
    pub fn size(&self, device: &Device) -> Result<(usize, Option<f64>), CudaError> {
        match self {
            Kept::Exact(e) => {
                let bytes = e.layers.iter().map(|l| 2 * l.kv_heads * l.dim * 2 * l.tokens).sum();
                Ok((bytes, e.layers.first().is_some_and(|l| l.tokens >= BLOCK).then_some(16.0)))
            }
            Kept::Coded(c) => {
                let (mut bytes, mut whole_bytes, mut elements) = (0, 0, 0);
                for l in &c.layers {
                    let whole = l.history.coded() / BLOCK;
                    let kept = if whole > 0 { l.pool.kept(device)? * 4 } else { 0 };
                    // A block and its number in the table.
                    let block = l.tables.block_bytes() + 4;
                    bytes += l.history.blocks() * block + kept + l.history.fixed_bytes();
                    whole_bytes += whole * block + kept;
                    elements += whole * BLOCK * 2 * l.tables.channels();
                }
                Ok((bytes, (elements > 0).then(|| 8.0 * whole_bytes as f64 / elements as f64)))
            }
        }
    }
}

impl Coded {
    /// Of `n` tokens after the first `start`, how many are kept exactly and how many as codes.
    fn split(&self, start: usize, n: usize) -> (usize, usize) {
        let exact = n.min(self.sinks.saturating_sub(start));
        (exact, n - exact)
    }

    fn reserve(&mut self, device: &Device, start: usize, n: usize) -> Result<(), CudaError> {
        let (exact, coded) = self.split(start, n);
        let mut records = Vec::with_capacity(self.layers.len() * RECORD_BYTES / 8);
        for l in &mut self.layers {
            let before = l.history.coded();
            let need = (before + coded).div_ceil(BLOCK).saturating_sub(l.history.blocks());
            if need > l.pool.free.len() {
                l.pool.grow(device, &l.tables, (need - l.pool.free.len()).max(l.pool.count), 0)?;
            }
            // Outliers go to the arena when their block is full; how many there are only the card knows.
            let full = (before + coded) / BLOCK - before / BLOCK;
            let most = full * most_outliers(&l.tables);
            if l.outliers + most > l.pool.outliers {
                l.outliers = l.pool.kept(device)?;
                let short = (l.outliers + most).saturating_sub(l.pool.outliers);
                if short > 0 {
                    l.pool.grow(device, &l.tables, 0, short.max(l.pool.outliers))?;
                }
            }
            l.outliers += most;
            l.history.reserve(device, &mut l.pool, coded)?;
            records.extend(l.history.record_after(&l.pool, exact, coded));
        }
        if n == 1 {
            device.write(&mut self.records, 0, &records)?;
            self.decode.follow(device, self.layers[0].history.blocks())?;
        }
        Ok(())
    }

    fn extend(
        &mut self,
        device: &Device,
        layer: usize,
        rotary: usize,
        start: usize,
        n: usize,
        sight: Sight,
        work: &mut Work,
    ) -> Result<(), CudaError> {
        let split = self.split(start, n);
        let (l, turns) = (&mut self.layers[layer], &self.turns[rotary]);
        if n == 1 {
            let record = (&self.records, layer * RECORD_BYTES);
            l.store(device, split, rotary, work, Some(record))?;
            return self.decode.decode(device, &l.tables, &l.pool, turns, record, &work.q, Out::Halves(&work.attended));
        }
        work.prefill.load(device, &work.q, &work.angles[rotary], n)?;
        if sight == Sight::Exact {
            let own = work.own.as_mut().ok_or(CudaError::Append { problem: "no rows for a chunk's own keys" })?;
            own.tokens = 0;
            own.append(device, &work.k, &work.v, &work.angles[rotary], n, None)?;
            let dense = work.dense.as_ref().ok_or(NO_DENSE)?;
            work.prefill.attend_coded(device, &l.tables, &l.pool, &l.history, turns, dense, SECTION, false)?;
            work.prefill.attend_exact(device, own, true, true)?;
            return l.store(device, split, rotary, work, None);
        }
        l.store(device, split, rotary, work, None)?;
        let dense = work.dense.as_ref().ok_or(NO_DENSE)?;
        work.prefill.attend_seen(device, &l.tables, &l.pool, &l.history, turns, dense, SECTION, start + 1, true)
    }
}

impl CodedLayer {
    fn store(
        &mut self,
        device: &Device,
        (exact, coded): (usize, usize),
        rotary: usize,
        work: &Work,
        record: Option<(&Buffer, usize)>,
    ) -> Result<(), CudaError> {
        let Work { k, v, angles, .. } = work;
        if exact > 0 {
            append_exact(device, &self.tables, &mut self.history, k, v, &angles[rotary], exact)?;
        }
        for from in (0..coded).step_by(self.pool.chunk) {
            let n = self.pool.chunk.min(coded - from);
            append_from(device, &self.tables, &mut self.pool, &mut self.history, [k, v], exact + from, n, record)?;
        }
        Ok(())
    }
}
