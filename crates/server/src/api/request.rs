//! Requests, checked, and what they come to.

use kvquant_model::sampling::SamplingParams;
use kvquant_model::template::Message;
use rand::random;
use serde_json::Value;

use super::answer::Kind;
use super::body::{ChatMessage, ChatRequest, CompletionRequest, SessionRequest, StreamOptions, TokenizeRequest};
use super::error::ApiError;
use super::fields::{Prompt, Texts};

/// Most log probabilities of a token.
const MOST_LOGPROBS: i64 = 20;
/// Most stop strings, and the longest.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;
const MOST_MESSAGES: usize = 4096;

/// What the model shall read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A chat.
    Messages(Vec<Message>),
    /// A text to be continued.
    Text(String),
    /// Tokens to be continued.
    Tokens(Vec<i64>),
}

/// A request that was checked, except for what depends on the model.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Chat or completion.
    pub kind: Kind,
    /// The model that was asked for.
    pub model: String,
    /// The prompt.
    pub input: Input,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// New tokens at most, where the request says it.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Log probabilities of each token and of this many most likely ones.
    pub logprobs: Option<usize>,
    /// Whether the answer is streamed.
    pub stream: bool,
    /// Whether a stream ends with the usage.
    pub include_usage: bool,
}

/// What both kinds of request ask for.
struct Common<'a> {
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    frequency_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    seed: Option<i64>,
    n: Option<i64>,
    logit_bias: &'a Option<Value>,
}

impl Common<'_> {
    fn sampling(&self) -> Result<SamplingParams, ApiError> {
        let within = |name: &str, x: Option<f64>, default: f64, low: f64, high: f64| match x.unwrap_or(default) {
            x if (low..=high).contains(&x) => Ok(x as f32),
            x => Err(ApiError::invalid(name, format!("`{name}` is {x}; it must be from {low} to {high}"))),
        };
        if self.n.is_some_and(|n| n != 1) {
            return Err(ApiError::unsupported(
                "n",
                "`n` must be 1: send a request for each answer; a common prompt is shared",
            ));
        }
        if self.logit_bias.as_ref().is_some_and(|v| !is_empty(v)) {
            return Err(ApiError::unsupported("logit_bias", "`logit_bias` is not supported; leave it out"));
        }
        let top_p = within("top_p", self.top_p, 1.0, 0.0, 1.0)?;
        let top_k = self.top_k.unwrap_or(0);
        if !(-1..=1 << 24).contains(&top_k) {
            return Err(ApiError::invalid("top_k", format!("`top_k` is {top_k}; it must be from -1 to {}", 1 << 24)));
        }
        Ok(SamplingParams {
            temperature: within("temperature", self.temperature, 1.0, 0.0, 2.0)?,
            // A share of 0 leaves the most likely token.
            top_p: top_p.max(f32::MIN_POSITIVE),
            top_k: top_k.max(0) as usize,
            min_p: within("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            frequency_penalty: within("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            presence_penalty: within("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            seed: self.seed.map_or_else(random, |s| s as u64),
        })
    }
}

fn is_empty(v: &Value) -> bool {
    match v {
        Value::Null => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    }
}

fn stops(stop: Option<Texts>) -> Result<Vec<String>, ApiError> {
    let stop = stop.unwrap_or_default().0;
    if stop.len() > MOST_STOPS || stop.iter().any(|s| s.is_empty() || s.len() > LONGEST_STOP) {
        let says = format!("`stop` takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} bytes");
        return Err(ApiError::invalid("stop", says));
    }
    Ok(stop)
}

fn count(name: &str, x: Option<i64>) -> Result<Option<usize>, ApiError> {
    match x {
        Some(x) if x < 1 => Err(ApiError::invalid(name, format!("`{name}` is {x}; it must be at least 1"))),
        x => Ok(x.map(|x| usize::try_from(x).unwrap_or(usize::MAX))),
    }
}

fn streaming(stream: Option<bool>, options: Option<StreamOptions>) -> Result<(bool, bool), ApiError> {
    let stream = stream.unwrap_or(false);
    match options {
        Some(_) if !stream => {
            Err(ApiError::invalid("stream_options", "`stream_options` applies to `stream: true` only"))
        }
        Some(o) if o.include_obfuscation == Some(true) => Err(ApiError::unsupported(
            "stream_options.include_obfuscation",
            "`include_obfuscation` is not supported; leave it out",
        )),
        o => Ok((stream, o.and_then(|o| o.include_usage).unwrap_or(false))),
    }
}

fn chat(messages: Vec<ChatMessage>) -> Result<Input, ApiError> {
    if messages.is_empty() || messages.len() > MOST_MESSAGES {
        let says = format!("`messages` has {} entries; it must have 1 to {MOST_MESSAGES}", messages.len());
        return Err(ApiError::invalid("messages", says));
    }
    let convert = |(i, m): (usize, ChatMessage)| {
        let at = |field: &str| format!("messages[{i}].{field}");
        let others = [("name", &m.name), ("tool_calls", &m.tool_calls), ("tool_call_id", &m.tool_call_id)];
        let others = others.into_iter().chain([("refusal", &m.refusal), ("audio", &m.audio)]);
        for (field, value) in others {
            if value.as_ref().is_some_and(|v| !is_empty(v)) {
                let says = format!("`{}` is not supported; a message has `role` and `content`", at(field));
                return Err(ApiError::unsupported(&at(field), says));
            }
        }
        let role = match m.role.as_str() {
            "system" | "developer" => "system",
            "user" => "user",
            "assistant" => "assistant",
            other => {
                let other: String = other.chars().take(40).collect();
                let says = format!("`{}` is `{other}`; supported: system, developer, user, assistant", at("role"));
                return Err(ApiError::invalid(&at("role"), says));
            }
        };
        match m.content {
            Some(content) => Ok(Message { role: role.into(), content: content.0 }),
            None => Err(ApiError::invalid(&at("content"), format!("`{}` is missing", at("content")))),
        }
    };
    Ok(Input::Messages(messages.into_iter().enumerate().map(convert).collect::<Result<_, _>>()?))
}

impl ChatRequest {
    /// Checks the request.
    ///
    /// # Errors
    /// A value is out of range, or asks for what this server does not have.
    pub fn plan(self) -> Result<Plan, ApiError> {
        let sampling = Common {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            seed: self.seed,
            n: self.n,
            logit_bias: &self.logit_bias,
        }
        .sampling()?;
        let none = |name: &str, v: &Option<Value>, usual: &[Value]| match v {
            Some(v) if !is_empty(v) && !usual.contains(v) => {
                Err(ApiError::unsupported(name, format!("`{name}` is not supported; leave it out")))
            }
            _ => Ok(()),
        };
        none("tools", &self.tools, &[])?;
        none("tool_choice", &self.tool_choice, &["none".into(), "auto".into()])?;
        none("functions", &self.functions, &[])?;
        none("function_call", &self.function_call, &["none".into(), "auto".into()])?;
        none("response_format", &self.response_format, &[serde_json::json!({"type": "text"})])?;
        none("modalities", &self.modalities, &[serde_json::json!(["text"])])?;
        none("audio", &self.audio, &[])?;
        let logprobs = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (_, Some(n)) if !(0..=MOST_LOGPROBS).contains(&n) => {
                let says = format!("`top_logprobs` is {n}; it must be from 0 to {MOST_LOGPROBS}");
                return Err(ApiError::invalid("top_logprobs", says));
            }
            (false, Some(_)) => {
                return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs: true`"));
            }
            (true, n) => Some(n.unwrap_or(0) as usize),
            (false, None) => None,
        };
        if self.max_tokens.is_some() && self.max_completion_tokens.is_some() {
            let says = "`max_tokens` and `max_completion_tokens` are two names of one thing; send one";
            return Err(ApiError::invalid("max_tokens", says));
        }
        let max_tokens = match self.max_completion_tokens {
            Some(n) => count("max_completion_tokens", Some(n))?,
            None => count("max_tokens", self.max_tokens)?,
        };
        let (stream, include_usage) = streaming(self.stream, self.stream_options)?;
        Ok(Plan {
            kind: Kind::Chat,
            model: self.model,
            input: chat(self.messages)?,
            sampling,
            max_tokens,
            stop: stops(self.stop)?,
            logprobs,
            stream,
            include_usage,
        })
    }
}

impl CompletionRequest {
    /// Checks the request.
    ///
    /// # Errors
    /// A value is out of range, or asks for what this server does not have.
    pub fn plan(self) -> Result<Plan, ApiError> {
        let sampling = Common {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            seed: self.seed,
            n: self.n,
            logit_bias: &self.logit_bias,
        }
        .sampling()?;
        if self.best_of.is_some_and(|n| n != 1) {
            return Err(ApiError::unsupported("best_of", "`best_of` must be 1"));
        }
        if self.echo == Some(true) {
            return Err(ApiError::unsupported("echo", "`echo` is not supported; leave it out"));
        }
        if self.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
            return Err(ApiError::unsupported("suffix", "`suffix` is not supported; leave it out"));
        }
        let input = match self.prompt {
            Prompt::Text(text) => Input::Text(text),
            Prompt::Tokens(tokens) => Input::Tokens(tokens),
            Prompt::Several(n) => {
                let says = format!("`prompt` holds {n} prompts; send one in a request: a common beginning is shared");
                return Err(ApiError::unsupported("prompt", says));
            }
        };
        let logprobs = match self.logprobs {
            Some(n) if !(0..=MOST_LOGPROBS).contains(&n) => {
                let says = format!("`logprobs` is {n}; it must be from 0 to {MOST_LOGPROBS}");
                return Err(ApiError::invalid("logprobs", says));
            }
            n => n.map(|n| n as usize),
        };
        let (stream, include_usage) = streaming(self.stream, self.stream_options)?;
        Ok(Plan {
            kind: Kind::Completion,
            model: self.model,
            input,
            sampling,
            // As OpenAI's.
            max_tokens: Some(count("max_tokens", self.max_tokens)?.unwrap_or(16)),
            stop: stops(self.stop)?,
            logprobs,
            stream,
            include_usage,
        })
    }
}

impl TokenizeRequest {
    /// Checks the request: the model, and the text.
    ///
    /// # Errors
    /// It has no text, or two.
    pub fn input(self) -> Result<(Option<String>, Input), ApiError> {
        Ok((self.model, one(self.prompt, self.messages)?))
    }
}

impl SessionRequest {
    /// Checks the request: the session's name, the model, and the text.
    ///
    /// # Errors
    /// It has no text, or two.
    pub fn input(self) -> Result<(String, Option<String>, Input), ApiError> {
        Ok((self.name, self.model, one(self.prompt, self.messages)?))
    }
}

fn one(prompt: Option<String>, messages: Option<Vec<ChatMessage>>) -> Result<Input, ApiError> {
    match (prompt, messages) {
        (Some(text), None) => Ok(Input::Text(text)),
        (None, Some(messages)) => chat(messages),
        _ => Err(ApiError::invalid("prompt", "give either `prompt` or `messages`")),
    }
}
