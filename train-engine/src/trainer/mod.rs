//! A model in training, and the loop: fetch, draw, run, update, log, save.
//!
//! Every draw is a pure function of (seed, purpose, step, row), so a run that is cut at any moment and started again
//! ends with the same bytes as one that was not.

mod draws;
mod given;
mod memory;
mod resume;
mod run_loop;
mod start;
mod state;
mod whole_run;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use graph_builder::{Graph, Precision};
use models::{LOSS_SCALE, Model, ProgramKind, ProgramSpec};
use runtime::update::UpdateStep;
use runtime::{Arena, ArenaLayout, Runtime, SessionOptions, SharedArena, UpdateReport};

use crate::checkpoint::{self, State};
use crate::config::TrainConfig;
use crate::data::Batch;
use crate::error::{Result, TrainError};
use crate::evidence;
use crate::loss_scale::LossScale;
use crate::mup::{MupTable, Stamp, draw_parameters};
use crate::schedule::{ema_decay, learning_rate_factor};
use crate::step::{CompiledStep, NOISE, StepArenas, StepInputs, StepLoss, StepShape, cache_shape};

use draws::{draw, fill_noise, noise};
pub use memory::MemoryPlan;
pub use start::Origin;
use state::OptimizerSettings;
pub(crate) use state::{Part, TrainingState};
pub use whole_run::{Observer, Outcome, RUN_CONFIG_FILE, RunInfo, StepReport, run};

/// Prefixes of the two moments in `optimizer.safetensors`.
const MOMENTS: [&str; 2] = ["exp_avg.", "exp_avg_sq."];

/// A model in training: compiled step, parameters, moments, average.
#[derive(Debug)]
pub struct Trainer {
    config: TrainConfig,
    model: Model,
    step: CompiledStep,
    state: Box<dyn TrainingState>,
    mup: MupTable,
    /// The factor on the loss, in f16.
    loss_scale: Option<LossScale>,
    /// The step whose first micro-batch is in the program's inputs.
    fed: Option<u64>,
    /// Losses of the micro-batches of the step in progress that are done.
    losses: Vec<StepLoss>,
    plan: Option<MemoryPlan>,
}

impl Trainer {
    /// Compiles the step and draws the first parameters.
    ///
    /// # Errors
    /// [`TrainError::Model`], [`TrainError::Runtime`], [`TrainError::BadValue`].
    pub fn new(runtime: &Arc<Runtime>, config: &TrainConfig, model: &Model) -> Result<Self> {
        Self::compile(runtime, config, model, model, None, &mut |_| {})
    }

    /// A trainer whose step other runs of its [`StepShape`] can use after it; see [`restart`](Self::restart).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shared(runtime: &Arc<Runtime>, config: &TrainConfig, model: &Model) -> Result<Self> {
        Self::shared_planned(runtime, config, model, &mut |_| {})
    }

    /// [`shared`](Self::shared); on a GPU, `planned` sees the plan of its memory before any is allocated.
    pub(crate) fn shared_planned(
        runtime: &Arc<Runtime>,
        config: &TrainConfig,
        model: &Model,
        planned: &mut dyn FnMut(&MemoryPlan),
    ) -> Result<Self> {
        Self::compile(runtime, config, model, &cache_shape(model), None, planned)
    }

    /// [`new`](Self::new) beside the program that draws sample pictures; on a GPU, `planned` sees the plan of its memory
    /// before any is allocated.
    fn planned(
        runtime: &Arc<Runtime>,
        config: &TrainConfig,
        model: &Model,
        pictures: Option<&Graph>,
        planned: &mut dyn FnMut(&MemoryPlan),
    ) -> Result<Self> {
        Self::compile(runtime, config, model, model, pictures, planned)
    }

    fn compile(
        runtime: &Arc<Runtime>,
        config: &TrainConfig,
        model: &Model,
        compiled: &Model,
        pictures: Option<&Graph>,
        planned: &mut dyn FnMut(&MemoryPlan),
    ) -> Result<Self> {
        refuse_precision(config)?;
        let train = &config.train;
        let (micro, options) = (train.batch_size / train.accumulate, session_options(config));
        let mut plan = None;
        let made = (|| {
            let step = CompiledStep::compile_in(
                runtime,
                compiled,
                micro,
                train.recompute,
                train.precision,
                &options,
                &mut |prepared| {
                    let on_gpu = pictures.filter(|_| train.provider.is_gpu());
                    let more = on_gpu.map_or(Ok(Vec::new()), |graph| {
                        memory::pictures(graph, train.provider.cuda_graph())
                    })?;
                    plan = MemoryPlan::before(config, &prepared.graph, &more)?;
                    plan.iter().for_each(&mut *planned);
                    plan.as_ref().map_or(Ok(()), MemoryPlan::check)
                },
            )?;
            Self::on(step, config, model)
        })();
        match (made, plan) {
            (Ok(trainer), plan) => Ok(Self { plan, ..trainer }),
            (Err(error), Some(plan)) => Err(plan.advise(error, config, compiled)),
            (Err(error), None) => Err(error),
        }
    }

    fn on(step: CompiledStep, config: &TrainConfig, model: &Model) -> Result<Self> {
        let declared = declarations(model)?;
        let gradients = match &step.arenas {
            StepArenas::Host(arenas) => crate::step::read_lock(&arenas.gradients)?.layout().clone(),
            StepArenas::Device(arenas) => arenas.gradient_layout.clone(),
        };
        let (mup, settings) = parameterisation(config, model, &declared, &gradients);
        let state = state::state(&step.arenas, config.train.accumulate > 1, &settings)?;
        let (config, model) = (config.clone(), model.clone());
        let (loss_scale, fed, losses, plan) = (None, None, Vec::new(), None);
        let mut trainer = Self { config, model, step, state, mup, loss_scale, fed, losses, plan };
        trainer.begin(&declared)?;
        Ok(trainer)
    }

    /// Starts another run on the same compiled step, with parameters of its own seed.
    ///
    /// # Errors
    /// [`TrainError::Internal`] when its [`StepShape`] is another; as [`new`](Self::new).
    pub fn restart(&mut self, config: &TrainConfig, model: &Model) -> Result<()> {
        let (was, is) = (StepShape::of(&self.config, &self.model), StepShape::of(config, model));
        if was != is || self.config.train.accumulate != config.train.accumulate {
            return Err(TrainError::Internal(format!("a step of {was:?} cannot serve {is:?}")));
        }
        let declared = declarations(model)?;
        let settings;
        (self.mup, settings) = parameterisation(config, model, &declared, self.state.gradients());
        self.state.configure(&settings)?;
        (self.config, self.model) = (config.clone(), model.clone());
        self.begin(&declared)
    }

    /// Draws the first parameters and sets everything else to its state before the first step.
    fn begin(&mut self, declared: &Graph) -> Result<()> {
        self.fed = None;
        self.step.parameterise(&self.model)?;
        self.step.set_hyperparameter("hp.vb_weight", self.config.objective.vb_weight)?;
        let (seed, scale) = (self.config.train.seed, self.config.mup.init_scale);
        self.state.begin(&mut |parameters| draw_parameters(declared, seed, scale, parameters))?;
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

    /// The moving average of the parameters where the host can read it; a copy if the state is on a GPU.
    ///
    /// # Errors
    /// [`TrainError::Runtime`].
    pub fn average(&mut self) -> Result<SharedArena> {
        self.state.average()
    }

    /// One optimizer step on `batch`; nothing is updated when the gradient is not finite.
    ///
    /// # Errors
    /// [`TrainError::Runtime`], [`TrainError::Internal`].
    pub fn step(&mut self, batch: &Batch) -> Result<(StepLoss, UpdateReport)> {
        self.enqueue(batch)?;
        self.complete()
    }

    /// Starts an optimizer step; [`complete`](Self::complete) ends it. On a GPU it is queued, and the host is free to
    /// [`prepare`](Self::prepare) the next one meanwhile.
    ///
    /// # Errors
    /// [`TrainError::Runtime`], [`TrainError::Internal`].
    pub fn enqueue(&mut self, batch: &Batch) -> Result<()> {
        let queued = self.queue(batch);
        queued.map_err(|error| match &self.plan {
            Some(plan) => plan.advise(error, &self.config, &self.model),
            None => error,
        })
    }

    fn queue(&mut self, batch: &Batch) -> Result<()> {
        if let Some(scale) = &self.loss_scale {
            self.step.set_hyperparameter(LOSS_SCALE, scale.scale())?;
        }
        let accumulate = self.config.train.accumulate;
        if self.fed.take() != Some(batch.step) {
            self.feed(batch, 0)?;
        }
        self.losses.clear();
        for k in 0..accumulate {
            self.step.binding().enqueue()?;
            self.state.accumulate(k, 1.0 / accumulate as f32)?;
            if k + 1 < accumulate {
                self.feed(batch, k + 1)?;
                self.step.binding().send_ahead()?;
                self.losses.push(self.step.loss()?);
            }
        }
        self.update(batch.step)
    }

    /// Draws for the first micro-batch of the next step and sends it ahead; changes no result.
    ///
    /// # Errors
    /// [`TrainError::Runtime`].
    pub fn prepare(&mut self, next: &Batch) -> Result<()> {
        // On the CPU the step that was started is done, and its inputs are free.
        self.feed(next, 0)?;
        self.step.binding().send_ahead()?;
        self.fed = Some(next.step);
        Ok(())
    }

    /// Ends the step that was started: its loss, and what the update did.
    ///
    /// # Errors
    /// [`TrainError::Runtime`] with the first failure of what was queued.
    pub fn complete(&mut self) -> Result<(StepLoss, UpdateReport)> {
        let last = self.step.loss()?;
        let report = self.state.report()?;
        self.losses.push(last);
        let count = self.losses.len() as f64;
        let mut losses = self.losses.drain(..);
        let Some(mut sum) = losses.next() else {
            return Err(TrainError::Internal("a step without micro-batches".into()));
        };
        for loss in losses {
            sum.loss += loss.loss;
            sum.mse.extend(loss.mse);
            sum.vb.extend(loss.vb);
        }
        sum.loss /= count;
        Ok((sum, report))
    }

    /// Puts a micro-batch into the program's inputs.
    fn feed(&mut self, batch: &Batch, micro_batch: usize) -> Result<()> {
        let image = batch.x0.len() / batch.y.len().max(1);
        let micro = self.step.batch;
        let rows = micro_batch * micro..(micro_batch + 1) * micro;
        let (config, model, binding) = (&self.config, &self.model, self.step.binding());
        binding.set_input("x0", &batch.x0[rows.start * image..rows.end * image])?;
        if binding.draws(NOISE) {
            let streams: Vec<_> = noise(config, batch, rows.clone()).map(|s| s.on_device()).collect();
            binding.draw(NOISE, &streams)?;
        } else {
            fill_noise(config, batch, rows.clone(), binding.input_f32(NOISE)?);
        }
        let (t, y) = draw(config, model, batch, rows);
        binding.set_input("t", &t)?;
        Ok(binding.set_input("y", &y)?)
    }

    fn update(&mut self, step: u64) -> Result<()> {
        let train = &self.config.train;
        let lr = train.learning_rate * learning_rate_factor(train, step);
        let (lr, weight_decay) = self.mup.rates(self.state.gradients(), lr, train.weight_decay);
        let clip = (train.clip > 0.0).then_some(train.clip);
        // Steps left out do not count for the moments' correction.
        let (gradient_scale, skipped) =
            self.loss_scale.map_or((1.0, 0), |scale| (scale.gradient_scale(), scale.skipped()));
        let update = UpdateStep {
            step: step + 1 - skipped,
            lr: &lr,
            weight_decay: &weight_decay,
            clip,
            gradient_scale,
        };
        self.state.update(&update, ema_decay(train, step))
    }

    /// Whether the run can go on after this step (counted from 1): one whose gradient overflowed f16 is left out, and
    /// the next has a smaller factor.
    ///
    /// # Errors
    /// [`TrainError::LossScale`] when the factor cannot become smaller.
    pub(crate) fn goes_on(&mut self, step: u64, loss: &StepLoss, update: &UpdateReport) -> Result<bool> {
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
        for (part, file) in
            [(Part::Parameters, checkpoint::MODEL_FILE), (Part::Average, checkpoint::EMA_FILE)]
        {
            self.state
                .show(part, &mut |values| Ok(values.write_safetensors(directory.join(file), &meta)?))?;
        }
        Ok(())
    }

    /// Writes the files of a checkpoint: the model, its optimizer and where the run stands. They are the same wherever
    /// the state is.
    ///
    /// # Errors
    /// [`TrainError::Runtime`], [`TrainError::Io`].
    pub fn write(&self, directory: &Path, state: &State) -> Result<()> {
        self.write_model(directory)?;
        let meta = Stamp::of(&self.model).metadata()?;
        let path = directory.join(checkpoint::OPTIMIZER_FILE);
        self.state.show(Part::FirstMoments, &mut |first| {
            self.state.show(Part::SecondMoments, &mut |second| {
                let moments = [(MOMENTS[0], first), (MOMENTS[1], second)];
                Ok(Arena::write_all_safetensors(&moments, &path, &meta)?)
            })
        })?;
        state.write(directory)
    }

    /// Saves what a step that is not finite was made of.
    fn save_evidence(
        &self,
        run_dir: &Path,
        batch: &Batch,
        loss: &StepLoss,
        grad_norm: f64,
    ) -> Result<PathBuf> {
        // On a GPU it was drawn there, from the same streams and to the same bits, and the next batch's may have replaced it.
        let (mut noise, rows) = (vec![0.0; batch.x0.len()], 0..batch.y.len());
        fill_noise(&self.config, batch, rows.clone(), &mut noise);
        let (t, y) = draw(&self.config, &self.model, batch, rows);
        let inputs = StepInputs { x0: &batch.x0, noise: &noise, t: &t, y: &y };
        evidence::save(run_dir, &*self.state, &self.model, batch, &inputs, loss, grad_norm)
    }

    /// Takes over the parameters, the average and the moments of a checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Runtime`] for a file that is missing, damaged or of another model.
    pub fn read(&mut self, directory: &Path) -> Result<()> {
        let (parameters, gradients) = (self.state.parameters().clone(), self.state.gradients().clone());
        for (part, file) in
            [(Part::Parameters, checkpoint::MODEL_FILE), (Part::Average, checkpoint::EMA_FILE)]
        {
            let saved = Arena::read_safetensors(&parameters, directory.join(file), false)?;
            self.state.take(part, &saved)?;
        }
        let path = directory.join(checkpoint::OPTIMIZER_FILE);
        for (part, prefix) in [Part::FirstMoments, Part::SecondMoments].into_iter().zip(MOMENTS) {
            let saved = Arena::read_prefixed_safetensors(&gradients, prefix, &path)?;
            self.state.take(part, &saved)?;
        }
        Ok(())
    }
}

/// The CPU provider computes in f32.
pub(crate) fn refuse_precision(config: &TrainConfig) -> Result<()> {
    let precision = config.train.precision;
    if precision == Precision::F32 || config.train.provider.is_gpu() {
        return Ok(());
    }
    Err(TrainError::BadValue {
        key: "train.precision",
        value: precision.to_string(),
        allowed:
            "`f32` on the CPU, which has no faster type (--precision f32); bf16 and f16 need --provider cuda"
                .into(),
    })
}

fn session_options(config: &TrainConfig) -> SessionOptions {
    let (threads, provider) = (config.train.threads, config.train.provider.clone());
    SessionOptions { threads, provider, ..SessionOptions::default() }
}

/// The parameters of a model as declared: a step that is shared has the declarations of another init.
fn declarations(model: &Model) -> Result<Graph> {
    Ok(model.program(&ProgramSpec::new(ProgramKind::Loss, 1))?)
}

fn parameterisation(
    config: &TrainConfig,
    model: &Model,
    declared: &Graph,
    gradients: &ArenaLayout,
) -> (MupTable, OptimizerSettings) {
    let train = &config.train;
    let mup = MupTable::new(declared, model)
        .with_conventions(config.mup.conventions())
        .with_init_scale(config.mup.init_scale);
    let epsilons = mup.epsilons(gradients, train.eps);
    let settings = OptimizerSettings { betas: (train.beta1, train.beta2), epsilons, threads: train.threads };
    (mup, settings)
}
