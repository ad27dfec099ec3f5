//! Building an engine out of sight.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use graph_builder::{OnnxProgram, OpenProgram};
use tempfile::TempDir;

use super::{
    CompiledFile, CompiledProgram, Engine, EngineKernels, EngineManifest, EngineNotes, EngineOpenProgram,
    EngineProgram, EngineWeights, FORMAT, FileStamp, MANIFEST, model_file_name, open_model_file_name,
};
use crate::cuda::kernels::{Architecture, Source};
use crate::error::{Result, RuntimeError};
use crate::file::{Placement, place_file, sha256_bytes, sha256_file, sync_directory, write_atomically};

/// Begins the names of drafts' directories.
const DRAFT: &str = ".engine-";

/// The weights of an engine to be.
#[derive(Clone, Debug)]
pub struct WeightsFile<'a> {
    /// The file that programs point into.
    pub file: &'a Path,
    /// The file that it was made from.
    pub source: FileStamp,
    /// How it gets into the engine.
    pub placement: Placement,
}

/// An engine in a temporary directory beside its place: it can be opened and run, and is gone when it is dropped.
#[derive(Debug)]
pub struct EngineDraft {
    target: PathBuf,
    work: TempDir,
    /// The directory, locked as long as somebody is at work in it.
    lock: File,
    manifest: EngineManifest,
}

impl EngineDraft {
    /// Writes the programs, and the weights under the file name that the programs point into.
    ///
    /// # Errors
    /// [`RuntimeError::Io`]; [`RuntimeError::Engine`] when the programs and the weights do not fit together.
    pub fn new(
        directory: impl AsRef<Path>,
        programs: &[(usize, &OnnxProgram)],
        weights: Option<WeightsFile<'_>>,
        notes: EngineNotes,
    ) -> Result<Self> {
        let target = directory.as_ref().to_path_buf();
        let weights_name = weights_name(&target, programs, weights.is_some())?;
        let create = |e| RuntimeError::io("create", &target, e);
        let parent = parent(&target);
        fs::create_dir_all(parent).map_err(create)?;
        remove_abandoned(parent);
        let (work, lock) = locked_directory(parent).map_err(create)?;
        let weights = match (weights, weights_name) {
            (Some(file), Some(name)) => Some(place_weights(file, work.path(), name)?),
            _ => None,
        };
        let programs =
            programs.iter().map(|(batch, p)| write_program(work.path(), *batch, p)).collect::<Result<_>>()?;
        let EngineNotes { key, options, versions, extra } = notes;
        let manifest = EngineManifest {
            format: FORMAT,
            key,
            programs,
            open_programs: Vec::new(),
            placements: BTreeMap::new(),
            weights,
            kernels: Vec::new(),
            options,
            versions,
            extra,
        };
        let draft = Self { target, work, lock, manifest };
        draft.write_manifest()?;
        Ok(draft)
    }

    /// The directory where the files are for now.
    pub fn directory(&self) -> &Path {
        self.work.path()
    }

    /// The engine as it is so far.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn engine(&self) -> Result<Engine> {
        self.write_manifest()?;
        Engine::open(self.work.path())
    }

    /// The manifest, to be added to.
    pub fn manifest_mut(&mut self) -> &mut EngineManifest {
        &mut self.manifest
    }

    /// Adds a program for every batch size, beside those of fixed ones.
    ///
    /// # Errors
    /// [`RuntimeError::Io`]; [`RuntimeError::Engine`] when it takes its weights from another file than the others.
    pub fn add_open(&mut self, program: &OpenProgram) -> Result<()> {
        let weights = self.manifest.weights.as_ref().map(|w| w.file.as_str());
        if program.weights_file.is_some() && program.weights_file.as_deref() != weights {
            let reason = format!("program {} needs other weights than are in it", program.name);
            return Err(RuntimeError::Engine { path: self.target.clone(), reason });
        }
        let file = open_model_file_name(&program.name);
        write_atomically(self.work.path().join(&file), |w| w.write_all(&program.bytes))?;
        self.manifest.open_programs.push(EngineOpenProgram {
            name: program.name.clone(),
            file,
            bytes: program.bytes.len() as u64,
            sha256: sha256_bytes(&program.bytes),
            inputs: program.inputs.clone(),
            outputs: program.outputs.clone(),
            unrepeatable: program.unrepeatable.clone(),
        });
        Ok(())
    }

    /// Takes up what a provider compiled of a program for these batch sizes: `model` and whatever else has appeared in the
    /// directory under a name that begins as the model's does.
    ///
    /// # Errors
    /// [`RuntimeError::Io`]; [`RuntimeError::Engine`] when `model` was not written.
    pub fn add_compiled(&mut self, program: &str, batches: &[usize], model: &str) -> Result<()> {
        let refuse = |reason: String| RuntimeError::Engine { path: self.target.clone(), reason };
        let stem = model.trim_end_matches(".onnx").to_owned();
        let mut files = BTreeMap::new();
        let failed = |e| RuntimeError::io("read", self.work.path(), e);
        for entry in fs::read_dir(self.work.path()).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&stem) {
                let bytes = entry.metadata().map_err(failed)?.len();
                files.insert(name, CompiledFile { bytes, ..CompiledFile::default() });
            }
        }
        if !files.contains_key(model) {
            return Err(refuse(format!("the provider wrote no `{model}`")));
        }
        let compiled = CompiledProgram { file: model.to_owned(), files };
        for batch in batches {
            let mut programs = self.manifest.programs.iter_mut();
            let found = programs.find(|p| p.name == program && p.batch == *batch);
            found.ok_or_else(|| refuse(format!("it has no program {program} at batch {batch}")))?.compiled =
                Some(compiled.clone());
        }
        Ok(())
    }

    /// Adds a source's kernels, compiled for an architecture.
    ///
    /// # Errors
    /// [`RuntimeError::Io`].
    pub fn add_kernels(&mut self, source: &Source, architecture: Architecture, cubin: &[u8]) -> Result<()> {
        let file = format!("{}-{architecture}.cubin", source.name.trim_end_matches(".cu"));
        write_atomically(self.work.path().join(&file), |w| w.write_all(cubin))?;
        let (bytes, sha256) = (cubin.len() as u64, sha256_bytes(cubin));
        self.manifest.kernels.push(EngineKernels {
            source: source.name.to_owned(),
            source_sha256: source.sha256(),
            architecture: architecture.to_string(),
            file,
            bytes,
            sha256,
        });
        Ok(())
    }

    /// Puts the engine in its place and returns its manifest.
    ///
    /// A new engine appears by one rename. In an existing directory the old manifest goes first, the files are renamed
    /// over the old ones, and the new manifest comes last, so a crash leaves the old engine, the new one or none, never
    /// a mixture that looks whole. Other files in the directory are left alone.
    ///
    /// # Errors
    /// [`RuntimeError::Io`].
    pub fn publish(mut self) -> Result<EngineManifest> {
        self.stamp_compiled()?;
        self.write_manifest()?;
        let Self { target, work, lock, manifest } = self;
        let create = |e| RuntimeError::io("create", &target, e);
        if target.exists() {
            replace_files(work.path(), &target, &manifest)?;
        } else {
            make_public(work.path()).map_err(create)?;
            fs::rename(work.path(), &target).map_err(create)?;
        }
        drop(lock);
        sync_directory(parent(&target))?;
        Ok(manifest)
    }

    /// Takes sizes and hashes of what a provider wrote as it is now.
    fn stamp_compiled(&mut self) -> Result<()> {
        let mut known: BTreeMap<String, CompiledFile> = BTreeMap::new();
        let compiled = self.manifest.programs.iter_mut().filter_map(|p| p.compiled.as_mut());
        for (name, file) in compiled.flat_map(|c| &mut c.files) {
            // Programs may share it: it is read once.
            if !known.contains_key(name) {
                let path = self.work.path().join(name);
                let bytes = fs::metadata(&path).map_err(|e| RuntimeError::io("read", &path, e))?.len();
                known.insert(name.clone(), CompiledFile { bytes, sha256: sha256_file(&path)? });
            }
            file.clone_from(&known[name]);
        }
        Ok(())
    }

    fn write_manifest(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.manifest)
            .map_err(|e| RuntimeError::Engine { path: self.target.clone(), reason: e.to_string() })?;
        write_atomically(self.work.path().join(MANIFEST), |w| writeln!(w, "{text}"))
    }
}

/// A new directory for a draft, which no other build takes for abandoned.
fn locked_directory(parent: &Path) -> std::io::Result<(TempDir, File)> {
    loop {
        let work = tempfile::Builder::new().prefix(DRAFT).tempdir_in(parent)?;
        match File::open(work.path()) {
            Ok(lock) => {
                // Where a file system has no locks, nobody can take one on a draft to remove it, either.
                drop(lock.lock());
                if work.path().exists() {
                    return Ok((work, lock));
                }
            }
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            Err(_) => {}
        }
        // Another build has found it before it was locked, and removed it.
    }
}

/// Removes the drafts that killed builds have left: those that nobody has locked. What cannot be removed stays: it is no
/// reason not to build.
fn remove_abandoned(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(DRAFT)) {
        let Ok(directory) = File::open(entry.path()) else { continue };
        if directory.try_lock().is_ok() {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

fn parent(directory: &Path) -> &Path {
    match directory.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// The one file name that all programs expect their weights under.
fn weights_name<'p>(
    directory: &Path,
    programs: &[(usize, &'p OnnxProgram)],
    given: bool,
) -> Result<Option<&'p str>> {
    let refuse = |reason: String| Err(RuntimeError::Engine { path: directory.to_path_buf(), reason });
    let mut names: Vec<&str> = programs.iter().filter_map(|(_, p)| p.weights_file.as_deref()).collect();
    names.dedup();
    match (names.as_slice(), given) {
        ([], false) => Ok(None),
        ([name], true) if Path::new(name).components().count() == 1 => Ok(Some(name)),
        ([name], true) => refuse(format!("its weights file `{name}` is not in the engine's directory")),
        ([name, ..], false) => refuse(format!("its programs need weights in `{name}`, and none were given")),
        ([], true) => refuse("weights were given, and no program has initializers".to_owned()),
        (_, true) => refuse(format!("its programs need several weights files: {}", names.join(", "))),
    }
}

fn place_weights(weights: WeightsFile<'_>, work: &Path, name: &str) -> Result<EngineWeights> {
    let WeightsFile { file, source, placement } = weights;
    let target = work.join(name);
    place_file(file, &target, placement)?;
    let sha256 = FileStamp::of(&target, Some(&source))?.sha256;
    let bytes = fs::metadata(&target).map_err(|e| RuntimeError::io("read", &target, e))?.len();
    Ok(EngineWeights { file: name.to_owned(), bytes, sha256, source: Some(source) })
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
        unrepeatable: program.unrepeatable.clone(),
        compiled: None,
    })
}

/// Moves a finished engine's files over those of an older one.
fn replace_files(work: &Path, directory: &Path, manifest: &EngineManifest) -> Result<()> {
    // Looked at before anything is taken away.
    for file in manifest.files().map(|(file, _)| work.join(file)) {
        fs::metadata(&file).map_err(|e| RuntimeError::io("read", &file, e))?;
    }
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
