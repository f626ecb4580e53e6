//! What a forward pass works in: buffers that are kept from pass to pass, and, where asked for, a clock.

use std::time::{Duration, Instant};

/// A part of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Rows of the embedding.
    Embed,
    /// Norms, biases, residual sums.
    Norms,
    /// Projections to queries, keys and values.
    Qkv,
    /// Keys and values into the cache, and attention over it.
    Cache,
    /// The projection of the attention's output.
    Output,
    /// The MLP's first two matrices.
    GateUp,
    /// Its activation.
    Gate,
    /// Its last matrix.
    Down,
    /// Logits.
    Head,
}

impl Stage {
    /// All, in order.
    pub const ALL: [Stage; 9] = [
        Stage::Embed,
        Stage::Norms,
        Stage::Qkv,
        Stage::Cache,
        Stage::Output,
        Stage::GateUp,
        Stage::Gate,
        Stage::Down,
        Stage::Head,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Embed => "embedding",
            Stage::Norms => "norms, residuals",
            Stage::Qkv => "q, k, v",
            Stage::Cache => "cache: store, attend",
            Stage::Output => "attention output",
            Stage::GateUp => "gate, up",
            Stage::Gate => "activation",
            Stage::Down => "down",
            Stage::Head => "head",
        }
    }
}

/// Wall time by stage.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    since: Instant,
    times: [Duration; Stage::ALL.len()],
}

/// Buffers of forward passes. One for each that run at the same time; a pass allocates only what is larger than in
/// all before it.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(crate) x: Vec<f32>,
    pub(crate) normed: Vec<f32>,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    pub(crate) attended: Vec<f32>,
    pub(crate) gate: Vec<f32>,
    pub(crate) up: Vec<f32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) clock: Option<Clock>,
}

impl Workspace {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Measures passes from now on.
    pub fn with_clock() -> Self {
        let clock = Clock { since: Instant::now(), times: Default::default() };
        Workspace { clock: Some(clock), ..Self::default() }
    }

    /// Wall time of each stage since the last call, over all passes; zeros without a clock.
    pub fn take_times(&mut self) -> [(Stage, Duration); Stage::ALL.len()] {
        let times = self.clock.as_mut().map(|c| std::mem::take(&mut c.times)).unwrap_or_default();
        std::array::from_fn(|i| (Stage::ALL[i], times[i]))
    }

    /// The logits of the last pass: `[rows asked for, vocab]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Starts the clock's next stage.
    pub(crate) fn start(&mut self) {
        if let Some(clock) = &mut self.clock {
            clock.since = Instant::now();
        }
    }

    /// Ends a stage, and starts the next.
    pub(crate) fn lap(&mut self, stage: Stage) {
        if let Some(clock) = &mut self.clock {
            let now = Instant::now();
            clock.times[stage as usize] += now - clock.since;
            clock.since = now;
        }
    }

    /// Room for `rows` rows: what is in it is left over from before.
    pub(crate) fn resize(&mut self, rows: usize, hidden: usize, wide: usize, narrow: usize, mlp: usize) {
        for (buffer, width) in [
            (&mut self.x, hidden),
            (&mut self.normed, hidden),
            (&mut self.q, wide),
            (&mut self.k, narrow),
            (&mut self.v, narrow),
            (&mut self.attended, wide),
            (&mut self.gate, mlp),
            (&mut self.up, mlp),
        ] {
            buffer.resize(rows * width, 0.0);
        }
    }
}
