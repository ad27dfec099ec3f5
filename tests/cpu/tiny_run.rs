//! The smallest training run: 64 noisy 8 × 8 images of 4 classes and a transformer of width 24.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mudit_tests::draws::Draws;
use tempfile::TempDir;
use train_engine::checkpoint::{EMA_FILE, MODEL_FILE, OPTIMIZER_FILE};

use crate::process::{Mudit, mudit};

const IMAGES: usize = 64;
const SIDE: usize = 8;
pub(crate) const CLASSES: usize = 4;

/// A folder with a data set and the configurations of runs on it.
pub(crate) struct TinyRun {
    folder: TempDir,
}

/// The bytes of an idx file.
pub(crate) fn idx(magic: u32, sizes: &[usize], data: &[u8]) -> Vec<u8> {
    let words = std::iter::once(magic).chain(sizes.iter().map(|s| *s as u32));
    words.flat_map(u32::to_be_bytes).chain(data.iter().copied()).collect()
}

/// Writes `images` images and their labels under MNIST's names.
pub(crate) fn write_idx(folder: &Path, images: usize) {
    let mut draws = Draws::named("tiny images");
    let pixels: Vec<u8> = (0..images * SIDE * SIDE).map(|_| draws.below(256) as u8).collect();
    let labels: Vec<u8> = (0..images).map(|i| (i % CLASSES) as u8).collect();
    fs::write(folder.join("train-images-idx3-ubyte"), idx(0x803, &[images, SIDE, SIDE], &pixels)).unwrap();
    fs::write(folder.join("train-labels-idx1-ubyte"), idx(0x801, &[images], &labels)).unwrap();
}

impl TinyRun {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_idx(folder.path(), IMAGES);
        let text = format!(
            r#"
            [model]
            patch_size = 4
            hidden_size = 24
            depth = 2
            num_heads = 2
            [mup]
            base_width = 12
            [data]
            kind = "idx"
            path = "{}"
            [train]
            steps = 80
            batch_size = 8
            learning_rate = 1e-3
            clip = 1.0
            ema_decay = 0.95
            [checkpoint]
            every_steps = 5
            [log]
            every_steps = 1
            "#,
            folder.path().display()
        );
        fs::write(folder.path().join("run.toml"), text).unwrap();
        Self { folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `mudit train` into the directory `out` with overrides.
    pub(crate) fn train(&self, out: &str, overrides: &[&str]) -> Mudit {
        let (config, out) = (self.text("run.toml"), self.text(out));
        let set = overrides.iter().flat_map(|o| ["--set", o]);
        mudit(["train", "--offline", "--config", &config, "--out", &out].into_iter().chain(set))
    }
}

/// The checkpoint files that a run's result consists of, by name.
pub(crate) fn result(run: &Path) -> BTreeMap<&'static str, Vec<u8>> {
    let read = |name: &'static str| {
        let path = run.join("checkpoints/latest").join(name);
        (name, fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    };
    [MODEL_FILE, EMA_FILE, OPTIMIZER_FILE].map(read).into()
}

/// The logged rows of a run without what the clock says.
pub(crate) fn losses(run: &Path) -> Vec<(u64, serde_json::Map<String, serde_json::Value>)> {
    let mut rows = train_engine::metrics::read(&run.join("metrics.jsonl")).unwrap_or_else(|e| panic!("{e}"));
    for (_, row) in &mut rows {
        assert!(row.shift_remove("images_per_s").is_some());
        assert!(row.shift_remove("peak_memory_mb").is_some_and(|mb| mb.as_f64() > Some(1.0)));
    }
    rows
}

/// Checks that two runs ended with the same bytes and logged the same losses.
pub(crate) fn assert_same_result(got: &Path, want: &Path, what: &str) {
    for (name, bytes) in result(got) {
        assert!(bytes == result(want)[name], "{what}: {name} differs");
    }
    assert_eq!(losses(got), losses(want), "{what}: the logged losses differ");
}
