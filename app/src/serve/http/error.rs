//! Errors as clients get them: a status that tells whose fault it is, in the shape that clients of the path expect.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::request::random;
use crate::serve::batching::order::{Failure, Refusal};

/// A wait is made longer by a random share up to this.
const JITTER: f64 = 0.2;

/// An answer that is no success.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// The field that is wrong.
    pub(crate) param: Option<String>,
    /// A word for programs.
    pub(crate) code: &'static str,
    pub(crate) retry_after: Option<Duration>,
    /// Encodings of bodies that would be taken.
    pub(crate) accept_encoding: Option<&'static str>,
}

pub(crate) type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code, retry_after: None, accept_encoding: None }
    }

    /// A field that is wrong.
    pub(crate) fn field(name: &str, message: impl std::fmt::Display) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_value", format!("`{name}`: {message}"));
        error.param = Some(name.to_owned());
        error
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// OpenAI's body.
    pub(crate) fn body(&self) -> Value {
        let Self { message, param, code, .. } = self;
        json!({"error": {"message": message, "type": self.kind(), "param": param, "code": code}})
    }

    /// The answer, with a body of this shape.
    fn respond(&self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            // OpenAI's clients take the finer one.
            headers.insert("retry-after-ms", HeaderValue::from(after.as_millis() as u64));
        }
        if let Some(encodings) = self.accept_encoding {
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(encodings));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    /// OpenAI's shape; [`shaped`] finds the error in the extensions where it has to be another.
    fn into_response(self) -> Response {
        let mut response = self.respond(self.body());
        response.extensions_mut().insert(self);
        response
    }
}

/// Whether a path is the Open Inference Protocol's.
pub(crate) fn is_protocol(path: &str) -> bool {
    path.strip_prefix("/v2").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// An answer whose body, if it is an error, has the shape that clients of `path` expect: the Open Inference Protocol's
/// below /v2, OpenAI's elsewhere. Whoever refused the request does not matter: a handler, the router or its readers.
pub(crate) fn shaped(path: &str, mut response: Response) -> Response {
    let status = response.status();
    let error = match response.extensions_mut().remove::<ApiError>() {
        Some(_) if !is_protocol(path) => return response,
        Some(error) => error,
        None => {
            let json = |kind: &HeaderValue| kind.as_bytes().starts_with(b"application/json");
            let told = response.headers().get(header::CONTENT_TYPE).is_some_and(json);
            if told || !(status.is_client_error() || status.is_server_error()) {
                return response;
            }
            let reason = status.canonical_reason().unwrap_or("refused");
            ApiError::new(status, "bad_request", format!("the request cannot be read: {reason}"))
        }
    };
    let body = if is_protocol(path) { json!({"error": error.message}) } else { error.body() };
    let mut new = error.respond(body);
    // What was said beside the body, e.g. which methods a path takes.
    for (name, value) in response.headers() {
        if name != header::CONTENT_LENGTH && name != header::CONTENT_TYPE {
            new.headers_mut().insert(name, value.clone());
        }
    }
    new
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::Full { retry_after, .. } => Self {
                // Those whose wait is the same, here and at other replicas, do not come back together.
                retry_after: Some(retry_after.mul_f64(1.0 + JITTER * random() as f64 / u64::MAX as f64)),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", text)
            },
            _ => Self {
                retry_after: Some(Duration::from_secs(1)),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, refusal.reason(), text)
            },
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let status = match failure {
            Failure::Deadline => StatusCode::GATEWAY_TIMEOUT,
            Failure::Stopped => StatusCode::SERVICE_UNAVAILABLE,
            // Nobody is there to read it.
            Failure::Cancelled => StatusCode::CONFLICT,
            Failure::Engine(_) | Failure::NotFinite(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, failure.reason(), failure.to_string())
    }
}
