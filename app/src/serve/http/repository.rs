//! What Triton's clients ask beside the protocol: configuration, statistics, the repository, shared memory. What this
//! server has not is refused in words.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::App;
use super::error::{ApiError, ApiResult};
use super::inference::{Port, VERSION, find, ports};
use crate::serve::batching::stats::Times;

/// The routes.
pub(super) fn routes() -> Router<Arc<App>> {
    let mut routes = Router::new()
        .route("/v2/models/stats", get(all_statistics))
        .route("/v2/models/{model}/config", get(configuration))
        .route("/v2/models/{model}/versions/{version}/config", get(configuration))
        .route("/v2/models/{model}/stats", get(statistics))
        .route("/v2/models/{model}/versions/{version}/stats", get(statistics))
        .route("/v2/repository/index", post(index))
        .route("/v2/repository/models/{model}/load", post(fixed))
        .route("/v2/repository/models/{model}/unload", post(fixed));
    for kind in ["systemsharedmemory", "cudasharedmemory"] {
        routes = routes
            .route(&format!("/v2/{kind}/status"), get(no_regions))
            .route(&format!("/v2/{kind}/unregister"), post(nothing_to_forget))
            .route(&format!("/v2/{kind}/region/{{region}}/status"), get(no_region))
            .route(&format!("/v2/{kind}/region/{{region}}/register"), post(no_shared_memory))
            .route(&format!("/v2/{kind}/region/{{region}}/unregister"), post(no_region));
    }
    routes
}

/// `GET /v2/models/{model}/config` and the same of a version: as Triton writes a model's configuration. Tensors have
/// the number of images as an axis of their own, so there is no batch beside it.
async fn configuration(State(app): State<Arc<App>>, Path(path): Path<Vec<String>>) -> ApiResult<Json<Value>> {
    let (_, source) = find(&app, &path)?;
    let described = |ports: &[Port], inputs: bool| -> Vec<Value> {
        let one = |port: &Port| {
            let kind = format!("TYPE_{}", port.datatype);
            let mut body = json!({"name": port.name, "data_type": kind, "dims": port.shape});
            if inputs {
                body["optional"] = json!(port.optional);
            }
            body
        };
        ports.iter().map(one).collect()
    };
    let [inputs, outputs] = ports(source);
    Ok(Json(json!({
        "name": source.name, "platform": "mudit", "backend": "mudit", "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0, "input": described(&inputs, true), "output": described(&outputs, false),
    })))
}

/// `GET /v2/models/{model}/stats` and the same of a version.
async fn statistics(State(app): State<Arc<App>>, Path(path): Path<Vec<String>>) -> ApiResult<Json<Value>> {
    let (index, _) = find(&app, &path)?;
    Ok(Json(json!({"model_stats": [statistics_of(&app, index)]})))
}

/// `GET /v2/models/stats`.
async fn all_statistics(State(app): State<Arc<App>>) -> Json<Value> {
    let all: Vec<Value> = (0..app.sources.len()).map(|index| statistics_of(&app, index)).collect();
    Json(json!({"model_stats": all}))
}

/// A batch is a step here, and an inference an image.
fn statistics_of(app: &App, index: usize) -> Value {
    let stats = app.batcher.stats();
    let orders = stats.orders.get(&index).copied().unwrap_or_default();
    let steps = || stats.steps.iter().filter(|((model, _), _)| *model == index);
    let all = steps().fold(Times::default(), |sum, (_, times)| Times {
        count: sum.count + times.count,
        seconds: sum.seconds + times.seconds,
    });
    let none = || duration(Times::default());
    let batches: Vec<Value> = steps()
        .map(|((_, rows), times)| {
            json!({
                "batch_size": rows, "compute_input": none(), "compute_infer": duration(*times),
                "compute_output": none(),
            })
        })
        .collect();
    let last = orders.last.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    json!({
        "name": app.sources[index].name, "version": VERSION,
        "last_inference": last.map_or(0, |at| at.as_millis() as u64),
        "inference_count": orders.images, "execution_count": all.count,
        "inference_stats": {
            "success": duration(orders.finished), "fail": duration(orders.failed), "queue": duration(orders.queued),
            "compute_input": none(), "compute_infer": duration(all), "compute_output": none(),
            "cache_hit": none(), "cache_miss": none(),
        },
        "batch_stats": batches,
    })
}

fn duration(times: Times) -> Value {
    json!({"count": times.count, "ns": (times.seconds * 1e9) as u64})
}

/// `POST /v2/repository/index`.
async fn index(State(app): State<Arc<App>>) -> Json<Value> {
    let (state, reason) =
        if app.ready() { ("READY", "") } else { ("UNAVAILABLE", "loading or shutting down") };
    let one = |name: String| json!({"name": name, "version": VERSION, "state": state, "reason": reason});
    Json(app.names().into_iter().map(one).collect())
}

/// `POST /v2/repository/models/{model}/load` and `…/unload`.
async fn fixed(State(app): State<Arc<App>>, Path(path): Path<Vec<String>>) -> ApiResult<Json<Value>> {
    find(&app, &path)?;
    let text = "the models of this server are chosen when it starts: none is loaded or unloaded later";
    Err(ApiError::new(StatusCode::BAD_REQUEST, "unsupported", text))
}

/// `GET /v2/systemsharedmemory/status` and the same of CUDA's.
async fn no_regions() -> Json<Value> {
    Json(json!([]))
}

/// `POST /v2/systemsharedmemory/unregister` and the same of CUDA's: none is registered afterwards.
async fn nothing_to_forget() -> Json<Value> {
    Json(json!({}))
}

/// Questions for one region.
async fn no_region(Path(region): Path<String>) -> ApiError {
    let text = format!("there is no region `{}`: {NO_SHARED_MEMORY}", super::fields::cut(&region));
    ApiError::new(StatusCode::NOT_FOUND, "unsupported", text)
}

/// `POST /v2/systemsharedmemory/region/{region}/register` and the same of CUDA's.
async fn no_shared_memory() -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "unsupported", NO_SHARED_MEMORY)
}

const NO_SHARED_MEMORY: &str = "this server takes no tensors from shared memory; send them in the body";
