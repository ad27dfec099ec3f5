//! What happened in a sweep: append-only files of JSON lines, one a worker, and the locks on trials.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use runtime::file::{sync_directory, sync_file};
use runtime::lock::{Holder, Lock, Tried};
use serde::{Deserialize, Serialize};

use crate::data::DataIdentity;
use crate::error::{Result, TrainError};

const JOURNALS: &str = "journal";
const LOCKS: &str = "locks";

/// How a trial ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// All steps were done.
    Finished,
    /// The loss or a gradient was not finite, or the loss ran away; what is left of the steps was not done.
    Diverged,
    /// It could not be run: its step does not compile, or does not fit into memory.
    Failed,
}

/// The result of a trial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialResult {
    /// The trial's id.
    pub id: String,
    /// Its number in the plan that it was run from.
    pub trial: usize,
    /// How it ended.
    pub status: Status,
    /// Why it failed; none otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Mean loss over the last share of the steps; none when diverged or failed.
    pub loss: Option<f64>,
    /// Steps done.
    pub steps: u64,
    /// Seconds of the trial in all.
    pub seconds: f64,
    /// Seconds of them in its steps.
    pub step_seconds: f64,
    /// Floating-point operations done, counted from the graph.
    pub flops: f64,
    /// Trainable parameters.
    pub parameters: usize,
    /// Images trained on.
    pub images: u64,
    /// Mean loss of successive windows: the window's last step, its mean.
    pub curve: Vec<(u64, Option<f64>)>,
}

impl TrialResult {
    /// Mean loss over the last share `tail` of the first `steps` steps, from the curve; none past the end of a diverged
    /// trial.
    pub fn loss_at(&self, steps: u64, tail: f64) -> Option<f64> {
        if steps > self.steps {
            return None;
        }
        let from = steps as f64 * (1.0 - tail);
        let inside = self.curve.iter().filter(|(end, _)| *end <= steps && *end as f64 > from);
        let values: Option<Vec<f64>> = inside.map(|(_, loss)| *loss).collect();
        values.filter(|v| !v.is_empty()).map(|v| v.iter().sum::<f64>() / v.len() as f64)
    }
}

/// One line of a journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The data set that the results after it are of.
    Data(DataIdentity),
    /// A step was compiled.
    Compiled {
        /// Its shape.
        shape: String,
        /// Seconds it took.
        seconds: f64,
    },
    /// A trial begins.
    Started {
        /// The trial's id.
        id: String,
        /// Its number.
        trial: usize,
    },
    /// A trial ended.
    Ended(TrialResult),
    /// Another judge's number for a finished trial.
    Told {
        /// The trial's id.
        id: String,
        /// The metric's name.
        metric: String,
        /// Its value.
        value: f64,
    },
}

/// All journals of a sweep, merged; reads what is new each time it is asked.
#[derive(Debug)]
pub struct Journals {
    folder: PathBuf,
    /// Bytes and lines read of each file, whole lines only.
    read: BTreeMap<PathBuf, (u64, usize)>,
    /// All events, file by file in the order they were read.
    pub events: Vec<Event>,
}

impl Journals {
    /// Reads the journals of the sweep in `folder`; none is no error.
    ///
    /// # Errors
    /// As [`refresh`](Self::refresh).
    pub fn open(folder: &Path) -> Result<Self> {
        let mut journals = Self { folder: folder.join(JOURNALS), read: BTreeMap::new(), events: Vec::new() };
        journals.refresh()?;
        Ok(journals)
    }

    /// Reads what was appended since the last time. A last line without its end is left for later: its writer is in the
    /// midst of it, or was killed.
    ///
    /// # Errors
    /// [`TrainError::Io`]; [`TrainError::BadMetrics`] for a whole line that is no event.
    pub fn refresh(&mut self) -> Result<()> {
        if !self.folder.is_dir() {
            return Ok(());
        }
        let entries = fs::read_dir(&self.folder).map_err(TrainError::io("list", &self.folder))?;
        let mut paths = entries
            .map(|e| Ok(e.map_err(TrainError::io("list", &self.folder))?.path()))
            .collect::<Result<Vec<_>>>()?;
        paths.retain(|path| path.extension().is_some_and(|e| e == "jsonl"));
        paths.sort();
        for path in paths {
            let (from, mut lines) = self.read.get(&path).copied().unwrap_or_default();
            let mut bytes = Vec::new();
            let mut file = File::open(&path).map_err(TrainError::io("open", &path))?;
            file.seek(SeekFrom::Start(from))
                .and_then(|_| file.read_to_end(&mut bytes))
                .map_err(TrainError::io("read", &path))?;
            let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            for line in bytes[..whole].split_inclusive(|b| *b == b'\n') {
                lines += 1;
                let (path, reason) = (path.clone(), |e: serde_json::Error| e.to_string());
                let event = serde_json::from_slice(line).map_err(reason);
                self.events.push(event.map_err(|reason| TrainError::BadMetrics {
                    path,
                    line: lines,
                    reason,
                })?);
            }
            self.read.insert(path, (from + whole as u64, lines));
        }
        Ok(())
    }

    /// Results by id.
    pub fn results(&self) -> BTreeMap<&str, &TrialResult> {
        let ended = self.events.iter().filter_map(|event| match event {
            Event::Ended(result) => Some((result.id.as_str(), result)),
            _ => None,
        });
        ended.collect()
    }

    /// Whether a trial has its result.
    pub fn has(&self, id: &str) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Ended(result) if result.id == id))
    }

    /// What another judge said last of a trial.
    pub fn told(&self, id: &str, metric: &str) -> Option<f64> {
        self.events.iter().rev().find_map(|event| match event {
            Event::Told { id: of, metric: name, value } if of == id && name == metric => Some(*value),
            _ => None,
        })
    }

    /// Refuses another data set than the results so far are of; whether any has been noted.
    ///
    /// # Errors
    /// [`TrainError::OtherData`] naming what differs.
    pub fn check_data(&self, data: &DataIdentity) -> Result<bool> {
        let noted = self.events.iter().find_map(|event| match event {
            Event::Data(before) => Some(before),
            _ => None,
        });
        let differences = noted.map_or(Vec::new(), |before| data.differences(before));
        if differences.is_empty() {
            return Ok(noted.is_some());
        }
        Err(TrainError::OtherData {
            path: self.folder.clone(),
            differences: differences.join("; "),
            remedy:
                "results on different data do not compare: bring it back, or choose another folder with --out"
                    .into(),
        })
    }

    /// Number of compilations, over all workers.
    pub fn compilations(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, Event::Compiled { .. })).count()
    }
}

/// The one file that a worker appends to.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
}

impl Writer {
    /// Makes a file that no other worker has.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn create(folder: &Path) -> Result<Self> {
        let directory = folder.join(JOURNALS);
        fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
        for number in 0.. {
            let path = directory.join(format!("worker-{number:04}.jsonl"));
            match File::options().append(true).create_new(true).open(&path) {
                Ok(file) => {
                    // Whether a power cut can take an empty journal back is no matter.
                    drop(sync_directory(&directory));
                    return Ok(Self { path, file });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(TrainError::io("create", &path)(error)),
            }
        }
        Err(TrainError::Internal("no number is left for a journal".into()))
    }

    /// Appends an event as one line; a result is durable when this returns.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn append(&mut self, event: &Event) -> Result<()> {
        let text = serde_json::to_string(event)
            .map_err(|e| TrainError::Internal(format!("an event does not serialise: {e}")))?;
        self.file.write_all(format!("{text}\n").as_bytes()).map_err(TrainError::io("write", &self.path))?;
        if matches!(event, Event::Ended(_) | Event::Told { .. }) {
            sync_file(&self.file).map_err(TrainError::io("sync", &self.path))?;
        }
        Ok(())
    }
}

/// The right to run one trial; ends when dropped or when the process ends, however it ends.
#[derive(Debug)]
pub struct Claim {
    /// None where nobody else can be at the trial.
    lock: Option<Lock>,
}

/// How an attempt to claim a trial ended.
#[derive(Debug)]
pub enum Claimed {
    /// It is ours.
    Ours(Claim),
    /// Another worker has it.
    Elsewhere(Holder),
}

impl Claim {
    /// Claims a trial. Where the file system has no locks, a worker that shares the trials `by_number` heeds no other: one
    /// that held it before was its own forerunner, perhaps on another machine.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn take(folder: &Path, id: &str, by_number: bool) -> Result<Claimed> {
        let directory = folder.join(LOCKS);
        fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
        Ok(match Lock::take(&directory.join(id))? {
            Tried::Ours(lock) => Claimed::Ours(Self { lock: Some(lock) }),
            Tried::Held(holder) if by_number && holder.is_written() => Claimed::Ours(Self { lock: None }),
            Tried::Held(holder) => Claimed::Elsewhere(holder),
        })
    }

    /// What stands in for the lock of a file system that has none.
    pub fn stand_in(&self) -> Option<String> {
        self.lock.as_ref()?.stand_in()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(in crate::sweep) fn result(id: &str, losses: &[Option<f64>]) -> TrialResult {
        let curve: Vec<(u64, Option<f64>)> =
            losses.iter().enumerate().map(|(i, l)| (10 * (i as u64 + 1), *l)).collect();
        TrialResult {
            id: id.to_owned(),
            trial: 0,
            status: Status::Finished,
            reason: None,
            loss: losses.last().copied().flatten(),
            steps: 10 * losses.len() as u64,
            seconds: 2.0,
            step_seconds: 1.0,
            flops: 1e9,
            parameters: 10,
            images: 100,
            curve,
        }
    }

    #[test]
    fn journals_of_several_workers_are_one_and_a_torn_line_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut writers = [(); 2].map(|()| Writer::create(dir.path()).unwrap());
        assert_ne!(writers[0].path, writers[1].path);
        let mut journals = Journals::open(dir.path()).unwrap();
        writers[0].append(&Event::Ended(result("a", &[Some(0.1)]))).unwrap();
        writers[1].append(&Event::Compiled { shape: "s".into(), seconds: 0.5 }).unwrap();
        writers[1].file.write_all(b"{\"event\":\"ended\",\"id\":\"b").unwrap();
        journals.refresh().unwrap();
        assert!(journals.has("a") && !journals.has("b"));
        assert_eq!((journals.compilations(), journals.events.len()), (1, 2));
        // The writer was slow, not dead.
        let rest = serde_json::to_string(&Event::Ended(result("b", &[None]))).unwrap();
        let rest = rest.strip_prefix("{\"event\":\"ended\",\"id\":\"b").unwrap();
        writers[1].file.write_all(format!("{rest}\n").as_bytes()).unwrap();
        writers[0].append(&Event::Told { id: "a".into(), metric: "fd".into(), value: 9.0 }).unwrap();
        journals.refresh().unwrap();
        assert_eq!(journals.results().keys().copied().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((journals.told("a", "fd"), journals.told("b", "fd")), (Some(9.0), None));
        let again = Journals::open(dir.path()).unwrap();
        assert_eq!((again.results(), again.events.len()), (journals.results(), 4));
    }

    #[test]
    fn a_line_of_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(dir.path()).unwrap();
        writer.file.write_all(b"hello\n").unwrap();
        let error = Journals::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("worker-0000.jsonl"), "{error}");
    }

    #[test]
    fn a_trial_is_claimed_once_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let free = |id: &str| matches!(Claim::take(dir.path(), id, false).unwrap(), Claimed::Ours(_));
        let Claimed::Ours(claim) = Claim::take(dir.path(), "a", false).unwrap() else { panic!("it is free") };
        assert!(!free("a") && free("b"));
        drop(claim);
        assert!(free("a"));
    }

    #[test]
    fn a_curve_gives_the_loss_of_a_shorter_run() {
        let result = result("a", &[Some(4.0), Some(3.0), Some(2.0), Some(1.0)]);
        assert_eq!(result.loss_at(40, 0.25), Some(1.0));
        assert_eq!(result.loss_at(40, 0.5), Some(1.5));
        assert_eq!(result.loss_at(20, 0.5), Some(3.0));
        assert_eq!(result.loss_at(50, 0.5), None);
    }
}
