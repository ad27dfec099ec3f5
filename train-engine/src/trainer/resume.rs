//! Whether a run may go on from a checkpoint: only with what the steps behind it were computed with.

use std::path::{Path, absolute};

use models::DitConfig;

use super::RUN_CONFIG_FILE;
use crate::checkpoint::{CONFIG_FILE, State};
use crate::config::TrainConfig;
use crate::data::DataIdentity;
use crate::error::{Result, TrainError};

/// Refuses to go on with a run whose results another configuration would change.
///
/// # Errors
/// [`TrainError::BadCheckpoint`] naming every key that differs.
pub(super) fn refuse_other_run(
    config: &TrainConfig,
    run_dir: &Path,
    (path, state): (&Path, &State),
) -> Result<()> {
    let refuse = |what: &str| {
        let reason = format!(
            "it belongs to another configuration ({what}); restore it, or start from these weights in another \
             directory: --set train.from={}",
            run_dir.display()
        );
        Err(TrainError::BadCheckpoint { path: path.to_path_buf(), reason })
    };
    if let Some(from) = &config.train.from {
        let meant = |path: &Path| absolute(path).unwrap_or_else(|_| path.to_path_buf());
        let before = state.origin.as_ref().map(|origin| origin.from.as_path());
        if before.map(meant) != Some(meant(from)) {
            let before = before.map_or_else(|| "unset".into(), |path| path.display().to_string());
            return refuse(&format!(
                "train.from: {before} before, {} now, and it is read when a run begins",
                from.display()
            ));
        }
    }
    if state.config_hash != config.hash()? {
        let before = TrainConfig::load(&run_dir.join(RUN_CONFIG_FILE), &[]);
        match before.and_then(|before| config.conflicts_with(&before)) {
            // The run is older than a key of the configuration, and the key has the value that was in force.
            Ok(conflicts) if conflicts.is_empty() => {}
            Ok(conflicts) => return refuse(&conflicts.join("; ")),
            Err(_) => return refuse("its hash differs"),
        }
    }
    refuse_other_decay(config, run_dir, (path, state))
}

/// A decaying learning rate depends on the length of the run, or of its decay, at every step.
fn refuse_other_decay(config: &TrainConfig, run_dir: &Path, (path, state): (&Path, &State)) -> Result<()> {
    let train = &config.train;
    let Some(now) = train.decay_end() else { return Ok(()) };
    // Runs from before the key decay over all of their steps.
    let before = state.decay_steps.unwrap_or(state.total_steps);
    if now == before {
        return Ok(());
    }
    let schedule = format!("{:?}", train.schedule).to_lowercase();
    Err(TrainError::BadCheckpoint {
        path: path.to_path_buf(),
        reason: format!(
            "its learning rate decays ({schedule}) to step {before}, and here it would to step {now}: what was trained \
             so far would be of neither run. `train.decay_steps = {before}` keeps the decay and lets the rate stay at \
             {} after it; or start from these weights in another directory: --set train.from={}",
            train.learning_rate * train.final_fraction,
            run_dir.display()
        ),
    })
}

/// What to tell of the data set of a run that goes on.
pub(super) enum DataNews {
    /// It is the same, or there is nothing to go on from.
    Same,
    /// The checkpoint is older than fingerprints of data.
    Unknown,
    /// It differs so.
    Changed(String),
}

/// Compares the data set with the one of the checkpoint.
///
/// # Errors
/// [`TrainError::OtherData`] where the model cannot go on with it.
pub(super) fn compare_data(
    data: &DataIdentity,
    model: &DitConfig,
    (path, state): (&Path, &State),
) -> Result<DataNews> {
    let Some(before) = &state.data else { return Ok(DataNews::Unknown) };
    let differences = data.differences(before);
    if differences.is_empty() {
        return Ok(DataNews::Same);
    }
    let differences = differences.join("; ");
    let config = path.join(CONFIG_FILE);
    let saved = DitConfig::resolve(&config.display().to_string())?;
    if saved.num_classes != model.num_classes {
        return Err(TrainError::OtherData {
            path: path.to_path_buf(),
            differences,
            remedy: format!(
                "the model has {} classes and keeps them: bring the data back, or begin a new run from these weights \
                 in another directory with `train.from`",
                saved.num_classes
            ),
        });
    }
    Ok(DataNews::Changed(differences))
}
