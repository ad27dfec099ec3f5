//! The loop: fetch, draw, run, update, log, save. Short enough to copy out.
//!
//! Every draw is a pure function of (seed, purpose, step, row), so a run that is cut at any moment and started again
//! ends with the same bytes as one that was not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use models::{DitConfig, Objective, TRAINING_STEPS};
use runtime::update::{UpdateState, UpdateStep};
use runtime::{AdamW, Arena, Runtime, SessionOptions, SharedArena, UpdateReport};

use crate::checkpoint::{self, RunLock, State};
use crate::config::{TimeSampling, TrainConfig};
use crate::data::{Batch, BatchPlan, Dataset, Loader};
use crate::error::{Result, TrainError};
use crate::evidence;
use crate::metrics::MetricsLog;
use crate::mup::{MupTable, draw_parameters};
use crate::random::{Purpose, Stream};
use crate::schedule::{ema_decay, learning_rate_factor};
use crate::signals::StopSignal;
use crate::step::{CompiledStep, StepInputs, StepLoss, read_lock, write_lock};
use crate::tensorboard::EventWriter;

/// File of the resolved configuration in a run directory.
pub const RUN_CONFIG_FILE: &str = "config.toml";

/// Prefixes of the two moments in `optimizer.safetensors`.
const MOMENTS: [&str; 2] = ["exp_avg.", "exp_avg_sq."];

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

/// What a caller wants to be told during a run. Nothing here can change a result.
pub trait Observer {
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
    /// Something a user should know.
    fn warn(&mut self, message: &str);
}

/// A model in training: compiled step, parameters, moments, average.
#[derive(Debug)]
pub struct Trainer {
    config: TrainConfig,
    model: DitConfig,
    step: CompiledStep,
    optimizer: AdamW,
    /// Moving average of the parameters.
    pub ema: SharedArena,
    moments: [Arena; 2],
    /// Sum of the gradients of earlier micro-batches.
    accumulated: Option<Arena>,
    mup: MupTable,
    noise: Vec<f32>,
}

impl Trainer {
    /// Compiles the step and draws the first parameters.
    ///
    /// # Errors
    /// [`TrainError::Model`], [`TrainError::Runtime`], [`TrainError::BadValue`].
    pub fn new(runtime: &Arc<Runtime>, config: &TrainConfig, model: &DitConfig) -> Result<Self> {
        let train = &config.train;
        let micro = train.batch_size / train.accumulate;
        let options = SessionOptions { threads: train.threads, ..SessionOptions::default() };
        let mut step = CompiledStep::compile(runtime, model, micro, train.recompute, &options)?;
        step.set_hyperparameter("hp.vb_weight", config.objective.vb_weight)?;
        let mup = MupTable::new(step.graph(), model);
        draw_parameters(step.graph(), train.seed, &mut *write_lock(&step.parameters)?)?;
        let ema = read_lock(&step.parameters)?.duplicate()?.into_shared();
        let gradients = read_lock(&step.gradients)?.layout().clone();
        let moments = [Arena::zeros(gradients.clone())?, Arena::zeros(gradients.clone())?];
        let accumulated = (train.accumulate > 1).then(|| Arena::zeros(gradients.clone())).transpose()?;
        let betas = (train.beta1, train.beta2, train.eps);
        let optimizer = AdamW::new(read_lock(&step.parameters)?.layout(), &gradients, betas, train.threads)?;
        let noise = Vec::new();
        let (config, model) = (config.clone(), model.clone());
        Ok(Self { config, model, step, optimizer, ema, moments, accumulated, mup, noise })
    }

    /// The compiled step.
    pub fn compiled(&self) -> &CompiledStep {
        &self.step
    }

    /// The parameterisation in force.
    pub fn mup(&self) -> &MupTable {
        &self.mup
    }

    /// One optimizer step on `batch`; nothing is updated when the gradient is not finite.
    ///
    /// # Errors
    /// [`TrainError::Runtime`], [`TrainError::Internal`].
    pub fn step(&mut self, batch: &Batch) -> Result<(StepLoss, UpdateReport)> {
        let accumulate = self.config.train.accumulate;
        let image = batch.x0.len() / batch.y.len().max(1);
        let micro = self.step.batch;
        let (t, y) = self.draw(batch);
        let mut total: Option<StepLoss> = None;
        for (k, rows) in (0..accumulate).map(|k| (k, k * micro..(k + 1) * micro)) {
            let pixels = rows.start * image..rows.end * image;
            let loss = self.step.run(&StepInputs {
                x0: &batch.x0[pixels.clone()],
                noise: &self.noise[pixels],
                t: &t[rows.clone()],
                y: &y[rows],
            })?;
            total = Some(match total {
                None => loss,
                Some(mut sum) => {
                    sum.loss += loss.loss;
                    sum.mse.extend(loss.mse);
                    sum.vb.extend(loss.vb);
                    sum
                }
            });
            if let Some(sum) = &mut self.accumulated {
                if k == 0 {
                    sum.fill(0.0);
                }
                sum.add_scaled(&*read_lock(&self.step.gradients)?, 1.0 / accumulate as f32)?;
            }
        }
        let mut loss = total.ok_or_else(|| TrainError::Internal("a step without micro-batches".into()))?;
        loss.loss /= accumulate as f64;
        let report = self.update(batch.step)?;
        Ok((loss, report))
    }

    /// Times and labels of a batch; fills the noise.
    fn draw(&mut self, batch: &Batch) -> (Vec<f32>, Vec<i64>) {
        let (train, objective) = (&self.config.train, &self.config.objective);
        let image = batch.x0.len() / batch.y.len().max(1);
        self.noise.resize(batch.x0.len(), 0.0);
        let drop = train.label_drop.unwrap_or(self.model.class_dropout_prob);
        let stream = |purpose, row: usize| Stream::new(train.seed, purpose, batch.step, row as u64);
        let mut t = Vec::with_capacity(batch.y.len());
        let mut y = Vec::with_capacity(batch.y.len());
        for (row, noise) in self.noise.chunks_mut(image).enumerate() {
            stream(Purpose::Noise, row).fill_normal(noise);
            let mut draw = stream(Purpose::Timestep, row);
            t.push(match (self.model.objective, objective.time) {
                (Objective::Ddpm, _) => draw.below(TRAINING_STEPS as u64) as f32,
                (Objective::Flow, TimeSampling::Uniform) => TRAINING_STEPS as f32 * draw.uniform(),
                (Objective::Flow, TimeSampling::LogitNormal) => {
                    let logit = objective.time_mean + objective.time_std * f64::from(draw.normal());
                    (TRAINING_STEPS as f64 / (1.0 + (-logit).exp())) as f32
                }
            });
            let null = self.model.null_class().filter(|_| stream(Purpose::LabelDrop, row).chance(drop));
            y.push(null.map_or(batch.y[row], |null| null as i64));
        }
        (t, y)
    }

    fn update(&mut self, step: u64) -> Result<UpdateReport> {
        let train = &self.config.train;
        let gradients = read_lock(&self.step.gradients)?;
        let lr = train.learning_rate * learning_rate_factor(train, step);
        let (lr, weight_decay) = self.mup.rates(gradients.layout(), lr, train.weight_decay);
        let [first_moments, second_moments] = &mut self.moments;
        let mut parameters = write_lock(&self.step.parameters)?;
        let mut ema = write_lock(&self.ema)?;
        let state = UpdateState {
            parameters: &mut parameters,
            gradients: self.accumulated.as_ref().unwrap_or(&gradients),
            first_moments,
            second_moments,
            ema: Some((&mut ema, ema_decay(train, step))),
        };
        let clip = (train.clip > 0.0).then_some(train.clip);
        let step = UpdateStep { step: step + 1, lr: &lr, weight_decay: &weight_decay, clip };
        Ok(self.optimizer.step(state, &step)?)
    }

    /// Writes the four files of a checkpoint that hold the model and its optimizer.
    fn write(&self, directory: &Path, state: &State) -> Result<()> {
        let meta = BTreeMap::new();
        let text = self.model.to_json();
        runtime::file::write_atomically(directory.join(checkpoint::CONFIG_FILE), |out| {
            out.write_all(text.as_bytes())
        })?;
        read_lock(&self.step.parameters)?.write_safetensors(directory.join(checkpoint::MODEL_FILE), &meta)?;
        read_lock(&self.ema)?.write_safetensors(directory.join(checkpoint::EMA_FILE), &meta)?;
        let moments: Vec<(&str, &Arena)> = MOMENTS.into_iter().zip(&self.moments).collect();
        Arena::write_all_safetensors(&moments, directory.join(checkpoint::OPTIMIZER_FILE), &meta)?;
        state.write(directory)
    }

    /// Saves what a step that is not finite was made of.
    fn save_evidence(
        &mut self,
        run_dir: &Path,
        batch: &Batch,
        loss: &StepLoss,
        grad_norm: f64,
    ) -> Result<PathBuf> {
        let (t, y) = self.draw(batch);
        let inputs = StepInputs { x0: &batch.x0, noise: &self.noise, t: &t, y: &y };
        evidence::save(run_dir, &self.step, &self.model, batch, &inputs, loss, grad_norm)
    }

    /// Takes over the parameters, the average and the moments of a checkpoint.
    fn read(&mut self, directory: &Path) -> Result<()> {
        for (file, arena) in
            [(checkpoint::MODEL_FILE, &self.step.parameters), (checkpoint::EMA_FILE, &self.ema)]
        {
            let mut arena = write_lock(arena)?;
            let saved = Arena::read_safetensors(arena.layout(), directory.join(file), false)?;
            arena.copy_from(&saved)?;
        }
        let path = directory.join(checkpoint::OPTIMIZER_FILE);
        for (prefix, moment) in MOMENTS.into_iter().zip(&mut self.moments) {
            *moment = Arena::read_prefixed_safetensors(moment.layout(), prefix, &path)?;
        }
        Ok(())
    }
}

/// Trains `config` in `run_dir` until its last step, a signal, or an error; goes on where an earlier run stopped.
///
/// # Errors
/// [`TrainError::Locked`] when another process trains there, [`TrainError::BadCheckpoint`] when the directory holds a
/// run of another configuration, [`TrainError::NotFinite`] with the evidence saved, and what files and sessions give.
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
    let plan = BatchPlan::new(train.seed, dataset.len(), train.batch_size)?;
    let lock = RunLock::acquire(run_dir)?;
    let warnings = std::cell::RefCell::new(Vec::new());
    let found = checkpoint::latest_valid(run_dir, &|message| warnings.borrow_mut().push(message.to_owned()))?;
    for message in warnings.into_inner() {
        observer.warn(&message);
    }
    refuse_other_run(config, run_dir, found.as_ref())?;
    let first = found.as_ref().map_or(0, |(_, state)| state.step);
    if first >= train.steps {
        return Ok(Outcome::AlreadyFinished);
    }
    let text = config.to_toml()?;
    runtime::file::write_atomically(run_dir.join(RUN_CONFIG_FILE), |out| out.write_all(text.as_bytes()))?;

    let mut trainer = Trainer::new(runtime, config, &model)?;
    if let Some((path, _)) = &found {
        trainer.read(path)?;
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
    let before = found.as_ref().map_or(0.0, |(_, state)| state.elapsed_seconds);
    let (start, mut last_save, mut last) = (Instant::now(), Instant::now(), Instant::now());
    for batch in loader {
        let batch = batch?;
        let (loss, update) = trainer.step(&batch)?;
        if !update.finite || !loss.loss.is_finite() {
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
                images_seen: done * train.batch_size as u64,
                epoch: position.epoch,
                epoch_batch: position.batch,
                seed: train.seed,
                elapsed_seconds: before + start.elapsed().as_secs_f64(),
                config_hash: config.hash()?,
                mup: serde_json::to_value(trainer.mup())
                    .map_err(|e| TrainError::Internal(format!("the muP table does not serialise: {e}")))?,
            };
            metrics.sync()?;
            let path = lock.save(done, every.keep, |directory| trainer.write(directory, &state))?;
            observer.saved(&path);
            last_save = Instant::now();
        }
        if config.sample.every_steps > 0 && done % config.sample.every_steps == 0 {
            observer.sample(done, &model, &trainer.ema)?;
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

/// Refuses to go on with a run whose results another configuration would change.
fn refuse_other_run(config: &TrainConfig, run_dir: &Path, found: Option<&(PathBuf, State)>) -> Result<()> {
    let Some((path, state)) = found else { return Ok(()) };
    if state.config_hash == config.hash()? {
        return Ok(());
    }
    let before = TrainConfig::load(&run_dir.join(RUN_CONFIG_FILE), &[]);
    let conflicts = before.and_then(|before| config.conflicts_with(&before)).unwrap_or_default();
    Err(TrainError::BadCheckpoint {
        path: path.clone(),
        reason: format!(
            "it belongs to another configuration ({}); restore it, or choose another directory",
            if conflicts.is_empty() { "its hash differs".into() } else { conflicts.join("; ") }
        ),
    })
}
