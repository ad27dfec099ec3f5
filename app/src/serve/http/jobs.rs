//! Jobs: submit, look, fetch, delete. They go on when the client is gone.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use indexmap::IndexMap;
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::images::{Waiting, body_of, collect, settings};
use super::request::random;
use super::{App, Body, Caller};

/// A finished job is kept so long.
const KEPT: Duration = Duration::from_hours(1);

/// Jobs by their numbers, oldest first.
#[derive(Debug)]
pub(crate) struct Jobs {
    all: Mutex<IndexMap<String, Job>>,
    most: usize,
}

#[derive(Debug)]
struct Job {
    /// The key that it was submitted with; others do not see it.
    owner: Option<usize>,
    created: u64,
    settings: Value,
    state: JobState,
    /// Ends the job when it is sent or dropped.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

#[derive(Debug)]
enum JobState {
    Running,
    Succeeded(Instant, Value),
    Failed(Instant, Value),
}

impl JobState {
    fn ended(&self) -> Option<Instant> {
        match self {
            Self::Running => None,
            Self::Succeeded(at, _) | Self::Failed(at, _) => Some(*at),
        }
    }
}

impl Jobs {
    pub(crate) fn new(most: usize) -> Self {
        Self { all: Mutex::default(), most }
    }

    fn lock(&self) -> MutexGuard<'_, IndexMap<String, Job>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for one more: old results go, oldest first.
    fn make_room(&self) -> ApiResult<()> {
        let mut all = self.lock();
        all.retain(|_, job| job.state.ended().is_none_or(|at| at.elapsed() < KEPT));
        let ended: VecDeque<String> =
            all.iter().filter(|(_, j)| j.state.ended().is_some()).map(|(id, _)| id.clone()).collect();
        for id in ended {
            if all.len() < self.most {
                break;
            }
            all.shift_remove(&id);
        }
        if all.len() < self.most {
            return Ok(());
        }
        let text = format!("{} jobs run already, and no more are kept", self.most);
        let mut error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_jobs", text);
        error.retry_after = Some(Duration::from_secs(1));
        Err(error)
    }

    fn end(&self, id: &str, state: JobState) {
        // It may have been deleted meanwhile.
        if let Some(job) = self.lock().get_mut(id) {
            job.state = state;
            job.stop = None;
        }
    }

    fn describe(&self, id: &str, caller: Caller) -> ApiResult<Value> {
        let all = self.lock();
        let job = all.get(id).filter(|job| job.owner == caller.0).ok_or_else(|| unknown(id))?;
        let mut body = json!({"id": id, "object": "image.job", "created": job.created});
        match &job.state {
            JobState::Running => {
                body["status"] = json!("running");
                body["settings"] = job.settings.clone();
            }
            JobState::Succeeded(_, result) => {
                body["status"] = json!("succeeded");
                body["result"] = result.clone();
            }
            JobState::Failed(_, error) => {
                body["status"] = json!("failed");
                body["error"] = error["error"].clone();
            }
        }
        Ok(body)
    }
}

fn unknown(id: &str) -> ApiError {
    let text = format!("there is no job `{}`; it may be older than an hour", super::fields::cut(id));
    ApiError::new(StatusCode::NOT_FOUND, "job_not_found", text)
}

/// `POST /v1/images/jobs`.
pub(crate) async fn submit(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> ApiResult<Response> {
    let request = super::request::read(&app, body.fields()?)?;
    if request.stream {
        return Err(ApiError::field("stream", "a job is polled, not streamed"));
    }
    if request.format == Some(super::request::Format::Png) {
        return Err(ApiError::field("response_format", "a job gives its images in JSON: expected b64_json"));
    }
    app.jobs.make_room()?;
    let mut waiting = Waiting::submit(&app.batcher, request.order.clone())?;
    let id = format!("job-{:016x}{:016x}", random(), random());
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let created = super::images::now();
    let settings = settings(&app, &request);
    let job = Job { owner: caller.0, created, settings, state: JobState::Running, stop: Some(stop) };
    app.jobs.lock().insert(id.clone(), job);
    let answer = app.jobs.describe(&id, caller)?;
    let (task_app, task_id) = (app.clone(), id.clone());
    tokio::spawn(async move {
        let outcome = tokio::select! {
            outcome = collect(&task_app, &request, &mut waiting) => outcome,
            // Deleted: the order is cancelled when `waiting` goes.
            _ = stopped => return,
        };
        let now = Instant::now();
        let state = match outcome {
            Ok((pictures, cost)) => JobState::Succeeded(now, body_of(&task_app, &request, &pictures, cost)),
            Err(error) => JobState::Failed(now, error.body()),
        };
        task_app.jobs.end(&task_id, state);
    });
    let place = format!("/v1/images/jobs/{id}");
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, place)], Json(answer)).into_response())
}

/// `GET /v1/images/jobs/{id}`.
pub(crate) async fn look(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> ApiResult<Json<Value>> {
    app.jobs.describe(&id, caller).map(Json)
}

/// `DELETE /v1/images/jobs/{id}`.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> ApiResult<Json<Value>> {
    let mut all = app.jobs.lock();
    if all.get(&id).is_none_or(|job| job.owner != caller.0) {
        return Err(unknown(&id));
    }
    // With the job goes the sender that its task listens to.
    all.shift_remove(&id);
    Ok(Json(json!({"id": id, "object": "image.job", "deleted": true})))
}
