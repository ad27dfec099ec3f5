//! The OpenAPI document, from the limits and models of this very server.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use models::SolverKind;
use serde_json::{Map, Value, json};

use super::App;
use super::error::is_protocol;
use super::request::{DEFAULT_GUIDANCE, FIELDS, MOST_GUIDANCE, MOST_PREVIEWS, UNUSED};

/// Method, path, tag, summary, body's schema, statuses.
type Operation = (&'static str, &'static str, &'static str, &'static str, &'static str, &'static [u16]);

/// Tag of what Triton's clients ask.
const TRITON: &str = "Triton's extensions";

const OPERATIONS: [Operation; 29] = [
    (
        "post",
        "/v1/images/generations",
        "images",
        "Make images; with `stream`, as server-sent events",
        "ImageRequest",
        &[200, 400, 401, 404, 408, 413, 415, 429, 500, 503, 504],
    ),
    (
        "post",
        "/v1/images/jobs",
        "jobs",
        "Submit a job that goes on when you hang up",
        "ImageRequest",
        &[202, 400, 401, 404, 408, 413, 415, 429, 503],
    ),
    (
        "get",
        "/v1/images/jobs/{id}",
        "jobs",
        "A job's state, and its images once they are made",
        "",
        &[200, 401, 404],
    ),
    ("delete", "/v1/images/jobs/{id}", "jobs", "Cancel a job, or drop its result", "", &[200, 401, 404]),
    ("get", "/v1/models", "models", "The models", "", &[200, 401]),
    ("get", "/v1/models/{model}", "models", "One model", "", &[200, 401, 404]),
    ("get", "/v2", "inference protocol", "The server", "", &[200]),
    ("get", "/v2/health/live", "inference protocol", "Whether the process is well", "", &[200, 503]),
    ("get", "/v2/health/ready", "inference protocol", "Whether requests are taken", "", &[200, 503]),
    ("get", "/v2/models/{model}", "inference protocol", "A model's tensors", "", &[200, 404]),
    (
        "get",
        "/v2/models/{model}/ready",
        "inference protocol",
        "Whether a model is loaded",
        "",
        &[200, 404, 503],
    ),
    (
        "post",
        "/v2/models/{model}/infer",
        "inference protocol",
        "Tensors in, tensors out",
        "InferRequest",
        &[200, 400, 401, 404, 408, 413, 415, 429, 500, 503, 504],
    ),
    (
        "get",
        "/v2/models/{model}/versions/{version}",
        "inference protocol",
        "A model's tensors",
        "",
        &[200, 404],
    ),
    (
        "get",
        "/v2/models/{model}/versions/{version}/ready",
        "inference protocol",
        "Whether a model is loaded",
        "",
        &[200, 404, 503],
    ),
    (
        "post",
        "/v2/models/{model}/versions/{version}/infer",
        "inference protocol",
        "Tensors in, tensors out",
        "InferRequest",
        &[200, 400, 401, 404, 408, 413, 415, 429, 500, 503, 504],
    ),
    ("get", "/v2/models/stats", TRITON, "What all models have done", "", &[200]),
    ("get", "/v2/models/{model}/stats", TRITON, "What a model has done", "", &[200, 404]),
    ("get", "/v2/models/{model}/versions/{version}/stats", TRITON, "What a model has done", "", &[200, 404]),
    ("get", "/v2/models/{model}/config", TRITON, "A model's configuration", "", &[200, 404]),
    (
        "get",
        "/v2/models/{model}/versions/{version}/config",
        TRITON,
        "A model's configuration",
        "",
        &[200, 404],
    ),
    ("post", "/v2/repository/index", TRITON, "The models and whether they are ready", "", &[200]),
    ("get", "/v2/systemsharedmemory/status", TRITON, "No region is ever registered", "", &[200]),
    ("get", "/v2/cudasharedmemory/status", TRITON, "No region is ever registered", "", &[200]),
    ("get", "/health", "operation", "Whether the process is well", "", &[200, 503]),
    (
        "get",
        "/info",
        "operation",
        "What runs: step times, batch sizes, determinism, limits, queue",
        "",
        &[200],
    ),
    ("get", "/metrics", "operation", "Counters in Prometheus' text format", "", &[200]),
    ("get", "/openapi.json", "operation", "This document", "", &[200]),
    ("get", "/docs", "operation", "This document for people", "", &[200]),
    ("get", "/", "operation", "The page", "", &[200]),
];

/// `GET /openapi.json`.
pub(super) async fn document(State(app): State<Arc<App>>) -> Json<Value> {
    let mut paths: Map<String, Value> = Map::new();
    for (method, path, tag, summary, schema, statuses) in OPERATIONS {
        let operation = operation(&app, path, tag, summary, schema, statuses);
        let entry = paths.entry(path).or_insert_with(|| json!({}));
        entry[method] = operation;
    }
    Json(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "mudit sampling server", "version": env!("CARGO_PKG_VERSION"),
            "description": "Images from diffusion transformers. Images of many requests share every step's batch; \
                the image of a seed and its settings does not depend on them. Unknown fields are refused.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "ImageRequest": image_request(&app), "InferRequest": infer_request(), "Error": error_schema(),
                "ProtocolError": {"type": "object", "properties": {"error": {"type": "string"}}},
            },
        },
    }))
}

fn operation(app: &App, path: &str, tag: &str, summary: &str, schema: &str, statuses: &[u16]) -> Value {
    let error = if is_protocol(path) { "ProtocolError" } else { "Error" };
    let mut responses: Map<String, Value> = Map::new();
    for status in statuses {
        let mut response = json!({"description": meaning(*status)});
        if *status >= 400 {
            response["content"] =
                json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{error}")}}});
        }
        responses.insert(status.to_string(), response);
    }
    let mut operation = json!({"tags": [tag], "summary": summary, "responses": responses});
    let parameters: Vec<Value> = ["id", "model", "version"]
        .iter()
        .filter(|name| path.contains(&format!("{{{name}}}")))
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
        .collect();
    if !parameters.is_empty() {
        operation["parameters"] = json!(parameters);
    }
    if !schema.is_empty() {
        let reference = json!({"$ref": format!("#/components/schemas/{schema}")});
        operation["requestBody"] =
            json!({"required": true, "content": {"application/json": {"schema": reference}}});
    }
    if statuses.contains(&401) && !app.keys.is_empty() {
        operation["security"] = json!([{"key": []}]);
    }
    operation
}

fn meaning(status: u16) -> &'static str {
    match status {
        200 => "done",
        202 => "accepted",
        400 => "a field is unknown, wrong or out of range; `param` names it",
        401 => "an API key is needed",
        404 => "there is none of that name",
        408 => "the body came too slowly",
        413 => "the body is too large",
        415 => "the body is not JSON, or in another encoding than gzip and deflate",
        429 => "the queue is full; `Retry-After` says when there is room",
        503 => "loading or shutting down",
        504 => "the deadline passed",
        _ => "a fault of the server",
    }
}

/// The fields with the limits of this server.
fn image_request(app: &App) -> Value {
    let limits = &app.limits;
    let steps = json!({"type": "integer", "minimum": 1, "maximum": limits.steps,
        "description": "Steps of the solver; its default is in /v1/models"});
    let guidance = json!({"type": "number", "minimum": 0, "maximum": MOST_GUIDANCE, "default": DEFAULT_GUIDANCE,
        "description": "Scale of classifier-free guidance; 1 is none and costs half"});
    let mut properties: Map<String, Value> = Map::new();
    for field in FIELDS {
        let schema = match field {
            "model" => json!({"type": "string", "enum": app.names(), "description": "Default: the first"}),
            "prompt" => {
                json!({"type": "string", "description": "A class by name or number, or `@` and a number; or use class_label"})
            }
            "class_label" => {
                json!({"description": "A class by number, or by name as in prompt; null for none; or one an image",
                "oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}, {"type": "array"}]})
            }
            "n" => json!({"type": "integer", "minimum": 1, "maximum": limits.images, "default": 1}),
            "size" => {
                let mut sizes: Vec<String> =
                    app.sources.iter().map(crate::serve::model::Source::size).collect();
                sizes.push("auto".into());
                json!({"type": "string", "enum": sizes, "default": "auto"})
            }
            "steps" => steps.clone(),
            "num_inference_steps" => alias("steps"),
            "guidance_scale" => guidance.clone(),
            "cfg" | "cfg_scale" => alias("guidance_scale"),
            "sampler" => json!({"type": "string", "enum": SolverKind::ALL.map(SolverKind::name)}),
            "eta" => {
                json!({"type": "number", "minimum": 0, "maximum": 1, "default": 0, "description": "Noise of ddim"})
            }
            "shift" => json!({"type": "number", "minimum": 0.01, "maximum": 100, "default": 1,
                "description": "Time shift of euler and heun"}),
            "seed" => json!({"type": "integer", "minimum": 0, "maximum": u64::MAX,
                "description": "Image i has seed + i; where none is given, one is drawn and reported"}),
            "response_format" => {
                json!({"type": "string", "enum": ["b64_json", "png"], "default": "b64_json"})
            }
            "output_format" => json!({"type": "string", "enum": ["png"], "default": "png"}),
            "stream" => json!({"type": "boolean", "default": false}),
            "partial_images" => {
                json!({"type": "integer", "minimum": 0, "maximum": MOST_PREVIEWS, "default": 0,
                "description": "Previews of each image on its way; needs stream"})
            }
            "timeout_ms" => {
                json!({"type": "integer", "minimum": 1, "maximum": limits.request_time.as_millis() as u64,
                "description": "The request fails when it takes longer"})
            }
            "user" => json!({"type": "string", "description": "For your own books"}),
            "background" => json!({"type": "string", "enum": ["auto", "opaque"]}),
            "output_compression" => {
                json!({"type": "integer", "minimum": if limits.ignore_unused { 0 } else { 100 }, "maximum": 100})
            }
            name => match UNUSED.iter().find(|(unused, _)| *unused == name && !limits.ignore_unused) {
                Some((_, choices)) => json!({"type": "string", "enum": choices}),
                None => json!({"type": "string", "description": "Ignored"}),
            },
        };
        properties.insert(field.to_owned(), schema);
    }
    json!({"type": "object", "additionalProperties": false, "properties": properties})
}

fn alias(of: &str) -> Value {
    json!({"description": format!("The same as `{of}`")})
}

fn infer_request() -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "description": "class_label INT64 [N]; perhaps seed UINT64 [N], noise FP32 [N,C,H,W]"},
            "outputs": {"type": "array", "description": "Of image UINT8 [N,H,W,C], latent FP32 [N,C,H,W], seed UINT64 [N]"},
            "parameters": {"type": "object",
                "description": "steps, guidance_scale, sampler, eta, shift, timeout_ms as in ImageRequest; binary_data_output"},
        },
    })
}

fn error_schema() -> Value {
    let text = json!({"type": ["string", "null"]});
    json!({"type": "object", "properties": {"error": {"type": "object",
        "properties": {"message": text, "type": text, "param": text, "code": text}}}})
}
