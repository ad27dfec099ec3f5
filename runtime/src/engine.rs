//! Engine directories: programs, their weights and `engine.json`, written whole or not at all.
//!
//! A directory holds `<program>-b<batch>.onnx` for each program and batch size, the weights file that their
//! initializers point into, what a provider compiled, and `engine.json`, which is written last: without it the
//! directory is no engine. An engine is built as an [`EngineDraft`], which becomes visible when it is published.

mod draft;
mod key;
mod manifest;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use draft::{EngineDraft, WeightsFile};
pub use key::{EngineKey, KeyDifference};
pub use manifest::{
    CompiledFile, CompiledProgram, EngineKernels, EngineManifest, EngineOpenProgram, EngineProgram,
    EngineWeights, FileStamp,
};

use crate::cuda::Gpu;
use crate::cuda::kernels::SOURCES;
use crate::error::{Result, RuntimeError};
use crate::file::sha256_file;
use crate::library::Runtime;
use crate::provider::{CudaOptions, Provider};
use crate::session::{OpenSession, Session, SessionOptions};

/// Version of the directory's layout and of `engine.json`.
pub const FORMAT: u32 = 2;
/// Name of the manifest.
pub const MANIFEST: &str = "engine.json";

/// What a builder knows beside the programs: goes into the manifest as it is.
#[derive(Clone, Debug, Default)]
pub struct EngineNotes {
    /// What the engine is built from.
    pub key: EngineKey,
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

/// Name of the model file of a program for every batch size.
pub fn open_model_file_name(program: &str) -> String {
    format!("{program}.onnx")
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

    /// Checks the hashes of all files, weights and what a provider compiled included.
    ///
    /// # Errors
    /// [`RuntimeError::Engine`] naming the file that was altered, [`RuntimeError::Io`].
    pub fn verify(&self) -> Result<()> {
        let programs = self.manifest.programs.iter().map(|p| (&p.file, &p.sha256));
        let open = self.manifest.open_programs.iter().map(|p| (&p.file, &p.sha256));
        let programs = programs.chain(open);
        let weights = self.manifest.weights.iter().map(|w| (&w.file, &w.sha256));
        let kernels = self.manifest.kernels.iter().map(|k| (&k.file, &k.sha256));
        let compiled: BTreeMap<&String, &String> =
            self.manifest.compiled().map(|(file, found)| (file, &found.sha256)).collect();
        programs
            .chain(weights)
            .chain(kernels)
            .chain(compiled)
            .try_for_each(|(file, sha256)| self.verify_file(file, sha256))
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Loads the program of a name and batch size: what the provider compiled of it where the options ask for that
    /// provider, else the program itself.
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
        let mut sessions = self.sessions(runtime, program, &[batch], options)?;
        sessions.pop().ok_or_else(|| self.broken("internal: no session of one batch size".to_owned()))
    }

    /// [`Engine::session`] for several batch sizes, in their order. Batch sizes that the provider compiled in one share
    /// what is loaded: it is on the GPU once.
    ///
    /// # Errors
    /// As [`Engine::session`].
    pub fn sessions(
        &self,
        runtime: &Arc<Runtime>,
        program: &str,
        batches: &[usize],
        options: &SessionOptions,
    ) -> Result<Vec<Arc<Session>>> {
        let programs: Vec<&EngineProgram> =
            batches.iter().map(|batch| self.program(program, *batch)).collect::<Result<_>>()?;
        programs.iter().try_for_each(|found| self.verify_file(&found.file, &found.sha256))?;
        self.prepare(options, programs.iter().any(|found| !found.native_ops.is_empty()))?;
        let mut loaded: BTreeMap<&str, OpenSession> = BTreeMap::new();
        let mut sessions = Vec::with_capacity(batches.len());
        for found in programs {
            let compiled = found.compiled.as_ref();
            let Some(compiled) = compiled.filter(|_| matches!(options.provider, Provider::TensorRt(_)))
            else {
                let path = self.directory.join(&found.file);
                let signature = Some((&*found.inputs, &*found.outputs));
                let unrepeatable = Some(&*found.unrepeatable);
                sessions.push(Session::load_known(runtime, &path, signature, options, unrepeatable)?);
                continue;
            };
            let before = loaded.remove(compiled.file.as_str());
            let session = if let Some(session) = before.filter(|session| !session.records_once()) {
                session
            } else {
                let path = self.directory.join(&compiled.file);
                OpenSession::load_known(runtime, &path, options, Some(&found.unrepeatable))?
            };
            sessions.push(session.at(&found.inputs, &found.outputs)?);
            loaded.insert(&compiled.file, session);
        }
        Ok(sessions)
    }

    /// Loads the program of a name for every batch size; [`OpenSession::at`] gives it at one.
    ///
    /// # Errors
    /// As [`Engine::session`].
    pub fn open_session(
        &self,
        runtime: &Arc<Runtime>,
        program: &str,
        options: &SessionOptions,
    ) -> Result<OpenSession> {
        let found = self.manifest.open_programs.iter().find(|p| p.name == program);
        let found = found
            .ok_or_else(|| self.broken(format!("it has no program {program} whose batch size is open")))?;
        self.verify_file(&found.file, &found.sha256)?;
        let mut fixed = self.manifest.programs.iter().filter(|p| p.name == program);
        self.prepare(options, fixed.any(|p| !p.native_ops.is_empty()))?;
        OpenSession::load_known(
            runtime,
            &self.directory.join(&found.file),
            options,
            Some(&found.unrepeatable),
        )
    }

    /// [`Engine::session`], through the program for every batch size where there is one; `beside` is a session of it that
    /// is loaded already, whose model and weights are then used once more.
    ///
    /// # Errors
    /// As [`Engine::session`].
    pub fn shared_session(
        &self,
        runtime: &Arc<Runtime>,
        program: &str,
        batch: usize,
        options: &SessionOptions,
        beside: Option<&Arc<Session>>,
    ) -> Result<Arc<Session>> {
        let found = self.program(program, batch)?;
        let compiled = found.compiled.is_some() && matches!(options.provider, Provider::TensorRt(_));
        let open = self.manifest.open_programs.iter().any(|p| p.name == program);
        match beside {
            Some(session) if open && !session.records_once() => session.at(&found.inputs, &found.outputs),
            _ if open && !compiled => {
                self.open_session(runtime, program, options)?.at(&found.inputs, &found.outputs)
            }
            _ => self.session(runtime, program, batch, options),
        }
    }

    fn program(&self, program: &str, batch: usize) -> Result<&EngineProgram> {
        let programs = &self.manifest.programs;
        programs.iter().find(|p| p.name == program && p.batch == batch).ok_or_else(|| {
            let known: Vec<_> = programs.iter().map(|p| format!("{} at batch {}", p.name, p.batch)).collect();
            self.broken(format!("it has no program {program} at batch {batch}, only {}", known.join(", ")))
        })
    }

    /// Readies the GPU of a CUDA session: its kernels are given to it, and asked for where native ops need them.
    fn prepare(&self, options: &SessionOptions, native_ops: bool) -> Result<()> {
        let Provider::Cuda(CudaOptions { ordinal, .. }) = options.provider else { return Ok(()) };
        let gpu = Gpu::open(ordinal)?;
        self.give_kernels(&gpu)?;
        if options.native_kernels && native_ops {
            gpu.loaded()?.require_kernels(&gpu)?;
        }
        Ok(())
    }

    /// Gives a GPU the kernels that were compiled for its architecture from the sources that this program has, too.
    fn give_kernels(&self, gpu: &Gpu) -> Result<()> {
        let architecture = gpu.info().architecture();
        for kernels in self.manifest.kernels.iter().filter(|k| k.architecture == architecture) {
            let known = SOURCES.iter().find(|s| s.name == kernels.source);
            if known.is_some_and(|source| source.sha256() == kernels.source_sha256) {
                self.verify_file(&kernels.file, &kernels.sha256)?;
                let path = self.directory.join(&kernels.file);
                gpu.give_kernels(
                    &kernels.source,
                    fs::read(&path).map_err(|e| RuntimeError::io("read", &path, e))?,
                );
            }
        }
        Ok(())
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

#[cfg(test)]
mod tests;
