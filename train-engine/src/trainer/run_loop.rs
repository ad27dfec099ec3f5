//! The loop of a run: step, log, save, draw; and which of these may fail without ending it.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;
use std::time::Instant;

use models::Model;
use runtime::UpdateReport;
use runtime::memory::peak_resident_bytes;

use super::Trainer;
use super::start::Origin;
use super::whole_run::{Observer, Outcome, StepReport};
use crate::checkpoint::{RunLock, State};
use crate::config::TrainConfig;
use crate::data::{Batch, BatchPlan, DataIdentity, Loader};
use crate::error::{Result, TrainError};
use crate::metrics::MetricsLog;
use crate::schedule::learning_rate_factor;
use crate::signals::StopSignal;
use crate::step::StepLoss;
use crate::tensorboard::EventWriter;

const NO_METRICS: &str = "`metrics.jsonl` lacks steps";
const NO_EVENTS: &str = "TensorBoard's file lacks steps";

/// What fails beside a run and makes no next step wrong: warnings, the first of each kind.
#[derive(Debug, Default)]
pub(super) struct ToleratedErrors {
    told: BTreeSet<&'static str>,
}

impl ToleratedErrors {
    fn tell(&mut self, observer: &mut dyn Observer, what: &'static str, error: &dyn Display) {
        if self.told.insert(what) {
            observer.warn(&format!("{what}: {error}; the run goes on, and this is told once"));
        }
    }

    /// What did not fail.
    pub(super) fn pass<T>(
        &mut self,
        observer: &mut dyn Observer,
        what: &'static str,
        result: Result<T>,
    ) -> Option<T> {
        result.map_err(|error| self.tell(observer, what, &error)).ok()
    }

    /// [`checkpoint::Trouble`](crate::checkpoint::Trouble)s of a run.
    pub(super) fn of<'a>(
        &'a mut self,
        observer: &'a mut dyn Observer,
    ) -> impl FnMut(&'static str, TrainError) + 'a {
        |what, error| self.tell(observer, what, &error)
    }
}

/// What a run's results stem from, as every checkpoint tells it.
#[derive(Debug)]
pub(super) struct Provenance {
    pub(super) data: DataIdentity,
    pub(super) origin: Option<Origin>,
}

/// A run between its first step and its last.
pub(super) struct RunLoop<'a> {
    config: &'a TrainConfig,
    run_dir: &'a Path,
    plan: BatchPlan,
    lock: &'a RunLock,
    trainer: Trainer,
    observer: &'a mut dyn Observer,
    tolerated: ToleratedErrors,
    provenance: Provenance,
    metrics: Option<MetricsLog>,
    events: Option<EventWriter>,
    /// Steps that are whole.
    done: u64,
    /// The step of the newest checkpoint.
    saved: u64,
    /// Whether the training state is that after `done` steps: not while a step is under way.
    whole: bool,
    /// Seconds of earlier runs.
    before: f64,
    start: Instant,
    last_save: Instant,
}

impl<'a> RunLoop<'a> {
    /// A run that has done some steps in some seconds; opens its logs.
    #[expect(clippy::too_many_arguments, reason = "the parts of a run, put together in one place")]
    pub(super) fn new(
        config: &'a TrainConfig,
        run_dir: &'a Path,
        plan: BatchPlan,
        lock: &'a RunLock,
        trainer: Trainer,
        observer: &'a mut dyn Observer,
        mut tolerated: ToleratedErrors,
        (done, before): (u64, f64),
        provenance: Provenance,
    ) -> Self {
        let opened = MetricsLog::open_beside(run_dir, (done > 0).then_some(done));
        let metrics = tolerated.pass(observer, NO_METRICS, opened).map(|(metrics, aside)| {
            if let Some(aside) = aside {
                let aside = aside.display();
                observer.warn(&format!(
                    "the metrics so far cannot be read and are now `{aside}`; new ones begin"
                ));
            }
            metrics
        });
        // The next step is the first of the new file: readers drop what older files hold from there on.
        let events = config.log.tensorboard.then(|| EventWriter::create(run_dir, done + 1)).transpose();
        let events = tolerated.pass(observer, NO_EVENTS, events).flatten();
        let (start, last_save) = (Instant::now(), Instant::now());
        Self {
            config,
            run_dir,
            plan,
            lock,
            trainer,
            observer,
            tolerated,
            provenance,
            metrics,
            events,
            done,
            saved: done,
            whole: true,
            before,
            start,
            last_save,
        }
    }

    /// Trains on all batches, or until a signal.
    ///
    /// # Errors
    /// What makes the next step wrong, or keeps a checkpoint from being written.
    pub(super) fn steps(&mut self, model: &Model, mut batches: Loader, stop: &StopSignal) -> Result<Outcome> {
        let (train, sample, every) = (&self.config.train, &self.config.sample, &self.config.checkpoint);
        let mut last = Instant::now();
        let mut next = if stop.is_set() { None } else { batches.next() };
        while let Some(batch) = next {
            let batch = batch?;
            if stop.is_set() && self.done == self.saved {
                break; // it came before the first step
            }
            self.trainer.enqueue(&batch)?;
            self.whole = false;
            // While a GPU computes, the next batch is fetched, drawn and sent. A failure is told in its turn.
            next = if stop.is_set() { None } else { batches.next() };
            let prepared = match &next {
                Some(Ok(next)) => self.trainer.prepare(next),
                _ => Ok(()),
            };
            let (loss, update) = self.trainer.complete()?;
            self.check(&batch, &loss, &update)?;
            self.done = batch.step + 1;
            self.whole = true;
            let seconds = last.elapsed().as_secs_f64();
            last = Instant::now();
            let lr = train.learning_rate * learning_rate_factor(train, batch.step);
            let (step, total_steps, grad_norm) = (self.done, train.steps, update.grad_norm);
            let report = StepReport { step, total_steps, loss, grad_norm, lr, seconds };
            if step % self.config.log.every_steps == 0 || step == total_steps {
                self.log(&report);
            }
            self.observer.stepped(&report);
            let stopped = stop.is_set() && step < total_steps;
            let due = every.every_seconds.is_some_and(|s| self.last_save.elapsed().as_secs() >= s);
            if step.is_multiple_of(every.every_steps) || due || stopped || step == total_steps {
                self.save()?;
            }
            if sample.every_steps > 0 && step % sample.every_steps == 0 {
                let average = self.trainer.average();
                let drawn = average.and_then(|average| self.observer.sample(step, model, &average));
                self.tolerated.pass(self.observer, "there are no sample pictures", drawn);
            }
            if stopped {
                break;
            }
            prepared?;
            if due || sample.every_steps > 0 {
                last = Instant::now();
            }
        }
        Ok(if self.done == train.steps { Outcome::Finished } else { Outcome::Interrupted(self.done) })
    }

    /// Refuses a step that is not finite, with what it was made of.
    fn check(&mut self, batch: &Batch, loss: &StepLoss, update: &UpdateReport) -> Result<()> {
        // Then nothing was updated.
        self.whole = !update.finite;
        let step = batch.step + 1;
        if self.trainer.goes_on(step, loss, update)? {
            return Ok(());
        }
        let evidence = self.trainer.save_evidence(self.run_dir, batch, loss, update.grad_norm);
        let evidence =
            self.tolerated.pass(self.observer, "what the step was made of is not written", evidence);
        Err(TrainError::NotFinite { step, loss: loss.loss, evidence })
    }

    fn log(&mut self, report: &StepReport) {
        let rate = self.config.train.batch_size as f64 / report.seconds;
        let mut values = vec![("loss", report.loss.loss), ("loss.mse", mean(&report.loss.mse))];
        if !report.loss.vb.is_empty() {
            values.push(("loss.vb", mean(&report.loss.vb)));
        }
        values.extend([("grad_norm", report.grad_norm), ("lr", report.lr), ("images_per_s", rate)]);
        if let Some(scale) = self.trainer.loss_scale() {
            let skipped = scale.skipped() as f64;
            values.extend([("loss_scale", scale.scale()), ("skipped_steps", skipped)]);
        }
        values.extend(peak_resident_bytes().map(|bytes| ("peak_memory_mb", bytes as f64 / 1e6)));
        if let Some(metrics) = &mut self.metrics {
            let written = metrics.append(report.step, &values);
            self.tolerated.pass(self.observer, NO_METRICS, written);
        }
        if let Some(events) = &mut self.events {
            let written = events.scalars(report.step, &values);
            self.tolerated.pass(self.observer, NO_EVENTS, written);
        }
    }

    fn save(&mut self) -> Result<()> {
        let train = &self.config.train;
        let position = self.plan.position(self.done);
        let state = State {
            format_version: State::FORMAT_VERSION,
            step: self.done,
            total_steps: train.steps,
            decay_steps: train.decay_end(),
            images_seen: self.done * train.batch_size as u64,
            epoch: position.epoch,
            epoch_batch: position.batch,
            seed: train.seed,
            elapsed_seconds: self.before + self.start.elapsed().as_secs_f64(),
            config_hash: self.config.hash()?,
            loss_scale: self.trainer.loss_scale().copied(),
            data: Some(self.provenance.data.clone()),
            origin: self.provenance.origin.clone(),
            mup: serde_json::to_value(self.trainer.mup())
                .map_err(|e| TrainError::Internal(format!("the muP table does not serialise: {e}")))?,
        };
        if let Some(metrics) = &self.metrics {
            self.tolerated.pass(self.observer, NO_METRICS, metrics.sync());
        }
        let keep = self.config.checkpoint.keep;
        let mut trouble = self.tolerated.of(self.observer);
        let path = self
            .lock
            .save(self.done, keep, &mut trouble, |directory| self.trainer.write(directory, &state))?;
        drop(trouble);
        self.observer.saved(&path);
        (self.saved, self.last_save) = (self.done, Instant::now());
        Ok(())
    }

    /// Saves the steps that were whole before an error.
    pub(super) fn rescue(&mut self) {
        if !self.whole || self.done == self.saved {
            return;
        }
        // A save that failed is tried once more; it is not the error to tell.
        let told = match self.save() {
            Ok(()) => format!("an error ends the run; its {} steps are saved", self.done),
            Err(error) => format!("the steps since the last checkpoint are lost: {error}"),
        };
        self.observer.warn(&told);
    }
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len().max(1) as f64
}
