//! The Open Inference Protocol, version 2, over HTTP, with its binary tensor extension: tensors in, tensors out.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::error::{ApiError, ApiResult};
use super::fields::Fields;
use super::images::{Waiting, internal};
use super::request::{self, Request};
use super::tensors::{Data, Tensor};
use super::{App, Body};
use crate::serve::batching::order::Event;
use crate::serve::model::Source;
use crate::serve::picture::pixels;

/// Where the JSON ends and the tensors begin.
pub(super) const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");
/// The one version of every model.
pub(super) const VERSION: &str = "1";
const NOT_READY: &str = "the server is loading or shutting down";

/// `GET /v2`.
pub(crate) async fn server() -> Json<Value> {
    Json(json!({
        "name": "mudit", "version": env!("CARGO_PKG_VERSION"),
        "extensions": ["binary_tensor_data", "model_configuration", "model_repository", "statistics"],
    }))
}

/// `GET /v2/health/live`.
pub(crate) async fn live(State(app): State<Arc<App>>) -> Response {
    if app.live() {
        Json(json!({"live": true})).into_response()
    } else {
        unavailable("live", "a step does not end")
    }
}

/// `GET /v2/health/ready`.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.ready() { Json(json!({"ready": true})).into_response() } else { unavailable("ready", NOT_READY) }
}

fn unavailable(what: &str, why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({what: false, "error": why}))).into_response()
}

/// `GET /v2/models/{model}` and the same of a version.
pub(crate) async fn metadata(
    State(app): State<Arc<App>>,
    Path(path): Path<Vec<String>>,
) -> ApiResult<Json<Value>> {
    let (_, source) = find(&app, &path)?;
    let described = |ports: &[Port]| -> Vec<Value> {
        ports.iter().map(|p| json!({"name": p.name, "datatype": p.datatype, "shape": p.shape})).collect()
    };
    let [inputs, outputs] = ports(source);
    Ok(Json(json!({
        "name": source.name, "versions": [VERSION], "platform": "mudit",
        "inputs": described(&inputs), "outputs": described(&outputs),
    })))
}

/// A tensor that goes in or comes out.
pub(super) struct Port {
    pub(super) name: &'static str,
    pub(super) datatype: &'static str,
    /// -1 is the number of images.
    pub(super) shape: Vec<i64>,
    pub(super) optional: bool,
}

/// The input and output tensors of a model.
pub(super) fn ports(source: &Source) -> [Vec<Port>; 2] {
    let port =
        |name, datatype, shape: &[i64], optional| Port { name, datatype, shape: shape.to_vec(), optional };
    let [c, h, w] = source.shape().map(|n| n as i64);
    let shown = if matches!(c, 1 | 2) { 1 } else { 3 };
    let inputs = vec![
        port("class_label", "INT64", &[-1], false),
        port("seed", "UINT64", &[-1], true),
        port("noise", "FP32", &[-1, c, h, w], true),
    ];
    let outputs = vec![
        port("image", "UINT8", &[-1, h, w, shown], false),
        port("latent", "FP32", &[-1, c, h, w], false),
        port("seed", "UINT64", &[-1], false),
    ];
    [inputs, outputs]
}

/// `GET /v2/models/{model}/ready` and the same of a version.
pub(crate) async fn model_ready(
    State(app): State<Arc<App>>,
    Path(path): Path<Vec<String>>,
) -> ApiResult<Response> {
    let (_, source) = find(&app, &path)?;
    if app.ready() {
        return Ok(Json(json!({"name": source.name, "ready": true})).into_response());
    }
    let body = json!({"name": source.name, "ready": false, "error": NOT_READY});
    Ok((StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response())
}

/// The model of a path, and perhaps its version.
pub(super) fn find<'a>(app: &'a App, path: &[String]) -> ApiResult<(usize, &'a Source)> {
    let found = request::model(app, path.first().cloned())?;
    if let Some(version) = path.get(1).filter(|v| *v != VERSION) {
        let text = format!(
            "model `{}` has version {VERSION} only, not `{}`",
            found.1.name,
            super::fields::cut(version)
        );
        return Err(ApiError::new(StatusCode::NOT_FOUND, "model_not_found", text));
    }
    Ok(found)
}

/// What an inference request asks for.
struct Inference {
    id: Option<String>,
    request: Request,
    /// Output names, and whether each is sent as bytes.
    outputs: Vec<(String, bool)>,
}

/// The output tensors.
const OUTPUTS: [&str; 3] = ["image", "latent", "seed"];

/// `POST /v2/models/{model}/infer` and the same of a version.
pub(crate) async fn infer(
    State(app): State<Arc<App>>,
    Path(path): Path<Vec<String>>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    let (index, source) = find(&app, &path)?;
    let inference = read(&app, &source.name, &headers, &body)?;
    let mut waiting = Waiting::submit(&app.batcher, inference.request.order.clone())?;
    let samples = &inference.request.order.samples;
    let mut values: Vec<Vec<f32>> = vec![Vec::new(); samples.len()];
    loop {
        match waiting.events.recv().await {
            Some(Event::Image { sample, values: made }) => values[sample] = made,
            Some(Event::Finished(_)) => break,
            Some(Event::Failed(failure)) => return Err(failure.into()),
            Some(_) => {}
            None => return Err(internal("the engine left an order without an end")),
        }
    }
    respond(&app.sources[index], &inference, &values)
}

fn read(app: &App, model: &str, headers: &HeaderMap, body: &Body) -> ApiResult<Inference> {
    let (head, mut rest) = split(headers, &body.0)?;
    let mut fields = Fields::parse(head)?;
    let id = fields.text(&["id"])?;
    let Some((_, Value::Array(inputs))) = fields.take(&["inputs"])? else {
        return Err(ApiError::field("inputs", "expected an array of tensors"));
    };
    let (mut parameters, binary_outputs) = parameters(fields.take(&["parameters"])?)?;
    let outputs = outputs(fields.take(&["outputs"])?, binary_outputs)?;
    fields.finish(&["id", "inputs", "outputs", "parameters"])?;
    let mut tensors: Vec<Tensor> = Vec::new();
    for input in inputs {
        let tensor = Tensor::read(input, &mut rest)?;
        if tensors.iter().any(|t| t.name == tensor.name) {
            return Err(ApiError::field(&tensor.name, "the input is there twice"));
        }
        tensors.push(tensor);
    }
    if !rest.is_empty() {
        return Err(ApiError::field("inputs", format!("{} bytes follow the last tensor", rest.len())));
    }
    let mut take = |name: &str| tensors.iter().position(|t| t.name == name).map(|i| tensors.remove(i));
    let (labels, seeds, noise) = (take("class_label"), take("seed"), take("noise"));
    if let Some(tensor) = tensors.first() {
        let text = "there is no such input; expected class_label, seed, noise";
        return Err(ApiError::field(&super::fields::cut(&tensor.name), text));
    }
    let labels = labels.ok_or_else(|| ApiError::field("class_label", "the input is missing"))?.whole()?;
    let n = labels.len();
    parameters.insert("class_label".into(), json!(labels));
    parameters.insert("model".into(), json!(model));
    let mut request = request::read(app, Fields::of(parameters))?;
    if let Some(seeds) = seeds {
        let seeds = seeds.seeds(n)?;
        for (sample, seed) in request.order.samples.iter_mut().zip(seeds) {
            sample.seed = seed;
        }
    }
    if let Some(noise) = noise {
        let [c, h, w] = app.sources[request.order.model].shape();
        let noise = noise.floats(&[n, c, h, w])?;
        for (sample, start) in request.order.samples.iter_mut().zip(noise.chunks_exact(c * h * w)) {
            sample.start = Some(start.to_vec());
        }
    }
    Ok(Inference { id, request, outputs })
}

/// The JSON, and the bytes behind it.
fn split<'b>(headers: &HeaderMap, body: &'b [u8]) -> ApiResult<(&'b [u8], &'b [u8])> {
    let Some(length) = headers.get(HEADER_LENGTH) else { return Ok((body, &[])) };
    let length =
        length.to_str().ok().and_then(|text| text.parse::<usize>().ok()).filter(|n| *n <= body.len());
    let wrong = || {
        ApiError::field(
            HEADER_LENGTH.as_str(),
            format!("expected a number up to the body's {} bytes", body.len()),
        )
    };
    Ok(body.split_at(length.ok_or_else(wrong)?))
}

/// The request's parameters: the settings of the images, and whether outputs are sent as bytes.
fn parameters(given: Option<(&str, Value)>) -> ApiResult<(Map<String, Value>, bool)> {
    const SETTINGS: [&str; 6] = ["steps", "guidance_scale", "sampler", "eta", "shift", "timeout_ms"];
    let mut map = match given {
        None => Map::new(),
        Some((_, Value::Object(map))) => map,
        Some(_) => return Err(ApiError::field("parameters", "expected an object")),
    };
    let binary = map.shift_remove("binary_data_output").is_some_and(|v| v == json!(true));
    if let Some(name) = map.keys().find(|name| !SETTINGS.contains(&name.as_str())) {
        let text = format!("there is no such parameter; expected {}", SETTINGS.join(", "));
        return Err(ApiError::field(&super::fields::cut(name), text));
    }
    Ok((map, binary))
}

fn outputs(given: Option<(&str, Value)>, binary: bool) -> ApiResult<Vec<(String, bool)>> {
    let all = match given {
        None => return Ok(OUTPUTS.map(|name| (name.to_owned(), binary)).to_vec()),
        Some((_, Value::Array(all))) => all,
        Some(_) => return Err(ApiError::field("outputs", "expected an array")),
    };
    let mut wanted = Vec::new();
    for output in all {
        let Value::Object(map) = output else {
            return Err(ApiError::field("outputs", "expected objects with a name"));
        };
        let mut fields = Fields::of(map);
        let name = fields
            .choice("name", &OUTPUTS)?
            .ok_or_else(|| ApiError::field("outputs", "a name is missing"))?;
        let as_bytes = match fields.take(&["parameters"])? {
            None => binary,
            Some((_, Value::Object(map))) => {
                let mut fields = Fields::of(map);
                let flag = fields.flag("binary_data")?.unwrap_or(binary);
                fields.finish(&["binary_data"])?;
                flag
            }
            Some(_) => return Err(ApiError::field("outputs", "parameters must be an object")),
        };
        fields.finish(&["name", "parameters"])?;
        if wanted.iter().any(|(known, _)| *known == name) {
            return Err(ApiError::field("outputs", format!("{name} is there twice")));
        }
        wanted.push((name, as_bytes));
    }
    Ok(wanted)
}

fn respond(source: &Source, inference: &Inference, values: &[Vec<f32>]) -> ApiResult<Response> {
    let [c, h, w] = source.shape();
    let n = values.len();
    let (mut outputs, mut bytes) = (Vec::new(), Vec::new());
    for (name, as_bytes) in &inference.outputs {
        let (shape, data) = match name.as_str() {
            "image" => {
                let mut all = Vec::new();
                let mut shown = 1;
                for values in values {
                    let made = pixels(values, [c, h, w]).map_err(|e| internal(&format!("{e:#}")))?;
                    all.extend(made.0);
                    shown = made.1;
                }
                (vec![n, h, w, shown], Data::Bytes(all))
            }
            "latent" => (vec![n, c, h, w], Data::Floats(values.concat())),
            _ => (vec![n], Data::Seeds(inference.request.order.samples.iter().map(|s| s.seed).collect())),
        };
        let mut output = json!({"name": name, "datatype": data.datatype(), "shape": shape});
        if *as_bytes {
            let data = data.bytes();
            output["parameters"] = json!({"binary_data_size": data.len()});
            bytes.extend(data);
        } else {
            output["data"] = data.json();
        }
        outputs.push(output);
    }
    let mut body = json!({"model_name": source.name, "model_version": VERSION, "outputs": outputs});
    if let Some(id) = &inference.id {
        body["id"] = json!(id);
    }
    if !inference.outputs.iter().any(|(_, as_bytes)| *as_bytes) {
        return Ok(Json(body).into_response());
    }
    let mut text = body.to_string().into_bytes();
    let length = text.len();
    text.extend(bytes);
    let mut response = text.into_response();
    let headers = response.headers_mut();
    headers.insert(HEADER_LENGTH, HeaderValue::from(length));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    Ok(response)
}
