//! A training step that is compiled, loaded and bound to arenas: forward, loss and backward in one run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use graph_builder::{Cost, Graph, Weights};
use models::{DitConfig, Guidance, HYPERPARAMETERS, InitScheme, ProgramKind, Recompute, program};
use runtime::update::trainable_layout;
use runtime::{Arena, ArenaLayout, Binding, Runtime, Session, SessionOptions, SharedArena};

use crate::config::TrainConfig;
use crate::error::{Result, TrainError};

/// One batch as the `train-step` program takes it.
#[derive(Debug, Clone, Copy)]
pub struct StepInputs<'a> {
    /// Images or latents (N, C, H, W).
    pub x0: &'a [f32],
    /// Gaussian noise (N, C, H, W).
    pub noise: &'a [f32],
    /// Times (N) as the model sees them.
    pub t: &'a [f32],
    /// Labels (N); the number of classes is the null class.
    pub y: &'a [i64],
}

/// What the program of a training step depends on. Settings that share it share one compiled step: rates, warm-up,
/// clip, loss weights, first values, and muP or not, for the factor on the output layer is an input.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepShape(String);

impl StepShape {
    /// The shape of a run's step.
    pub fn of(config: &TrainConfig, model: &DitConfig) -> Self {
        let train = &config.train;
        let model = neutral(model).to_json().replace(['\n', ' '], "");
        Self(format!(
            "{model} batch {} recompute {:?} {}",
            train.batch_size / train.accumulate,
            train.recompute,
            train.precision
        ))
    }
}

impl std::fmt::Display for StepShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// The model without what is no part of the program's shape.
fn neutral(model: &DitConfig) -> DitConfig {
    let dropout = if model.class_dropout_prob > 0.0 { 0.5 } else { 0.0 }; // only whether there is a null class
    DitConfig {
        mup: None,
        init: InitScheme::Dit,
        class_names: None,
        class_dropout_prob: dropout,
        ..model.clone()
    }
}

/// Per-sample terms of the last run.
#[derive(Debug, Clone, PartialEq)]
pub struct StepLoss {
    /// The loss, averaged over the batch.
    pub loss: f64,
    /// Mean square error of each sample.
    pub mse: Vec<f32>,
    /// Variational bound of each sample in bits per dimension; empty for a model without learned variance.
    pub vb: Vec<f32>,
}

/// A graph that is compiled, loaded and bound: its parameters are read from one arena, its outputs `grad.<parameter>` are
/// written to another.
#[derive(Debug)]
pub(crate) struct BoundGraph {
    pub(crate) binding: Binding,
    pub(crate) parameters: SharedArena,
    pub(crate) gradients: SharedArena,
    /// Work of one run, counted from the graph; what is computed again is not counted twice.
    pub(crate) cost: Cost,
    /// Names of the outputs.
    pub(crate) outputs: Vec<String>,
}

impl BoundGraph {
    /// Compiles a graph; parameters are zero.
    pub(crate) fn compile(
        runtime: &Arc<Runtime>,
        graph: &Graph,
        recompute: Recompute,
        options: &SessionOptions,
    ) -> Result<Self> {
        let optimised = graph.optimised().map_err(models::ModelError::from)?;
        let cost = optimised.cost();
        let optimised = recompute.apply(optimised)?;
        let emitted = optimised.emit(Weights::Inputs).map_err(models::ModelError::from)?;
        let layout = parameter_layout(graph)?;
        let trainable = |name: &str, _: &graph_builder::Shape| {
            graph.parameters().iter().any(|p| p.trainable && p.name == name)
        };
        let gradient_layout = Arc::new(trainable_layout(&layout, trainable)?);
        let session = Session::load(runtime, &emitted, &runtime::Weights::Inside, options)?;
        let parameters = Arena::zeros(layout)?.into_shared();
        let gradients = Arena::zeros(gradient_layout)?.into_shared();
        let mut builder = Binding::builder(&session);
        builder.bind_inputs_by_name(&parameters)?;
        builder.bind_outputs_by_name(&gradients, "grad.")?;
        let outputs = emitted.outputs.into_iter().map(|o| o.name).collect();
        Ok(Self { binding: builder.finish()?, parameters, gradients, cost, outputs })
    }
}

/// The `train-step` program of a model, bound to its parameters and gradients.
#[derive(Debug)]
pub struct CompiledStep {
    binding: Binding,
    /// Parameters, read by the step.
    pub parameters: SharedArena,
    /// Gradients of the trainable ones, written by the step.
    pub gradients: SharedArena,
    /// Samples of one run.
    pub batch: usize,
    /// Work of one run, counted from the graph; what is computed again is not counted twice.
    pub cost: Cost,
    /// Time from the model's description to a session that can run.
    pub compile_time: Duration,
    graph: Graph,
    /// m of the factor 1/m that the program holds as a constant.
    width_multiplier: f64,
    has_vb: bool,
}

/// Layout of all parameters of a graph, in order of declaration.
///
/// # Errors
/// [`TrainError::Runtime`] when two parameters share a name.
pub fn parameter_layout(graph: &Graph) -> Result<Arc<ArenaLayout>> {
    let entries = graph.parameters().iter().map(|p| (p.name.clone(), p.shape()));
    Ok(Arc::new(ArenaLayout::new(entries)?))
}

impl CompiledStep {
    /// Builds, emits, loads and binds the training step of `model` for `batch` samples; parameters are zero.
    ///
    /// # Errors
    /// [`TrainError::Model`], [`TrainError::Runtime`].
    pub fn compile(
        runtime: &Arc<Runtime>,
        model: &DitConfig,
        batch: usize,
        recompute: Recompute,
        options: &SessionOptions,
    ) -> Result<Self> {
        let start = Instant::now();
        let graph = program(model, ProgramKind::TrainStep, batch, Guidance::Off)?;
        let BoundGraph { mut binding, parameters, gradients, cost, outputs } =
            BoundGraph::compile(runtime, &graph, recompute, options)?;
        for (name, neutral) in HYPERPARAMETERS {
            binding.set_input(name, &[neutral])?;
        }
        let has_vb = outputs.iter().any(|name| name == "loss.vb");
        let compile_time = start.elapsed();
        let width_multiplier = model.width_multiplier();
        let mut step = Self {
            binding,
            parameters,
            gradients,
            batch,
            cost,
            compile_time,
            graph,
            width_multiplier,
            has_vb,
        };
        step.parameterise(model)?;
        Ok(step)
    }

    /// The training step that every run of one [`StepShape`] can use; see [`parameterise`](Self::parameterise).
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn compile_shared(
        runtime: &Arc<Runtime>,
        config: &TrainConfig,
        model: &DitConfig,
        options: &SessionOptions,
    ) -> Result<Self> {
        let train = &config.train;
        let micro = train.batch_size / train.accumulate;
        Self::compile(runtime, &neutral(model), micro, train.recompute, options)
    }

    /// Sets the factor on the output layer to that of `model`'s parameterisation: α/m in all.
    ///
    /// # Errors
    /// [`TrainError::Runtime`].
    pub fn parameterise(&mut self, model: &DitConfig) -> Result<()> {
        let alpha = model.mup.map_or(1.0, |mup| mup.output_multiplier) as f32;
        // Rounded as the program would round its constant, so that a shared step gives the bits of an own one.
        let rest = (self.width_multiplier / model.width_multiplier()) as f32;
        Ok(self.binding.set_input("hp.output_multiplier", &[alpha * rest])?)
    }

    /// The graph as built, before the passes: declarations and roles.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Sets one of the scalars that stay inputs of the program.
    ///
    /// # Errors
    /// [`TrainError::Runtime`] when the program has no such input.
    pub fn set_hyperparameter(&mut self, name: &str, value: f64) -> Result<()> {
        Ok(self.binding.set_input(name, &[value as f32])?)
    }

    /// Runs the step: the gradients of this batch replace those of the last.
    ///
    /// # Errors
    /// [`TrainError::Runtime`] when an input has the wrong length or the session fails.
    pub fn run(&mut self, inputs: &StepInputs<'_>) -> Result<StepLoss> {
        self.binding.set_input("x0", inputs.x0)?;
        self.binding.set_input("noise", inputs.noise)?;
        self.binding.set_input("t", inputs.t)?;
        self.binding.set_input("y", inputs.y)?;
        self.binding.run()?;
        let loss = f64::from(self.binding.output_f32("loss")?.first().copied().unwrap_or(f32::NAN));
        let mse = self.binding.output_f32("loss.mse")?.to_vec();
        let vb = if self.has_vb { self.binding.output_f32("loss.vb")?.to_vec() } else { Vec::new() };
        Ok(StepLoss { loss, mse, vb })
    }
}

/// Exclusive access to an arena.
///
/// # Errors
/// [`TrainError::Internal`] after a panic of another holder.
pub fn write_lock(arena: &SharedArena) -> Result<std::sync::RwLockWriteGuard<'_, Arena>> {
    arena.write().map_err(|_| TrainError::Internal("an arena's holder panicked".into()))
}

/// Shared access to an arena.
///
/// # Errors
/// [`TrainError::Internal`] after a panic of another holder.
pub fn read_lock(arena: &SharedArena) -> Result<std::sync::RwLockReadGuard<'_, Arena>> {
    arena.read().map_err(|_| TrainError::Internal("an arena's holder panicked".into()))
}
