//! A prompt in chunks, then token by token, streamed as text.

use std::time::Instant;

use kvquant_cache::{Cache, Prefill};

use crate::forward::{ForwardError, Logits, Model};
use crate::sampling::Sampler;
use crate::sequence::{OnCpu, Sequence};
use crate::stream::TextStream;
use crate::tokenizer::Tokenizer;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model ended it.
    EndOfTurn,
    /// A stop string came.
    StopString,
    /// The limit of new tokens.
    MaxTokens,
    /// No position is left.
    ContextFull,
    /// The caller asked to stop.
    Cancelled,
}

/// Limits and ways of a generation.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// New tokens at most.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Prompt tokens of one forward pass.
    pub prefill_chunk: usize,
    /// How a prompt's tokens see each other.
    pub prefill: Prefill,
    /// Positions at most; the model's context is another limit.
    pub context: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_tokens: 512,
            stop: Vec::new(),
            prefill_chunk: 512,
            prefill: Prefill::Exact,
            context: usize::MAX,
        }
    }
}

/// A finished answer.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its text, without what ended it.
    pub text: String,
    /// Its tokens. The last one was not run, so it is not in the cache.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time for the prompt.
    pub prefill_seconds: f64,
    /// Time for the tokens after the first.
    pub decode_seconds: f64,
}

/// What the caller sees while it runs.
#[derive(Debug)]
pub enum Event<'a> {
    /// Prompt tokens done.
    Prefill {
        /// So far.
        done: usize,
        /// Of.
        total: usize,
    },
    /// More text of the answer.
    Text(&'a str),
}

/// Runs `prompt` after what `cache` holds and generates an answer. `on_event` returns false to cancel; the answer so
/// far is returned then.
///
/// # Errors
/// The prompt is empty or too long, or the model failed. The cache keeps the prompt's chunks that were done.
pub fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    cache: &mut Cache,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    on_event: &mut dyn FnMut(Event<'_>) -> bool,
) -> Result<Outcome, ForwardError> {
    generate_on(&mut OnCpu::new(model, cache), tokenizer, prompt, sampler, options, on_event)
}

/// [`generate`] after the history of any sequence.
///
/// # Errors
/// As [`generate`].
pub fn generate_on(
    sequence: &mut dyn Sequence,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    on_event: &mut dyn FnMut(Event<'_>) -> bool,
) -> Result<Outcome, ForwardError> {
    let context = options.context.min(sequence.context());
    if prompt.is_empty() {
        return Err(ForwardError::Empty);
    }
    if sequence.len() + prompt.len() > context {
        return Err(ForwardError::ContextFull { stored: sequence.len(), new: prompt.len(), context });
    }
    let start = Instant::now();
    let mut outcome = Outcome {
        text: String::new(),
        tokens: Vec::new(),
        stop: StopReason::Cancelled,
        prompt_tokens: prompt.len(),
        prefill_seconds: 0.0,
        decode_seconds: 0.0,
    };
    let mut done = 0;
    for chunk in prompt.chunks(options.prefill_chunk.max(1)) {
        let last = done + chunk.len() == prompt.len();
        let wanted = if last { Logits::Last } else { Logits::None };
        sequence.run(chunk, wanted, options.prefill)?;
        done += chunk.len();
        if !on_event(Event::Prefill { done, total: prompt.len() }) {
            outcome.prefill_seconds = start.elapsed().as_secs_f64();
            return Ok(outcome);
        }
    }
    outcome.prefill_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut stream = TextStream::new(options.stop.clone());
    outcome.stop = loop {
        if outcome.tokens.len() == options.max_tokens {
            break StopReason::MaxTokens;
        }
        let id = sampler.sample(sequence.logits())?;
        outcome.tokens.push(id);
        if tokenizer.end_of_turn().contains(&id) {
            break StopReason::EndOfTurn;
        }
        if stream.push(tokenizer.token_bytes(id)) {
            break StopReason::StopString;
        }
        let ready = stream.ready(false);
        if !on_event(Event::Text(ready)) {
            break StopReason::Cancelled;
        }
        if outcome.tokens.len() == options.max_tokens {
            break StopReason::MaxTokens;
        }
        if sequence.len() >= context {
            break StopReason::ContextFull;
        }
        sequence.run(&[id], Logits::Last, options.prefill)?;
    };
    let rest = stream.ready(true);
    if !rest.is_empty() {
        on_event(Event::Text(rest));
    }
    outcome.decode_seconds = start.elapsed().as_secs_f64();
    outcome.text = stream.into_text();
    Ok(outcome)
}
