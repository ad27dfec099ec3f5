//! The HTTP side: who may ask what, and how the answer is written. It knows no batches: orders go to the
//! [`Batcher`], events come back.
//!
//! | module | holds |
//! |---|---|
//! | `listen` | connections: limits, timeouts, the end |
//! | [`auth`] | API keys |
//! | `fields`, `request` | strict reading of bodies; from fields to an order |
//! | `images`, `stream`, `jobs` | the three ways to get images |
//! | `inference`, `tensors` | the Open Inference Protocol |
//! | `describe`, `openapi`, `pages` | what the server says of itself |
#![allow(clippy::unused_async, reason = "the router takes async functions")]

pub mod auth;
mod describe;
mod error;
mod fields;
mod images;
mod inference;
mod jobs;
mod listen;
mod openapi;
mod pages;
mod request;
mod stream;
mod tensors;

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{FromRequest, MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tower_http::catch_panic::CatchPanicLayer;

use super::batching::{Batcher, Phase};
use super::engine::ModelReport;
use super::metrics::Metrics;
use super::model::Source;
use crate::execution::Execution;
use auth::Keys;
use error::{ApiError, ApiResult};
use fields::Fields;
pub(super) use listen::listen;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What a client may ask for, and how long it may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Images of one request.
    pub images: usize,
    /// Steps of an image.
    pub steps: usize,
    /// Bytes of a body.
    pub body: usize,
    /// Connections at a time.
    pub connections: usize,
    /// Jobs that run or are kept.
    pub jobs: usize,
    /// A request's images are ready in this time, or it fails.
    pub request_time: Duration,
    /// A client sends its head, and then its body, in this time.
    pub read_time: Duration,
    /// A client takes a piece of the answer in this time.
    pub write_time: Duration,
    /// A step takes longer only when the engine is stuck.
    pub stuck_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            images: 10,
            steps: 1000,
            body: 1 << 20,
            connections: 1024,
            jobs: 256,
            request_time: Duration::from_mins(5),
            read_time: Duration::from_secs(10),
            write_time: Duration::from_secs(30),
            stuck_time: Duration::from_mins(1),
        }
    }
}

/// All that handlers share.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) batcher: Batcher,
    pub(crate) sources: Vec<Source>,
    /// Set once the models are loaded.
    pub(crate) reports: OnceLock<Vec<ModelReport>>,
    pub(crate) limits: Limits,
    pub(crate) execution: Execution,
    pub(crate) keys: Keys,
    pub(crate) metrics: Metrics,
    pub(crate) jobs: jobs::Jobs,
    /// The server was asked to end: balancers shall send nothing more.
    pub(crate) leaving: AtomicBool,
}

impl App {
    /// Whether the process is well.
    fn live(&self) -> bool {
        self.batcher.is_alive(self.limits.stuck_time)
    }

    /// Whether requests shall come here.
    pub(crate) fn ready(&self) -> bool {
        !self.leaving.load(Ordering::Relaxed) && self.batcher.phase() == Phase::Serving && self.live()
    }

    fn names(&self) -> Vec<String> {
        self.sources.iter().map(|s| s.name.clone()).collect()
    }
}

/// Makes the store of jobs.
pub(crate) fn jobs(limits: &Limits) -> jobs::Jobs {
    jobs::Jobs::new(limits.jobs)
}

/// Which key a request came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller(Option<usize>);

/// When a request came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accepted(pub(crate) Instant);

/// A body that was read whole, within the limits.
pub(crate) struct Body(Vec<u8>);

impl Body {
    fn fields(&self) -> ApiResult<Fields> {
        Fields::parse(&self.0)
    }
}

impl FromRequest<Arc<App>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> ApiResult<Self> {
        let headers = request.headers();
        let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        // A page of another origin cannot send JSON without asking first; a browser always tells the origin. Triton's
        // client is none, and names no type at all.
        let tensors =
            request.extensions().get::<MatchedPath>().is_some_and(|p| p.as_str().ends_with("/infer"));
        let bare = kind.is_empty() && !headers.contains_key(header::ORIGIN);
        let binary = headers.contains_key(inference::HEADER_LENGTH) && kind == "application/octet-stream";
        if kind != "application/json" && !(tensors && (bare || binary)) {
            let text = "send `Content-Type: application/json`";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", text));
        }
        let limit = app.limits.body;
        let too_large = || {
            ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "body_too_large",
                format!("the body has more than {limit} bytes"),
            )
        };
        let read = Limited::new(request.into_body(), limit).collect();
        match tokio::time::timeout(app.limits.read_time, read).await {
            Ok(Ok(body)) => Ok(Self(body.to_bytes().into())),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(_)) => Err(ApiError::new(StatusCode::BAD_REQUEST, "broken_body", "the body broke off")),
            Err(_) => {
                let text = format!("the body did not come within {} s", app.limits.read_time.as_secs_f64());
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", text))
            }
        }
    }
}

/// All routes.
pub(crate) fn router(app: &Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/images/generations", post(images::generate))
        .route("/v1/images/jobs", post(jobs::submit))
        .route("/v1/images/jobs/{id}", get(jobs::look).delete(jobs::delete))
        .route("/v1/models", get(describe::models))
        .route("/v1/models/{model}", get(describe::model))
        .route("/v2/models/{model}/infer", post(inference::infer))
        .route("/v2/models/{model}/versions/{version}/infer", post(inference::infer))
        .route_layer(middleware::from_fn_with_state(app.clone(), guard));
    let open = Router::new()
        .route("/", get(pages::page))
        .route("/style.css", get(pages::style))
        .route("/app.js", get(pages::script))
        .route("/docs", get(pages::docs))
        .route("/docs.js", get(pages::docs_script))
        .route("/openapi.json", get(openapi::document))
        .route("/health", get(describe::health))
        .route("/info", get(describe::info))
        .route("/metrics", get(describe::metrics))
        .route("/v2", get(inference::server))
        .route("/v2/health/live", get(inference::live))
        .route("/v2/health/ready", get(inference::ready))
        .route("/v2/models/{model}", get(inference::metadata))
        .route("/v2/models/{model}/ready", get(inference::model_ready))
        .route("/v2/models/{model}/versions/{version}", get(inference::metadata))
        .route("/v2/models/{model}/versions/{version}/ready", get(inference::model_ready));
    guarded
        .merge(open)
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.clone(), note))
        .with_state(app.clone())
}

/// Lets callers with a key through.
async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Result<Response, ApiError> {
    let caller = Caller(app.keys.check(request.headers())?);
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

/// Counts a request and gives it a number.
async fn note(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    // A number of the client's own is sent back, unless it is too long to be one.
    let given = request.headers().get(REQUEST_ID).filter(|id| id.len() <= 128).cloned();
    let fresh = || HeaderValue::try_from(format!("{:016x}", request::random()));
    let id = given.map_or_else(fresh, Ok);
    request.extensions_mut().insert(Accepted(start));
    let mut response = next.run(request).await;
    if let Ok(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    app.metrics.request(&route, response.status().as_u16(), start.elapsed());
    response
}

async fn no_route(method: Method, request: Request) -> ApiError {
    let path = fields::cut(request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is no {method} {path}; see /docs"))
}

async fn wrong_method(method: Method, request: Request) -> ApiError {
    let path = fields::cut(request.uri().path());
    let text = format!("{path} does not take {method}; see /docs");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", text)
}

/// A handler's panic is one failed request.
#[expect(clippy::needless_pass_by_value, reason = "shape of the layer's callback")]
fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    crate::console::note(&format!("serve: a request panicked: {}", text.unwrap_or("without words")));
    images::internal("the request failed inside the server").into_response()
}
