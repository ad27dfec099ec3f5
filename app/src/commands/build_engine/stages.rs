//! How far a build is: one line a stage, with the time that is left where it can be known.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::console;
use crate::render::progress::duration;

/// In the cache: how long the stages of earlier builds took.
const TIMES: &str = "build-times.json";
/// Seconds below which nobody needs to know.
const WORTH_TELLING: f64 = 2.0;

/// What is done once, or once for each program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Stage {
    /// Weights are brought to the programs' types.
    Convert,
    /// A program becomes ONNX.
    Emit,
    /// The engine's kernels are compiled.
    Kernels,
    /// A provider loads a program, and builds its own engine of it.
    Load,
    /// A program's answers are compared.
    Validate,
}

impl Stage {
    fn words(self) -> &'static str {
        match self {
            Self::Convert => "converting the weights",
            Self::Emit => "emitting",
            Self::Kernels => "compiling the kernels",
            Self::Load => "loading",
            Self::Validate => "validating",
        }
    }
}

/// The stages that are to come and how long the earlier ones took, of this build and of the last one of the same kind.
#[derive(Debug)]
pub(super) struct Stages {
    /// Where the times of builds are kept, and the name of this kind.
    times: Option<(PathBuf, String)>,
    /// Seconds of each stage in the last build.
    before: BTreeMap<Stage, f64>,
    left: BTreeMap<Stage, usize>,
    total: usize,
    taken: BTreeMap<Stage, Vec<f64>>,
    running: Option<(Stage, Instant)>,
}

impl Stages {
    /// A build of so many of each.
    pub(super) fn new(counts: impl IntoIterator<Item = (Stage, usize)>) -> Self {
        let left: BTreeMap<Stage, usize> = counts.into_iter().filter(|(_, n)| *n > 0).collect();
        let (times, before, taken) = (None, BTreeMap::new(), BTreeMap::new());
        Self { total: left.values().sum(), left, taken, running: None, times, before }
    }

    /// Guesses by the last build of this kind until a stage was seen, and keeps this one's times for the next.
    pub(super) fn remembering(mut self, folder: Option<PathBuf>, kind: &str) -> Self {
        let Some(file) = folder.map(|folder| folder.join(TIMES)) else { return self };
        self.before = kept(&file).remove(kind).unwrap_or_default();
        self.times = Some((file, kind.to_owned()));
        self
    }

    /// All is done.
    pub(super) fn finish(mut self) {
        self.end();
        let Some((file, kind)) = &self.times else { return };
        let mut all = kept(file);
        let means = self.taken.iter().map(|(stage, taken)| (*stage, mean(taken)));
        all.entry(kind.clone()).or_default().extend(means);
        // A guess that is not kept is no reason to fail a build that is done.
        if let Ok(text) = serde_json::to_vec_pretty(&all) {
            drop(runtime::file::write_atomically(file, |out| out.write_all(&text)));
        }
    }

    /// Ends the stage before and says what begins; `what` names the program.
    pub(super) fn begin(&mut self, stage: Stage, what: &str) {
        self.end();
        let worth = self.remaining().filter(|t| *t >= WORTH_TELLING);
        let time = worth.map_or(String::new(), |t| format!(" (about {} left)", duration(t)));
        if let Some(left) = self.left.get_mut(&stage) {
            *left = left.saturating_sub(1);
        }
        let number = self.total - self.left.values().sum::<usize>();
        let what = if what.is_empty() { String::new() } else { format!(" {what}") };
        console::note(&format!("[{number}/{}] {}{what}{time}", self.total, stage.words()));
        self.running = Some((stage, Instant::now()));
    }

    /// Ends the stage that runs; returns how long it took.
    pub(super) fn end(&mut self) -> Duration {
        let Some((stage, start)) = self.running.take() else { return Duration::ZERO };
        let took = start.elapsed();
        self.taken.entry(stage).or_default().push(took.as_secs_f64());
        took
    }

    /// Seconds until all is done, if each kind of what is left was seen at least once, in this build or the last: programs
    /// differ by a few times in size, so their mean is a fair guess and no more.
    fn remaining(&self) -> Option<f64> {
        let left = self.left.iter().filter(|(_, n)| **n > 0);
        let seconds = left.map(|(stage, n)| {
            let each = self.taken.get(stage).map(|taken| mean(taken)).or(self.before.get(stage).copied())?;
            Some(each * *n as f64)
        });
        seconds.sum()
    }
}

fn mean(seconds: &[f64]) -> f64 {
    seconds.iter().sum::<f64>() / seconds.len() as f64
}

/// Seconds of each stage by the kind of build; nothing where there is no such file.
fn kept(file: &Path) -> BTreeMap<String, BTreeMap<Stage, f64>> {
    std::fs::read(file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_known_once_every_kind_was_seen() {
        let mut stages = Stages::new([(Stage::Emit, 3), (Stage::Load, 2), (Stage::Convert, 0)]);
        assert_eq!((stages.total, stages.left.len()), (5, 2));
        stages.begin(Stage::Emit, "a");
        stages.end();
        assert_eq!(stages.remaining(), None);
        stages.taken = BTreeMap::from([(Stage::Emit, vec![1.0, 3.0]), (Stage::Load, vec![10.0])]);
        assert_eq!(stages.remaining(), Some(2.0 * 2.0 + 2.0 * 10.0));
        for stage in [Stage::Emit, Stage::Emit, Stage::Load, Stage::Load] {
            stages.begin(stage, "b");
        }
        stages.end();
        assert_eq!(stages.remaining(), Some(0.0));
    }

    #[test]
    fn a_build_is_guessed_by_the_last_one_of_its_kind() {
        let folder = tempfile::tempdir().unwrap();
        let begin = |kind| {
            let stages = Stages::new([(Stage::Load, 2)]);
            stages.remembering(Some(folder.path().to_path_buf()), kind)
        };
        let mut first = begin("tensorrt bf16");
        assert_eq!(first.remaining(), None);
        first.taken = BTreeMap::from([(Stage::Load, vec![200.0, 100.0])]);
        first.finish();
        assert_eq!(begin("tensorrt bf16").remaining(), Some(300.0));
        assert_eq!(begin("cuda bf16").remaining(), None);
    }
}
