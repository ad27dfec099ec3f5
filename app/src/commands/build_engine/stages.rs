//! How far a build is: one line a stage, with the time that is left where it can be known.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::console;
use crate::render::progress::duration;

/// What is done once, or once for each program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// Weights are brought to the programs' types.
    Convert,
    /// A program becomes ONNX.
    Emit,
    /// Kernels are compiled for a GPU that may be elsewhere.
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

/// The stages that are to come and how long the earlier ones took.
#[derive(Debug)]
pub(super) struct Stages {
    left: BTreeMap<Stage, usize>,
    total: usize,
    taken: BTreeMap<Stage, Vec<f64>>,
    running: Option<(Stage, Instant)>,
}

impl Stages {
    /// A build of so many of each.
    pub(super) fn new(counts: impl IntoIterator<Item = (Stage, usize)>) -> Self {
        let left: BTreeMap<Stage, usize> = counts.into_iter().filter(|(_, n)| *n > 0).collect();
        Self { total: left.values().sum(), left, taken: BTreeMap::new(), running: None }
    }

    /// Ends the stage before and says what begins; `what` names the program.
    pub(super) fn begin(&mut self, stage: Stage, what: &str) {
        self.end();
        let time = self.remaining().map_or(String::new(), |t| format!(" (about {} left)", duration(t)));
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

    /// Seconds until all is done, if each kind of what is left was seen at least once: programs differ by a few times
    /// in size, so their mean is a fair guess and no more.
    fn remaining(&self) -> Option<f64> {
        let left = self.left.iter().filter(|(_, n)| **n > 0);
        let seconds = left.map(|(stage, n)| {
            let taken = self.taken.get(stage)?;
            Some(taken.iter().sum::<f64>() / taken.len() as f64 * *n as f64)
        });
        seconds.sum()
    }
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
}
