//! Chats and completions.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::sse::{Event as Sse, KeepAlive};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream};
use kvquant_model::Tokenizer;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::plain::{body, known};
use super::{App, Ready};
use crate::api::{Answer, ApiError, ChatRequest, Chunks, CompletionRequest, Input, Plan};
use crate::engine::{Event, Job};

pub(super) async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    app.ready()?;
    let plan = body::<ChatRequest>(&app, request).await?.plan()?;
    answer(&app, plan).await
}

pub(super) async fn completion(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    app.ready()?;
    let plan = body::<CompletionRequest>(&app, request).await?.plan()?;
    answer(&app, plan).await
}

async fn answer(app: &Arc<App>, plan: Plan) -> Result<Response, ApiError> {
    let ready = app.ready()?;
    known(app, &plan.model)?;
    let prompt = tokens(app, plan.input.clone()).await?;
    let max_tokens = room(app, ready, &plan, prompt.len())?;
    let answer = Answer::new(plan.kind, app.options.model_name.clone());
    let (events, mut from) = unbounded_channel();
    ready.engine.submit(Job {
        request: answer.id.clone(),
        prompt,
        sampling: plan.sampling,
        max_tokens,
        stop: plan.stop,
        logprobs: plan.logprobs,
        events,
    })?;
    // A status can only be chosen before the first byte: wait until the request is admitted.
    match from.recv().await {
        Some(Event::Started { .. }) => {}
        Some(Event::Failed(failure)) => return Err(failure.into()),
        _ => return Err(gone()),
    }
    let tokenizer = ready.tokenizer.clone();
    if plan.stream {
        let chunks = Chunks::new(answer, plan.logprobs.is_some(), plan.include_usage);
        let events = events_of(from, chunks, tokenizer);
        let keep = KeepAlive::new().interval(Duration::from_secs(15));
        return Ok(axum::response::Sse::new(events).keep_alive(keep).into_response());
    }
    let (mut text, mut tokens) = (String::new(), Vec::new());
    loop {
        match from.recv().await {
            Some(Event::Text { text: more, tokens: infos }) => {
                text.push_str(&more);
                tokens.extend(infos);
            }
            Some(Event::Done { reason, usage }) => {
                let tokens = plan.logprobs.map(|_| &tokens[..]);
                return Ok(Json(answer.whole(&text, tokens, reason, usage, &tokenizer)).into_response());
            }
            Some(Event::Failed(failure)) => return Err(failure.into()),
            Some(_) => {}
            None => return Err(gone()),
        }
    }
}

pub(super) fn gone() -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_gone", "the engine ended; see the server's log")
}

/// The prompt's tokens. A long text takes a while: not on a thread that others' streams need.
pub(super) async fn tokens(app: &Arc<App>, input: Input) -> Result<Vec<u32>, ApiError> {
    let app = app.clone();
    let encoded = tokio::task::spawn_blocking(move || app.ready()?.tokens(&input)).await;
    let tokens = encoded.map_err(|_| {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "tokenizer_failed",
            "the tokenizer failed; see the server's log",
        )
    })??;
    if tokens.is_empty() {
        return Err(ApiError::invalid("prompt", "the prompt is empty; give at least one token of text"));
    }
    Ok(tokens)
}

/// New tokens that the answer may have.
fn room(app: &App, ready: &Ready, plan: &Plan, prompt: usize) -> Result<usize, ApiError> {
    let context = ready.limits.context;
    let param = if matches!(plan.input, Input::Messages(_)) { "messages" } else { "prompt" };
    let too_long =
        |param: &str, says: String| ApiError { code: "context_length_exceeded", ..ApiError::invalid(param, says) };
    if prompt >= context {
        let says = format!(
            "the prompt has {prompt} tokens and the context {context}, which also holds the answer; shorten it"
        );
        return Err(too_long(param, says));
    }
    match plan.max_tokens {
        Some(n) if n > context - prompt => Err(too_long(
            "max_tokens",
            format!(
                "{prompt} tokens of prompt and {n} of answer are more than the context of {context}; at most {} can be asked for",
                context - prompt
            ),
        )),
        Some(n) => Ok(n),
        // What fits, up to the server's default.
        None => {
            let fits = ready.engine.most_tokens().saturating_sub(prompt).max(1);
            Ok((context - prompt).min(app.options.default_max_tokens).min(fits))
        }
    }
}

/// The events of a streamed answer.
struct Streaming {
    from: UnboundedReceiver<Event>,
    chunks: Chunks,
    tokenizer: Arc<Tokenizer>,
    /// What comes next, last first.
    ready: Vec<Sse>,
    over: bool,
}

fn events_of(
    from: UnboundedReceiver<Event>,
    chunks: Chunks,
    tokenizer: Arc<Tokenizer>,
) -> impl Stream<Item = Result<Sse, Infallible>> {
    let ready = chunks.first().map(|v| data(&v)).into_iter().collect();
    let state = Streaming { from, chunks, tokenizer, ready, over: false };
    stream::unfold(state, |mut s| async move {
        loop {
            if let Some(event) = s.ready.pop() {
                return Some((Ok(event), s));
            }
            if s.over {
                return None;
            }
            s.next().await;
        }
    })
}

fn data(value: &serde_json::Value) -> Sse {
    Sse::default().data(value.to_string())
}

impl Streaming {
    async fn next(&mut self) {
        match self.from.recv().await {
            Some(Event::Text { text, tokens }) => {
                self.ready.push(data(&self.chunks.text(&text, &tokens, &self.tokenizer)));
            }
            Some(Event::Done { reason, usage }) => {
                let last = self.chunks.last(reason, usage);
                self.end(last);
            }
            Some(Event::Failed(failure)) => self.end(vec![ApiError::from(failure).body()]),
            Some(_) => {}
            None => self.end(vec![gone().body()]),
        }
    }

    fn end(&mut self, values: Vec<serde_json::Value>) {
        self.ready.push(Sse::default().data("[DONE]"));
        self.ready.extend(values.iter().rev().map(data));
        self.over = true;
    }
}
