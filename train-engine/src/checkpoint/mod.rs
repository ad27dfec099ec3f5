//! Checkpoints: directories that appear whole or not at all.
//!
//! `RUN/checkpoints/step-00001000/` holds the five [`FILES`]; `RUN/checkpoints/latest` is a relative symbolic link to the
//! newest. A checkpoint is written into a hidden directory beside, each file is synced, and the directory is renamed; a
//! process killed at any moment leaves hidden directories only, which [`RunLock::acquire`] removes.
//!
//! Only what a checkpoint is made of can fail a save. `latest`, the removal of old ones and the like are conveniences: what
//! fails of them is told as a [`Trouble`].

mod latest;
mod state;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process;

use runtime::file::{sync_directory, sync_file};
use runtime::lock::{Lock, Tried};
use runtime::safetensors_file::SafetensorsReader;
pub use state::State;

use crate::error::{Result, TrainError};

/// The model's constructor keys.
pub const CONFIG_FILE: &str = "config.json";
/// The parameters under their published names.
pub const MODEL_FILE: &str = "model.safetensors";
/// The parameters' moving average, under the same names.
pub const EMA_FILE: &str = "ema.safetensors";
/// The optimizer's moments.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The run's [`State`].
pub const STATE_FILE: &str = "state.json";
/// All files of a checkpoint.
pub const FILES: [&str; 5] = [CONFIG_FILE, MODEL_FILE, EMA_FILE, OPTIMIZER_FILE, STATE_FILE];

const DIRECTORY: &str = "checkpoints";
const PREFIX: &str = "step-";
/// What unfinished and half-removed directories start with.
const HIDDEN_PREFIX: &str = ".step-";
const LOCK_FILE: &str = ".lock";

/// What is told of a failure that makes no next step wrong: its kind, in words, and what happened.
pub type Trouble<'a> = dyn FnMut(&'static str, TrainError) + 'a;

/// The right to write to a run's directory; given back when dropped or when the process ends, however it ends.
#[derive(Debug)]
pub struct RunLock {
    run_dir: PathBuf,
    lock: Lock,
}

impl RunLock {
    /// Makes the run's directory, takes its lock, finds out whether checkpoints can be written, and removes what a killed
    /// process left unfinished.
    ///
    /// # Errors
    /// [`TrainError::Locked`] when another process holds it; [`TrainError::Io`].
    pub fn acquire(run_dir: &Path, trouble: &mut Trouble<'_>) -> Result<Self> {
        let directory = run_dir.join(DIRECTORY);
        fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
        let lock = match Lock::take(&run_dir.join(LOCK_FILE))? {
            Tried::Ours(lock) => Self { run_dir: run_dir.to_path_buf(), lock },
            Tried::Held(holder) => {
                return Err(TrainError::Locked { path: run_dir.to_path_buf(), holder });
            }
        };
        lock.remove_leftovers(trouble)?;
        probe(&directory)?;
        latest::adopt(&directory, trouble)?;
        Ok(lock)
    }

    /// What stands in for the lock of a file system that has none.
    pub fn stand_in(&self) -> Option<String> {
        self.lock.stand_in()
    }

    /// Writes the checkpoint of `step`, points `latest` to it and removes all but the newest `keep` (at least one).
    ///
    /// `write` fills the directory it is given with all five [`FILES`]. Whatever fails, checkpoints that were there
    /// before are untouched and no unfinished one remains.
    ///
    /// # Errors
    /// What `write` gives; [`TrainError::Internal`] when it leaves out a file; [`TrainError::Io`].
    pub fn save(
        &self,
        step: u64,
        keep: usize,
        trouble: &mut Trouble<'_>,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let directory = self.run_dir.join(DIRECTORY);
        let name = name_of(step);
        let target = directory.join(&name);
        let unfinished = directory.join(format!(".{name}.new-{}", process::id()));
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(TrainError::io("remove", &unfinished))?;
        }
        fs::create_dir(&unfinished).map_err(TrainError::io("create", &unfinished))?;
        let written = write(&unfinished).and_then(|()| sync_files(&unfinished, trouble)).and_then(|()| {
            if target.exists() {
                // A checkpoint of this step that could not be used, or that an earlier run went beyond.
                remove_hidden(&hide(&target)?, trouble);
            }
            fs::rename(&unfinished, &target).map_err(TrainError::io("write", &target))
        });
        if let Err(error) = written {
            // The first error is the one to tell; what stays behind goes at the next start.
            drop(fs::remove_dir_all(&unfinished));
            return Err(error);
        }
        try_sync(&directory, trouble);
        latest::point(&directory, &name, trouble);
        self.prune(step, keep, trouble);
        Ok(target)
    }

    fn prune(&self, newest: u64, keep: usize, trouble: &mut Trouble<'_>) {
        let mut checkpoints = match list(&self.run_dir) {
            Ok(checkpoints) => checkpoints,
            Err(error) => return trouble(STAYS, error),
        };
        // The one just written stays even where later ones of an abandoned course are there.
        checkpoints.retain(|(step, _)| *step != newest);
        let surplus = (checkpoints.len() + 1).saturating_sub(keep.max(1));
        for (_, path) in checkpoints.iter().take(surplus) {
            match hide(path) {
                Ok(hidden) => remove_hidden(&hidden, trouble),
                Err(error) => trouble(STAYS, error),
            }
        }
    }

    fn remove_leftovers(&self, trouble: &mut Trouble<'_>) -> Result<()> {
        let directory = self.run_dir.join(DIRECTORY);
        for path in entries(&directory)? {
            if file_name(&path).starts_with(HIDDEN_PREFIX) {
                remove_hidden(&path, trouble);
            }
        }
        Ok(())
    }
}

/// What is told when something old cannot be removed.
const STAYS: &str = "something that is not needed any more stays in the run's directory";

fn name_of(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// Finds out before the first step whether a checkpoint can be written.
fn probe(directory: &Path) -> Result<()> {
    let probe = directory.join(format!("{HIDDEN_PREFIX}probe-{}", process::id()));
    let written = fs::create_dir(&probe).and_then(|()| fs::write(probe.join(STATE_FILE), [b' '; 4096]));
    drop(fs::remove_dir_all(&probe));
    written.map_err(TrainError::io("write", directory))
}

/// The run's checkpoints, oldest first, with their steps.
///
/// # Errors
/// [`TrainError::Io`] when the directory cannot be listed; none at all is an empty list.
pub fn list(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let directory = run_dir.join(DIRECTORY);
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let step = |path: &Path| file_name(path).strip_prefix(PREFIX)?.parse().ok();
    let mut found: Vec<(u64, PathBuf)> =
        entries(&directory)?.into_iter().filter_map(|path| Some((step(&path)?, path))).collect();
    found.sort();
    Ok(found)
}

/// The newest checkpoint that can be used, with its state; `None` when there is no checkpoint at all.
///
/// `warn` gets one line for each newer one that cannot.
///
/// # Errors
/// [`TrainError::BadCheckpoint`] when there are checkpoints and none can be used: starting anew would throw them away.
pub fn latest_valid(run_dir: &Path, warn: &dyn Fn(&str)) -> Result<Option<(PathBuf, State)>> {
    let mut reasons = Vec::new();
    for (_, path) in list(run_dir)?.into_iter().rev() {
        match verify(&path) {
            Ok(state) => return Ok(Some((path, state))),
            Err(error) => {
                warn(&format!("{error}; going back to the one before"));
                reasons.push(error.to_string());
            }
        }
    }
    if reasons.is_empty() {
        return Ok(None);
    }
    Err(TrainError::BadCheckpoint {
        path: run_dir.join(DIRECTORY),
        reason: format!("none of those in it is whole ({}); move it away to start anew", reasons.join("; ")),
    })
}

/// The directory of a checkpoint given either itself or by its run's directory.
///
/// # Errors
/// [`TrainError::BadCheckpoint`] when it is neither; what [`latest_valid`] gives.
pub fn find(path: &Path, warn: &dyn Fn(&str)) -> Result<PathBuf> {
    if path.join(MODEL_FILE).exists() {
        return Ok(path.to_path_buf());
    }
    latest_valid(path, warn)?.map(|(path, _)| path).ok_or_else(|| TrainError::BadCheckpoint {
        path: path.to_path_buf(),
        reason: format!("it holds no `{MODEL_FILE}` and no `{DIRECTORY}` of a run"),
    })
}

/// Checks that a checkpoint has all its files, that none is cut short, and reads its state.
///
/// # Errors
/// [`TrainError::BadCheckpoint`].
pub fn verify(path: &Path) -> Result<State> {
    let bad = |reason: String| TrainError::BadCheckpoint { path: path.to_path_buf(), reason };
    if let Some(name) = FILES.iter().find(|name| !path.join(name).is_file()) {
        return Err(bad(format!("`{name}` is missing")));
    }
    for name in [MODEL_FILE, EMA_FILE, OPTIMIZER_FILE] {
        SafetensorsReader::open(path.join(name)).map_err(|error| bad(error.to_string()))?;
    }
    State::read(path)
}

fn sync_files(directory: &Path, trouble: &mut Trouble<'_>) -> Result<()> {
    for name in FILES {
        let path = directory.join(name);
        if !path.is_file() {
            return Err(TrainError::Internal(format!("the checkpoint was written without its `{name}`")));
        }
        File::open(&path).and_then(|file| sync_file(&file)).map_err(TrainError::io("sync", &path))?;
    }
    try_sync(directory, trouble);
    Ok(())
}

fn try_sync(directory: &Path, trouble: &mut Trouble<'_>) {
    if let Err(error) = sync_directory(directory) {
        trouble("a power cut could take back the newest checkpoint", error.into());
    }
}

/// Gives a checkpoint that is to be removed a hidden name, so that it is never seen half-removed.
fn hide(path: &Path) -> Result<PathBuf> {
    let hidden = path.with_file_name(format!(".{}.old-{}", file_name(path), process::id()));
    // One of before that could not be removed.
    drop(fs::remove_dir_all(&hidden));
    fs::rename(path, &hidden).map_err(TrainError::io("remove", path))?;
    Ok(hidden)
}

/// Removes what has a hidden name, whatever it is; what stays goes at the next start.
fn remove_hidden(path: &Path, trouble: &mut Trouble<'_>) {
    let is_directory = path.symlink_metadata().is_ok_and(|there| there.is_dir());
    let removed = if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    if let Err(error) = removed {
        trouble(STAYS, TrainError::io("remove", path)(error));
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let io = || TrainError::io("list", directory);
    let entries = fs::read_dir(directory).map_err(io())?;
    entries.map(|entry| Ok(entry.map_err(io())?.path())).collect()
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
