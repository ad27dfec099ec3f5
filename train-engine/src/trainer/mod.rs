//! A model in training, and the loop: fetch, draw, run, update, log, save.
//!
//! Every draw is a pure function of (seed, purpose, step, row), so a run that is cut at any moment and started again
//! ends with the same bytes as one that was not.

mod whole_run;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use graph_builder::{Graph, Precision};
use models::{DitConfig, Guidance, LOSS_SCALE, Objective, ProgramKind, TRAINING_STEPS, program};
use runtime::update::{UpdateState, UpdateStep};
use runtime::{AdamW, Arena, Runtime, SessionOptions, SharedArena, UpdateReport};

use crate::checkpoint::{self, State};
use crate::config::{TimeSampling, TrainConfig};
use crate::data::Batch;
use crate::error::{Result, TrainError};
use crate::evidence;
use crate::loss_scale::LossScale;
use crate::mup::{MupTable, Stamp, draw_parameters};
use crate::random::{Purpose, Stream};
use crate::schedule::{ema_decay, learning_rate_factor};
use crate::step::{CompiledStep, StepInputs, StepLoss, StepShape, read_lock, write_lock};

pub use whole_run::{Observer, Outcome, RUN_CONFIG_FILE, RunInfo, StepReport, run};

/// Prefixes of the two moments in `optimizer.safetensors`.
const MOMENTS: [&str; 2] = ["exp_avg.", "exp_avg_sq."];

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
    /// The factor on the loss, in f16.
    loss_scale: Option<LossScale>,
}

impl Trainer {
    /// Compiles the step and draws the first parameters.
    ///
    /// # Errors
    /// [`TrainError::Model`], [`TrainError::Runtime`], [`TrainError::BadValue`].
    pub fn new(runtime: &Arc<Runtime>, config: &TrainConfig, model: &DitConfig) -> Result<Self> {
        refuse_precision(config)?;
        let train = &config.train;
        let micro = train.batch_size / train.accumulate;
        let step = CompiledStep::compile(runtime, model, micro, train.recompute, &session_options(config))?;
        Self::on(step, config, model)
    }

    /// A trainer whose step other runs of its [`StepShape`] can use after it; see [`restart`](Self::restart).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shared(runtime: &Arc<Runtime>, config: &TrainConfig, model: &DitConfig) -> Result<Self> {
        refuse_precision(config)?;
        Self::on(
            CompiledStep::compile_shared(runtime, config, model, &session_options(config))?,
            config,
            model,
        )
    }

    fn on(step: CompiledStep, config: &TrainConfig, model: &DitConfig) -> Result<Self> {
        let parameters = read_lock(&step.parameters)?;
        let gradients = read_lock(&step.gradients)?.layout().clone();
        let ema = parameters.duplicate()?.into_shared();
        let moments = [Arena::zeros(gradients.clone())?, Arena::zeros(gradients.clone())?];
        let accumulated = (config.train.accumulate > 1).then(|| Arena::zeros(gradients)).transpose()?;
        let declared = declarations(model)?;
        let (mup, optimizer) = parameterisation(config, model, &declared, &step)?;
        drop(parameters);
        let (config, model, noise) = (config.clone(), model.clone(), Vec::new());
        let loss_scale = None;
        let mut trainer =
            Self { config, model, step, optimizer, ema, moments, accumulated, mup, noise, loss_scale };
        trainer.begin(&declared)?;
        Ok(trainer)
    }

    /// Starts another run on the same compiled step, with parameters of its own seed.
    ///
    /// # Errors
    /// [`TrainError::Internal`] when its [`StepShape`] is another; as [`new`](Self::new).
    pub fn restart(&mut self, config: &TrainConfig, model: &DitConfig) -> Result<()> {
        let (was, is) = (StepShape::of(&self.config, &self.model), StepShape::of(config, model));
        if was != is || self.config.train.accumulate != config.train.accumulate {
            return Err(TrainError::Internal(format!("a step of {was:?} cannot serve {is:?}")));
        }
        let declared = declarations(model)?;
        (self.mup, self.optimizer) = parameterisation(config, model, &declared, &self.step)?;
        (self.config, self.model) = (config.clone(), model.clone());
        self.begin(&declared)
    }

    /// Draws the first parameters and sets everything else to its state before the first step.
    fn begin(&mut self, declared: &Graph) -> Result<()> {
        self.step.parameterise(&self.model)?;
        self.step.set_hyperparameter("hp.vb_weight", self.config.objective.vb_weight)?;
        let mut parameters = write_lock(&self.step.parameters)?;
        draw_parameters(declared, self.config.train.seed, self.config.mup.init_scale, &mut parameters)?;
        write_lock(&self.ema)?.copy_from(&parameters)?;
        for moment in &mut self.moments {
            moment.fill(0.0);
        }
        self.loss_scale = (self.config.train.precision == Precision::F16).then(LossScale::default);
        Ok(())
    }

    /// The compiled step.
    pub fn compiled(&self) -> &CompiledStep {
        &self.step
    }

    /// The parameterisation in force.
    pub fn mup(&self) -> &MupTable {
        &self.mup
    }

    /// The factor on the loss, of a run in f16.
    pub fn loss_scale(&self) -> Option<&LossScale> {
        self.loss_scale.as_ref()
    }

    /// One optimizer step on `batch`; nothing is updated when the gradient is not finite.
    ///
    /// # Errors
    /// [`TrainError::Runtime`], [`TrainError::Internal`].
    pub fn step(&mut self, batch: &Batch) -> Result<(StepLoss, UpdateReport)> {
        if let Some(scale) = &self.loss_scale {
            self.step.set_hyperparameter(LOSS_SCALE, scale.scale())?;
        }
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
        // Steps left out do not count for the moments' correction.
        let (gradient_scale, skipped) =
            self.loss_scale.map_or((1.0, 0), |scale| (scale.gradient_scale(), scale.skipped()));
        let step = UpdateStep {
            step: step + 1 - skipped,
            lr: &lr,
            weight_decay: &weight_decay,
            clip,
            gradient_scale,
        };
        Ok(self.optimizer.step(state, &step)?)
    }

    /// Whether the run can go on after this step (counted from 1): one whose gradient overflowed f16 is left out, and
    /// the next has a smaller factor.
    fn goes_on(&mut self, step: u64, loss: &StepLoss, update: &UpdateReport) -> Result<bool> {
        match &mut self.loss_scale {
            Some(scale) if loss.loss.is_finite() => scale.record(step, update.finite).map(|()| true),
            _ => Ok(update.finite && loss.loss.is_finite()),
        }
    }

    /// Writes the three files of a checkpoint that hold the model, enough to sample from.
    ///
    /// # Errors
    /// [`TrainError::Runtime`], [`TrainError::Io`].
    pub fn write_model(&self, directory: &Path) -> Result<()> {
        let meta = Stamp::of(&self.model).metadata()?;
        let text = self.model.to_json();
        runtime::file::write_atomically(directory.join(checkpoint::CONFIG_FILE), |out| {
            out.write_all(text.as_bytes())
        })?;
        read_lock(&self.step.parameters)?.write_safetensors(directory.join(checkpoint::MODEL_FILE), &meta)?;
        Ok(read_lock(&self.ema)?.write_safetensors(directory.join(checkpoint::EMA_FILE), &meta)?)
    }

    /// Writes the files of a checkpoint: the model, its optimizer and where the run stands.
    fn write(&self, directory: &Path, state: &State) -> Result<()> {
        self.write_model(directory)?;
        let meta = Stamp::of(&self.model).metadata()?;
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

/// The CPU provider computes in f32.
fn refuse_precision(config: &TrainConfig) -> Result<()> {
    let precision = config.train.precision;
    if precision == Precision::F32 || config.train.provider.is_gpu() {
        return Ok(());
    }
    Err(TrainError::BadValue {
        key: "train.precision",
        value: precision.to_string(),
        allowed: "`f32` on the CPU, which has no faster type; bf16 and f16 need a GPU".into(),
    })
}

fn session_options(config: &TrainConfig) -> SessionOptions {
    let (threads, provider) = (config.train.threads, config.train.provider.clone());
    SessionOptions { threads, provider, ..SessionOptions::default() }
}

/// The parameters of a model as declared: a step that is shared has the declarations of another init.
fn declarations(model: &DitConfig) -> Result<Graph> {
    Ok(program(model, ProgramKind::Loss, 1, Guidance::Off)?)
}

fn parameterisation(
    config: &TrainConfig,
    model: &DitConfig,
    declared: &Graph,
    step: &CompiledStep,
) -> Result<(MupTable, AdamW)> {
    let train = &config.train;
    let mup = MupTable::new(declared, model)
        .with_conventions(config.mup.conventions())
        .with_init_scale(config.mup.init_scale);
    let gradients = read_lock(&step.gradients)?.layout().clone();
    let betas = (train.beta1, train.beta2, train.eps);
    let optimizer = AdamW::new(read_lock(&step.parameters)?.layout(), &gradients, betas, train.threads)?;
    let optimizer = optimizer.with_epsilons(mup.epsilons(&gradients, train.eps))?;
    Ok((mup, optimizer))
}
