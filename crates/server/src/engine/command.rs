//! What goes to the engine and what comes back.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvquant_cache::Cache;
use kvquant_model::generate::StopReason;
use kvquant_model::sampling::{Logprobs, SamplingParams};
use tokio::sync::mpsc::UnboundedSender;

use super::{Limits, Served};
use crate::metrics::Metrics;
use crate::stats::Stats;

/// A request to the engine.
#[derive(Debug)]
pub struct Job {
    /// Names it in logs.
    pub request: String,
    /// Its tokens, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// New tokens at most; 0: only the prompt is run, and its cache comes back.
    pub max_tokens: usize,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Log probabilities of each token and of this many most likely ones.
    pub logprobs: Option<usize>,
    /// Where the answer goes. When the other end is dropped, the request is.
    pub events: UnboundedSender<Event>,
}

/// A token with its log probabilities.
#[derive(Debug, Clone)]
pub struct TokenInfo {
    /// The token.
    pub id: u32,
    /// Its own and those of the most likely ones.
    pub logprobs: Logprobs,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: usize,
    /// Of these, from shared blocks.
    pub cached: usize,
    /// Of the answer, the one that ended it included.
    pub completion: usize,
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Event {
    /// It has left the queue.
    Started {
        /// Prompt tokens from shared blocks.
        cached: usize,
    },
    /// More of the answer.
    Text {
        /// What can be shown.
        text: String,
        /// Its tokens, where log probabilities were asked for.
        tokens: Vec<TokenInfo>,
    },
    /// The end of a job without new tokens: the cache of its prompt.
    Read(Box<Cache>),
    /// The end.
    Done {
        /// Why.
        reason: StopReason,
        /// How much.
        usage: Usage,
    },
    /// The end, with an error.
    Failed(Failure),
}

/// A request was given up.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// The model or its cache failed.
    #[error("{0}")]
    Model(String),
    /// It waited too long.
    #[error("no memory came free within {} s; try again later, or ask for fewer tokens", .0.as_secs())]
    QueueTime(Duration),
    /// The server ends.
    #[error("the server is shutting down")]
    Stopping,
}

/// A job is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many wait.
    #[error("{waiting} requests are waiting already; try again later")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// It would not fit if it were alone.
    #[error(
        "{tokens} tokens need about {need} bytes of cache, more than the server's budget of {budget}; shorten the prompt or lower max_tokens"
    )]
    TooLarge {
        /// Prompt and answer.
        tokens: usize,
        /// Bytes.
        need: usize,
        /// Bytes.
        budget: usize,
    },
    /// The engine has ended.
    #[error("the server is shutting down")]
    Stopping,
}

pub(super) enum Command {
    Run(Box<Job>),
    Stop,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub metrics: Arc<Metrics>,
    pub waiting: AtomicUsize,
    stats: Mutex<Arc<Stats>>,
}

impl Shared {
    pub fn set_stats(&self, stats: Stats) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(stats);
    }
}

/// The way to the engine.
#[derive(Debug, Clone)]
pub struct Engine {
    sender: Sender<Command>,
    shared: Arc<Shared>,
    max_queue: usize,
    budget: usize,
    context: usize,
    /// For estimates.
    empty: Arc<Cache>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Command::Run(_)) { "Run" } else { "Stop" })
    }
}

impl Engine {
    pub(super) fn new(sender: Sender<Command>, served: &Served, limits: &Limits, metrics: Arc<Metrics>) -> Self {
        let shared =
            Arc::new(Shared { metrics, waiting: AtomicUsize::new(0), stats: Mutex::new(Arc::new(Stats::default())) });
        Engine {
            sender,
            shared,
            max_queue: limits.max_queue,
            budget: limits.kv_memory,
            context: limits.context,
            empty: Arc::new(served.empty.fresh()),
        }
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Hands over a job.
    ///
    /// # Errors
    /// It can never fit, too many wait, or the engine has ended.
    pub fn submit(&self, job: Job) -> Result<(), Refused> {
        let tokens = (job.prompt.len() + job.max_tokens).min(self.context);
        let need = self.empty.bytes_for(tokens);
        if need > self.budget {
            return Err(Refused::TooLarge { tokens, need, budget: self.budget });
        }
        // What was sent and not yet seen counts too.
        let waiting = self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        if waiting >= self.max_queue {
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(Refused::Busy { waiting });
        }
        self.sender.send(Command::Run(Box::new(job))).map_err(|_| Refused::Stopping)
    }

    /// Tokens of prompt and answer that the budget holds.
    pub fn most_tokens(&self) -> usize {
        let fits = |n: usize| self.empty.bytes_for(n) <= self.budget;
        let (mut low, mut high) = (0, self.context);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if fits(middle) { low = middle } else { high = middle - 1 }
        }
        low
    }

    /// The latest picture of the cache.
    pub fn stats(&self) -> Arc<Stats> {
        self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the engine after its pass; what runs gets [`Failure::Stopping`].
    pub fn stop(&self) {
        // It has ended already.
        let _ = self.sender.send(Command::Stop);
    }
}
