//! What the handlers share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use axum::http::StatusCode;
use kvquant_model::sampling::SamplingParams;
use kvquant_model::{ChatTemplate, Model, Tokenizer};
use tokio::sync::mpsc;

use super::{HttpOptions, ServeError};
use crate::api::{ApiError, Input};
use crate::engine::{Engine, Event, Job, Limits};
use crate::metrics::Metrics;
use crate::sessions::Sessions;

/// A model that answers.
#[derive(Debug)]
pub(crate) struct Ready {
    pub engine: Engine,
    pub model: Arc<Model>,
    pub tokenizer: Arc<Tokenizer>,
    pub template: ChatTemplate,
    pub limits: Limits,
    pub sessions: Option<Arc<Sessions>>,
}

/// The server's state.
#[derive(Debug)]
pub(crate) struct App {
    pub options: HttpOptions,
    pub metrics: Arc<Metrics>,
    pub draining: AtomicBool,
    ready: OnceLock<Ready>,
}

impl App {
    pub fn new(options: HttpOptions, metrics: Arc<Metrics>) -> Self {
        App { options, metrics, draining: AtomicBool::new(false), ready: OnceLock::new() }
    }

    pub fn set_ready(&self, ready: Ready) {
        // Called once.
        let _ = self.ready.set(ready);
    }

    /// The model, once it is loaded and while the server is not ending.
    pub fn ready(&self) -> Result<&Ready, ApiError> {
        let not = |code, says| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, says);
        if self.draining.load(Ordering::Relaxed) {
            return Err(not("shutting_down", "the server is shutting down"));
        }
        self.ready.get().ok_or_else(|| not("loading", "the model is being loaded; try again in a moment"))
    }

    /// A first answer, so that no client waits for what is slow once.
    pub async fn warm_up(&self, engine: &Engine, tokenizer: &Tokenizer) -> Result<(), ServeError> {
        let prompt = tokenizer.encode("Warm-up.", false).unwrap_or_default();
        let prompt = if prompt.is_empty() { vec![0] } else { prompt };
        let (events, mut from) = mpsc::unbounded_channel();
        let job = Job {
            request: "warm-up".into(),
            prompt,
            sampling: SamplingParams::default(),
            max_tokens: 2,
            stop: Vec::new(),
            logprobs: None,
            events,
        };
        engine.submit(job).map_err(|e| ServeError::Load(e.into()))?;
        loop {
            match from.recv().await {
                Some(Event::Done { .. }) => return Ok(()),
                Some(Event::Failed(e)) => return Err(ServeError::Load(Box::new(e))),
                Some(_) => {}
                None => return Err(ServeError::Engine),
            }
        }
    }
}

impl Ready {
    /// A prompt's tokens, with the beginning-of-text token where the model wants one.
    pub fn tokens(&self, input: &Input) -> Result<Vec<u32>, ApiError> {
        let (encoded, param) = match input {
            Input::Messages(messages) => {
                let text =
                    self.template.render(messages, true).map_err(|e| ApiError::invalid("messages", e.to_string()))?;
                (self.tokenizer.encode(&text, true), "messages")
            }
            Input::Text(text) => (self.tokenizer.encode(text, false), "prompt"),
            Input::Tokens(ids) => {
                let vocab = self.model.config.vocab;
                let id = |id: &i64| u32::try_from(*id).ok().filter(|id| (*id as usize) < vocab);
                let wrong = |i: usize, id: i64| {
                    ApiError::invalid("prompt", format!("`prompt[{i}]` is {id}; tokens are from 0 to {}", vocab - 1))
                };
                let ids: Result<Vec<u32>, ApiError> =
                    ids.iter().enumerate().map(|(i, x)| id(x).ok_or_else(|| wrong(i, *x))).collect();
                return ids;
            }
        };
        let mut ids = encoded.map_err(|e| ApiError::invalid(param, e.to_string()))?;
        let bos = self.tokenizer.bos().filter(|bos| self.tokenizer.add_bos() && ids.first() != Some(bos));
        if let Some(bos) = bos {
            ids.insert(0, bos);
        }
        Ok(ids)
    }
}
