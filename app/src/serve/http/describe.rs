//! What the server says of itself: health, models, what runs, counters.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use models::SolverKind;
use serde_json::{Value, json};

use super::App;
use super::error::ApiResult;
use super::request::{self, DEFAULT_GUIDANCE, MOST_GUIDANCE, MOST_PREVIEWS};
use crate::sampler::{default_sampler, default_steps};
use crate::serve::batching::Phase;
use crate::serve::model::Source;
use crate::serve::picture::decoder;

/// `GET /health`.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let status = match app.batcher.phase() {
        _ if !app.live() => "stuck",
        Phase::Loading => "loading",
        Phase::Serving => "ok",
        Phase::Draining | Phase::Stopped => "draining",
    };
    let code = if app.live() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({"status": status}))).into_response()
}

/// `GET /v1/models`.
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let data: Vec<Value> = (0..app.sources.len()).map(|i| describe(&app, i)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/{model}`.
pub(super) async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> ApiResult<Json<Value>> {
    let (index, _) = request::model(&app, Some(name))?;
    Ok(Json(describe(&app, index)))
}

fn describe(app: &App, index: usize) -> Value {
    let source = &app.sources[index];
    let Source { name, model, sha256, .. } = source;
    let sampler = default_sampler(model.objective);
    let usable: Vec<&str> =
        SolverKind::ALL.iter().filter(|k| k.objective() == model.objective).map(|k| k.name()).collect();
    let guided = model.conditioning().has_null();
    let steps =
        |kind: &str| kind.parse::<SolverKind>().map_or(0, |kind| default_steps(kind).min(app.limits.steps));
    json!({
        "id": name, "object": "model", "created": 0, "owned_by": "mudit", "task": "class-to-image",
        "size": source.size(), "classes": model.conditioning().class_count(), "class_names": model.class_names,
        "unconditional": guided, "latent_shape": source.shape(), "decoder": decoder(model.latent().channels),
        "objective": model.objective.name(), "precision": app.execution.precision,
        "samplers": usable, "default_sampler": sampler.name(),
        "default_steps": usable.iter().map(|k| ((*k).to_owned(), json!(steps(k)))).collect::<serde_json::Map<_, _>>(),
        "max_steps": app.limits.steps, "max_images": app.limits.images, "max_partial_images": MOST_PREVIEWS,
        "default_guidance_scale": if guided { DEFAULT_GUIDANCE } else { 1.0 },
        "max_guidance_scale": if guided { MOST_GUIDANCE } else { 1.0 },
        "weights_sha256": sha256,
    })
}

/// `GET /info`.
pub(super) async fn info(State(app): State<Arc<App>>) -> Json<Value> {
    let reports = app.reports.get();
    let load = app.batcher.load();
    let model = |i: usize| {
        let mut body = describe(&app, i);
        body["engine"] = json!(reports.and_then(|r| r.get(i)));
        body["queue"] = json!(load.get(i).map(|l| {
            json!({
                "image_steps": l.waiting, "limit_image_steps": l.limit,
                "image_steps_per_second": l.rate,
                "seconds": l.waiting as f64 / l.rate,
            })
        }));
        body
    };
    let stats = app.batcher.stats();
    let limits = &app.limits;
    Json(json!({
        "name": "mudit", "version": env!("CARGO_PKG_VERSION"), "phase": format!("{:?}", app.batcher.phase()).to_lowercase(),
        "ready": app.ready(), "uptime_seconds": app.metrics.uptime().as_secs_f64(),
        "threads": app.execution.threads,
        "provider": app.execution.provider.to_string(), "precision": app.execution.precision, "api_key_needed": !app.keys.is_empty(),
        "models": (0..app.sources.len()).map(model).collect::<Vec<_>>(),
        "ignores_unused_options": limits.ignore_unused,
        "slot_use": stats.rows_used as f64 / (stats.rows_run as f64).max(1.0),
        "limits": {
            "images": limits.images, "steps": limits.steps, "body_bytes": limits.body,
            "connections": limits.connections, "jobs": limits.jobs,
            "request_seconds": limits.request_time.as_secs_f64(), "read_seconds": limits.read_time.as_secs_f64(),
            "write_seconds": limits.write_time.as_secs_f64(), "keep_alive_seconds": limits.keep_alive.as_secs_f64(),
        },
    }))
}

/// `GET /metrics`.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    let text = app.metrics.text(&app.batcher, &app.names(), app.ready());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}
