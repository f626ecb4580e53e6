//! Errors in OpenAI's shape.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::{Failure, Refused};

/// An answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What went wrong and what to do.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// For programs.
    pub code: &'static str,
}

impl ApiError {
    /// An error without a field.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), param: None, code }
    }

    /// A value that can't be taken.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message) }
    }

    /// A feature that this server does not have.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        ApiError { code: "unsupported_parameter", ..Self::invalid(param, message) }
    }

    /// As JSON; also an event of a stream that fails on the way.
    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 | 403 => "authentication_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl From<Refused> for ApiError {
    fn from(r: Refused) -> Self {
        let (status, code) = match r {
            Refused::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, "queue_full"),
            Refused::TooLarge { .. } => (StatusCode::BAD_REQUEST, "kv_memory_exceeded"),
            Refused::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        };
        ApiError::new(status, code, r.to_string())
    }
}

impl From<Failure> for ApiError {
    fn from(f: Failure) -> Self {
        let (status, code) = match f {
            Failure::Model(_) => (StatusCode::INTERNAL_SERVER_ERROR, "model_failed"),
            Failure::QueueTime(_) => (StatusCode::TOO_MANY_REQUESTS, "queue_timeout"),
            Failure::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        };
        ApiError::new(status, code, f.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
            }
            _ => {}
        }
        response
    }
}
