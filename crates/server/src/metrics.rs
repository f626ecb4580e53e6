//! Figures for Prometheus.

use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

use crate::engine::Sequence;
use crate::stats::Stats;

/// All figures.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Answers by path and status.
    pub requests: IntCounterVec,
    /// Clients that went away.
    pub cancelled: IntCounter,
    failed: IntCounter,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    run_tokens: IntCounter,
    generated_tokens: IntCounter,
    queue: Histogram,
    first_token: Histogram,
    a_token: Histogram,
    pass: Histogram,
    batch: Histogram,
    running: IntGauge,
    waiting: IntGauge,
    kv_bytes: IntGauge,
    kv_budget: IntGauge,
    kv_reserved: IntGauge,
    prefix_bytes: IntGauge,
    prefix_segments: IntGauge,
    evicted: IntGauge,
    resident: IntGauge,
}

impl Metrics {
    /// New figures, all 0.
    ///
    /// # Errors
    /// Two of them have one name.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| {
            let c = IntCounter::new(format!("kvquant_{name}"), help)?;
            registry.register(Box::new(c.clone()))?;
            Ok::<_, prometheus::Error>(c)
        };
        let gauge = |name: &str, help: &str| {
            let g = IntGauge::new(name, help)?;
            registry.register(Box::new(g.clone()))?;
            Ok::<_, prometheus::Error>(g)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let h =
                Histogram::with_opts(HistogramOpts::new(format!("kvquant_{name}"), help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(h.clone()))?;
            Ok::<_, prometheus::Error>(h)
        };
        let requests = IntCounterVec::new(
            Opts::new("kvquant_http_requests_total", "Answers by path and status"),
            &["path", "status"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        let seconds = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
        let figures = Metrics {
            requests,
            cancelled: counter("cancelled_total", "Requests whose client went away")?,
            failed: counter("failed_total", "Requests that the model failed")?,
            prompt_tokens: counter("prompt_tokens_total", "Tokens of admitted prompts")?,
            cached_tokens: counter("cached_tokens_total", "Of these, from shared blocks")?,
            run_tokens: counter("prefill_tokens_total", "Prompt tokens that were run")?,
            generated_tokens: counter("generated_tokens_total", "Tokens that were drawn")?,
            queue: histogram("queue_seconds", "From arrival to admission", &seconds)?,
            first_token: histogram("first_token_seconds", "From arrival to the first token", &seconds)?,
            a_token: histogram("token_seconds", "Mean time of a token after the first, by request", &seconds)?,
            pass: histogram("pass_seconds", "A pass over the weights", &seconds)?,
            batch: histogram(
                "batch_sequences",
                "Sequences that decode in a pass",
                &[0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
            )?,
            running: gauge("kvquant_running", "Sequences that run")?,
            waiting: gauge("kvquant_waiting", "Requests that wait")?,
            kv_bytes: gauge("kvquant_kv_bytes", "Bytes of all caches, shared blocks once")?,
            kv_budget: gauge("kvquant_kv_budget_bytes", "Bytes that caches may take")?,
            kv_reserved: gauge("kvquant_kv_reserved_bytes", "Bytes that running sequences may still need")?,
            prefix_bytes: gauge("kvquant_prefix_bytes", "Bytes of blocks that are kept for later requests")?,
            prefix_segments: gauge("kvquant_prefix_blocks", "Blocks that are kept for later requests")?,
            evicted: gauge("kvquant_prefix_evicted", "Blocks that were let go since the start")?,
            resident: gauge("process_resident_memory_bytes", "Resident memory of the process")?,
            registry: Registry::new(),
        };
        Ok(Metrics { registry, ..figures })
    }

    pub(crate) fn admitted(&self, queued: f64, prompt: usize, cached: usize) {
        self.queue.observe(queued);
        self.prompt_tokens.inc_by(prompt as u64);
        self.cached_tokens.inc_by(cached as u64);
    }

    pub(crate) fn pass(&self, seconds: f64, prompt: usize, decode: usize) {
        self.pass.observe(seconds);
        self.batch.observe(decode as f64);
        self.run_tokens.inc_by(prompt as u64);
        self.generated_tokens.inc_by(decode as u64);
    }

    pub(crate) fn finished(&self, f: &Sequence) {
        if f.failed() {
            self.failed.inc();
        }
        let Some(first) = f.first_token_seconds() else { return };
        self.first_token.observe(first);
        if f.generated() > 1 {
            self.a_token.observe((f.seconds() - first) / (f.generated() - 1) as f64);
        }
        let (prompt, cached) = f.prompt();
        let (generated, seconds) = (f.generated(), f.seconds());
        tracing::info!(request = f.name(), prompt, cached, generated, first_token = first, seconds, "finished");
    }

    pub(crate) fn show(&self, s: &Stats, evicted: u64) {
        for (gauge, value) in [
            (&self.running, s.sequences.len()),
            (&self.waiting, s.waiting),
            (&self.kv_bytes, s.kv_bytes),
            (&self.kv_budget, s.kv_budget_bytes),
            (&self.kv_reserved, s.kv_reserved_bytes),
            (&self.prefix_bytes, s.prefix_bytes),
            (&self.prefix_segments, s.prefix_segments),
            (&self.evicted, evicted as usize),
        ] {
            gauge.set(value as i64);
        }
    }

    /// The text that Prometheus reads.
    ///
    /// # Errors
    /// A figure can't be written as text.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        if let Some(bytes) = resident_bytes() {
            self.resident.set(bytes as i64);
        }
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut out)?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }
}

/// Resident memory of this process, where the system tells.
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kb| kb * 1024)
}
