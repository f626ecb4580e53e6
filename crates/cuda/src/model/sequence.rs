//! One sequence on a card: tokens after a history, to logits.

use std::sync::Arc;

use kvquant_cache::{CacheError, Prefill as Sight};
use kvquant_model::sequence::{Sequence, Size};
use kvquant_model::{ForwardError, Logits};
use kvquant_quant::{Quantizer, Spec};

use super::history::{Kept, check_spec};
use super::rows::{Added, HeadWeights};
use super::work::Work;
use super::{GpuModel, Parts};
use crate::CudaError;
use crate::device::Buffer;
use crate::graph::Graph;
use crate::layer::query_scale;
use crate::pool::Pool;
use crate::tables::angles;

/// Nothing went wrong yet: kernels/append.cu's word, and the first layer whose sum is not finite.
const FINE: [u32; 2] = [0, u32::MAX];

/// A sequence whose history lies on a card.
pub struct OnGpu {
    model: GpuModel,
    kept: Kept,
    coded: bool,
    status: Arc<Buffer>,
    work: Work,
    step: Step,
    logits: Vec<f32>,
    len: usize,
}

/// The step of one token that ran last: what it was told, and its launches, recorded once the same comes again.
#[derive(Default)]
struct Step {
    key: Option<Vec<u64>>,
    graph: Option<Graph>,
}

impl OnGpu {
    pub(super) fn new(model: GpuModel, spec: &Spec, quantizer: Option<&Quantizer>) -> Result<Self, ForwardError> {
        check_spec(spec)?;
        if let Some(q) = quantizer {
            q.check_model(&model.fingerprint)?;
        } else if spec.needs_fit() {
            return Err(CacheError::NeedsQuantizer { spec: spec.to_string() }.into());
        }
        let status = Arc::new(model.device().upload(&FINE)?);
        // A file may hold fits for other caches only.
        let fit = quantizer.filter(|_| spec.needs_fit()).map(|q| q.fit(spec)).transpose()?;
        let kept = Kept::new(&model, spec, fit, &status)?;
        let coded = matches!(spec, Spec::Coded(_));
        let work = Work::new(&model, 1, coded)?;
        Ok(OnGpu { model, kept, coded, status, work, step: Step::default(), logits: Vec::new(), len: 0 })
    }

    /// Tokens to logits. Every count is as before but for the layers' histories.
    fn pass(&mut self, tokens: &[u32], wanted: Logits, sight: Sight) -> Result<(), CudaError> {
        let model = self.model.clone();
        let Parts { device, config: c, .. } = &*model;
        let (n, start) = (tokens.len(), self.len);
        let picked = match wanted {
            Logits::None => 0,
            Logits::Last => 1,
            Logits::All => n,
        };
        if n > self.work.rows {
            self.step = Step::default();
            self.work = Work::new(&model, n, self.coded)?;
        }
        if self.work.logits.bytes() < picked * c.vocab * 4 {
            self.work.logits = device.room(picked * c.vocab * 4)?;
        }
        self.kept.reserve(device, start, n)?;
        let w = &mut self.work;
        device.write(&mut w.tokens, 0, tokens)?;
        for (r, to) in c.rotary.iter().zip(&mut w.angles) {
            let all: Vec<[f32; 2]> = (start..start + n).flat_map(|p| angles(&r.inv_freq, p as f64)).collect();
            device.write(to, 0, &all)?;
        }
        if n == 1 {
            self.step(&model, picked, sight)?;
        } else {
            self.layers(&model, n, picked, sight)?;
        }
        self.logits.resize(picked * c.vocab, 0.0);
        device.read_into(&self.work.logits, 0, &mut self.logits)?;
        if let Some(cap) = c.logit_cap {
            self.logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        Ok(())
    }

    /// [`layers`](OnGpu::layers) of one token: recorded when it comes a second time, then repeated.
    fn step(&mut self, model: &GpuModel, picked: usize, sight: Sight) -> Result<(), CudaError> {
        let and = [picked as u64, self.work.logits.at()];
        let key = self.kept.step_key().map(|places| places.into_iter().chain(and).collect());
        if key.is_none() || key != self.step.key {
            self.step = Step { key, graph: None };
            return self.layers(model, 1, picked, sight);
        }
        if let Some(graph) = &mut self.step.graph {
            graph.launch(model.device())?;
            self.kept.stored_one();
            return Ok(());
        }
        let mut graph = Graph::record(model.device(), || self.layers(model, 1, picked, sight))?;
        graph.launch(model.device())?;
        self.step.graph = Some(graph);
        Ok(())
    }

    /// Launches what takes `n` tokens through all layers, and the head's product for the last `picked` of them.
    fn layers(&mut self, model: &GpuModel, n: usize, picked: usize, sight: Sight) -> Result<(), CudaError> {
        let Parts { device, blas, weights, config: c, widths, .. } = &**model;
        let (start, w) = (self.len, &mut self.work);
        widths.embed(device, &w.tokens, &weights.embed.weights, &w.x, n, c.embedding_scale)?;
        let first = weights.layers.first().map(|l| &l.attn_norm);
        widths.add_norm(device, (&w.x, 0), None, first, &w.normed, n, (&self.status, 0))?;
        for (i, l) in weights.layers.iter().enumerate() {
            let rotary = c.attention[i].rotary;
            blas.product(device, &l.qkv, &w.normed, n, &w.qkv)?;
            let with = HeadWeights {
                bias: l.bias.as_ref(),
                q_norm: l.q_norm.as_ref(),
                k_norm: l.k_norm.as_ref(),
                q_scale: weights.query_scales[rotary].as_ref(),
            };
            // A decode kernel takes queries as they are multiplied; prefill turns them on the way to fp16.
            let (turned, scale) = if n == 1 { (Some(&w.angles[rotary]), query_scale(c.head_dim)) } else { (None, 1.0) };
            widths.heads(device, &w.qkv, &with, turned, scale, [&w.q, &w.k, &w.v], n)?;
            self.kept.extend(device, i, rotary, start, n, sight, w)?;
            if n > 1 {
                widths.attended(device, w.prefill.out(), &w.attended, n)?;
            }
            blas.product(device, &l.o, &w.attended, n, &w.y)?;
            let added = Added { y: &w.y, scales: None, post: l.post_attn_norm.as_ref() };
            let status = (&*self.status, i);
            widths.add_norm(device, (&w.x, 0), Some(added), Some(&l.ffn_norm), &w.normed, n, status)?;
            blas.product(device, &l.gate_up, &w.normed, n, &w.gate_up)?;
            widths.gate(device, &w.gate_up, &w.gated, &w.scales, n)?;
            blas.product(device, &l.down, &w.gated, n, &w.y)?;
            let added = Added { y: &w.y, scales: Some(&w.scales), post: l.post_ffn_norm.as_ref() };
            // The last layer's sum is normed for the head, where all of its rows are asked for.
            let next = match weights.layers.get(i + 1) {
                Some(next) => Some(&next.attn_norm),
                None => (picked == n).then_some(&weights.final_norm),
            };
            widths.add_norm(device, (&w.x, 0), Some(added), next, &w.normed, n, status)?;
        }
        if picked > 0 {
            if picked < n {
                let last = (&w.x, n - picked);
                let status = (&*self.status, c.layers);
                widths.add_norm(device, last, None, Some(&weights.final_norm), &w.normed, picked, status)?;
            }
            blas.product(device, &weights.head, &w.normed, picked, &w.logits)?;
        }
        Ok(())
    }

    /// What the kernels complained of, which is then forgotten.
    fn complaint(&mut self) -> Result<(), ForwardError> {
        let device = self.model.device();
        let mut status = FINE;
        device.read_into(&self.status, 0, &mut status)?;
        if status == FINE {
            return Ok(());
        }
        device.overwrite(&self.status, &FINE)?;
        if status[1] != FINE[1] {
            return Err(ForwardError::NotFinite { layer: status[1] as usize });
        }
        Ok(Pool::explain(status[0])?)
    }
}

impl Sequence for OnGpu {
    fn len(&self) -> usize {
        self.len
    }

    fn context(&self) -> usize {
        self.model.config.context
    }

    fn run(&mut self, tokens: &[u32], logits: Logits, prefill: Sight) -> Result<&[f32], ForwardError> {
        let (vocab, context, n) = (self.model.config.vocab, self.model.config.context, tokens.len());
        if n == 0 {
            return Err(ForwardError::Empty);
        }
        if let Some(&id) = tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(ForwardError::Token { id, vocab });
        }
        if self.len + n > context {
            return Err(ForwardError::ContextFull { stored: self.len, new: n, context });
        }
        let passed = self.pass(tokens, logits, prefill).map_err(ForwardError::from);
        match passed.and_then(|()| self.complaint()) {
            Ok(()) => {
                self.len += n;
                Ok(&self.logits)
            }
            Err(e) => {
                // Codes go block by block: what is left may be shorter than before.
                let held = self.kept.keepable(usize::MAX, self.len);
                if self.kept.truncate(self.model.device(), held).is_ok() {
                    self.len = held;
                }
                Err(e)
            }
        }
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn keepable(&self, len: usize) -> usize {
        self.kept.keepable(self.len, len)
    }

    fn truncate(&mut self, len: usize) -> Result<(), ForwardError> {
        let keepable = self.keepable(len);
        if len != keepable {
            return Err(CacheError::Length { what: "truncated cache", expected: keepable, got: len }.into());
        }
        self.kept.truncate(self.model.device(), len)?;
        self.len = len;
        Ok(())
    }

    fn size(&self) -> Result<Size, ForwardError> {
        let (bytes, bits_at_infinity) = self.kept.size(self.model.device())?;
        let c = &self.model.config;
        let elements = 2 * c.layers * c.kv_heads * c.head_dim * self.len;
        let bits_per_element = if elements == 0 { 0.0 } else { 8.0 * bytes as f64 / elements as f64 };
        Ok(Size { bytes, bits_per_element, bits_at_infinity })
    }
}
