//! Runs a program on random values, plain and under ONNX Runtime's profiler, with the update that follows a training step.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use graph_builder::{Cost, DType, Graph, OnnxProgram, Weights};
use models::{Guidance, Model, ProgramKind, ProgramSpec};
use runtime::memory::peak_resident_bytes;
use runtime::safetensors_file::SafetensorsReader;
use runtime::update::{UpdateState, UpdateStep, trainable_layout};
use runtime::{AdamW, Arena, ArenaLayout, Binding, Runtime, Session, SessionOptions, SharedArena};
use train_engine::random::{Purpose, Stream};
use train_engine::step::{parameter_layout, read_lock, write_lock};

use super::{Profile, Spent, trace};
use crate::external;

/// File of the parameters that a program's initializers point into.
const WEIGHTS: &str = "weights.safetensors";
/// Standard deviation of random parameters, about that of trained ones.
const PARAMETER_STD: f32 = 0.02;
/// Operations on each element: square and sum, clip, two moments, root and quotient, decay and step, average.
const UPDATE_FLOPS: u64 = 18;
/// f32 values moved for each element: the gradient twice, parameter, moments and average read and written.
const UPDATE_VALUES: u64 = 10;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The model.
    pub model: &'a Model,
    /// The program.
    pub kind: ProgramKind,
    /// Samples of one run.
    pub batch: usize,
    /// Channels that guidance changes.
    pub guidance: Guidance,
    /// Threads inside one op; 0 is one a core.
    pub threads: usize,
    /// Timed runs, each way.
    pub repeat: usize,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The program's graph after all passes.
    pub graph: Graph,
    /// Work of one run.
    pub cost: Cost,
    /// One run without the profiler: the median, in milliseconds.
    pub plain_ms: f64,
    /// The update after a training step: gradient norm, clip, AdamW, moving average.
    pub update: Option<Spent>,
    /// Largest resident memory of this process before the profiler was started.
    pub peak_resident_bytes: Option<u64>,
    /// Node by node.
    pub profile: Profile,
}

impl Subject<'_> {
    /// Builds, loads, runs.
    ///
    /// # Errors
    /// A graph that cannot be built, a session that does not load or run, a disk that is full.
    pub fn measure(&self, runtime: &Arc<Runtime>) -> anyhow::Result<Measured> {
        let graph = self.model.compiled(&ProgramSpec::new(self.kind, self.batch).guided(self.guidance))?;
        let directory = tempfile::tempdir().context("a place for the profile")?;
        let parameters = Self::parameters(&graph)?;
        let emitted = self.emit(&graph, &parameters, directory.path())?;
        let parameters = self.kind.feeds_parameters().then(|| parameters.into_shared());
        let (gradients, mut update) = self.training(&graph, parameters.as_ref())?;
        let plain = SessionOptions { threads: self.threads, ..SessionOptions::default() };
        let profiled = SessionOptions {
            profile: Some(directory.path().join("trace")),
            optimized_model_path: Some(directory.path().join("optimised.onnx")),
            ..plain.clone()
        };
        let load = |options: &SessionOptions| -> anyhow::Result<Binding> {
            let weights = match emitted.weights_file {
                Some(_) => runtime::Weights::Directory(directory.path().to_path_buf()),
                None => runtime::Weights::Inside,
            };
            let session = Session::load(runtime, &emitted, &weights, options)?;
            let mut builder = Binding::builder(&session);
            if let Some(arena) = &parameters {
                builder.bind_inputs_by_name(arena)?;
            }
            if let Some(arena) = &gradients {
                builder.bind_outputs_by_name(arena, "grad.")?;
            }
            let mut binding = builder.finish()?;
            self.fill(&graph, &mut binding)?;
            Ok(binding)
        };

        let mut binding = load(&plain)?;
        binding.run()?;
        let plain_ms = median_ms(self.repeat, || Ok(binding.run()?))?;
        let update = update.as_mut().map(|update| update.spent(self.repeat)).transpose()?;
        let peak_resident_bytes = peak_resident_bytes();
        drop(binding);

        let mut binding = load(&profiled)?;
        for _ in 0..=self.repeat {
            binding.run()?;
        }
        let runs = trace::read(&binding.session().finish_profile()?)?;
        let model = std::fs::read(directory.path().join("optimised.onnx"))
            .context("reading the model as ONNX Runtime rewrote it")?;
        let profile = Profile::new(&graph, &graph.origins(&model)?, &runs);
        let cost = graph.cost();
        Ok(Measured { graph, cost, plain_ms, update, peak_resident_bytes, profile })
    }

    fn parameters(graph: &Graph) -> anyhow::Result<Arena> {
        let mut arena = Arena::zeros(parameter_layout(graph.parameters())?)?;
        for (i, view) in arena.views_mut().into_iter().enumerate() {
            Stream::new(0, Purpose::Init, 0, i as u64).fill_normal(view);
            for value in view.iter_mut() {
                *value *= PARAMETER_STD;
            }
        }
        Ok(arena)
    }

    /// The program as it is used: training reads parameters from an arena, an engine has them as initializers.
    fn emit(&self, graph: &Graph, parameters: &Arena, directory: &Path) -> anyhow::Result<OnnxProgram> {
        if self.kind.feeds_parameters() {
            return Ok(graph.emit(Weights::Inputs)?);
        }
        let path = directory.join(WEIGHTS);
        parameters.write_safetensors(&path, &BTreeMap::new())?;
        let reader = SafetensorsReader::open(&path)?;
        let tensors = external::tensors(&reader, parameters.layout(), |_| DType::F32)?;
        Ok(graph.emit(Weights::External { file: WEIGHTS, tensors: &tensors })?)
    }

    /// The gradients' arena and the update, for the program that has gradients.
    fn training(
        &self,
        graph: &Graph,
        parameters: Option<&SharedArena>,
    ) -> anyhow::Result<(Option<SharedArena>, Option<Update>)> {
        let (ProgramKind::TrainStep, Some(parameters)) = (self.kind, parameters) else {
            return Ok((None, None));
        };
        let layout = read_lock(parameters)?.layout().clone();
        let trainable = |name: &str| graph.parameters().iter().any(|p| p.trainable && p.name == name);
        let gradient_layout = Arc::new(trainable_layout(&layout, |name, _| trainable(name))?);
        let gradients = Arena::zeros(gradient_layout.clone())?.into_shared();
        let update = Update {
            optimizer: AdamW::new(&layout, &gradient_layout, (0.9, 0.999, 1e-8), self.threads)?,
            parameters: parameters.clone(),
            gradients: gradients.clone(),
            moments: [Arena::zeros(gradient_layout.clone())?, Arena::zeros(gradient_layout.clone())?],
            ema: read_lock(parameters)?.duplicate()?,
            layout: gradient_layout,
        };
        Ok((Some(gradients), Some(update)))
    }

    /// Random values of the kind that each input takes.
    fn fill(&self, graph: &Graph, binding: &mut Binding) -> anyhow::Result<()> {
        let owned: Vec<(String, DType)> =
            graph.inputs().map(|(name, ty)| (name.to_owned(), ty.dtype)).collect();
        for (i, (name, dtype)) in owned.iter().enumerate() {
            let mut draw = Stream::new(0, Purpose::SampleInit, 0, i as u64);
            match (dtype, name.as_str()) {
                // Each row is its own pair.
                (DType::I64, "pair") => {
                    let rows = binding.input_i64("pair")?.iter_mut().enumerate();
                    rows.for_each(|(row, v)| *v = row as i64);
                }
                (DType::I64, name) => {
                    let classes = self.model.conditioning().class_count().max(1) as u64;
                    binding.input_i64(name)?.iter_mut().for_each(|v| *v = draw.below(classes) as i64);
                }
                (_, "t") => binding.input_f32("t")?.iter_mut().for_each(|v| *v = draw.below(1000) as f32),
                (_, name) if name.starts_with("hp.") => binding.input_f32(name)?.fill(1.0),
                (_, name) => draw.fill_normal(binding.input_f32(name)?),
            }
        }
        Ok(())
    }
}

/// Everything that an update needs.
struct Update {
    optimizer: AdamW,
    parameters: SharedArena,
    gradients: SharedArena,
    moments: [Arena; 2],
    ema: Arena,
    layout: Arc<ArenaLayout>,
}

impl Update {
    fn spent(&mut self, repeat: usize) -> anyhow::Result<Spent> {
        let zeros = vec![0.0; self.layout.entries().len()];
        // A rate of zero does the same work and keeps the parameters.
        let step =
            UpdateStep { step: 1, lr: &zeros, weight_decay: &zeros, clip: Some(1.0), gradient_scale: 1.0 };
        let elements = self.layout.numel() as u64;
        let mut once = || -> anyhow::Result<()> {
            let [first_moments, second_moments] = &mut self.moments;
            let state = UpdateState {
                parameters: &mut *write_lock(&self.parameters)?,
                gradients: &*read_lock(&self.gradients)?,
                first_moments,
                second_moments,
                ema: Some((&mut self.ema, 0.9999)),
            };
            let report = self.optimizer.step(state, &step)?;
            anyhow::ensure!(report.finite, "the gradients of random parameters are not finite");
            Ok(())
        };
        once()?;
        let ms = median_ms(repeat, once)?;
        Ok(Spent { calls: 1, ms, flops: UPDATE_FLOPS * elements, bytes: UPDATE_VALUES * 4 * elements })
    }
}

fn median_ms(repeat: usize, mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(repeat.max(1));
    for _ in 0..repeat.max(1) {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(f64::midpoint(times[(times.len() - 1) / 2], times[times.len() / 2]))
}
