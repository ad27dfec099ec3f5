//! What can go wrong in this room, as data.

use std::io;
use std::path::{Path, PathBuf};

use models::ModelError;
use runtime::RuntimeError;
use runtime::hint::hint;
use runtime::lock::Holder;

/// Short for a result with [`TrainError`].
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

/// Everything the training engine refuses or fails at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The operating system refused a file operation.
    #[error("cannot {action} `{}`: {source}{}", path.display(), hint(action, path, source))]
    Io {
        /// What was tried: a verb such as `read`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// A configuration key that does not exist.
    #[error("unknown key `{key}` in {origin}: {}", nearest_hint(nearest.as_deref(), valid))]
    UnknownKey {
        /// The dotted key as given.
        key: String,
        /// The file or `--set` it came from.
        origin: String,
        /// The valid dotted key closest to it, where one is close.
        nearest: Option<String>,
        /// All names that are valid in its place.
        valid: Vec<&'static str>,
    },

    /// A configuration that is not TOML, or a value of the wrong type.
    #[error("{origin} is no valid configuration: {reason}")]
    ConfigSyntax {
        /// The file or `--set` it came from.
        origin: String,
        /// The parser's account: line, expected, got.
        reason: String,
    },

    /// A `--set` that is not of the form `section.key=value`.
    #[error("cannot read the override `{given}`: expected `section.key=value`, as in `train.steps=1000`")]
    Override {
        /// The override as given.
        given: String,
    },

    /// A configuration value outside its range.
    #[error("`{key} = {value}` is not allowed: it must be {allowed}")]
    BadValue {
        /// The dotted key.
        key: &'static str,
        /// The value found.
        value: String,
        /// What would be accepted.
        allowed: String,
    },

    /// A data file whose content is not what its format or its companions demand.
    #[error("`{}` cannot be used: {what}: expected {expected}, got {got}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// The part that is wrong, such as `magic number`.
        what: String,
        /// What the format demands.
        expected: String,
        /// What the file holds.
        got: String,
    },

    /// An image that does not decode.
    #[error("cannot decode the image `{}`: {reason}; replace or remove the file", path.display())]
    BadImage {
        /// The file.
        path: PathBuf,
        /// The decoder's account.
        reason: String,
    },

    /// A data set that cannot be used as configured.
    #[error("the data set `{}` cannot be used: {reason}", path.display())]
    BadDataset {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong, with the remedy.
        reason: String,
    },

    /// A data set smaller than one batch.
    #[error(
        "the data set holds {images} images, fewer than one batch of {batch_size}: lower `train.batch_size`"
    )]
    DatasetTooSmall {
        /// Images in the set.
        images: usize,
        /// Images of one optimizer step.
        batch_size: usize,
    },

    /// A sample index or buffer that does not fit the data set.
    #[error("internal: the data set has {len} samples of {size} values; asked for sample {index} into {got}")]
    BadRead {
        /// Samples in the set.
        len: usize,
        /// Values of one sample.
        size: usize,
        /// The index asked for.
        index: usize,
        /// The length of the buffer given.
        got: usize,
    },

    /// Something had to be fetched while fetching was forbidden.
    #[error("{what} is not on this machine and `--offline` forbids fetching it: {remedy}")]
    Offline {
        /// What is missing.
        what: &'static str,
        /// How to get it by hand.
        remedy: String,
    },

    /// Something could not be fetched from any of its sources.
    #[error("cannot fetch {what}: {}; {remedy}", attempts.join("; "))]
    Fetch {
        /// What is missing.
        what: &'static str,
        /// One account for each source tried.
        attempts: Vec<String>,
        /// How to get it by hand.
        remedy: String,
    },

    /// A checkpoint that cannot be used.
    #[error("the checkpoint `{}` cannot be used: {reason}", path.display())]
    BadCheckpoint {
        /// The checkpoint's directory.
        path: PathBuf,
        /// What is wrong, with the remedy.
        reason: String,
    },

    /// A run that was trained on other data than it would go on with.
    #[error("the data set is not the one that `{}` was trained on: {differences}; {remedy}", path.display())]
    OtherData {
        /// The checkpoint's directory, or the sweep's.
        path: PathBuf,
        /// What differs.
        differences: String,
        /// What can be done.
        remedy: String,
    },

    /// A trial of a sweep that cannot run.
    #[error("the trial {set}: {source}")]
    BadTrial {
        /// What it sets.
        set: String,
        /// Why not.
        source: Box<Self>,
    },

    /// A run directory that another process is writing to.
    #[error("{holder} is training in `{}`: wait for it, or choose another directory", path.display())]
    Locked {
        /// The run directory.
        path: PathBuf,
        /// The process.
        holder: Holder,
    },

    /// A line of `metrics.jsonl` that is not one of ours.
    #[error("`{}` line {line} is no metrics record: {reason}; move the file away to go on", path.display())]
    BadMetrics {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },

    /// A session, an arena or one of their files.
    #[error(transparent)]
    Runtime(RuntimeError),

    /// The model's description or its graph.
    #[error(transparent)]
    Model(#[from] ModelError),

    /// The loss or a gradient is not finite; nothing was updated.
    #[error(
        "step {step}: the loss is {loss} or a gradient is not finite, though the images were; nothing was updated{}; try \
         a lower `train.learning_rate` or a `train.clip`",
        kept(evidence.as_deref())
    )]
    NotFinite {
        /// The step, counted from 1.
        step: u64,
        /// The loss.
        loss: f64,
        /// Where the evidence lies, if it could be written.
        evidence: Option<PathBuf>,
    },

    /// A sample with a value that no training can use.
    #[error(
        "the data set holds {value} in {place} (value {at} of it): take it out or make it anew; neither the gradients nor \
         the rate are to blame"
    )]
    BadSample {
        /// The file and the row, or the sample's number.
        place: String,
        /// NaN or an infinity.
        value: f32,
        /// Which of the sample's values, counted from 0.
        at: usize,
    },

    /// Sample pictures that could not be drawn.
    #[error("cannot draw `{}`: {reason}", path.display())]
    Picture {
        /// The picture.
        path: PathBuf,
        /// Why not.
        reason: String,
    },

    /// A gradient overflows f16 without any scaling of the loss.
    #[error(
        "step {step}: a gradient is not finite in f16 though the loss is not scaled any more ({skipped} steps were left \
         out on the way); train in bf16, or with a lower `train.learning_rate`"
    )]
    LossScale {
        /// The step, counted from 1.
        step: u64,
        /// Steps left out before it.
        skipped: u64,
    },

    /// A data set whose images are not what the model takes.
    #[error("the data set does not fit the model: `{key}` is {model} in the model, {data} in the data")]
    DataMismatch {
        /// The model's key.
        key: &'static str,
        /// The model's value.
        model: usize,
        /// The data set's value.
        data: usize,
    },

    /// Weights of another parameterisation than the model computes with.
    #[error(
        "`{}` was trained under {saved}, the model's configuration says {wanted}: the output layer's product would be \
         scaled by {wanted_scale} instead of {saved_scale}, and its rates are those of another width; use the \
         `config.json` saved beside the weights, or make a plain checkpoint of them with `mudit convert \
         --fold-output-multiplier`",
        path.display()
    )]
    OtherParameterisation {
        /// The weights file.
        path: PathBuf,
        /// What the file says.
        saved: String,
        /// What the configuration says.
        wanted: String,
        /// Factor on the output layer's product under which the weights were trained.
        saved_scale: f64,
        /// The factor that the configuration asks for.
        wanted_scale: f64,
    },

    /// Something that works on the host's memory alone.
    #[error("the training state is on GPU {gpu}, and this reads it in the host's memory; use provider `cpu`")]
    OnDevice {
        /// The CUDA driver's number of the GPU.
        gpu: usize,
    },

    /// A broken invariant of this crate.
    #[error("internal: {0}")]
    Internal(String),
}

impl TrainError {
    /// A closure for `map_err` that adds what was done to which path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// A [`TrainError::BadFile`] from anything that displays.
    #[expect(clippy::needless_pass_by_value, reason = "numbers and literals read better without a reference")]
    pub(crate) fn bad_file(
        path: &Path,
        what: impl Into<String>,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self::BadFile {
            path: path.to_path_buf(),
            what: what.into(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}

impl From<RuntimeError> for TrainError {
    /// File operations become [`TrainError::Io`], so that they end with a remedy wherever they happen.
    fn from(error: RuntimeError) -> Self {
        match error {
            RuntimeError::Io { action, path, source } => Self::Io { action, path, source },
            other => Self::Runtime(other),
        }
    }
}

fn kept(evidence: Option<&Path>) -> String {
    evidence.map_or_else(String::new, |path| {
        format!(", and the batch, the parameters and the gradients' sizes are in `{}`", path.display())
    })
}

fn nearest_hint(nearest: Option<&str>, valid: &[&str]) -> String {
    match nearest {
        Some(name) => format!("did you mean `{name}`?"),
        None => format!("valid here: {}", valid.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_names_the_file_and_the_remedy() {
        let full = TrainError::io("write", Path::new("runs/a"))(io::ErrorKind::StorageFull.into());
        let text = full.to_string();
        let below = RuntimeError::io("write", Path::new("runs/a"), io::ErrorKind::StorageFull.into());
        assert_eq!(TrainError::from(below).to_string(), text);
        assert!(text.starts_with("cannot write `runs/a`: "), "{text}");
        assert!(text.ends_with("free some space and run the same command again"), "{text}");
    }

    #[test]
    fn an_unknown_key_without_a_neighbour_lists_the_valid_ones() {
        let error = TrainError::UnknownKey {
            key: "train.xyz".into(),
            origin: "`a.toml`".into(),
            nearest: None,
            valid: vec!["steps", "seed"],
        };
        assert_eq!(error.to_string(), "unknown key `train.xyz` in `a.toml`: valid here: steps, seed");
    }
}
