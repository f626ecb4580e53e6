//! One request that runs.

use std::borrow::Cow;
use std::time::Instant;

use kvquant_cache::{Cache, Segment};
use kvquant_model::generate::StopReason;
use kvquant_model::sampling::{Sampler, logprobs};
use kvquant_model::stream::TextStream;
use kvquant_model::{Step, Tokenizer};

use super::{Event, Failure, Job, TokenInfo, Usage};
use crate::prefixes::{Key, key};
use crate::stats::SequenceStats;

/// A sequence's part in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    pub tokens: usize,
    /// A token of the answer, and not a part of the prompt.
    pub decode: bool,
    pub logits: bool,
}

/// A request with its cache.
#[derive(Debug)]
pub struct Sequence {
    id: u64,
    job: Job,
    cache: Cache,
    sampler: Sampler,
    text: TextStream,
    /// The token that was drawn last and has not been run.
    next: [u32; 1],
    generated: usize,
    pub(super) cached: usize,
    /// Bytes that it may still come to need for itself.
    pub(super) reserved: usize,
    context: usize,
    /// Tokens whose text is held back.
    held: Vec<TokenInfo>,
    /// The next segment of the prompt to be kept for others, and the key of what lies before it.
    segment: usize,
    parent: Key,
    arrived: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    failed: bool,
}

impl Sequence {
    /// A sequence that continues `cache`, which holds the first `segments` segments of the prompt, known by `parent`.
    pub(super) fn new(
        id: u64,
        job: Job,
        arrived: Instant,
        cache: Cache,
        segments: usize,
        parent: Key,
        context: usize,
    ) -> Result<Self, Failure> {
        let sampler = Sampler::new(job.sampling.clone()).map_err(|e| Failure::Model(e.to_string()))?;
        let text = TextStream::new(job.stop.clone());
        let cached = cache.len();
        // Nobody listens: it ends before the first pass.
        let _ = job.events.send(Event::Started { cached });
        Ok(Sequence {
            id,
            job,
            cache,
            sampler,
            text,
            next: [0],
            generated: 0,
            cached,
            reserved: 0,
            context,
            held: Vec::new(),
            segment: segments,
            parent,
            arrived,
            first_token: None,
            last_token: arrived,
            failed: false,
        })
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn request(&self) -> &str {
        &self.job.request
    }

    /// Tokens that were drawn.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Seconds from arrival to the first token.
    pub fn first_token_seconds(&self) -> Option<f64> {
        Some(self.first_token?.duration_since(self.arrived).as_secs_f64())
    }

    /// Seconds since arrival.
    pub fn seconds(&self) -> f64 {
        self.arrived.elapsed().as_secs_f64()
    }

    /// Prompt tokens, and how many of them came from shared blocks.
    pub fn prompt(&self) -> (usize, usize) {
        (self.job.prompt.len(), self.cached)
    }

    /// Whether it ended with an error.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// The request's name, for logs.
    pub fn name(&self) -> &str {
        &self.job.request
    }

    pub(super) fn is_gone(&self) -> bool {
        self.job.events.is_closed()
    }

    pub(super) fn fail(self, failure: Failure) {
        let _ = self.job.events.send(Event::Failed(failure));
    }

    /// Whether the prompt is done.
    pub(super) fn answers(&self) -> bool {
        self.generated > 0
    }

    /// Tokens of the prompt that were run, of all.
    pub(super) fn prompt_done(&self) -> (usize, usize) {
        (self.cache.len(), self.job.prompt.len())
    }

    /// Whether the last token of the prompt needs logits.
    pub(super) fn wants_answer(&self) -> bool {
        self.job.max_tokens > 0
    }

    pub(super) fn step(&mut self, turn: Turn) -> Step<'_> {
        let at = self.cache.len();
        let tokens = if turn.decode { &self.next[..] } else { &self.job.prompt[at..at + turn.tokens] };
        Step { tokens, cache: &mut self.cache, logits: turn.wanted() }
    }

    /// Takes the outcome of a pass; true when the sequence is over.
    pub(super) fn advance(
        &mut self,
        turn: Turn,
        result: Result<Cow<'_, [f32]>, Failure>,
        tokenizer: &Tokenizer,
    ) -> bool {
        let drawn = result.and_then(|logits| {
            if !turn.logits {
                return Ok(None);
            }
            let id = self.sampler.sample(&logits).map_err(|e| Failure::Model(e.to_string()))?;
            Ok(Some((id, self.job.logprobs.map(|n| logprobs(&logits, id, n)))))
        });
        match drawn {
            Ok(None) if self.cache.len() == self.job.prompt.len() && !self.wants_answer() => {
                let _ = self.job.events.send(Event::Read(Box::new(self.cache.fork())));
                true
            }
            Ok(None) => false,
            Ok(Some((id, logprobs))) => self.accept(id, logprobs, tokenizer),
            Err(failure) => {
                self.failed = true;
                tracing::error!(request = self.job.request, error = %failure, "the sequence failed");
                let _ = self.job.events.send(Event::Failed(failure));
                true
            }
        }
    }

    fn accept(&mut self, id: u32, logprobs: Option<kvquant_model::sampling::Logprobs>, tokenizer: &Tokenizer) -> bool {
        self.generated += 1;
        self.next = [id];
        self.last_token = Instant::now();
        self.first_token.get_or_insert(self.last_token);
        let stop = if tokenizer.end_of_turn().contains(&id) {
            Some(StopReason::EndOfTurn)
        } else {
            if let Some(logprobs) = logprobs {
                self.held.push(TokenInfo { id, logprobs });
            }
            if self.text.push(tokenizer.token_bytes(id)) {
                Some(StopReason::StopString)
            } else if self.generated >= self.job.max_tokens {
                Some(StopReason::MaxTokens)
            } else if self.cache.len() >= self.context {
                Some(StopReason::ContextFull)
            } else {
                None
            }
        };
        let text = self.text.ready(stop.is_some()).to_owned();
        if !text.is_empty() || (stop.is_some() && !self.held.is_empty()) {
            // Whether somebody listens is asked before each pass.
            let _ = self.job.events.send(Event::Text { text, tokens: std::mem::take(&mut self.held) });
        }
        if let Some(reason) = stop {
            let usage = Usage { prompt: self.job.prompt.len(), cached: self.cached, completion: self.generated };
            let _ = self.job.events.send(Event::Done { reason, usage });
        }
        stop.is_some()
    }

    /// The next whole block of the prompt, with its key and the key of what lies before.
    pub(super) fn next_segment(&self) -> Option<(Key, Key, Segment)> {
        let (from, to) = (self.cache.segment_tokens(self.segment), self.cache.segment_tokens(self.segment + 1));
        let tokens = self.job.prompt.get(from..to)?;
        let segment = self.cache.segment(self.segment)?;
        Some((key(&self.parent, tokens), self.parent, segment))
    }

    pub(super) fn segment_kept(&mut self, key: Key) {
        self.parent = key;
        self.segment += 1;
    }

    /// Bytes of blocks that nobody else holds.
    pub(super) fn own_bytes(&self) -> usize {
        self.cache.bytes().total().saturating_sub(self.cache.shared_bytes())
    }

    pub(super) fn stats(&self) -> SequenceStats {
        let decode = self.first_token.map_or(0.0, |first| self.last_token.duration_since(first).as_secs_f64());
        // One holder is the sequence, another the store.
        let mark = |holders: usize| match holders {
            0 | 1 => 'o',
            2 => 'k',
            _ => 's',
        };
        SequenceStats {
            id: self.job.request.clone(),
            tokens: self.cache.len(),
            prompt_tokens: self.job.prompt.len(),
            cached_tokens: self.cached,
            generated_tokens: self.generated,
            tokens_per_second: if decode > 0.0 { (self.generated - 1) as f64 / decode } else { 0.0 },
            bytes: self.cache.bytes().total(),
            shared_bytes: self.cache.shared_bytes(),
            blocks: self.cache.holders().into_iter().map(mark).collect(),
        }
    }
}
