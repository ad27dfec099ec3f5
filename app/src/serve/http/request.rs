//! From the fields of a request for images to an order.

use std::time::{Duration, Instant};

use models::{Guidance, ModelError, Solver, SolverKind};
use serde_json::Value;

use super::App;
use super::error::{ApiError, ApiResult};
use super::fields::{Fields, shown, whole};
use crate::sampler::{default_sampler, default_steps};
use crate::serve::batching::order::{Order, Sample};
use crate::serve::model::Source;

/// The guidance scale where none is given, as `mudit sample` has it.
pub(crate) const DEFAULT_GUIDANCE: f64 = 1.5;
/// The largest guidance scale.
pub(crate) const MOST_GUIDANCE: f64 = 100.0;
/// Most previews of an image.
pub(crate) const MOST_PREVIEWS: u64 = 50;
/// The largest drawn seed: every JSON reader keeps it whole.
const LARGEST_DRAWN: u64 = (1 << 53) - 1;

/// Every field of a request for images.
pub(crate) const FIELDS: [&str; 25] = [
    "model",
    "prompt",
    "class_label",
    "n",
    "size",
    "steps",
    "num_inference_steps",
    "guidance_scale",
    "cfg",
    "cfg_scale",
    "sampler",
    "eta",
    "shift",
    "seed",
    "response_format",
    "output_format",
    "stream",
    "partial_images",
    "timeout_ms",
    "user",
    "quality",
    "style",
    "background",
    "moderation",
    "output_compression",
];

/// Texts without a meaning for these models, and what is taken all the same.
pub(crate) const UNUSED: [(&str, &[&str]); 3] =
    [("quality", &["auto", "standard"]), ("style", &["auto"]), ("moderation", &["auto"])];

/// How the images are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// In JSON.
    Base64,
    /// One PNG as it is.
    Png,
}

/// A request that was understood.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) order: Order,
    pub(crate) sampler: SolverKind,
    /// As the user counts them: a Heun step evaluates the model twice.
    pub(crate) steps: usize,
    pub(crate) format: Option<Format>,
    pub(crate) stream: bool,
}

/// Reads a request.
pub(crate) fn read(app: &App, mut fields: Fields) -> ApiResult<Request> {
    let (index, source) = model(app, fields.text(&["model"])?)?;
    let labels = labels(&mut fields, source)?;
    let n = fields.whole(&["n"], 1..=app.limits.images as u64)?.map(|n| n as usize);
    let labels = one_each(labels, n, app.limits.images)?;
    sizes_and_neutral(&mut fields, source, app.limits.ignore_unused)?;
    let (solver, steps) = solver(&mut fields, source, app.limits.steps)?;
    let guidance = guidance(&mut fields, source, &labels)?;
    let seed = match fields.whole(&["seed"], 0..=u64::MAX)? {
        Some(seed) => seed,
        None => random() & LARGEST_DRAWN,
    };
    let format = fields.choice("response_format", &["b64_json", "png"])?.map(|f| match f.as_str() {
        "png" => Format::Png,
        _ => Format::Base64,
    });
    let stream = fields.flag("stream")?.unwrap_or(false);
    let previews = fields.whole(&["partial_images"], 0..=MOST_PREVIEWS)?.unwrap_or(0) as usize;
    if previews > 0 && !stream {
        return Err(ApiError::field("partial_images", "partial images come by `stream`: set it to true"));
    }
    if format == Some(Format::Png) && (stream || labels.len() != 1) {
        return Err(ApiError::field("response_format", "`png` is for one image that is not streamed"));
    }
    let most = app.limits.request_time;
    let timeout =
        fields.whole(&["timeout_ms"], 1..=most.as_millis() as u64)?.map_or(most, Duration::from_millis);
    fields.finish(&FIELDS)?;
    let plan = source.plan(&solver).map_err(|e| solver_field(&e))?;
    let sample = |(i, label)| Sample { label, seed: seed.wrapping_add(i as u64), start: None };
    let samples = labels.into_iter().enumerate().map(sample).collect();
    let deadline = Some(Instant::now() + timeout);
    let order = Order { model: index, samples, plan, guidance, previews, deadline };
    Ok(Request { order, sampler: solver.kind, steps, format, stream })
}

/// The model that is asked for; the first where none is.
pub(crate) fn model(app: &App, name: Option<String>) -> ApiResult<(usize, &Source)> {
    let found = match &name {
        None => app.sources.first().map(|s| (0, s)),
        Some(name) => app.sources.iter().enumerate().find(|(_, s)| s.name == *name),
    };
    found.ok_or_else(|| {
        let names: Vec<&str> = app.sources.iter().map(|s| s.name.as_str()).collect();
        let got = shown(&Value::from(name.unwrap_or_default()));
        let mut error =
            ApiError::field("model", format!("there is no model {got}; there is {}", names.join(", ")));
        (error.status, error.code) = (axum::http::StatusCode::NOT_FOUND, "model_not_found");
        error
    })
}

/// The classes, from `class_label` or from `prompt`.
fn labels(fields: &mut Fields, source: &Source) -> ApiResult<Vec<i64>> {
    let prompt = fields.text(&["prompt"])?;
    let prompt = prompt.filter(|p| !p.trim().is_empty());
    let from_prompt = prompt.map(|text| class("prompt", &text, source)).transpose()?;
    let labels = match fields.take(&["class_label"])? {
        None => {
            let expected =
                || ApiError::field("class_label", format!("give a class: {}", source.model.known_classes()));
            return Ok(vec![from_prompt.ok_or_else(expected)?]);
        }
        Some((_, Value::Array(all))) if all.is_empty() => {
            return Err(ApiError::field("class_label", "expected at least one class, got []"));
        }
        Some((_, Value::Array(all))) => {
            all.iter().map(|v| label(v, source)).collect::<ApiResult<Vec<_>>>()?
        }
        Some((_, value)) => vec![label(&value, source)?],
    };
    if let Some(other) = from_prompt.filter(|p| labels.iter().any(|l| l != p)) {
        let name = source.class_name(other);
        return Err(ApiError::field(
            "prompt",
            format!("it says class {name}, and `class_label` another one"),
        ));
    }
    Ok(labels)
}

/// A class by number, name, or null for none.
fn label(value: &Value, source: &Source) -> ApiResult<i64> {
    let found = match value {
        Value::String(text) => return class("class_label", text, source),
        Value::Null => source.model.conditioning().null_class(),
        number => whole(number)
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| *n < source.model.conditioning().class_count()),
    };
    found.map(|class| class as i64).ok_or_else(|| {
        let null = if source.model.conditioning().null_class().is_some() { ", or null for none" } else { "" };
        no_class("class_label", value, &format!("{}{null}", source.model.known_classes()))
    })
}

/// The class that a text means.
fn class(field: &str, text: &str, source: &Source) -> ApiResult<i64> {
    source.model.class(text).map(|class| class as i64).map_err(|error| match error {
        ModelError::UnknownClass { known, .. } => no_class(field, &Value::from(text), &known),
        other => ApiError::field(field, other),
    })
}

fn no_class(field: &str, got: &Value, expected: &str) -> ApiError {
    ApiError::field(field, format!("{} is no class of this model; expected {expected}", shown(got)))
}

/// One class an image.
fn one_each(labels: Vec<i64>, n: Option<usize>, most: usize) -> ApiResult<Vec<i64>> {
    match (labels.len(), n) {
        (1, n) => Ok(vec![labels[0]; n.unwrap_or(1)]),
        (count, None) if count <= most => Ok(labels),
        (count, Some(n)) if count == n => Ok(labels),
        (count, None) => Err(ApiError::field(
            "class_label",
            format!("{count} images are asked for; at most {most} are made"),
        )),
        (count, Some(n)) => {
            Err(ApiError::field("n", format!("it is {n}, and `class_label` names {count} images")))
        }
    }
}

/// Fields that this server has one value for; where it was told to, it takes any value of those that cannot matter.
fn sizes_and_neutral(fields: &mut Fields, source: &Source, ignore_unused: bool) -> ApiResult<()> {
    let size = source.size();
    fields.choice("size", &[size.as_str(), "auto"])?;
    fields.choice("output_format", &["png"])?;
    // A transparent background would be another picture.
    fields.choice("background", &["auto", "opaque"])?;
    let told = |mut error: ApiError| {
        if !ignore_unused {
            error.message.push_str("; a server with --ignore-unused-options takes any");
        }
        error
    };
    for (name, neutral) in UNUSED {
        let taken = if ignore_unused { fields.text(&[name]) } else { fields.choice(name, neutral) };
        taken.map_err(told)?;
    }
    // PNG loses nothing, whatever is asked of it.
    let least = if ignore_unused { 0 } else { 100 };
    fields.whole(&["output_compression"], least..=100).map_err(told)?;
    // It is for the client's own books.
    fields.text(&["user"])?;
    Ok(())
}

fn solver(fields: &mut Fields, source: &Source, most: usize) -> ApiResult<(Solver, usize)> {
    let objective = source.model.objective;
    let usable: Vec<&str> =
        SolverKind::ALL.iter().filter(|k| k.objective() == objective).map(|k| k.name()).collect();
    let kind = match fields.choice("sampler", &usable)? {
        Some(name) => name.parse().map_err(|e| solver_field(&e))?,
        None => default_sampler(objective),
    };
    let steps = fields.whole(&["steps", "num_inference_steps"], 1..=most as u64)?;
    let steps = steps.map_or(default_steps(kind).min(most), |s| s as usize);
    let eta = fields.number(&["eta"], 0.0..=1.0)?.unwrap_or(0.0);
    let shift = fields.number(&["shift"], 0.01..=100.0)?.unwrap_or(1.0);
    Ok((Solver { eta, shift, ..Solver::new(kind, models::Spacing::even(steps)) }, steps))
}

/// A refusal of the solver as that of a field.
fn solver_field(error: &ModelError) -> ApiError {
    let field = match error {
        ModelError::SolverOption { option, .. } => option,
        ModelError::BadSpacing { .. } => "steps",
        _ => "sampler",
    };
    ApiError::field(field, error)
}

fn guidance(fields: &mut Fields, source: &Source, labels: &[i64]) -> ApiResult<f32> {
    let names = ["guidance_scale", "cfg", "cfg_scale"];
    let given = fields.number(&names, 0.0..=MOST_GUIDANCE)?;
    let null = source.model.conditioning().null_class().map(|n| n as i64);
    let possible = source.guided != Guidance::Off && null.is_some();
    let classless = labels.iter().any(|l| Some(*l) == null);
    match given {
        Some(scale) if scale != 1.0 && !possible => {
            Err(ApiError::field(names[0], "this model cannot be guided: expected 1"))
        }
        Some(scale) if scale != 1.0 && classless => {
            Err(ApiError::field(names[0], "an image without class cannot be guided: expected 1"))
        }
        Some(scale) => Ok(scale as f32),
        None if possible && !classless => Ok(DEFAULT_GUIDANCE as f32),
        None => Ok(1.0),
    }
}

/// 64 random bits.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // The standard library keys every such hasher from the system's random source and a counter.
    RandomState::new().build_hasher().finish()
}
