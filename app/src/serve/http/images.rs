//! `POST /v1/images/generations`: images in one answer.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::error::{ApiError, ApiResult};
use super::request::{Format, Request};
use super::{App, Body, stream};
use crate::serve::batching::Batcher;
use crate::serve::batching::order::{Cost, Event, Order};
use crate::serve::picture::png;

/// Progress events that may wait for a client that reads slowly; further ones are left out.
const SLACK: usize = 64;

/// An order of a client that waits for it: dropped, it is cancelled.
#[derive(Debug)]
pub(crate) struct Waiting {
    batcher: Batcher,
    id: u64,
    pub(crate) events: mpsc::Receiver<Event>,
}

impl Waiting {
    /// Hands an order to the batcher.
    pub(crate) fn submit(batcher: &Batcher, order: Order) -> ApiResult<Self> {
        // There is room for every event that counts; progress takes only what is left over.
        let needed = order.samples.len() * (order.previews + 1) + 1;
        let (sender, events) = mpsc::channel(needed + SLACK);
        let sink = move |event: Event| {
            if !matches!(event, Event::Step { .. }) || sender.capacity() > needed {
                // The receiver is gone when the client is; the order is then cancelled.
                let _ = sender.try_send(event);
            }
        };
        let id = batcher.submit(order, Box::new(sink))?;
        Ok(Self { batcher: batcher.clone(), id, events })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.batcher.cancel(self.id);
    }
}

/// One finished image.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    pub(crate) png: Vec<u8>,
    pub(crate) seed: u64,
    pub(crate) label: i64,
}

/// `POST /v1/images/generations`.
pub(crate) async fn generate(
    State(app): State<Arc<App>>,
    Extension(accepted): Extension<super::Accepted>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    let mut request = super::request::read(&app, body.fields()?)?;
    let wants_png = headers.get(header::ACCEPT).is_some_and(|a| a.as_bytes() == b"image/png");
    if wants_png && request.format.is_none() && !request.stream {
        if request.order.samples.len() != 1 {
            return Err(ApiError::field("n", "`Accept: image/png` is for one image"));
        }
        request.format = Some(Format::Png);
    }
    if request.stream {
        return stream::respond(&app, request);
    }
    let mut waiting = Waiting::submit(&app.batcher, request.order.clone())?;
    let (pictures, cost) = collect(&app, &request, &mut waiting).await?;
    let mut response = match (request.format, pictures.first()) {
        (Some(Format::Png), Some(picture)) => raw(picture),
        _ => Json(body_of(&app, &request, &pictures, cost)).into_response(),
    };
    let times = [
        ("x-queue-time", cost.queued),
        ("x-compute-time", cost.computed),
        ("x-total-time", accepted.0.elapsed()),
    ];
    for (name, time) in times {
        response.headers_mut().insert(name, HeaderValue::from(time.as_millis() as u64));
    }
    Ok(response)
}

fn raw(picture: &Picture) -> Response {
    let mut response = picture.png.clone().into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("image/png"));
    headers.insert("x-seed", HeaderValue::from(picture.seed));
    headers.insert("x-class-label", HeaderValue::from(picture.label));
    response
}

/// Waits for all images.
pub(crate) async fn collect(
    app: &Arc<App>,
    request: &Request,
    waiting: &mut Waiting,
) -> ApiResult<(Vec<Picture>, Cost)> {
    let samples = &request.order.samples;
    let mut pictures: Vec<Option<Picture>> = vec![None; samples.len()];
    while let Some(event) = waiting.events.recv().await {
        match event {
            Event::Image { sample, values } => {
                let of = &samples[sample];
                let png = encode(app, request.order.model, values).await?;
                pictures[sample] = Some(Picture { png, seed: of.seed, label: of.label });
            }
            Event::Finished(cost) => return Ok((pictures.into_iter().flatten().collect(), cost)),
            Event::Failed(failure) => return Err(failure.into()),
            Event::Step { .. } | Event::Preview { .. } => {}
        }
    }
    Err(internal("the engine left an order without an end"))
}

/// A picture, made off the threads that make steps and off those that answer.
pub(crate) async fn encode(app: &Arc<App>, model: usize, values: Vec<f32>) -> ApiResult<Vec<u8>> {
    let shape = app.sources[model].shape();
    let made = tokio::task::spawn_blocking(move || png(&values, shape)).await;
    match made {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(internal(&format!("{error:#}"))),
        Err(_) => Err(internal("encoding a picture panicked")),
    }
}

pub(crate) fn internal(text: &str) -> ApiError {
    ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, "internal", text)
}

/// The answer's body.
pub(crate) fn body_of(app: &App, request: &Request, pictures: &[Picture], cost: Cost) -> Value {
    let source = &app.sources[request.order.model];
    let data: Vec<Value> = pictures
        .iter()
        .map(|p| {
            json!({
                "b64_json": STANDARD.encode(&p.png), "revised_prompt": null, "seed": p.seed,
                "class_label": p.label, "class_name": source.class_name(p.label),
            })
        })
        .collect();
    let mut body = settings(app, request);
    body["created"] = json!(now());
    body["data"] = json!(data);
    body["metrics"] = json!({
        "queue_ms": cost.queued.as_secs_f64() * 1e3, "compute_ms": cost.computed.as_secs_f64() * 1e3,
        "image_steps": request.order.work(), "mean_batch_rows": cost.rows,
    });
    body
}

/// What the images are made with, all defaults filled in.
pub(crate) fn settings(app: &App, request: &Request) -> Value {
    let source = &app.sources[request.order.model];
    json!({
        "created": now(), "model": source.name, "size": source.size(), "output_format": "png", "quality": "auto",
        "background": "auto", "sampler": request.sampler.name(), "steps": request.steps,
        "guidance_scale": request.order.guidance,
    })
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
