//! A prompt in chunks, then token by token, streamed as text.

use std::time::Instant;

use kvquant_cache::{Cache, Prefill};

use crate::forward::{ForwardError, Logits, Model, Step};
use crate::sampling::Sampler;
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

/// Bytes to text: holds back an unfinished character and what may become a stop string.
struct Stream<'a> {
    stop: &'a [String],
    bytes: Vec<u8>,
    text: String,
    sent: usize,
}

impl Stream<'_> {
    /// Adds a token's bytes; returns whether a stop string is complete.
    fn push(&mut self, bytes: &[u8]) -> bool {
        self.bytes.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.bytes) {
            Ok(_) => self.bytes.len(),
            Err(e) if e.error_len().is_none() => e.valid_up_to(),
            // Bytes that can't become a character are replaced.
            Err(_) => self.bytes.len(),
        };
        let fresh: Vec<u8> = self.bytes.drain(..whole).collect();
        self.text.push_str(&String::from_utf8_lossy(&fresh));
        let end =
            self.stop.iter().filter(|s| !s.is_empty()).filter_map(|s| self.text[self.sent..].find(s.as_str())).min();
        if let Some(end) = end {
            self.text.truncate(self.sent + end);
        }
        end.is_some()
    }

    /// Text that is ready to be shown.
    fn ready(&mut self, all: bool) -> &str {
        let held = if all {
            0
        } else {
            let tail = &self.text[self.sent..];
            let starts = |s: &String| (1..s.len()).rev().find(|&n| s.is_char_boundary(n) && tail.ends_with(&s[..n]));
            self.stop.iter().filter_map(starts).max().unwrap_or(0)
        };
        let (from, to) = (self.sent, self.text.len() - held);
        self.sent = to.max(from);
        &self.text[from..self.sent]
    }
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
    let context = options.context.min(model.config.context);
    if prompt.is_empty() {
        return Err(ForwardError::Empty);
    }
    if cache.len() + prompt.len() > context {
        return Err(ForwardError::ContextFull { stored: cache.len(), new: prompt.len(), context });
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
    let mut logits = Vec::new();
    let mut done = 0;
    for chunk in prompt.chunks(options.prefill_chunk.max(1)) {
        let last = done + chunk.len() == prompt.len();
        let wanted = if last { Logits::Last } else { Logits::None };
        logits = model.forward(&mut [Step { tokens: chunk, cache, logits: wanted }], options.prefill)?;
        done += chunk.len();
        if !on_event(Event::Prefill { done, total: prompt.len() }) {
            outcome.prefill_seconds = start.elapsed().as_secs_f64();
            return Ok(outcome);
        }
    }
    outcome.prefill_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut stream = Stream { stop: &options.stop, bytes: Vec::new(), text: String::new(), sent: 0 };
    outcome.stop = loop {
        if outcome.tokens.len() == options.max_tokens {
            break StopReason::MaxTokens;
        }
        let id = sampler.sample(&logits)?;
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
        if cache.len() >= context {
            break StopReason::ContextFull;
        }
        logits = model.forward(&mut [Step { tokens: &[id], cache, logits: Logits::Last }], options.prefill)?;
    };
    let rest = stream.ready(true);
    if !rest.is_empty() {
        on_event(Event::Text(rest));
    }
    outcome.decode_seconds = start.elapsed().as_secs_f64();
    outcome.text = stream.text;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], pieces: &[&[u8]]) -> (String, Vec<String>, bool) {
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut s = Stream { stop: &stop, bytes: vec![], text: String::new(), sent: 0 };
        let mut shown = vec![];
        let mut stopped = false;
        for p in pieces {
            stopped = s.push(p);
            if stopped {
                break;
            }
            shown.push(s.ready(false).to_string());
        }
        shown.push(s.ready(true).to_string());
        (s.text, shown, stopped)
    }

    #[test]
    fn characters_come_whole_and_stop_strings_never_show() {
        let (text, shown, _) = run(&[], &[&[0xF0, 0x9F], &[0x99], &[0x82], b"!"]);
        assert_eq!((text.as_str(), shown), ("🙂!", vec!["".into(), "".into(), "🙂".into(), "!".into(), "".into()]));
        let (text, shown, stopped) = run(&["END", "E!"], &[b"a E", b"N", b"x E", b"ND z"]);
        assert!(stopped);
        assert_eq!(text, "a ENx ");
        assert_eq!(shown.concat(), "a ENx ");
        assert_eq!(shown[0], "a ");
        let (text, _, _) = run(&[], &[&[0xFF], b"a"]);
        assert_eq!(text, "\u{FFFD}a");
    }
}
