//! Folders of good files from which each proof of a refusal spoils one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use runtime::{HostTensor, read_safetensors_file, write_safetensors_file};
use tempfile::TempDir;

use crate::process::{Mudit, mudit};
use crate::tiny_run::write_idx;

/// A small model of the fixtures: 8 × 8 × 4 latents, 10 classes, width 48.
const FIXTURE: &str = "dit-d48-h4-p2";

pub(crate) type Tensors = IndexMap<String, HostTensor>;

/// A folder with a data set (`data`), a checkpoint (`checkpoint`), batches and noise for it, and a run's configuration.
pub(crate) struct Scene {
    folder: TempDir,
}

/// A file of the fixtures.
pub(crate) fn fixture(model: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(model).join(file)
}

pub(crate) fn tensors(path: &Path) -> Tensors {
    read_safetensors_file(path).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn save(path: &Path, tensors: &Tensors) {
    write_safetensors_file(path, tensors, &BTreeMap::new()).unwrap_or_else(|e| panic!("{e}"));
}

/// Makes a checkpoint directory of a fixture's model.
pub(crate) fn checkpoint(folder: &Path, model: &str) {
    fs::create_dir_all(folder).unwrap();
    fs::copy(fixture(model, "config.json"), folder.join("config.json")).unwrap();
    fs::copy(fixture(model, "weights.safetensors"), folder.join("model.safetensors")).unwrap();
}

/// Every file and directory below a folder with its content.
pub(crate) fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                folders.push(path.clone());
            }
            found.insert(path.clone(), fs::read(&path).unwrap_or_default());
        }
    }
    found
}

impl Scene {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let scene = Self { folder };
        checkpoint(&scene.path("checkpoint"), FIXTURE);
        for file in ["batches.safetensors", "sample-noise.safetensors"] {
            fs::copy(fixture(FIXTURE, file), scene.path(file)).unwrap();
        }
        fs::create_dir(scene.path("data")).unwrap();
        write_idx(&scene.path("data"), 16);
        let run = "[model]\npatch_size = 4\nhidden_size = 16\ndepth = 1\nnum_heads = 2\n\
                   [data]\nkind = \"idx\"\npath = \"data\"\n[train]\nsteps = 2\nbatch_size = 4\n";
        scene.write("run.toml", run);
        scene
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), content).unwrap();
    }

    /// Another checkpoint whose parameters are changed.
    pub(crate) fn spoiled(&self, name: &str, spoil: impl FnOnce(&mut Tensors)) {
        checkpoint(&self.path(name), FIXTURE);
        let file = self.path(name).join("model.safetensors");
        let mut all = tensors(&file);
        spoil(&mut all);
        save(&file, &all);
    }

    /// A command line of words between spaces, in the scene's folder.
    pub(crate) fn mudit(&self, line: &str) -> Mudit {
        mudit(line.split_whitespace()).within(self.folder.path())
    }

    /// Runs a command that must be refused, name all of `parts`, and leave every file as it was.
    pub(crate) fn refuses(&self, line: &str, code: i32, parts: &[&str]) {
        self.untouched(self.mudit(line), code, parts);
    }

    /// [`refuses`](Self::refuses) for a command that is put together already.
    pub(crate) fn untouched(&self, command: Mudit, code: i32, parts: &[&str]) {
        let before = contents(self.folder.path());
        let done = command.run();
        done.refuses(code, parts);
        let after = contents(self.folder.path());
        let changed: Vec<_> =
            after.iter().filter(|(path, bytes)| before.get(*path) != Some(*bytes)).collect();
        let changed: Vec<_> = changed.into_iter().map(|(path, _)| path).collect();
        assert!(changed.is_empty() && after.len() == before.len(), "it left {changed:?}: {done}");
    }
}
