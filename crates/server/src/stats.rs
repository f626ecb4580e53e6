//! A picture of the cache, for the page and for whoever asks.

use serde::Serialize;

/// The engine at a moment.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stats {
    /// How caches are stored.
    pub spec: String,
    /// Positions of a sequence.
    pub context: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Bytes that all caches may take.
    pub kv_budget_bytes: usize,
    /// Bytes that they take, shared blocks once.
    pub kv_bytes: usize,
    /// Bytes that running sequences may still come to need.
    pub kv_reserved_bytes: usize,
    /// What an fp16 cache takes for a token.
    pub fp16_token_bytes: usize,
    /// What fp16 caches that share nothing would take for the same tokens.
    pub fp16_bytes: usize,
    /// Blocks that are kept for later requests.
    pub prefix_segments: usize,
    /// Their bytes.
    pub prefix_bytes: usize,
    /// Those of them that no sequence uses now.
    pub prefix_idle_bytes: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Requests that run.
    pub sequences: Vec<SequenceStats>,
}

/// A running sequence.
#[derive(Debug, Clone, Serialize)]
pub struct SequenceStats {
    /// The request.
    pub id: String,
    /// Tokens in its cache.
    pub tokens: usize,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Of these, from shared blocks.
    pub cached_tokens: usize,
    /// Tokens that were drawn.
    pub generated_tokens: usize,
    /// Since the first of them.
    pub tokens_per_second: f64,
    /// Bytes of its cache.
    pub bytes: usize,
    /// Of these, in blocks that others hold as well.
    pub shared_bytes: usize,
    /// A letter a block: `o` its own, `k` kept for later requests too, `s` shared with a request that runs.
    pub blocks: String,
}
