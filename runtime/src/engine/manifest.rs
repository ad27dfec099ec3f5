//! What `engine.json` says.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use graph_builder::{OpenSpec, TensorSpec};
use serde::{Deserialize, Serialize};

use super::key::EngineKey;
use crate::error::{Result, RuntimeError};
use crate::file::sha256_file;
use crate::placement::PlacementSummary;

/// What `engine.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineManifest {
    /// [`FORMAT`](super::FORMAT) of the writer.
    pub format: u32,
    /// What the engine was built from, part by part: a build with an equal key has nothing to do.
    #[serde(default)]
    pub key: EngineKey,
    /// The programs, one for each batch size.
    pub programs: Vec<EngineProgram>,
    /// The same programs in one form for every batch size.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub open_programs: Vec<EngineOpenProgram>,
    /// Who runs the nodes, by model file, as far as somebody has loaded it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub placements: BTreeMap<String, PlacementSummary>,
    /// The weights beside them.
    pub weights: Option<EngineWeights>,
    /// Machine code of the CUDA kernels, where they were compiled for another machine's GPU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<EngineKernels>,
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
    /// Nodes that no recorded run may have, see [`OnnxProgram::unrepeatable`](graph_builder::OnnxProgram).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unrepeatable: Vec<String>,
    /// What the provider compiled of it, in the engine's directory; loaded in place of `file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compiled: Option<CompiledProgram>,
}

/// A program whose batch size is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineOpenProgram {
    /// The name that the programs of fixed batch sizes have too.
    pub name: String,
    /// The model file, in the engine's directory.
    pub file: String,
    /// Size of the model file in bytes.
    pub bytes: u64,
    /// SHA-256 of the model file.
    pub sha256: String,
    /// Inputs in order.
    pub inputs: Vec<OpenSpec>,
    /// Outputs in order.
    pub outputs: Vec<OpenSpec>,
    /// As of [`EngineProgram`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unrepeatable: Vec<String>,
}

/// A provider's own form of a program: a model whose node stands for a compiled engine. Programs of several batch sizes
/// may have one in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledProgram {
    /// The model to load.
    pub file: String,
    /// Every file it consists of, the model's own among them.
    pub files: BTreeMap<String, CompiledFile>,
}

/// A file that a provider wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledFile {
    /// Its size in bytes.
    pub bytes: u64,
    /// Its SHA-256, taken when the engine is published: until then a provider may write it again.
    pub sha256: String,
}

/// The kernels of one source, compiled for one architecture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineKernels {
    /// The source's name.
    pub source: String,
    /// SHA-256 of the source's text.
    pub source_sha256: String,
    /// What it was compiled for: `sm_90`.
    pub architecture: String,
    /// The machine code, in the engine's directory.
    pub file: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
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
    /// The file that it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<FileStamp>,
}

/// A file as it was once: enough to tell that it is still the same without reading it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was last changed, nanoseconds of the Unix clock.
    pub modified: u64,
    /// Its SHA-256.
    pub sha256: String,
}

impl FileStamp {
    /// Looks at a file; reads it only where size or time differ from those of `known`.
    ///
    /// # Errors
    /// [`RuntimeError::Io`].
    pub fn of(path: impl AsRef<Path>, known: Option<&Self>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |e| RuntimeError::io("read", path, e);
        let metadata = fs::metadata(path).map_err(failed)?;
        let since = metadata.modified().map_err(failed)?.duration_since(std::time::UNIX_EPOCH);
        let (bytes, modified) = (metadata.len(), since.map_or(0, |d| d.as_nanos() as u64));
        match known.filter(|k| (k.bytes, k.modified) == (bytes, modified)) {
            Some(same) => Ok(same.clone()),
            None => Ok(Self { bytes, modified, sha256: sha256_file(path)? }),
        }
    }
}

impl EngineManifest {
    /// Every file beside the manifest once, with its size in bytes; the weights first.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        let weights = self.weights.iter().map(|w| (w.file.as_str(), w.bytes));
        // One for all batch sizes where the provider compiled them in one.
        let compiled: BTreeMap<&str, u64> =
            self.compiled().map(|(file, found)| (file.as_str(), found.bytes)).collect();
        let programs = self.programs.iter().map(|p| (p.file.as_str(), p.bytes));
        let open = self.open_programs.iter().map(|p| (p.file.as_str(), p.bytes));
        let kernels = self.kernels.iter().map(|k| (k.file.as_str(), k.bytes));
        weights.chain(programs).chain(open).chain(compiled).chain(kernels)
    }

    /// The files that a provider wrote, once for each program that has them.
    pub(super) fn compiled(&self) -> impl Iterator<Item = (&String, &CompiledFile)> {
        self.programs.iter().filter_map(|p| p.compiled.as_ref()).flat_map(|c| &c.files)
    }
}
