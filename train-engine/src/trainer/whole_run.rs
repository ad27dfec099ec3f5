//! A run from its configuration to its last step, in a directory that it can go on in.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use graph_builder::Graph;
use models::Model;
use runtime::{Recording, Runtime, SharedArena};

use super::resume::{DataNews, compare_data, refuse_other_run};
use super::run_loop::{Provenance, RunLoop, ToleratedErrors};
use super::start::Start;
use super::{MemoryPlan, Trainer};
use crate::checkpoint::{self, RunLock};
use crate::config::TrainConfig;
use crate::data::{BatchPlan, DataIdentity, Dataset, Loader};
use crate::error::{Result, TrainError};
use crate::signals::StopSignal;
use crate::step::StepLoss;

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
    /// A signal stopped it after this step; the state is saved, if any step was done.
    Interrupted(u64),
}

/// What a caller wants to be told, and is asked, during a run.
pub trait Observer {
    /// The program that will draw sample pictures from a copy of the average, after all passes: its memory is planned for.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn pictures(&self, _model: &Model) -> Result<Option<Graph>> {
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
    /// Why there are none; the run goes on.
    fn sample(&mut self, step: u64, model: &Model, ema: &SharedArena) -> Result<()>;
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
/// Only what makes the next step wrong is an error, and the steps that were whole before it are saved. What else fails (logs,
/// pictures, links, old checkpoints) is a warning, told once a kind.
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
    let mut tolerated = ToleratedErrors::default();
    let lock = RunLock::acquire(run_dir, &mut tolerated.of(observer))?;
    if let Some(stand_in) = lock.stand_in() {
        observer.warn(&stand_in);
    }
    let warnings = RefCell::new(Vec::new());
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
    let copied =
        runtime::file::write_atomically(run_dir.join(RUN_CONFIG_FILE), |out| out.write_all(text.as_bytes()));
    tolerated.pass(observer, "the settings are not in the run's directory", copied.map_err(Into::into));

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

    let loader = Loader::start(
        Arc::clone(dataset),
        plan,
        config.data.flip,
        first..train.steps,
        config.data.prefetch,
        config.data.workers,
    )?;
    let before = found.map_or(0.0, |(_, state)| state.elapsed_seconds);
    let provenance = Provenance { data, origin };
    let mut run =
        RunLoop::new(config, run_dir, plan, &lock, trainer, observer, tolerated, (first, before), provenance);
    let ended = run.steps(&model, loader, stop);
    if ended.is_err() {
        run.rescue();
    }
    ended
}
