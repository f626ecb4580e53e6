//! Everything that does not generate.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::App;
use crate::api::{ApiError, TokenizeRequest, parse};

/// How long a client may take to send a request.
const BODY_TIME: Duration = Duration::from_secs(60);

/// The body of a request, as JSON of a shape.
pub(super) async fn body<T: DeserializeOwned>(app: &App, request: Request) -> Result<T, ApiError> {
    let stated = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = stated.split(';').next().unwrap_or_default().trim();
    // A page of another origin can't send this type without being asked first (CORS).
    if !kind.eq_ignore_ascii_case("application/json") {
        let says = format!("the content type is `{kind}`; send application/json");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "wrong_content_type", says));
    }
    let limit = app.options.max_body;
    let bytes = tokio::time::timeout(BODY_TIME, axum::body::to_bytes(request.into_body(), limit)).await;
    let bytes =
        bytes.map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "too_slow", "the body did not come in time"))?;
    let bytes = bytes.map_err(|e| {
        use std::error::Error;
        match e.source() {
            Some(source) if source.is::<http_body_util::LengthLimitError>() => {
                let says = format!("the body is longer than the limit of {limit} bytes");
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", says)
            }
            _ => ApiError::new(StatusCode::BAD_REQUEST, "broken_body", format!("the body did not arrive: {e}")),
        }
    })?;
    parse(&bytes)
}

fn card(app: &App) -> Value {
    let ready = app.ready().ok();
    json!({
        "id": app.options.model_name, "object": "model", "created": 0, "owned_by": "kvquant",
        "max_model_len": ready.map(|r| r.limits.context), "kv_cache": ready.map(|r| r.engine.stats().spec.clone()),
    })
}

pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [card(&app)] }))
}

pub(super) async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    known(&app, &name)?;
    Ok(Json(card(&app)))
}

/// Whether a model is the one that is served.
pub(super) fn known(app: &App, name: &str) -> Result<(), ApiError> {
    if name == app.options.model_name {
        return Ok(());
    }
    let name: String = name.chars().take(100).collect();
    let says = format!("the model `{name}` is not served here; this server has `{}`", app.options.model_name);
    Err(ApiError { param: Some("model".into()), ..ApiError::new(StatusCode::NOT_FOUND, "model_not_found", says) })
}

pub(super) async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, ApiError> {
    let ready = app.ready()?;
    let (model, input) = body::<TokenizeRequest>(&app, request).await?.input()?;
    if let Some(model) = model {
        known(&app, &model)?;
    }
    let tokens = ready.tokens(&input)?;
    Ok(Json(json!({ "count": tokens.len(), "max_model_len": ready.limits.context, "tokens": tokens })))
}

pub(super) async fn stats(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let stats = app.ready()?.engine.stats();
    let failed = |e: serde_json::Error| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "stats", format!("the figures are no JSON: {e}"))
    };
    Ok(Json(serde_json::to_value(&*stats).map_err(failed)?))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = app.metrics.text().map_err(|e| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "metrics", format!("the figures can't be written: {e}"))
    })?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let (code, status) = match app.ready() {
        Ok(_) => (StatusCode::OK, "ok"),
        Err(_) if app.draining.load(Ordering::Relaxed) => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
    };
    (code, Json(json!({ "status": status }))).into_response()
}

pub(super) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], include_str!("../openapi.json")).into_response()
}

/// Only what the page brings runs in it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn asset(kind: &'static str, content: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, content).into_response()
}

pub(super) async fn page() -> Response {
    asset("text/html; charset=utf-8", include_str!("../../page/index.html"))
}

pub(super) async fn script() -> Response {
    asset("text/javascript; charset=utf-8", include_str!("../../page/page.js"))
}

pub(super) async fn style() -> Response {
    asset("text/css; charset=utf-8", include_str!("../../page/page.css"))
}

pub(super) async fn not_found(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(100).collect();
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is nothing at `{path}`; see /openapi.json"))
}

pub(super) async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let says = format!("`{}` does not take {method}; see /openapi.json", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "wrong_method", says)
}
