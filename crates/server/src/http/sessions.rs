//! Sessions over HTTP.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kvquant_cache::{SessionFile, SessionInfo, save_session};
use kvquant_model::sampling::SamplingParams;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use super::App;
use super::plain::{body, known};
use crate::api::{ApiError, SessionRequest};
use crate::engine::{Event, Job};
use crate::sessions::Sessions;

fn sessions(app: &App) -> Result<Arc<Sessions>, ApiError> {
    app.ready()?.sessions.clone().ok_or_else(|| {
        ApiError::new(
            StatusCode::NOT_FOUND,
            "sessions_off",
            "this server keeps no sessions; start it with --session-dir",
        )
    })
}

fn failed(code: &'static str) -> impl Fn(String) -> ApiError {
    move |says| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, code, says)
}

pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({ "object": "list", "data": sessions(&app)?.cards() })))
}

pub(super) async fn remove(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let sessions = sessions(&app)?;
    let asked = name.clone();
    let removed = tokio::task::spawn_blocking(move || sessions.remove(&asked)).await;
    let removed = removed.map_err(|e| failed("session_failed")(e.to_string()))?;
    match removed.map_err(|e| failed("session_failed")(format!("cannot remove the session: {e}")))? {
        true => Ok(Json(json!({ "id": name, "object": "session", "deleted": true }))),
        false => {
            let name: String = name.chars().take(100).collect();
            Err(ApiError::new(StatusCode::NOT_FOUND, "session_not_found", format!("there is no session `{name}`")))
        }
    }
}

/// Reads a prompt and stores its cache.
pub(super) async fn save(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let ready = app.ready()?;
    let sessions = sessions(&app)?;
    let (name, model, input) = body::<SessionRequest>(&app, request).await?.input()?;
    if let Some(model) = model {
        known(&app, &model)?;
    }
    let path = sessions.path(&name).map_err(|e| ApiError::invalid("name", e.to_string()))?;
    let prompt = super::generate::tokens(&app, input).await?;
    let context = ready.limits.context;
    if prompt.len() > context {
        let says = format!("the prompt has {} tokens and the context {context}; shorten it", prompt.len());
        return Err(ApiError { code: "context_length_exceeded", ..ApiError::invalid("prompt", says) });
    }
    let (events, mut from) = unbounded_channel();
    ready.engine.submit(Job {
        request: format!("session-{name}"),
        prompt: prompt.clone(),
        sampling: SamplingParams::default(),
        max_tokens: 0,
        stop: Vec::new(),
        logprobs: None,
        events,
    })?;
    let cache = loop {
        match from.recv().await {
            Some(Event::Read(cache)) => break cache,
            Some(Event::Failed(failure)) => return Err(failure.into()),
            Some(_) => {}
            None => return Err(super::generate::gone()),
        }
    };
    let info = SessionInfo {
        identity: sessions.kind().identity.clone(),
        model: app.options.model_name.clone(),
        prefill_chunk: sessions.kind().prefill_chunk,
        after: String::new(),
        tokens: prompt.len(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
    };
    let saved = tokio::task::spawn_blocking(move || {
        save_session(&path, &cache, &prompt, &info)?;
        sessions.add(&name, SessionFile::open(&path)?, &cache)
    });
    let saved = saved.await.map_err(|e| failed("session_failed")(e.to_string()))?;
    let card = saved.map_err(|e| failed("session_failed")(e.to_string()))?;
    Ok((StatusCode::CREATED, Json(card)).into_response())
}
