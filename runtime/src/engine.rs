//! Engine directories: programs, their weights and `engine.json`, written whole or not at all.
//!
//! A directory holds `<program>-b<batch>.onnx` for each program and batch size, the weights file that their
//! initializers point into, and `engine.json`, which is written last: without it the directory is no engine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use graph_builder::{OnnxProgram, TensorSpec};
use serde::{Deserialize, Serialize};

use crate::error::{Result, RuntimeError};
use crate::file::{link_or_copy, sha256_bytes, sha256_file, sync_directory, write_atomically};
use crate::library::Runtime;
use crate::session::{Session, SessionOptions};

/// Version of the directory's layout and of `engine.json`.
pub const FORMAT: u32 = 1;
/// Name of the manifest.
pub const MANIFEST: &str = "engine.json";

/// What `engine.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineManifest {
    /// [`FORMAT`] of the writer.
    pub format: u32,
    /// The programs, one for each batch size.
    pub programs: Vec<EngineProgram>,
    /// The weights beside them.
    pub weights: Option<EngineWeights>,
    /// The build's options.
    pub options: serde_json::Value,
    /// Versions of what built the engine: `mudit`, `onnxruntime`.
    pub versions: BTreeMap<String, String>,
    /// The model's configuration, its muP table and whatever else the builder knows.
    pub extra: serde_json::Value,
}

/// One program of an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineProgram {
    /// `denoise`, `train-step`, …
    pub name: String,
    /// Batch size it was built for.
    pub batch: usize,
    /// The model file, in the engine's directory.
    pub file: String,
    /// Size of the model file in bytes.
    pub bytes: u64,
    /// SHA-256 of the model file.
    pub sha256: String,
    /// Inputs in order.
    pub inputs: Vec<TensorSpec>,
    /// Outputs in order.
    pub outputs: Vec<TensorSpec>,
    /// The `mudit` ops inside.
    pub native_ops: Vec<String>,
}

/// The weights of an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineWeights {
    /// The file, in the engine's directory.
    pub file: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
}

/// What a builder knows beside the programs: goes into the manifest as it is.
#[derive(Clone, Debug, Default)]
pub struct EngineNotes {
    /// The build's options.
    pub options: serde_json::Value,
    /// Versions of what built the engine.
    pub versions: BTreeMap<String, String>,
    /// Everything else.
    pub extra: serde_json::Value,
}

/// Name of the model file of a program and batch size.
pub fn model_file_name(program: &str, batch: usize) -> String {
    format!("{program}-b{batch}.onnx")
}

/// Writes an engine directory and returns its manifest.
///
/// Everything is built in a temporary directory beside `directory`. A new engine then appears by one rename. In an
/// existing directory the old manifest goes first, the files are renamed over the old ones, and the new manifest
/// comes last, so a crash leaves the old engine, the new one or none, never a mixture that looks whole. Other
/// files in the directory are left alone.
///
/// `weights` is hard-linked to the file name that the programs point into, or copied across file systems.
///
/// # Errors
/// [`RuntimeError::Io`]; [`RuntimeError::Engine`] when the programs and the weights do not fit together.
pub fn write_engine(
    directory: impl AsRef<Path>,
    programs: &[(usize, &OnnxProgram)],
    weights: Option<&Path>,
    notes: EngineNotes,
) -> Result<EngineManifest> {
    let directory = directory.as_ref();
    let weights_name = weights_name(directory, programs, weights)?;
    let create = |e| RuntimeError::io("create", directory, e);
    let parent = match directory.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(create)?;
    let work = tempfile::Builder::new().prefix(".engine-").tempdir_in(parent).map_err(create)?;

    let weights = match (weights, weights_name) {
        (Some(source), Some(name)) => Some(place_weights(source, work.path(), name)?),
        _ => None,
    };
    let programs =
        programs.iter().map(|(batch, p)| write_program(work.path(), *batch, p)).collect::<Result<_>>()?;
    let EngineNotes { options, versions, extra } = notes;
    let manifest = EngineManifest { format: FORMAT, programs, weights, options, versions, extra };
    let text = serde_json::to_string_pretty(&manifest)
        .map_err(|e| RuntimeError::Engine { path: directory.to_path_buf(), reason: e.to_string() })?;
    write_atomically(work.path().join(MANIFEST), |w| writeln!(w, "{text}"))?;

    if directory.exists() {
        replace_files(work.path(), directory, &manifest)?;
    } else {
        make_public(work.path()).map_err(create)?;
        fs::rename(work.path(), directory).map_err(create)?;
    }
    sync_directory(parent)?;
    Ok(manifest)
}

/// An engine directory that was opened.
#[derive(Debug)]
pub struct Engine {
    directory: PathBuf,
    manifest: EngineManifest,
}

impl Engine {
    /// Opens a directory and checks that its files are there with the sizes that the manifest says.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] when there is no manifest, [`RuntimeError::Engine`].
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref().to_path_buf();
        let path = directory.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(|e| RuntimeError::io("read", &path, e))?;
        let broken = |reason: String| RuntimeError::Engine { path: directory.clone(), reason };
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| broken(format!("{MANIFEST}: {e}")))?;
        let format = value.get("format").and_then(serde_json::Value::as_u64);
        if format != Some(u64::from(FORMAT)) {
            let found = format.map_or_else(|| "none".to_owned(), |f| f.to_string());
            return Err(broken(format!("{MANIFEST} has format {found}, this program reads {FORMAT}")));
        }
        let manifest: EngineManifest =
            serde_json::from_value(value).map_err(|e| broken(format!("{MANIFEST}: {e}")))?;
        for (file, bytes) in manifest.files() {
            if Path::new(file).file_name() != Some(file.as_ref()) {
                return Err(broken(format!("{MANIFEST} names `{file}`, which is not a plain file name")));
            }
            let path = directory.join(file);
            let found = fs::metadata(&path).map_err(|e| RuntimeError::io("read", &path, e))?.len();
            if found != bytes {
                return Err(broken(format!("{file} has {found} bytes, {MANIFEST} says {bytes}")));
            }
        }
        Ok(Self { directory, manifest })
    }

    /// The manifest.
    pub fn manifest(&self) -> &EngineManifest {
        &self.manifest
    }

    /// Checks the hashes of all files, weights included.
    ///
    /// # Errors
    /// [`RuntimeError::Engine`] naming the file that was altered, [`RuntimeError::Io`].
    pub fn verify(&self) -> Result<()> {
        let programs = self.manifest.programs.iter().map(|p| (&p.file, &p.sha256));
        let weights = self.manifest.weights.iter().map(|w| (&w.file, &w.sha256));
        programs.chain(weights).try_for_each(|(file, sha256)| self.verify_file(file, sha256))
    }

    /// Loads the program of a name and batch size.
    ///
    /// # Errors
    /// [`RuntimeError::Engine`] when there is none or its file was altered; as [`Session::load_file`].
    pub fn session(
        &self,
        runtime: &Arc<Runtime>,
        program: &str,
        batch: usize,
        options: &SessionOptions,
    ) -> Result<Arc<Session>> {
        let programs = &self.manifest.programs;
        let found = programs.iter().find(|p| p.name == program && p.batch == batch).ok_or_else(|| {
            let known: Vec<_> = programs.iter().map(|p| format!("{} at batch {}", p.name, p.batch)).collect();
            self.broken(format!("it has no program {program} at batch {batch}, only {}", known.join(", ")))
        })?;
        self.verify_file(&found.file, &found.sha256)?;
        let path = self.directory.join(&found.file);
        Session::load_file(runtime, path, Some((&found.inputs, &found.outputs)), options)
    }

    fn verify_file(&self, file: &str, sha256: &str) -> Result<()> {
        let got = sha256_file(self.directory.join(file))?;
        if got == sha256 {
            return Ok(());
        }
        Err(self.broken(format!("{file} has sha256 {got}, {MANIFEST} says {sha256}")))
    }

    fn broken(&self, reason: String) -> RuntimeError {
        RuntimeError::Engine { path: self.directory.clone(), reason }
    }
}

impl EngineManifest {
    /// Every file beside the manifest, with its size in bytes; the weights first.
    fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        let weights = self.weights.iter().map(|w| (w.file.as_str(), w.bytes));
        weights.chain(self.programs.iter().map(|p| (p.file.as_str(), p.bytes)))
    }
}

/// The one file name that all programs expect their weights under.
fn weights_name<'p>(
    directory: &Path,
    programs: &[(usize, &'p OnnxProgram)],
    weights: Option<&Path>,
) -> Result<Option<&'p str>> {
    let refuse = |reason: String| Err(RuntimeError::Engine { path: directory.to_path_buf(), reason });
    let mut names: Vec<&str> = programs.iter().filter_map(|(_, p)| p.weights_file.as_deref()).collect();
    names.dedup();
    match (names.as_slice(), weights) {
        ([], None) => Ok(None),
        ([name], Some(_)) if Path::new(name).components().count() == 1 => Ok(Some(name)),
        ([name], Some(_)) => refuse(format!("its weights file `{name}` is not in the engine's directory")),
        ([name, ..], None) => refuse(format!("its programs need weights in `{name}`, and none were given")),
        ([], Some(_)) => refuse("weights were given, and no program has initializers".to_owned()),
        (_, Some(_)) => refuse(format!("its programs need several weights files: {}", names.join(", "))),
    }
}

fn place_weights(source: &Path, work: &Path, name: &str) -> Result<EngineWeights> {
    let target = work.join(name);
    link_or_copy(source, &target)?;
    let bytes = fs::metadata(&target).map_err(|e| RuntimeError::io("read", &target, e))?.len();
    Ok(EngineWeights { file: name.to_owned(), bytes, sha256: sha256_file(&target)? })
}

fn write_program(work: &Path, batch: usize, program: &OnnxProgram) -> Result<EngineProgram> {
    let file = model_file_name(&program.name, batch);
    write_atomically(work.join(&file), |w| w.write_all(&program.bytes))?;
    Ok(EngineProgram {
        name: program.name.clone(),
        batch,
        file,
        bytes: program.bytes.len() as u64,
        sha256: sha256_bytes(&program.bytes),
        inputs: program.inputs.clone(),
        outputs: program.outputs.clone(),
        native_ops: program.native_ops.clone(),
    })
}

/// Moves a finished engine's files over those of an older one.
fn replace_files(work: &Path, directory: &Path, manifest: &EngineManifest) -> Result<()> {
    let old_manifest = directory.join(MANIFEST);
    let older = Engine::open(directory).ok();
    if old_manifest.exists() {
        fs::remove_file(&old_manifest).map_err(|e| RuntimeError::io("replace", &old_manifest, e))?;
    }
    for file in manifest.files().map(|(file, _)| file).chain([MANIFEST]) {
        let target = directory.join(file);
        fs::rename(work.join(file), &target).map_err(|e| RuntimeError::io("write", &target, e))?;
    }
    for (file, _) in older.iter().flat_map(|e| e.manifest.files()) {
        if manifest.files().all(|(kept, _)| kept != file) {
            let stale = directory.join(file);
            fs::remove_file(&stale).map_err(|e| RuntimeError::io("remove", &stale, e))?;
        }
    }
    sync_directory(directory)
}

/// Temporary directories are private; an engine has the permissions of any other new directory.
fn make_public(directory: &Path) -> std::io::Result<()> {
    let probe = directory.join(".probe");
    fs::create_dir(&probe)?;
    let permissions = fs::metadata(&probe)?.permissions();
    fs::remove_dir(&probe)?;
    fs::set_permissions(directory, permissions)
}

#[cfg(test)]
mod tests;
