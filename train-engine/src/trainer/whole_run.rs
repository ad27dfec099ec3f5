//! A run from its configuration to its last step, in a directory that it can go on in.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use graph_builder::Graph;
use models::DitConfig;
use runtime::memory::peak_resident_bytes;
use runtime::{Recording, Runtime, SharedArena};

use super::resume::{DataNews, compare_data, refuse_other_run};
use super::start::Start;
use super::{MemoryPlan, Trainer};
use crate::checkpoint::{self, RunLock, State};
use crate::config::TrainConfig;
use crate::data::{BatchPlan, DataIdentity, Dataset, Loader};
use crate::error::{Result, TrainError};
use crate::metrics::MetricsLog;
use crate::schedule::learning_rate_factor;
use crate::signals::StopSignal;
use crate::step::StepLoss;
use crate::tensorboard::EventWriter;

/// File of the resolved configuration in a run directory.
pub const RUN_CONFIG_FILE: &str = "config.toml";

/// What one optimizer step did.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Loss and its terms.
    pub loss: StepLoss,
    /// Norm of all gradients before the clip.
    pub grad_norm: f64,
    /// Learning rate at the base width.
    pub lr: f64,
    /// Wall time of the step in seconds, waiting for data included.
    pub seconds: f64,
}

/// What a run is about to do.
#[derive(Debug, Clone)]
pub struct RunInfo {
    /// Steps already done by an earlier run.
    pub resumed_at: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Images of one optimizer step.
    pub batch_size: usize,
    /// Floating-point operations of one optimizer step, counted from the graph.
    pub flops_per_step: f64,
    /// Elements of the trainable parameters.
    pub trainable_parameters: usize,
    /// Seconds from the description to a session that can run.
    pub compile_seconds: f64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// All steps were done before.
    AlreadyFinished,
    /// A signal stopped it after this step; the state is saved.
    Interrupted(u64),
}

/// What a caller wants to be told, and is asked, during a run.
pub trait Observer {
    /// The program that will draw sample pictures from a copy of the average, after all passes: its memory is planned for.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn pictures(&self, _model: &DitConfig) -> Result<Option<Graph>> {
        Ok(None)
    }
    /// On a GPU: what the run will take of its memory. Nothing has been allocated yet.
    fn planned(&mut self, _plan: &MemoryPlan) {}
    /// The run starts or goes on.
    fn started(&mut self, info: &RunInfo);
    /// A step is done.
    fn stepped(&mut self, report: &StepReport);
    /// A checkpoint was written.
    fn saved(&mut self, path: &Path);
    /// It is time for sample pictures from the averaged parameters.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn sample(&mut self, step: u64, model: &DitConfig, ema: &SharedArena) -> Result<()>;
    /// The run has been trained on another data set, different in what `differences` tells: whether it goes on all the
    /// same.
    fn accepts_data(&mut self, _differences: &str) -> bool {
        false
    }
    /// Something a user should know.
    fn warn(&mut self, message: &str);
}

/// Trains `config` in `run_dir` until its last step, a signal, or an error; goes on where an earlier run stopped.
///
/// # Errors
/// [`TrainError::Locked`] when another process trains there, [`TrainError::BadCheckpoint`] when the directory holds a
/// run of another configuration, [`TrainError::OtherData`] when it was trained on other data, [`TrainError::NotFinite`] with the evidence saved, and what files and sessions give.
pub fn run(
    runtime: &Arc<Runtime>,
    config: &TrainConfig,
    run_dir: &Path,
    dataset: &Arc<dyn Dataset>,
    stop: &StopSignal,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let train = &config.train;
    // What the configuration and the data alone can refuse is refused before anything is written.
    let model = config.model_config(dataset.as_ref())?;
    super::refuse_precision(config)?;
    let plan = BatchPlan::new(train.seed, dataset.len(), train.batch_size)?;
    let lock = RunLock::acquire(run_dir)?;
    let warnings = std::cell::RefCell::new(Vec::new());
    let found = checkpoint::latest_valid(run_dir, &|message| warnings.borrow_mut().push(message.to_owned()))?;
    for message in warnings.take() {
        observer.warn(&message);
    }
    let found = found.as_ref().map(|(path, state)| (path.as_path(), state));
    if let Some(found) = found {
        refuse_other_run(config, run_dir, found)?;
    }
    let first = found.map_or(0, |(_, state)| state.step);
    if first >= train.steps {
        return Ok(Outcome::AlreadyFinished);
    }
    let data = DataIdentity::of(dataset.as_ref())?;
    if let Some(found) = found {
        match compare_data(&data, &model, found)? {
            DataNews::Same => {}
            DataNews::Unknown => observer.warn(
                "the checkpoint is older than fingerprints of data, so whether its data are these cannot be told; from \
                 now on it is",
            ),
            DataNews::Changed(differences) if observer.accepts_data(&differences) => {
                observer.warn(&format!("going on with another data set, as asked: {differences}"));
            }
            DataNews::Changed(differences) => {
                let remedy = "bring it back, go on all the same with --accept-data-change, or begin a new run".into();
                return Err(TrainError::OtherData { path: found.0.to_path_buf(), differences, remedy });
            }
        }
    }
    let start = match (&config.train.from, found) {
        (Some(from), None) => {
            Some(Start::find(from, &|message| warnings.borrow_mut().push(message.to_owned()))?)
        }
        _ => None,
    };
    for message in warnings.into_inner() {
        observer.warn(&message);
    }
    let text = config.anchored()?.to_toml()?;
    runtime::file::write_atomically(run_dir.join(RUN_CONFIG_FILE), |out| out.write_all(text.as_bytes()))?;

    let pictures = if config.sample.every_steps > 0 { observer.pictures(&model)? } else { None };
    let mut planned = |plan: &MemoryPlan| observer.planned(plan);
    let mut trainer = Trainer::planned(runtime, config, &model, pictures.as_ref(), &mut planned)?;
    let mut origin = None;
    if let Some((path, state)) = found {
        trainer.read(path)?;
        trainer.loss_scale = state.loss_scale.or(trainer.loss_scale);
        origin.clone_from(&state.origin);
    } else if let Some(start) = &start {
        origin = Some(trainer.start_from(start, &mut |message| observer.warn(message))?);
    }
    let compiled = trainer.compiled();
    let info = RunInfo {
        resumed_at: first,
        total_steps: train.steps,
        batch_size: train.batch_size,
        flops_per_step: compiled.cost.flops as f64 * train.accumulate as f64,
        trainable_parameters: compiled.graph().parameter_counts().1,
        compile_seconds: compiled.compile_time.as_secs_f64(),
    };
    observer.started(&info);
    if let Recording::Refused(reason) = compiled.recording() {
        observer.warn(&format!("the training step is not recorded as a CUDA graph: {reason}"));
    }
    for message in trainer.mup().warnings(config) {
        observer.warn(&message);
    }

    let resumed = (first > 0).then_some(first);
    let mut metrics = MetricsLog::open(run_dir, resumed)?;
    let mut events = config.log.tensorboard.then(|| EventWriter::create(run_dir, first)).transpose()?;
    let loader = Loader::start(
        Arc::clone(dataset),
        plan,
        config.data.flip,
        first..train.steps,
        config.data.prefetch,
        config.data.workers,
    )?;
    let before = found.map_or(0.0, |(_, state)| state.elapsed_seconds);
    let (start, mut last_save, mut last) = (Instant::now(), Instant::now(), Instant::now());
    let mut batches = loader;
    let mut next = batches.next();
    while let Some(batch) = next {
        let batch = batch?;
        trainer.enqueue(&batch)?;
        // While a GPU computes, the next batch is fetched, drawn and sent. A failure is told in its turn.
        next = batches.next();
        if let Some(Ok(next)) = &next {
            trainer.prepare(next)?;
        }
        let (loss, update) = trainer.complete()?;
        if !trainer.goes_on(batch.step + 1, &loss, &update)? {
            let path = trainer.save_evidence(run_dir, &batch, &loss, update.grad_norm)?;
            return Err(TrainError::NotFinite { step: batch.step + 1, loss: loss.loss, evidence: path });
        }
        let done = batch.step + 1;
        let seconds = last.elapsed().as_secs_f64();
        last = Instant::now();
        let lr = train.learning_rate * learning_rate_factor(train, batch.step);
        let grad_norm = update.grad_norm;
        let report = StepReport { step: done, total_steps: train.steps, loss, grad_norm, lr, seconds };
        if done % config.log.every_steps == 0 || done == train.steps {
            let rate = train.batch_size as f64 / seconds;
            let mut values = vec![("loss", report.loss.loss), ("loss.mse", mean(&report.loss.mse))];
            if !report.loss.vb.is_empty() {
                values.push(("loss.vb", mean(&report.loss.vb)));
            }
            values.extend([("grad_norm", grad_norm), ("lr", lr), ("images_per_s", rate)]);
            if let Some(scale) = trainer.loss_scale() {
                let skipped = scale.skipped() as f64;
                values.extend([("loss_scale", scale.scale()), ("skipped_steps", skipped)]);
            }
            values.extend(peak_resident_bytes().map(|bytes| ("peak_memory_mb", bytes as f64 / 1e6)));
            metrics.append(done, &values)?;
            if let Some(events) = &mut events {
                events.scalars(done, &values)?;
            }
        }
        observer.stepped(&report);
        let stopped = stop.is_set() && done < train.steps;
        let every = &config.checkpoint;
        let due = every.every_seconds.is_some_and(|s| last_save.elapsed().as_secs() >= s);
        if done.is_multiple_of(every.every_steps) || due || stopped || done == train.steps {
            let position = plan.position(done);
            let state = State {
                format_version: State::FORMAT_VERSION,
                step: done,
                total_steps: train.steps,
                decay_steps: train.decay_end(),
                images_seen: done * train.batch_size as u64,
                epoch: position.epoch,
                epoch_batch: position.batch,
                seed: train.seed,
                elapsed_seconds: before + start.elapsed().as_secs_f64(),
                config_hash: config.hash()?,
                loss_scale: trainer.loss_scale().copied(),
                data: Some(data.clone()),
                origin: origin.clone(),
                mup: serde_json::to_value(trainer.mup())
                    .map_err(|e| TrainError::Internal(format!("the muP table does not serialise: {e}")))?,
            };
            metrics.sync()?;
            let path = lock.save(done, every.keep, |directory| trainer.write(directory, &state))?;
            observer.saved(&path);
            last_save = Instant::now();
        }
        if config.sample.every_steps > 0 && done % config.sample.every_steps == 0 {
            observer.sample(done, &model, &trainer.average()?)?;
        }
        if stopped {
            return Ok(Outcome::Interrupted(done));
        }
        if due || config.sample.every_steps > 0 {
            last = Instant::now();
        }
    }
    Ok(Outcome::Finished)
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len().max(1) as f64
}
