//! Where a run stands: everything a resumed run needs beside the tensors.

use std::fs;
use std::path::Path;

use runtime::file::write_atomically;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::STATE_FILE;
use crate::data::DataIdentity;
use crate::error::{Result, TrainError};
use crate::loss_scale::LossScale;
use crate::trainer::Origin;

/// The content of `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this format.
    pub format_version: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps the run was planned for.
    pub total_steps: u64,
    /// The step at which its learning rate has decayed, of a run whose rate decays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// Training images seen.
    pub images_seen: u64,
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Batches of the present pass that are complete.
    pub epoch_batch: u64,
    /// Seed of every draw.
    pub seed: u64,
    /// Time spent training, over all resumptions, in seconds.
    pub elapsed_seconds: f64,
    /// [`TrainConfig::hash`](crate::config::TrainConfig::hash) of the run.
    pub config_hash: String,
    /// The factor on the loss, of a run in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// The data set that it was trained on; none in checkpoints from before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataIdentity>,
    /// The weights that the run began with, where it did not draw them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Role, learning-rate factor and init of each parameter.
    pub mup: Value,
}

impl State {
    /// The version written now, and the newest that can be read.
    pub const FORMAT_VERSION: u32 = 1;

    /// Writes `state.json` into a checkpoint's directory.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn write(&self, directory: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| TrainError::Internal(format!("the state does not serialise: {error}")))?;
        Ok(write_atomically(directory.join(STATE_FILE), |out| writeln!(out, "{text}"))?)
    }

    /// Reads `state.json` from a checkpoint's directory.
    ///
    /// # Errors
    /// [`TrainError::BadCheckpoint`] when it cannot be read, is no state, or is of a newer format.
    pub fn read(directory: &Path) -> Result<Self> {
        let bad = |reason: String| TrainError::BadCheckpoint { path: directory.to_path_buf(), reason };
        let text = fs::read_to_string(directory.join(STATE_FILE))
            .map_err(|error| bad(format!("`{STATE_FILE}` cannot be read: {error}")))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|error| bad(format!("`{STATE_FILE}` is no JSON: {error}")))?;
        let version = value.get("format_version").and_then(Value::as_u64);
        if version.is_some_and(|version| version > u64::from(Self::FORMAT_VERSION)) {
            let version = version.unwrap_or_default();
            return Err(bad(format!(
                "its format is {version}, this program reads up to {}: use a newer one",
                Self::FORMAT_VERSION
            )));
        }
        serde_json::from_value(value).map_err(|error| bad(format!("`{STATE_FILE}` is no state: {error}")))
    }
}
