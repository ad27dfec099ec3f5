//! `metrics.jsonl`: one JSON object a logged step, readable while the run goes on.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use runtime::file::{sync_file, write_atomically};
use serde_json::{Map, Value};

use crate::error::{Result, TrainError};

/// Rows that wait for a full disk to have room again, in bytes at most.
const MOST_WAITING: usize = 1 << 24;

/// The file that metrics are appended to.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    /// Bytes of whole rows in the file.
    length: u64,
    /// Rows that could not be written yet.
    waiting: Vec<u8>,
}

impl MetricsLog {
    /// Name of the file in a run's directory.
    pub const FILE: &str = "metrics.jsonl";

    /// Opens `RUN/metrics.jsonl` to go on after `resumed_step`; `None` starts anew.
    ///
    /// Rows beyond the resumed step were written by steps that are now done again: they are removed, as is a last line
    /// that a kill cut short, so the file ends up with the rows of an undisturbed run.
    ///
    /// # Errors
    /// [`TrainError::Io`]; [`TrainError::BadMetrics`] for a whole line without a `step`.
    pub fn open(run_dir: &Path, resumed_step: Option<u64>) -> Result<Self> {
        fs::create_dir_all(run_dir).map_err(TrainError::io("create", run_dir))?;
        let path = run_dir.join(Self::FILE);
        if path.exists() {
            keep_until(&path, resumed_step)?;
        }
        let file = File::options().append(true).create(true).open(&path);
        let file = file.map_err(TrainError::io("open", &path))?;
        let length = file.metadata().map_err(TrainError::io("read", &path))?.len();
        Ok(Self { path, file, length, waiting: Vec::new() })
    }

    /// [`open`](Self::open), after a file that cannot be read is moved out of the way; gives its new name.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn open_beside(run_dir: &Path, resumed_step: Option<u64>) -> Result<(Self, Option<PathBuf>)> {
        match Self::open(run_dir, resumed_step) {
            Err(TrainError::BadMetrics { path, .. }) => {
                let free = (1..).map(|n| path.with_added_extension(format!("unreadable-{n}")));
                let Some(aside) = free.into_iter().find(|aside| aside.symlink_metadata().is_err()) else {
                    return Err(TrainError::Internal("no name is left for old metrics".into()));
                };
                fs::rename(&path, &aside).map_err(TrainError::io("rename", &path))?;
                Ok((Self::open(run_dir, resumed_step)?, Some(aside)))
            }
            opened => Ok((opened?, None)),
        }
    }

    /// Appends the row of a step: `{"step": …, "loss": …, …}`. A value that is not finite is written as null. A row that
    /// cannot be written is kept, and written with the next.
    ///
    /// # Errors
    /// [`TrainError::Io`]; the file then holds whole rows only.
    pub fn append(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut row = Map::new();
        row.insert("step".into(), step.into());
        row.extend(values.iter().map(|&(name, value)| (name.to_owned(), Value::from(value))));
        let line = format!("{}\n", Value::Object(row));
        if self.waiting.len() + line.len() <= MOST_WAITING {
            self.waiting.extend(line.as_bytes());
        }
        // One write a row, so that a reader sees whole lines.
        if let Err(error) = self.file.write_all(&self.waiting) {
            drop(self.file.set_len(self.length));
            return Err(TrainError::io("write", &self.path)(error));
        }
        self.length += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// Makes the rows durable, as before a checkpoint that counts on them.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn sync(&self) -> Result<()> {
        sync_file(&self.file).map_err(TrainError::io("sync", &self.path))
    }
}

/// All rows of a file, in order, with their steps; a last line cut short is left out.
///
/// # Errors
/// [`TrainError::Io`], [`TrainError::BadMetrics`].
pub fn read(path: &Path) -> Result<Vec<(u64, Map<String, Value>)>> {
    let mut rows = Vec::new();
    for_each_row(path, |step, row, _| rows.push((step, row)))?;
    Ok(rows)
}

fn keep_until(path: &Path, last: Option<u64>) -> Result<()> {
    let mut kept = Vec::new();
    for_each_row(path, |step, _, line| {
        if last.is_some_and(|last| step <= last) {
            kept.extend_from_slice(line);
        }
    })?;
    let length = fs::metadata(path).map_err(TrainError::io("read", path))?.len();
    if length == kept.len() as u64 {
        return Ok(());
    }
    Ok(write_atomically(path, |out| out.write_all(&kept))?)
}

fn for_each_row(path: &Path, mut visit: impl FnMut(u64, Map<String, Value>, &[u8])) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(TrainError::io("open", path))?);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        reader.read_until(b'\n', &mut line).map_err(TrainError::io("read", path))?;
        if line.last() != Some(&b'\n') {
            break;
        }
        let bad = |reason: String| TrainError::BadMetrics { path: path.to_path_buf(), line: number, reason };
        let row: Map<String, Value> =
            serde_json::from_slice(&line).map_err(|error| bad(error.to_string()))?;
        let step = row.get("step").and_then(Value::as_u64).ok_or_else(|| bad("it has no `step`".into()))?;
        visit(step, row, &line);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_file_equals_an_undisturbed_one() {
        let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |log: &mut MetricsLog, steps: std::ops::Range<u64>| {
            for step in steps {
                log.append(step, &[("loss", 1.0 / (step + 1) as f64), ("lr", 1e-4)]).unwrap();
            }
        };
        write(&mut MetricsLog::open(whole.path(), None).unwrap(), 0..10);
        let path = broken.path().join(MetricsLog::FILE);
        write(&mut MetricsLog::open(broken.path(), None).unwrap(), 0..8);
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend(b"{\"step\":8,\"lo");
        fs::write(&path, bytes).unwrap();
        write(&mut MetricsLog::open(broken.path(), Some(5)).unwrap(), 6..10);
        assert_eq!(fs::read(&path).unwrap(), fs::read(whole.path().join(MetricsLog::FILE)).unwrap());
        let rows = read(&path).unwrap();
        assert_eq!(rows.len(), 10);
        assert_eq!((rows[3].0, rows[3].1["loss"].as_f64()), (3, Some(0.25)));
    }

    #[test]
    fn a_fresh_start_empties_the_file() {
        let dir = tempfile::tempdir().unwrap();
        MetricsLog::open(dir.path(), None).unwrap().append(0, &[]).unwrap();
        drop(MetricsLog::open(dir.path(), Some(0)).unwrap());
        assert_eq!(read(&dir.path().join(MetricsLog::FILE)).unwrap().len(), 1);
        drop(MetricsLog::open(dir.path(), None).unwrap());
        assert_eq!(fs::read(dir.path().join(MetricsLog::FILE)).unwrap(), b"");
    }

    #[test]
    fn what_is_not_finite_is_null() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), None).unwrap();
        log.append(1, &[("loss", f64::NAN), ("x", 0.5)]).unwrap();
        log.sync().unwrap();
        let text = fs::read_to_string(dir.path().join(MetricsLog::FILE)).unwrap();
        assert_eq!(text, "{\"step\":1,\"loss\":null,\"x\":0.5}\n");
    }

    #[test]
    fn a_foreign_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MetricsLog::FILE);
        fs::write(&path, "{\"step\":1}\nhello\n").unwrap();
        let error = MetricsLog::open(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("line 2 is no metrics record"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"{\"step\":1}\nhello\n");
        for name in ["metrics.jsonl.unreadable-1", "metrics.jsonl.unreadable-2"] {
            fs::write(&path, "{\"step\":1}\nhello\n").unwrap();
            let (_, aside) = MetricsLog::open_beside(dir.path(), Some(1)).unwrap();
            assert_eq!(aside.unwrap(), dir.path().join(name));
            assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"{\"step\":1}\nhello\n");
            assert_eq!(fs::read(&path).unwrap(), b"");
        }
        fs::write(&path, "{\"loss\":1}\n").unwrap();
        assert!(MetricsLog::open(dir.path(), Some(3)).unwrap_err().to_string().contains("no `step`"));
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/full", dir.path().join("full")).unwrap();
        let path = dir.path().join("full");
        let file = File::options().append(true).open(&path).unwrap();
        let mut log = MetricsLog { path: path.clone(), file, length: 0, waiting: Vec::new() };
        let error = log.append(1, &[]).unwrap_err().to_string();
        assert!(error.contains("free some space"), "{error}");
        // There is room again: nothing is missing.
        fs::remove_file(&path).unwrap();
        log.file = File::options().append(true).create(true).open(&path).unwrap();
        log.append(2, &[]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
    }
}
