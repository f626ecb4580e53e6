//! Prompt in chunks, then token by token, with stop strings.
use crate::{Model, Tokenizer, ForwardError, sampling::Sampler};
use kvquant_cache::{Cache, Prefill};
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub enum StopReason { EndOfTurn, StopString, MaxTokens, ContextFull, Cancelled }
#[derive(Debug, Clone)] pub struct GenerateOptions { pub max_tokens: usize, pub stop: Vec<String>, pub prefill_chunk: usize, pub prefill: Prefill, pub context: usize }
#[derive(Debug, Clone)] pub struct Outcome { pub text: String, pub tokens: Vec<u32>, pub stop: StopReason, pub prompt_tokens: usize, pub prefill_seconds: f64, pub decode_seconds: f64 }
/// What the caller sees while it runs.
pub enum Event<'a> { Prefill { done: usize, total: usize }, Text(&'a str) }
/// `on_event` returns false to cancel.
pub fn generate(_model: &Model, _tokenizer: &Tokenizer, _cache: &mut Cache, _prompt: &[u32], _sampler: &mut Sampler, _options: &GenerateOptions, _on_event: &mut dyn FnMut(Event<'_>) -> bool) -> Result<Outcome, ForwardError> { todo!() }
