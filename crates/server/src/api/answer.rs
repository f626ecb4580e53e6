//! Answers, whole and in pieces.

use std::time::{SystemTime, UNIX_EPOCH};

use kvquant_model::Tokenizer;
use kvquant_model::generate::StopReason;
use serde_json::{Value, json};

use crate::engine::{TokenInfo, Usage};

/// Which endpoint answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

/// What is known of an answer from the start.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The endpoint.
    pub kind: Kind,
    /// The request's name.
    pub id: String,
    /// The model's name.
    pub model: String,
    /// Seconds since 1970.
    pub created: u64,
}

/// Why an answer ended, in OpenAI's words.
fn finish(reason: StopReason) -> &'static str {
    match reason {
        StopReason::EndOfTurn | StopReason::StopString | StopReason::Cancelled => "stop",
        StopReason::MaxTokens | StopReason::ContextFull => "length",
    }
}

fn usage(u: Usage) -> Value {
    json!({
        "prompt_tokens": u.prompt, "completion_tokens": u.completion, "total_tokens": u.prompt + u.completion,
        "prompt_tokens_details": { "cached_tokens": u.cached },
    })
}

impl Answer {
    /// An answer that begins now.
    pub fn new(kind: Kind, model: String) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        Answer { kind, id: format!("{prefix}-{:032x}", rand::random::<u128>()), model, created }
    }

    fn object(&self, object: &str, choices: Value) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    /// The whole answer.
    pub fn whole(
        &self,
        text: &str,
        tokens: Option<&[TokenInfo]>,
        reason: StopReason,
        u: Usage,
        tokenizer: &Tokenizer,
    ) -> Value {
        let (finish, logprobs) = (finish(reason), self.logprobs(tokens, 0, tokenizer));
        let (object, choice) = match self.kind {
            Kind::Chat => {
                let message = json!({ "role": "assistant", "content": text, "refusal": null });
                let choice = json!({
                    "index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish,
                });
                ("chat.completion", choice)
            }
            Kind::Completion => {
                let choice = json!({ "index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish });
                ("text_completion", choice)
            }
        };
        let mut all = self.object(object, json!([choice]));
        all["usage"] = usage(u);
        all
    }

    /// `offset`: characters of the answer before these tokens.
    fn logprobs(&self, tokens: Option<&[TokenInfo]>, offset: usize, tokenizer: &Tokenizer) -> Value {
        let Some(tokens) = tokens else { return Value::Null };
        let text = |id: u32| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
        let one = |id: u32, logprob: f32| json!({ "token": text(id), "logprob": logprob, "bytes": tokenizer.token_bytes(id) });
        match self.kind {
            Kind::Chat => {
                let each = tokens.iter().map(|t| {
                    let mut entry = one(t.id, t.logprobs.chosen);
                    entry["top_logprobs"] = t.logprobs.top.iter().map(|(id, p)| one(*id, *p)).collect();
                    entry
                });
                json!({ "content": each.collect::<Vec<_>>(), "refusal": null })
            }
            Kind::Completion => {
                let mut at = offset;
                let offsets: Vec<usize> = tokens
                    .iter()
                    .map(|t| {
                        let here = at;
                        at += text(t.id).chars().count();
                        here
                    })
                    .collect();
                let tops: Vec<Value> = tokens
                    .iter()
                    .map(|t| {
                        t.logprobs
                            .top
                            .iter()
                            .map(|(id, p)| (text(*id), json!(p)))
                            .collect::<serde_json::Map<_, _>>()
                            .into()
                    })
                    .collect();
                json!({
                    "tokens": tokens.iter().map(|t| text(t.id)).collect::<Vec<_>>(),
                    "token_logprobs": tokens.iter().map(|t| t.logprobs.chosen).collect::<Vec<_>>(),
                    "top_logprobs": tops,
                    "text_offset": offsets,
                })
            }
        }
    }
}

/// The pieces of a streamed answer.
#[derive(Debug)]
pub struct Chunks {
    answer: Answer,
    logprobs: bool,
    include_usage: bool,
    /// Characters so far.
    at: usize,
}

impl Chunks {
    /// Pieces of an answer; `include_usage`: the last one has the usage, and the others say that they have not.
    pub fn new(answer: Answer, logprobs: bool, include_usage: bool) -> Self {
        Chunks { answer, logprobs, include_usage, at: 0 }
    }

    fn chunk(&self, choices: Value) -> Value {
        let object = if self.answer.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut all = self.answer.object(object, choices);
        if self.include_usage {
            all["usage"] = Value::Null;
        }
        all
    }

    /// What comes before the text.
    pub fn first(&self) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        (self.answer.kind == Kind::Chat)
            .then(|| self.chunk(json!([{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": null }])))
    }

    /// More text.
    pub fn text(&mut self, text: &str, tokens: &[TokenInfo], tokenizer: &Tokenizer) -> Value {
        let logprobs = self.answer.logprobs(self.logprobs.then_some(tokens), self.at, tokenizer);
        self.at += text.chars().count();
        let choice = match self.answer.kind {
            Kind::Chat => {
                json!({ "index": 0, "delta": { "content": text }, "logprobs": logprobs, "finish_reason": null })
            }
            Kind::Completion => json!({ "index": 0, "text": text, "logprobs": logprobs, "finish_reason": null }),
        };
        self.chunk(json!([choice]))
    }

    /// The end, and after it the usage where it was asked for.
    pub fn last(&self, reason: StopReason, u: Usage) -> Vec<Value> {
        let finish = finish(reason);
        let choice = match self.answer.kind {
            Kind::Chat => json!({ "index": 0, "delta": {}, "logprobs": null, "finish_reason": finish }),
            Kind::Completion => json!({ "index": 0, "text": "", "logprobs": null, "finish_reason": finish }),
        };
        let mut all = vec![self.chunk(json!([choice]))];
        if self.include_usage {
            let mut end = self.chunk(json!([]));
            end["usage"] = usage(u);
            all.push(end);
        }
        all
    }
}
