//! From a checkpoint on disk to a model and its parameters.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ValueEnum;
use models::Model;
use runtime::file::sha256_file;
use runtime::safetensors_file::SafetensorsReader;
use runtime::{Arena, SharedArena};
use train_engine::checkpoint::{self, CONFIG_FILE, MODEL_FILE};
use train_engine::mup::check_stamp;
use train_engine::step::parameter_layout;

use super::weights_file::{WeightsFile, in_directory};
use crate::Usage;
use crate::built::BuiltEngine;
use crate::console;

/// Which parameters of a checkpoint are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Which {
    /// The moving average, where there is one; else the parameters themselves.
    Ema,
    /// The parameters as trained.
    Model,
}

/// A model with its parameters.
pub(super) struct Loaded {
    pub(super) model: Model,
    pub(super) parameters: SharedArena,
    /// The weights file.
    pub(super) file: PathBuf,
}

/// Opens a checkpoint directory, the newest checkpoint of a run directory, or a weights file beside its model's
/// `config.json`.
pub(super) fn open(path: &Path, which: Which) -> anyhow::Result<Loaded> {
    let (model, file) = find(path, which)?;
    let file = WeightsFile::open(&model, &file, which)?;
    let parameters = read(&model, file.path())?.into_shared();
    Ok(Loaded { model, parameters, file: file.given().to_path_buf() })
}

/// Opens an engine; with `checkpoint`, one that was built from it.
///
/// # Errors
/// No engine; one of another model or of other weights than the checkpoint's, naming both.
pub(super) fn open_engine(
    directory: &Path,
    checkpoint: Option<&Path>,
    which: Option<Which>,
) -> anyhow::Result<BuiltEngine> {
    let engine = BuiltEngine::open(directory)?;
    let Some(checkpoint) = checkpoint else {
        if which.is_some() {
            let text = "--weights chooses between a checkpoint's, and an engine has its own";
            return Err(Usage(text.into()).into());
        }
        return Ok(engine);
    };
    let (model, file) = find(checkpoint, which.unwrap_or(Which::Ema))?;
    let (e, c) = (directory.display(), checkpoint.display());
    let keys = |model: &Model| serde_json::to_value(model);
    let (built, wanted) = (keys(engine.model())?, keys(&model)?);
    let names = built.as_object().into_iter().chain(wanted.as_object()).flat_map(|keys| keys.keys());
    if let Some(key) = names.into_iter().find(|key| built[*key] != wanted[*key]) {
        anyhow::bail!("the engine `{e}` has {key} {}, and `{c}` has {}", built[key], wanted[key]);
    }
    let (built, wanted) = (engine.weights_sha256().unwrap_or("none"), sha256_file(&file)?);
    anyhow::ensure!(
        built == wanted,
        "the engine `{e}` was built from weights with sha256 {built}, and `{}` has {wanted}: build it again",
        file.display()
    );
    Ok(engine)
}

/// The model of a checkpoint and its weights file.
fn find(path: &Path, which: Which) -> anyhow::Result<(Model, PathBuf)> {
    let place = path.display();
    if BuiltEngine::is_at(path) {
        return Err(Usage(format!("`{place}` is an engine, not a checkpoint: give it with --engine")).into());
    }
    if path.is_file() {
        let config = path.with_file_name(CONFIG_FILE);
        if !config.is_file() {
            let text = format!(
                "`{place}` is a file, and no {CONFIG_FILE} beside it says of which model; put that there, or give a \
                 checkpoint's directory (with {CONFIG_FILE} and {MODEL_FILE}) or a run directory"
            );
            return Err(Usage(text).into());
        }
        return Ok((Model::resolve(&config.display().to_string())?, path.to_path_buf()));
    }
    if !path.is_dir() {
        return Err(Usage(format!(
            "`{place}` is no directory; give a checkpoint (with {CONFIG_FILE} and {MODEL_FILE}) or a run directory"
        ))
        .into());
    }
    let directory = directory(path)?;
    let model = Model::resolve(&directory.join(CONFIG_FILE).display().to_string())?;
    let file = in_directory(&directory, which)?;
    Ok((model, file))
}

/// The model that `text` names: a preset, a `config.json`, a checkpoint's directory, a run's, or an engine.
pub(super) fn model(text: &str) -> anyhow::Result<Model> {
    let path = Path::new(text);
    if BuiltEngine::is_at(path) {
        return Ok(BuiltEngine::open(path)?.model().clone());
    }
    Ok(match checkpoint_of(path)? {
        Some(directory) => Model::resolve(&directory.join(CONFIG_FILE).display().to_string())?,
        None => Model::resolve(text)?,
    })
}

/// The weights that a model's name brings along: those of a checkpoint or of a run's newest.
pub(super) fn beside(text: &str) -> anyhow::Result<Option<PathBuf>> {
    let Some(directory) = checkpoint_of(Path::new(text))? else { return Ok(None) };
    Ok(Some(in_directory(&directory, Which::Ema)?).filter(|file| file.is_file()))
}

/// The checkpoint's directory that a path means, if it means one.
fn checkpoint_of(path: &Path) -> anyhow::Result<Option<PathBuf>> {
    let is_run = || checkpoint::list(path).is_ok_and(|found| !found.is_empty());
    if path.is_dir() && !BuiltEngine::is_at(path) && (path.join(CONFIG_FILE).is_file() || is_run()) {
        return Ok(Some(directory(path)?));
    }
    Ok(None)
}

/// The directory of a checkpoint given either itself or by its run's directory.
pub(super) fn directory(path: &Path) -> anyhow::Result<PathBuf> {
    if path.join(CONFIG_FILE).is_file() {
        return Ok(path.to_path_buf());
    }
    Ok(checkpoint::find(path, &console::note)?)
}

/// Reads the parameters of `model` from a safetensors file; those of another parameterisation are refused.
pub(super) fn read(model: &Model, file: &Path) -> anyhow::Result<Arena> {
    check_stamp(&SafetensorsReader::open(file)?.metadata(), model, file)?;
    Arena::read_safetensors(&parameter_layout(&model.parameters()?)?, file, false)
        .with_context(|| format!("`{}` does not hold this model's parameters", file.display()))
}
