//! What every request passes: the key, a name, and the count.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::App;
use crate::api::ApiError;

/// Answered without a key: the page asks for it, and a probe has none.
const OPEN: [&str; 5] = ["/", "/page.js", "/page.css", "/health", "/openapi.json"];

pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("other", |p| p.as_str()).to_owned();
    let open = OPEN.contains(&path.as_str());
    let method = request.method().clone();
    let started = std::time::Instant::now();
    let response = match &app.options.api_key {
        Some(key) if !open && !has_key(&request, key) => ApiError::new(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "send the server's key: Authorization: Bearer KEY",
        )
        .into_response(),
        _ => next.run(request).await,
    };
    let status = response.status();
    app.metrics.requests.with_label_values(&[&path, status.as_str()]).inc();
    let ms = started.elapsed().as_millis() as u64;
    if status.is_server_error() {
        tracing::warn!(%method, path, status = status.as_u16(), ms, "answered");
    } else {
        tracing::debug!(%method, path, status = status.as_u16(), ms, "answered");
    }
    let mut response = response;
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn has_key(request: &Request, key: &str) -> bool {
    let sent = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let sent = sent.and_then(|v| v.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    sent.is_some_and(|(_, sent)| bool::from(sent.trim().as_bytes().ct_eq(key.as_bytes())))
}
