//! A training step that is compiled, loaded and bound to arenas: forward, loss and backward in one run.
//!
//! On the CPU the arenas are the host's; on a GPU they are there, and only a batch and its losses cross the bus.

use std::sync::Arc;
use std::time::{Duration, Instant};

use graph_builder::{Cost, DType, Graph, OnnxProgram, Parameter, Precision, Weights};
use models::{HYPERPARAMETERS, InitScheme, LOSS_SCALE, Model, ProgramKind, ProgramSpec, Recompute};
use runtime::cuda::{DeviceArena, Gpu};
use runtime::update::trainable_layout;
use runtime::{Arena, ArenaLayout, Binding, Recording, Runtime, Session, SessionOptions, SharedArena};

use crate::config::TrainConfig;
use crate::error::{Result, TrainError};

/// The input of a training step that a GPU draws by itself.
pub(crate) const NOISE: &str = "noise";

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
    pub fn of(config: &TrainConfig, model: &Model) -> Self {
        let train = &config.train;
        let model = cache_shape(model).to_json().replace(['\n', ' '], "");
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
pub(crate) fn cache_shape(model: &Model) -> Model {
    Model {
        network: model.network.canonical(),
        mup: None,
        init: InitScheme::Original,
        class_names: None,
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

/// Arenas of the host that a step reads and writes.
#[derive(Debug, Clone)]
pub struct HostArenas {
    /// Parameters, read by the step.
    pub parameters: SharedArena,
    /// Gradients of the trainable ones, written by the step.
    pub gradients: SharedArena,
}

/// Arenas of a GPU that a step reads and writes.
#[derive(Debug, Clone)]
pub struct DeviceArenas {
    /// The GPU.
    pub gpu: Arc<Gpu>,
    /// Parameters in f32, read by the step where it needs them so.
    pub masters: Arc<DeviceArena>,
    /// Parameters in the compute type; none in f32.
    pub copy: Option<Arc<DeviceArena>>,
    /// Gradients of the trainable ones, written by the step: an arena for each element type.
    pub gradients: Vec<Arc<DeviceArena>>,
    /// Layout of all gradients together.
    pub gradient_layout: Arc<ArenaLayout>,
}

/// What a step reads its parameters from and writes its gradients to.
#[derive(Debug, Clone)]
pub enum StepArenas {
    /// On the CPU.
    Host(HostArenas),
    /// On a GPU.
    Device(DeviceArenas),
}

/// A graph after all passes, and what is declared in it.
pub(crate) struct Prepared {
    /// After the passes.
    pub(crate) graph: Graph,
    program: OnnxProgram,
    /// Work of one run, counted from the graph; what is computed again is not counted twice.
    pub(crate) cost: Cost,
    parameters: Arc<ArenaLayout>,
    gradients: Arc<ArenaLayout>,
    /// One for each element type of the gradients.
    groups: Vec<(DType, Arc<ArenaLayout>)>,
}

impl Prepared {
    /// Brings a graph into its last form.
    pub(crate) fn new(
        graph: &Graph,
        recompute: Recompute,
        stacks: &[&str],
        precision: Precision,
    ) -> Result<Self> {
        let built = models::ModelError::from;
        let optimised = graph.optimised().map_err(built)?;
        let cost = optimised.cost();
        let last = recompute.apply(optimised, stacks)?.in_precision(precision).map_err(built)?;
        let program = last.emit(Weights::Inputs).map_err(built)?;
        let parameters = parameter_layout(graph.parameters())?;
        let (gradients, groups) = gradient_layouts(&parameters, &last)?;
        Ok(Self { graph: last, program, cost, parameters, gradients, groups })
    }

    /// Loads the program and binds it to arenas where its provider has its memory; parameters are zero.
    pub(crate) fn bind(
        self,
        runtime: &Arc<Runtime>,
        precision: Precision,
        options: &SessionOptions,
    ) -> Result<(Binding, StepArenas)> {
        let session = Session::load(runtime, &self.program, &runtime::Weights::Inside, options)?;
        let mut builder = Binding::builder(&session);
        let Some(gpu) = session.gpu() else {
            let parameters = Arena::zeros(self.parameters)?.into_shared();
            let gradients = Arena::zeros(self.gradients)?.into_shared();
            builder.bind_inputs_by_name(&parameters)?;
            builder.bind_outputs_by_name(&gradients, "grad.")?;
            return Ok((builder.finish()?, StepArenas::Host(HostArenas { parameters, gradients })));
        };
        let arena = |layout: &Arc<ArenaLayout>, dtype, what: &str| {
            DeviceArena::zeros(gpu, layout.clone(), dtype, what).map(Arc::new)
        };
        let masters = arena(&self.parameters, DType::F32, "the parameters")?;
        let narrow = precision != Precision::F32;
        let copy = narrow
            .then(|| arena(&self.parameters, precision.dtype(), "the parameters in the compute type"))
            .transpose()?;
        let gradients = self.groups.iter().map(|(dtype, layout)| arena(layout, *dtype, "the gradients"));
        let gradients = gradients.collect::<runtime::error::Result<Vec<_>>>()?;
        let mut bound = builder.bind_device_inputs_by_name(&masters)?;
        if let Some(copy) = &copy {
            bound += builder.bind_device_inputs_by_name(copy)?;
        }
        let mut written = 0;
        for arena in &gradients {
            written += builder.bind_device_outputs_by_name(arena, "grad.")?;
        }
        let (parameters, trainable) = (self.parameters.entries().len(), self.gradients.entries().len());
        if (bound, written) != (parameters, trainable) {
            return Err(TrainError::Internal(format!(
                "{bound} of {parameters} parameters and {written} of {trainable} gradients are on the GPU"
            )));
        }
        builder.draw_input(NOISE)?;
        let (gpu, gradient_layout) = (gpu.clone(), self.gradients);
        let arenas = DeviceArenas { gpu, masters, copy, gradients, gradient_layout };
        Ok((builder.finish()?, StepArenas::Device(arenas)))
    }
}

/// The `train-step` program of a model, bound to its parameters and gradients.
#[derive(Debug)]
pub struct CompiledStep {
    binding: Binding,
    /// What the step reads and writes.
    pub arenas: StepArenas,
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

/// The layout of all gradients, and one for each element type that `last`, the graph after all passes, gives them.
///
/// # Errors
/// [`TrainError::Runtime`] for a layout that cannot be.
pub fn gradient_layouts(parameters: &ArenaLayout, last: &Graph) -> Result<GradientLayouts> {
    let of = |name: &str| last.parameters().iter().find(|p| p.trainable && p.name == name);
    let gradients = Arc::new(trainable_layout(parameters, |name, _| of(name).is_some())?);
    let mut groups = Vec::new();
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let layout = trainable_layout(parameters, |name, _| of(name).is_some_and(|p| p.dtype == dtype))?;
        if !layout.is_empty() {
            groups.push((dtype, Arc::new(layout)));
        }
    }
    Ok((gradients, groups))
}

/// All gradients, and those of each element type.
pub type GradientLayouts = (Arc<ArenaLayout>, Vec<(DType, Arc<ArenaLayout>)>);

/// Layout of parameters, in order of declaration.
///
/// # Errors
/// [`TrainError::Runtime`] when two parameters share a name.
pub fn parameter_layout(parameters: &[Parameter]) -> Result<Arc<ArenaLayout>> {
    let entries = parameters.iter().map(|p| (p.name.clone(), p.shape()));
    Ok(Arc::new(ArenaLayout::new(entries)?))
}

impl CompiledStep {
    /// Builds, emits, loads and binds the training step of `model` for `batch` samples; parameters are zero.
    ///
    /// # Errors
    /// [`TrainError::Model`], [`TrainError::Runtime`].
    pub fn compile(
        runtime: &Arc<Runtime>,
        model: &Model,
        batch: usize,
        recompute: Recompute,
        options: &SessionOptions,
    ) -> Result<Self> {
        Self::compile_in(runtime, model, batch, recompute, Precision::F32, options, &mut |_| Ok(()))
    }

    /// [`compile`](Self::compile) in a precision, which takes a GPU if it is not f32. `inspect` sees the program before
    /// any memory is allocated for it.
    ///
    /// # Errors
    /// As [`compile`](Self::compile), and those of `inspect`.
    pub(crate) fn compile_in(
        runtime: &Arc<Runtime>,
        model: &Model,
        batch: usize,
        recompute: Recompute,
        precision: Precision,
        options: &SessionOptions,
        inspect: &mut dyn FnMut(&Prepared) -> Result<()>,
    ) -> Result<Self> {
        let start = Instant::now();
        let spec =
            ProgramSpec::new(ProgramKind::TrainStep, batch).recomputing(recompute).in_precision(precision);
        let graph = model.program(&spec)?;
        let prepared = Prepared::new(&graph, recompute, model.network.stacks(), precision)?;
        inspect(&prepared)?;
        let cost = prepared.cost;
        let (mut binding, arenas) = prepared.bind(runtime, precision, options)?;
        for (name, neutral) in HYPERPARAMETERS {
            binding.set_input(name, &[neutral])?;
        }
        if precision == Precision::F16 {
            binding.set_input(LOSS_SCALE, &[1.0_f32])?;
        }
        let has_vb = binding.session().outputs().iter().any(|output| output.name == "loss.vb");
        let compile_time = start.elapsed();
        let width_multiplier = model.width_multiplier();
        let mut step = Self { binding, arenas, batch, cost, compile_time, graph, width_multiplier, has_vb };
        step.parameterise(model)?;
        Ok(step)
    }

    /// The arenas of a step on the CPU.
    ///
    /// # Errors
    /// [`TrainError::OnDevice`] for a step on a GPU.
    pub fn host(&self) -> Result<&HostArenas> {
        match &self.arenas {
            StepArenas::Host(arenas) => Ok(arenas),
            StepArenas::Device(arenas) => Err(TrainError::OnDevice { gpu: arenas.gpu.info().ordinal }),
        }
    }

    /// Sets the factor on the output layer to that of `model`'s parameterisation: α/m in all.
    ///
    /// # Errors
    /// [`TrainError::Runtime`].
    pub fn parameterise(&mut self, model: &Model) -> Result<()> {
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
        self.binding.set_input(NOISE, inputs.noise)?;
        self.binding.set_input("t", inputs.t)?;
        self.binding.set_input("y", inputs.y)?;
        self.binding.run()?;
        self.loss()
    }

    /// The values of an f32 input that the last run has read.
    ///
    /// # Errors
    /// [`TrainError::Runtime`] when the program has no such input, or reads it from an arena.
    pub fn input(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.binding.read_input(name)?)
    }

    /// Whether its runs are recorded as CUDA graphs.
    pub fn recording(&self) -> &Recording {
        self.binding.session().recording()
    }

    /// The inputs of the next run, where it reads them, for the trainer to fill.
    pub(crate) fn binding(&mut self) -> &mut Binding {
        &mut self.binding
    }

    /// The losses of the last run; waits for it.
    pub(crate) fn loss(&self) -> Result<StepLoss> {
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
