//! Running the trials of a sweep that have no result yet.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use runtime::lock::Holder;
use runtime::{Recording, Runtime, RuntimeError};

use super::journal::{Claim, Claimed, Event, Journals, Status, TrialResult, Writer};
use super::plan::{Plan, StepCost, Trial, step_cost};
use crate::data::{BatchPlan, DataIdentity, Dataset, Loader};
use crate::error::{Result, TrainError};
use crate::signals::StopSignal;
use crate::step::StepShape;
use crate::trainer::{MemoryPlan, Trainer};

/// Windows of a trial's curve, at most.
const WINDOWS: u64 = 64;
/// Steps over which the loss that is watched for divergence forgets half.
const HALF_LIFE: f64 = 10.0;
/// Folder of the kept weights, one checkpoint a trial.
pub const WEIGHTS: &str = "weights";

/// What a caller is told while trials run.
#[derive(Debug)]
pub enum News<'a> {
    /// A step is about to be compiled.
    Compiling(&'a Trial),
    /// On a GPU: what that step will take of its memory. Nothing has been allocated yet.
    Planned(&'a MemoryPlan),
    /// The step's runs are not recorded as CUDA graphs, though that was asked for: why.
    Unrecorded(&'a str),
    /// The file system has no locks; what keeps other workers from a trial instead.
    Unlocked(&'a str),
    /// A trial is left alone for what the file of another worker says, which may be gone.
    Held(&'a Trial, &'a Holder),
    /// A trial begins.
    Started(&'a Trial),
    /// A step of it is done; its loss.
    Stepped(&'a Trial, f64),
    /// It ended.
    Ended(&'a Trial, &'a TrialResult),
}

/// What a worker has to know.
pub struct Work<'a> {
    /// The trials.
    pub plan: &'a Plan,
    /// The sweep's folder.
    pub folder: &'a Path,
    /// Who runs the steps.
    pub runtime: &'a Arc<Runtime>,
    /// The images.
    pub dataset: &'a Arc<dyn Dataset>,
    /// Of `of` workers that share the trials out by number, this one's index; 0 of 1 takes any.
    pub index: usize,
    /// Number of such workers.
    pub of: usize,
    /// Ends the work between two steps.
    pub stop: &'a StopSignal,
}

/// What a worker did.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Summary {
    /// Trials that it ended.
    pub ended: usize,
    /// Those of them that diverged.
    pub diverged: usize,
    /// Those of them that could not be run.
    pub failed: usize,
    /// Trials that other workers were at when it had nothing left.
    pub elsewhere: usize,
    /// Steps that it compiled.
    pub compilations: usize,
    /// Seconds that took.
    pub compile_seconds: f64,
    /// Seconds in all.
    pub seconds: f64,
    /// Seconds of them in steps of trials that ended.
    pub step_seconds: f64,
    /// Whether it was stopped.
    pub stopped: bool,
}

impl Summary {
    /// Share of the time, compilations aside, that was not spent in steps.
    pub fn overhead(&self) -> f64 {
        let busy = self.seconds - self.compile_seconds;
        if busy > 0.0 { 1.0 - self.step_seconds / busy } else { 0.0 }
    }
}

impl Work<'_> {
    /// Runs trials until none is left that no other worker is at.
    ///
    /// # Errors
    /// [`TrainError::OtherData`] when the results so far are of another data set; what files, data and sessions give. A
    /// trial that diverges, or that cannot be run by itself, is a result, not an error.
    pub fn run(&self, news: &mut dyn FnMut(News<'_>)) -> Result<Summary> {
        let start = Instant::now();
        let mut summary = Summary::default();
        let mut journals = Journals::open(self.folder)?;
        let data = DataIdentity::of(self.dataset.as_ref())?;
        let noted = journals.check_data(&data)?;
        let mut writer = Writer::create(self.folder)?;
        if !noted {
            writer.append(&Event::Data(data))?;
        }
        let mut compiled: Option<Compiled> = None;
        let (mut told_unlocked, mut told_held) = (false, BTreeSet::new());
        loop {
            let (mut ran, mut elsewhere) = (false, 0);
            for trial in self.plan.trials.iter().filter(|t| t.index % self.of.max(1) == self.index) {
                if journals.has(&trial.id) {
                    continue;
                }
                let claim = match Claim::take(self.folder, &trial.id, self.of > 1)? {
                    Claimed::Ours(claim) => claim,
                    Claimed::Elsewhere(holder) => {
                        elsewhere += 1;
                        if holder.is_written() && told_held.insert(&trial.id) {
                            news(News::Held(trial, &holder));
                        }
                        continue;
                    }
                };
                if let Some(stand_in) =
                    claim.stand_in().filter(|_| !std::mem::replace(&mut told_unlocked, true))
                {
                    news(News::Unlocked(&stand_in));
                }
                journals.refresh()?;
                if journals.has(&trial.id) {
                    continue; // whoever had the claim before has finished it
                }
                let outcome = match self.trial(trial, &mut compiled, &mut writer, &mut summary, news) {
                    Err(error) if is_of_the_trial(&error) => {
                        compiled = None; // its memory, and whatever it left half done
                        let result = failed(trial, &error);
                        writer.append(&Event::Ended(result.clone()))?;
                        Some(result)
                    }
                    outcome => outcome?,
                };
                let Some(result) = outcome else {
                    summary.stopped = true;
                    summary.seconds = start.elapsed().as_secs_f64();
                    return Ok(summary);
                };
                drop(claim);
                summary.ended += 1;
                summary.diverged += usize::from(result.status == Status::Diverged);
                summary.failed += usize::from(result.status == Status::Failed);
                summary.step_seconds += result.step_seconds;
                news(News::Ended(trial, &result));
                ran = true;
            }
            if !ran {
                summary.elsewhere = elsewhere;
                summary.seconds = start.elapsed().as_secs_f64();
                return Ok(summary);
            }
        }
    }

    /// Runs one trial and writes its result; none when it was stopped.
    fn trial(
        &self,
        trial: &Trial,
        compiled: &mut Option<Compiled>,
        writer: &mut Writer,
        summary: &mut Summary,
        news: &mut dyn FnMut(News<'_>),
    ) -> Result<Option<TrialResult>> {
        let start = Instant::now();
        // Its first batch is read while the parameters are drawn.
        let (train, data) = (&trial.config.train, &trial.config.data);
        let batches = BatchPlan::new(train.seed, self.dataset.len(), train.batch_size)?;
        let steps = 0..train.steps;
        let loader =
            Loader::start(Arc::clone(self.dataset), batches, data.flip, steps, data.prefetch, data.workers)?;
        let usable = matches!(compiled, Some(c) if c.shape == trial.shape);
        let mut compile_seconds = 0.0;
        if usable {
            if let Some(compiled) = compiled.as_mut() {
                compiled.trainer.restart(&trial.config, &trial.model)?;
            }
        } else {
            news(News::Compiling(trial));
            let start = Instant::now();
            *compiled = None; // its memory first
            let mut planned = |plan: &MemoryPlan| news(News::Planned(plan));
            let trainer = Trainer::shared_planned(self.runtime, &trial.config, &trial.model, &mut planned)?;
            if let Recording::Refused(reason) = trainer.compiled().recording() {
                news(News::Unrecorded(reason));
            }
            let cost = step_cost(&trial.config, &trial.model)?;
            *compiled = Some(Compiled { shape: trial.shape.clone(), trainer, cost });
            compile_seconds = start.elapsed().as_secs_f64();
            summary.compilations += 1;
            summary.compile_seconds += compile_seconds;
            writer.append(&Event::Compiled { shape: trial.shape.to_string(), seconds: compile_seconds })?;
        }
        let Some(Compiled { trainer, cost, .. }) = compiled.as_mut() else { return Ok(None) };
        writer.append(&Event::Started { id: trial.id.clone(), trial: trial.index })?;
        news(News::Started(trial));
        let mut result = self.steps(trial, trainer, loader, *cost, news)?;
        if let Some(result) = &mut result {
            result.seconds = start.elapsed().as_secs_f64() - compile_seconds;
            if self.plan.spec.keep_weights && result.status == Status::Finished {
                trainer.write_model(&self.folder.join(WEIGHTS).join(&trial.id))?;
            }
            writer.append(&Event::Ended(result.clone()))?;
        }
        Ok(result)
    }

    fn steps(
        &self,
        trial: &Trial,
        trainer: &mut Trainer,
        loader: Loader,
        cost: StepCost,
        news: &mut dyn FnMut(News<'_>),
    ) -> Result<Option<TrialResult>> {
        let (train, mut step_seconds) = (&trial.config.train, 0.0);
        let mut losses: Vec<f64> = Vec::new();
        let mut watch = Watch::new(self.plan.spec.diverged);
        let mut diverged = false;
        for batch in loader {
            let batch = batch?;
            let begin = Instant::now();
            let (loss, update) = trainer.step(&batch)?;
            step_seconds += begin.elapsed().as_secs_f64();
            losses.push(loss.loss);
            news(News::Stepped(trial, loss.loss));
            let goes_on = match trainer.goes_on(batch.step + 1, &loss, &update) {
                Err(TrainError::LossScale { .. }) => false,
                other => other?,
            };
            diverged = !goes_on || watch.ran_away(loss.loss);
            if diverged {
                break;
            }
            if self.stop.is_set() && (losses.len() as u64) < train.steps {
                return Ok(None);
            }
        }
        let done = losses.len() as u64;
        let tail = ((train.steps as f64 * self.plan.spec.tail).ceil() as usize).clamp(1, losses.len().max(1));
        let window = train.steps.div_ceil(WINDOWS).max(1) as usize;
        let curve = losses.chunks(window).enumerate().map(|(i, losses)| {
            let end = (i * window + losses.len()) as u64;
            (end, Some(mean(losses)).filter(|m| m.is_finite()))
        });
        Ok(Some(TrialResult {
            id: trial.id.clone(),
            trial: trial.index,
            status: if diverged { Status::Diverged } else { Status::Finished },
            reason: None,
            loss: (!diverged).then(|| mean(&losses[losses.len().saturating_sub(tail)..])),
            steps: done,
            seconds: step_seconds, // the caller adds what is around the steps
            step_seconds,
            flops: done as f64 * cost.flops,
            parameters: cost.parameters,
            images: done * train.batch_size as u64,
            curve: curve.collect(),
        }))
    }
}

/// Whether other trials may well run though this one cannot: what fails is its model, its settings or its size.
fn is_of_the_trial(error: &TrainError) -> bool {
    match error {
        TrainError::Model(_)
        | TrainError::BadValue { .. }
        | TrainError::DataMismatch { .. }
        | TrainError::DatasetTooSmall { .. } => true,
        TrainError::Runtime(error) => matches!(
            error,
            RuntimeError::OutOfMemory { .. }
                | RuntimeError::GpuOutOfMemory { .. }
                | RuntimeError::Load { .. }
                | RuntimeError::Run { .. }
        ),
        _ => false,
    }
}

fn failed(trial: &Trial, error: &TrainError) -> TrialResult {
    TrialResult {
        id: trial.id.clone(),
        trial: trial.index,
        status: Status::Failed,
        reason: Some(error.to_string()),
        loss: None,
        steps: 0,
        seconds: 0.0,
        step_seconds: 0.0,
        flops: 0.0,
        parameters: 0,
        images: 0,
        curve: Vec::new(),
    }
}

/// A step that is loaded.
struct Compiled {
    shape: StepShape,
    trainer: Trainer,
    cost: StepCost,
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Tells a run whose loss has left for good from one with a spike.
struct Watch {
    factor: f64,
    first: Option<f64>,
    smooth: f64,
    seen: f64,
}

impl Watch {
    fn new(factor: f64) -> Self {
        Self { factor, first: None, smooth: 0.0, seen: 0.0 }
    }

    fn ran_away(&mut self, loss: f64) -> bool {
        if !loss.is_finite() {
            return true;
        }
        let first = *self.first.get_or_insert(loss);
        let keep = 0.5f64.powf(1.0 / HALF_LIFE);
        self.smooth = keep * self.smooth + (1.0 - keep) * loss;
        self.seen += 1.0;
        let mean = self.smooth / (1.0 - keep.powf(self.seen));
        self.factor > 0.0 && self.seen >= HALF_LIFE && mean > self.factor * first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends_at(factor: f64, losses: impl IntoIterator<Item = f64>) -> Option<usize> {
        let mut watch = Watch::new(factor);
        losses.into_iter().position(|loss| watch.ran_away(loss))
    }

    #[test]
    fn a_run_that_ran_away_ends_and_a_spike_does_not_end_one() {
        assert_eq!(
            ends_at(2.0, (0..40).map(|i| 1.0 + f64::from(i) / 4.0)).map(|i| (9..20).contains(&i)),
            Some(true)
        );
        let spike = (0..60).map(|i| if i == 20 { 12.0 } else { 1.0 });
        assert_eq!(ends_at(2.0, spike), None);
        assert_eq!(ends_at(2.0, (0..60).map(|i| 1.0 / f64::from(i + 1))), None);
        assert_eq!(ends_at(0.0, [1.0, 1e9, 1e20]), None, "0 waits for what is not finite");
        assert_eq!(ends_at(0.0, [1.0, f64::INFINITY]), Some(1));
    }

    #[test]
    fn what_ends_a_trial_and_what_the_sweep() {
        let runtime = |error: RuntimeError| TrainError::Runtime(error);
        let memory = RuntimeError::OutOfMemory { bytes: 1, what: "x".into() };
        let load = RuntimeError::Load { program: "p".into(), reason: "r".into() };
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        for (error, of_the_trial) in [
            (runtime(memory), true),
            (runtime(load), true),
            (TrainError::DatasetTooSmall { images: 1, batch_size: 2 }, true),
            (TrainError::Io { action: "write", path: "x".into(), source: full }, false),
            (TrainError::BadImage { path: "x".into(), reason: "cut".into() }, false),
            (TrainError::Internal("x".into()), false),
        ] {
            assert_eq!(is_of_the_trial(&error), of_the_trial, "{error}");
        }
    }

    #[test]
    fn overhead_is_what_is_not_steps_nor_compiling() {
        let summary =
            Summary { seconds: 12.0, compile_seconds: 2.0, step_seconds: 9.9, ..Summary::default() };
        assert!((summary.overhead() - 0.01).abs() < 1e-12);
    }
}
