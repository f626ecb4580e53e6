//! The thread that computes.
//!
//! Each pass over the weights takes one token of every sequence that answers, and one chunk of a prompt (or several
//! short prompts): a long prompt slows the other streams, it does not stop them. Prompts take turns.
//!
//! Chunks end at fixed positions, so that a block's content depends on its tokens alone and not on who asked before: an
//! answer on shared blocks is the answer on fresh ones. Blocks of generated tokens are not shared; they were computed
//! token by token, and a prompt with the same text would hold others.
//!
//! A sequence is admitted when all that it may come to need fits the budget, first come, first served. So a sequence that
//! runs is never ended for another one.

mod admit;
mod command;
mod sequence;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use kvquant_cache::{Cache, Prefill, SessionIdentity};
use kvquant_kernels::threads;
use kvquant_model::{ForwardError, Logits, Model, Step, Tokenizer, Workspace};
use kvquant_quant::pack::BLOCK_TOKENS;

use crate::metrics::Metrics;
use crate::prefixes::{Key, Prefixes, root};
use crate::sessions::Sessions;
use crate::stats::{SequenceStats, Stats};
use command::{Command, Shared};
pub use command::{Engine, Event, Failure, Job, Refused, TokenInfo, Usage};
pub use sequence::Sequence;
use sequence::Turn;

/// A model that is ready to be served.
#[derive(Debug)]
pub struct Served {
    /// The model.
    pub model: Arc<Model>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// An empty cache of the kind that every sequence gets.
    pub empty: Cache,
    /// Hashes of weights and quantizer, and the spec.
    pub identity: SessionIdentity,
}

impl Served {
    /// The key of an empty text in this kind of cache.
    pub fn root(&self) -> Key {
        let id = &self.identity;
        root(&[id.weights_sha256.as_bytes(), id.quantizer_sha256.as_bytes(), id.spec.as_bytes()])
    }
}

/// Bounds of the engine.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Positions of a sequence.
    pub context: usize,
    /// Bytes of all caches.
    pub kv_memory: usize,
    /// Sequences that run at a time.
    pub max_sequences: usize,
    /// Requests that wait at a time.
    pub max_queue: usize,
    /// How long a request waits at most.
    pub queue_time: Duration,
    /// Prompt tokens of a pass, a multiple of 64.
    pub prefill_chunk: usize,
}

/// How often the picture of the cache is renewed at most.
const STATS_EVERY: Duration = Duration::from_millis(100);
/// How often a queue without runners is looked at.
const IDLE: Duration = Duration::from_millis(20);

struct Worker {
    served: Served,
    limits: Limits,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    waiting: VecDeque<(Job, Instant)>,
    running: Vec<Sequence>,
    work: Workspace,
    prefixes: Prefixes,
    root: Key,
    sessions: Option<Arc<Sessions>>,
    /// The sequence whose prompt got the last chunk.
    turn: u64,
    next_id: u64,
    stats_at: Option<Instant>,
    stopped: bool,
}

/// Starts the thread.
///
/// # Errors
/// The system gives no thread.
pub fn start(
    served: Served,
    limits: Limits,
    metrics: Arc<Metrics>,
    sessions: Option<Arc<Sessions>>,
) -> std::io::Result<(Engine, std::thread::JoinHandle<()>)> {
    let (sender, commands) = std::sync::mpsc::channel();
    let engine = Engine::new(sender, &served, &limits, metrics);
    let shared = engine.shared();
    let worker = Worker {
        root: served.root(),
        sessions,
        served,
        limits,
        commands,
        shared,
        waiting: VecDeque::new(),
        running: Vec::new(),
        work: Workspace::new(),
        prefixes: Prefixes::default(),
        turn: 0,
        next_id: 1,
        stats_at: None,
        stopped: false,
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || worker.run())?;
    Ok((engine, thread))
}

impl Worker {
    fn run(mut self) {
        while self.listen() {
            self.forget_gone();
            self.admit();
            self.pass();
            self.show();
        }
        for s in self.running.drain(..) {
            s.fail(Failure::Stopping);
        }
        for (job, _) in self.waiting.drain(..) {
            // Nobody listens: nothing is lost.
            let _ = job.events.send(Event::Failed(Failure::Stopping));
        }
    }

    /// Takes commands; waits for one when there is nothing to do. False when the engine shall end.
    fn listen(&mut self) -> bool {
        loop {
            let busy = !self.running.is_empty();
            let next = if busy {
                self.commands.try_recv()
            } else {
                self.stats_at = None;
                self.show();
                let wait = if self.waiting.is_empty() { Duration::from_secs(3600) } else { IDLE };
                self.commands.recv_timeout(wait).map_err(|e| match e {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                })
            };
            match next {
                Ok(Command::Run(job)) => self.waiting.push_back((*job, Instant::now())),
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => self.stopped = true,
                Err(TryRecvError::Empty) => return !self.stopped,
            }
            if self.stopped {
                return false;
            }
            if !busy && !self.waiting.is_empty() {
                // Others that came at the same time.
                while let Ok(Command::Run(job)) = self.commands.try_recv() {
                    self.waiting.push_back((*job, Instant::now()));
                }
                return true;
            }
        }
    }

    /// Frees what belongs to clients that went away, and refuses those that waited too long.
    fn forget_gone(&mut self) {
        let metrics = &self.shared.metrics;
        self.running.retain(|s| {
            let gone = s.is_gone();
            if gone {
                metrics.cancelled.inc();
                tracing::info!(request = s.request(), generated = s.generated(), "client went away");
            }
            !gone
        });
        let limit = self.limits.queue_time;
        self.waiting.retain(|(job, since)| {
            if job.events.is_closed() {
                metrics.cancelled.inc();
                return false;
            }
            let late = since.elapsed() > limit;
            if late {
                let _ = job.events.send(Event::Failed(Failure::QueueTime(limit)));
            }
            !late
        });
        self.shared.waiting.store(self.waiting.len(), Ordering::Relaxed);
    }

    /// One pass over the weights.
    fn pass(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let turns = self.turns();
        let started = Instant::now();
        let mut work = std::mem::take(&mut self.work);
        let done = forward(&self.served.model, &mut work, &mut self.running, &turns);
        let results = match done {
            Ok(logits) => split(&turns, logits, self.served.model.config.vocab),
            Err(e) if turns.iter().flatten().count() > 1 => {
                // One of them is at fault: alone, the others go on.
                tracing::warn!(error = %e, "a pass failed; its sequences are run one by one");
                self.one_by_one(&turns)
            }
            Err(e) => turns.iter().map(|t| t.map(|_| Err(Failure::Model(e.to_string())))).collect(),
        };
        let tokenizer = &*self.served.tokenizer;
        let mut over = vec![false; self.running.len()];
        let sequences = self.running.iter_mut().zip(&turns).zip(results).zip(&mut over);
        let mut advances: Vec<_> = sequences
            .filter_map(|(((sequence, turn), result), over)| Some((sequence, (*turn)?, Some(result?), over)))
            .collect();
        threads::for_each_mut(&mut advances, |_, (sequence, turn, result, over)| {
            **over = result.take().is_some_and(|result| sequence.advance(*turn, result, tokenizer));
        });
        self.work = work;
        let metrics = self.shared.metrics.clone();
        let prompt: usize = turns.iter().flatten().map(|t| if t.decode { 0 } else { t.tokens }).sum();
        let decode = turns.iter().flatten().filter(|t| t.decode).count();
        metrics.pass(started.elapsed().as_secs_f64(), prompt, decode);
        for i in 0..self.running.len() {
            self.keep(i);
        }
        let mut over = over.into_iter();
        let ended: Vec<Sequence> = self.running.extract_if(.., |_| over.next().unwrap_or(false)).collect();
        ended.iter().for_each(|s| metrics.finished(s));
    }

    /// Which sequence runs how many tokens: one of each that answers; prompts in turn, up to a chunk in all.
    fn turns(&mut self) -> Vec<Option<Turn>> {
        let chunk = self.limits.prefill_chunk;
        let sinks = self.served.empty.segment_tokens(1);
        let mut turns: Vec<Option<Turn>> = self
            .running
            .iter()
            .map(|s| s.answers().then_some(Turn { tokens: 1, decode: true, logits: true }))
            .collect();
        let n = self.running.len();
        let after = self.running.iter().position(|s| s.id() > self.turn).unwrap_or(0);
        let mut left = chunk + sinks;
        for i in (0..n).map(|i| (after + i) % n) {
            let s = &self.running[i];
            if turns[i].is_some() {
                continue;
            }
            let (done, total) = s.prompt_done();
            // To the next fixed position.
            let end = if done < sinks { sinks + chunk } else { sinks + ((done - sinks) / chunk + 1) * chunk };
            let tokens = end.min(total) - done;
            if tokens > left {
                break;
            }
            left -= tokens;
            turns[i] = Some(Turn { tokens, decode: false, logits: done + tokens == total && s.wants_answer() });
            self.turn = s.id();
        }
        turns
    }

    fn one_by_one(&mut self, turns: &[Option<Turn>]) -> Vec<Option<Result<Cow<'static, [f32]>, Failure>>> {
        let model = &self.served.model;
        let alone = self.running.iter_mut().zip(turns).map(|(s, turn)| {
            let turn = (*turn)?;
            let mut step = [s.step(turn)];
            Some(model.forward(&mut step, Prefill::Exact).map(Cow::Owned).map_err(|e| Failure::Model(e.to_string())))
        });
        alone.collect()
    }

    /// Keeps the whole blocks of a sequence's prompt for others.
    fn keep(&mut self, i: usize) {
        while let Some((key, parent, segment)) = self.running[i].next_segment() {
            if self.prefixes.get(&key).is_none() {
                let freed = segment.bytes().min(self.running[i].reserved);
                let reserved: usize = self.running.iter().map(|s| s.reserved).sum();
                let used = self.prefixes.bytes() + reserved + segment.bytes() - freed;
                let missing = used.saturating_sub(self.limits.kv_memory);
                if missing > 0 && self.prefixes.evict(missing) < missing {
                    return;
                }
                self.prefixes.insert(key, parent, segment);
                self.running[i].reserved -= freed;
            }
            self.running[i].segment_kept(key);
        }
    }

    /// Renews the picture of the cache.
    fn show(&mut self) {
        if self.stats_at.is_some_and(|at| at.elapsed() < STATS_EVERY) {
            return;
        }
        self.stats_at = Some(Instant::now());
        let sequences: Vec<SequenceStats> = self.running.iter().map(Sequence::stats).collect();
        let own: usize = self.running.iter().map(Sequence::own_bytes).sum();
        let shape = self.served.empty.shape();
        let fp16_token_bytes = 4 * shape.layers * shape.channels();
        let (idle, idle_bytes) = self.prefixes.idle();
        // What an fp16 cache would hold that shares nothing: all sequences, and what is kept beside them.
        let tokens = sequences.iter().map(|s| s.tokens).sum::<usize>() + idle * BLOCK_TOKENS;
        let stats = Stats {
            spec: self.served.empty.spec().to_string(),
            context: self.limits.context,
            block_tokens: BLOCK_TOKENS,
            kv_budget_bytes: self.limits.kv_memory,
            kv_bytes: own + self.prefixes.bytes(),
            kv_reserved_bytes: self.running.iter().map(|s| s.reserved).sum(),
            fp16_token_bytes,
            prefix_segments: self.prefixes.len(),
            prefix_bytes: self.prefixes.bytes(),
            prefix_idle_bytes: idle_bytes,
            fp16_bytes: tokens * fp16_token_bytes,
            waiting: self.waiting.len(),
            sequences,
        };
        self.shared.metrics.show(&stats, self.prefixes.evicted());
        self.shared.set_stats(stats);
    }
}

fn forward<'w>(
    model: &Model,
    work: &'w mut Workspace,
    running: &mut [Sequence],
    turns: &[Option<Turn>],
) -> Result<&'w [f32], ForwardError> {
    let mut steps: Vec<Step<'_>> =
        running.iter_mut().zip(turns).filter_map(|(s, turn)| turn.map(|turn| s.step(turn))).collect();
    model.forward_in(work, &mut steps, Prefill::Exact)
}

/// The logits of each sequence that asked for them.
fn split<'l>(turns: &[Option<Turn>], logits: &'l [f32], vocab: usize) -> Vec<Option<Result<Cow<'l, [f32]>, Failure>>> {
    let mut rows = logits.chunks_exact(vocab);
    let mut of = |t: Turn| if t.logits { rows.next().unwrap_or_default() } else { &[] };
    turns.iter().map(|t| t.map(|t| Ok(Cow::Borrowed(of(t))))).collect()
}

impl Turn {
    fn wanted(self) -> Logits {
        if self.logits { Logits::Last } else { Logits::None }
    }
}
