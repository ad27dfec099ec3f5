//! What every request passes: keys, counters, a number, the shape of refusals, pages of other origins.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowOrigin, AllowPrivateNetwork, CorsLayer};

use super::error::{ApiError, shaped};
use super::{Accepted, App, Caller, fields, images, inference, request};

/// A client's head holds no more bytes.
pub(super) const LARGEST_HEAD: usize = 32 * 1024;
/// Nor more fields.
pub(super) const MOST_HEADERS: usize = 100;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// How long a browser keeps what it was told of other origins.
const PREFLIGHT_KEPT: Duration = Duration::from_hours(1);

/// Lets callers with a key through.
pub(super) async fn guard(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let caller = Caller(app.keys.check(request.headers())?);
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

/// Counts a request, gives it a number, and its refusal the shape of its path.
pub(super) async fn note(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    // A number of the client's own is sent back, unless it is too long to be one.
    let given = request.headers().get(REQUEST_ID).filter(|id| id.len() <= 128).cloned();
    let fresh = || HeaderValue::try_from(format!("{:016x}", request::random()));
    let id = given.map_or_else(fresh, Ok);
    let path = request.uri().path().to_owned();
    let kept = stays_open(&request).then_some(app.limits.keep_alive.as_secs()).filter(|seconds| *seconds > 0);
    request.extensions_mut().insert(Accepted(start));
    let answer = match too_large(&request) {
        Some(refusal) => refusal.into_response(),
        None => next.run(request).await,
    };
    let mut response = shaped(&path, answer);
    if let Ok(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    if let Some(Ok(kept)) = kept.map(|seconds| HeaderValue::try_from(format!("timeout={seconds}"))) {
        response.headers_mut().insert("keep-alive", kept);
    }
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    app.metrics.request(&route, response.status().as_u16(), start.elapsed());
    response
}

/// Whether the connection is kept after this request, as far as the client says.
fn stays_open(request: &Request) -> bool {
    let says = |word: &str| {
        let values = request.headers().get_all(header::CONNECTION).iter();
        values
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|w| w.trim().eq_ignore_ascii_case(word)))
    };
    !says("close") && (request.version() >= Version::HTTP_11 || says("keep-alive"))
}

fn too_large(request: &Request) -> Option<ApiError> {
    let headers = request.headers();
    let line = request.method().as_str().len() + request.uri().to_string().len();
    let size = line + size(headers);
    let text = if size > LARGEST_HEAD {
        format!("the head has more than {LARGEST_HEAD} bytes")
    } else if headers.len() > MOST_HEADERS {
        format!("the head has more than {MOST_HEADERS} fields")
    } else {
        return None;
    };
    Some(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large", text))
}

fn size(headers: &HeaderMap) -> usize {
    // With the colon, the space and the end of the line.
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}

/// Lets pages of other origins ask.
pub(super) fn origins(allowed: &[HeaderValue]) -> CorsLayer {
    let any = allowed.iter().any(|origin| origin == "*");
    let exposed = [
        REQUEST_ID,
        header::RETRY_AFTER,
        header::LOCATION,
        HeaderName::from_static("retry-after-ms"),
        HeaderName::from_static("x-seed"),
        HeaderName::from_static("x-class-label"),
        HeaderName::from_static("x-queue-time"),
        HeaderName::from_static("x-compute-time"),
        HeaderName::from_static("x-total-time"),
        inference::HEADER_LENGTH,
    ];
    CorsLayer::new()
        .allow_origin(if any { AllowOrigin::any() } else { AllowOrigin::list(allowed.iter().cloned()) })
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // Official clients send fields of their own; keys stay where they are needed.
        .allow_headers(AllowHeaders::mirror_request())
        .allow_private_network(AllowPrivateNetwork::yes())
        .expose_headers(exposed)
        .max_age(PREFLIGHT_KEPT)
}

pub(super) async fn no_route(method: Method, request: Request) -> ApiError {
    let path = fields::cut(request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is no {method} {path}; see /docs"))
}

pub(super) async fn wrong_method(method: Method, request: Request) -> ApiError {
    let path = fields::cut(request.uri().path());
    let text = format!("{path} does not take {method}; see /docs");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", text)
}

/// A handler's panic is one failed request.
#[expect(clippy::needless_pass_by_value, reason = "shape of the layer's callback")]
pub(super) fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    crate::console::note(&format!("serve: a request panicked: {}", text.unwrap_or("without words")));
    images::internal("the request failed inside the server").into_response()
}
