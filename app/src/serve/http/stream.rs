//! Server-sent events: progress, previews and images as they are made.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use serde_json::{Value, json};

use super::App;
use super::error::{ApiError, ApiResult};
use super::images::{Waiting, encode, internal, now, settings};
use super::request::Request;
use crate::serve::batching::order::Event;

/// A stream on its way. The order is cancelled when the client goes and this is dropped.
struct Stream {
    app: Arc<App>,
    request: Request,
    waiting: Waiting,
    /// Frames that are made and not sent.
    ready: VecDeque<String>,
    ended: bool,
}

/// Begins to answer with events. A refusal is still an answer of its own; later failures are events.
pub(super) fn respond(app: &Arc<App>, request: Request) -> ApiResult<Response> {
    let waiting = Waiting::submit(&app.batcher, request.order.clone())?;
    let stream = Stream { app: app.clone(), request, waiting, ready: VecDeque::new(), ended: false };
    let frames = stream::unfold(stream, |mut stream| async move {
        let frame = stream.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(frame)), stream))
    });
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

impl Stream {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            if self.ended {
                return None;
            }
            let outcome = match self.waiting.events.recv().await {
                Some(event) => self.take(event).await,
                None => Err(internal("the engine left an order without an end")),
            };
            if let Err(error) = outcome {
                self.ready.push_back(frame("error", &error.body()));
                self.ended = true;
            }
        }
    }

    async fn take(&mut self, event: Event) -> ApiResult<()> {
        let steps = self.request.order.plan.steps.len();
        match event {
            Event::Step { sample, done } => {
                let body = json!({"sample": sample, "step": done, "steps": steps});
                self.push("image_generation.progress", body);
            }
            Event::Preview { sample, index, done, values } => {
                let mut body = self.image(sample, values).await?;
                body["partial_image_index"] = json!(index);
                body["step"] = json!(done);
                body["steps"] = json!(steps);
                self.push("image_generation.partial_image", body);
            }
            Event::Image { sample, values } => {
                let mut body = self.image(sample, values).await?;
                body["usage"] = json!({"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
                    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}});
                self.push("image_generation.completed", body);
            }
            Event::Finished(_) => {
                self.ready.push_back("data: [DONE]\n\n".to_owned());
                self.ended = true;
            }
            Event::Failed(failure) => return Err(ApiError::from(failure)),
        }
        Ok(())
    }

    /// What OpenAI's events of an image say, and what this server adds.
    async fn image(&self, sample: usize, values: Vec<f32>) -> ApiResult<Value> {
        let of = &self.request.order.samples[sample];
        let png = encode(&self.app, self.request.order.model, values).await?;
        let mut body = settings(&self.app, &self.request);
        body["b64_json"] = json!(STANDARD.encode(png));
        body["created_at"] = json!(now());
        body["sample"] = json!(sample);
        body["seed"] = json!(of.seed);
        body["class_label"] = json!(of.label);
        Ok(body)
    }

    fn push(&mut self, kind: &str, mut body: Value) {
        body["type"] = json!(kind);
        self.ready.push_back(frame(kind, &body));
    }
}

fn frame(kind: &str, body: &Value) -> String {
    format!("event: {kind}\ndata: {body}\n\n")
}
