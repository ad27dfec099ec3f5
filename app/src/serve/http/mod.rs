//! The HTTP side: who may ask what, and how the answer is written. It knows no batches: orders go to the
//! [`Batcher`], events come back.
//!
//! | module | holds |
//! |---|---|
//! | `listen`, `places`, `timed_stream` | connections: how many, how slow, and how they end |
//! | [`auth`] | API keys |
//! | `layers`, `error` | what every request passes; refusals in the shape of their path |
//! | `body`, `fields`, `request` | strict reading of bodies; from fields to an order |
//! | `images`, `stream`, `jobs` | the three ways to get images |
//! | `inference`, `tensors`, `repository` | the Open Inference Protocol, and what Triton's clients ask beside it |
//! | `describe`, `openapi`, `pages` | what the server says of itself |
#![allow(clippy::unused_async, reason = "the router takes async functions")]

pub mod auth;
mod body;
mod describe;
mod error;
mod fields;
mod images;
mod inference;
mod jobs;
mod layers;
mod listen;
mod openapi;
mod pages;
mod places;
mod repository;
mod request;
mod stream;
mod tensors;
mod timed_stream;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::HeaderValue;
use axum::middleware;
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use super::batching::{Batcher, Phase};
use super::engine::ModelReport;
use super::metrics::Metrics;
use super::model::Source;
use crate::execution::Execution;
use auth::Keys;
use body::Body;
use layers::{guard, no_route, note, panicked, wrong_method};
pub(super) use listen::listen;
pub(super) use places::waiting;

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
    /// A connection without a request is kept so long; not at all where it is zero.
    pub keep_alive: Duration,
    /// A client takes a piece of the answer in this time.
    pub write_time: Duration,
    /// A step takes longer only when the engine is stuck.
    pub stuck_time: Duration,
    /// Options that cannot matter may have any value.
    pub ignore_unused: bool,
    /// Origins whose pages may ask, beside the server's own.
    pub origins: Vec<HeaderValue>,
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
            keep_alive: Duration::from_secs(75),
            write_time: Duration::from_secs(30),
            stuck_time: Duration::from_mins(1),
            ignore_unused: false,
            origins: Vec::new(),
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
        .route("/v2/models/{model}/versions/{version}/ready", get(inference::model_ready))
        .merge(repository::routes());
    let router = guarded
        .merge(open)
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.clone(), note));
    let allowed = &app.limits.origins;
    let router = if allowed.is_empty() { router } else { router.layer(layers::origins(allowed)) };
    router.with_state(app.clone())
}
