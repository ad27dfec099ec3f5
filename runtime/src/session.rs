//! Loaded programs: ONNX models that ONNX Runtime accepted and whose signature was checked.

mod loaded;
mod open;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};

use graph_builder::{NativeCall, NativeKernel, OnnxProgram, TensorSpec};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use crate::cuda::Gpu;
use crate::device::Device;
use crate::error::{Result, RuntimeError};
use crate::kernels;
use crate::library::Runtime;
use crate::provider::{self, Provider};
use loaded::{Loaded, LoadedFrom};
pub use open::OpenSession;

/// How far ONNX Runtime rewrites a graph before running it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Optimization {
    /// The graph as emitted.
    None,
    /// Rewrites that keep the meaning and use standard ops only.
    Basic,
    /// Basic, and fusions into ONNX Runtime's own ops.
    Extended,
    /// Everything, layout changes included.
    #[default]
    All,
}

/// Most threads inside one op that are asked for: more than machines have cores.
pub const MAX_THREADS: usize = 1024;

/// How a program is loaded and run.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent switches, each with a default")]
pub struct SessionOptions {
    /// Threads inside one op; 0 leaves it to ONNX Runtime (one per physical core).
    pub threads: usize,
    /// Graph rewriting. TensorRT gets the graph as emitted.
    pub optimization: Optimization,
    /// Run `mudit` ops by this crate's kernels, on the CPU and on CUDA; otherwise by the function bodies inside the model.
    /// TensorRT gets programs without such ops. On CUDA the kernels need NVRTC and a GPU of compute capability 8.0 or
    /// more: a session of a program with such ops that cannot have them is refused.
    pub native_kernels: bool,
    /// Let idle threads spin before they sleep: faster steps, but a core is busy while it waits.
    pub spinning: bool,
    /// Ask for kernels whose result does not vary between runs.
    pub deterministic: bool,
    /// Write a profile with this path prefix; see [`Session::finish_profile`].
    pub profile: Option<PathBuf>,
    /// Who executes the nodes.
    pub provider: Provider,
    /// Write the graph as ONNX Runtime rewrote it.
    pub optimized_model_path: Option<PathBuf>,
    /// Note which provider runs which node; see [`Session::placement`].
    pub record_placement: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            threads: 0,
            optimization: Optimization::default(),
            native_kernels: true,
            spinning: true,
            deterministic: true,
            profile: None,
            provider: Provider::default(),
            optimized_model_path: None,
            record_placement: false,
        }
    }
}

/// Where the initializers of a program in memory are.
#[derive(Clone, Debug, Default)]
pub enum Weights {
    /// The program has none outside its own bytes.
    #[default]
    Inside,
    /// The program's weights file lies in this directory.
    Directory(PathBuf),
    /// The contents of the program's weights file.
    Memory(Arc<[u8]>),
}

/// Whether a session's runs are recorded as CUDA graphs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Recording {
    /// Nobody asked for it.
    #[default]
    Off,
    /// They are.
    On,
    /// It was asked for and is not safe; every run starts its kernels one by one. The reason.
    Refused(String),
}

/// A program that ONNX Runtime has loaded. Runs go through a [`Binding`](crate::Binding); one at a time, also where several
/// sessions are views of one [`OpenSession`].
pub struct Session {
    name: String,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    loaded: Arc<Loaded>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Session {
    /// Loads a program from memory and checks the model against the program's signature. Where CUDA graphs are asked for
    /// and are not safe, it goes without, and [`Session::recording`] says why.
    ///
    /// # Errors
    /// [`RuntimeError::ProviderUnavailable`], [`RuntimeError::Load`] with ONNX Runtime's words,
    /// [`RuntimeError::Signature`].
    pub fn load(
        runtime: &Arc<Runtime>,
        program: &OnnxProgram,
        weights: &Weights,
        options: &SessionOptions,
    ) -> Result<Arc<Self>> {
        let inlined = options.provider.reads_single_nodes().then(|| program.inlined()).transpose();
        let inlined = inlined.map_err(|e| load_error(&program.name, &e))?;
        let program = inlined.as_ref().unwrap_or(program);
        let from = LoadedFrom {
            name: &program.name,
            bytes: &program.bytes,
            weights_file: program.weights_file.as_deref(),
            native_ops: &program.native_ops,
            unrepeatable: &program.unrepeatable,
        };
        let check = |native: &dyn Fn(&NativeCall<'_>) -> NativeKernel| {
            program.check_cuda(native).map_err(|e| load_error(&program.name, &e))
        };
        let loaded = Loaded::from_memory(runtime, &from, weights, options, &check)?;
        loaded.check_static(&program.name)?;
        loaded.check(&program.name, &program.inputs, &program.outputs)?;
        // Callers address inputs and outputs by the program's order and static shapes.
        let (inputs, outputs) = (program.inputs.clone(), program.outputs.clone());
        Ok(Arc::new(Self { name: program.name.clone(), inputs, outputs, loaded: Arc::new(loaded) }))
    }

    /// Loads a model file; its external data must lie in the file's directory.
    ///
    /// `signature` is checked where given: (inputs, outputs).
    ///
    /// # Errors
    /// As [`Session::load`], and [`RuntimeError::Io`] when there is no such file.
    pub fn load_file(
        runtime: &Arc<Runtime>,
        path: impl AsRef<Path>,
        signature: Option<(&[TensorSpec], &[TensorSpec])>,
        options: &SessionOptions,
    ) -> Result<Arc<Self>> {
        Self::load_known(runtime, path.as_ref(), signature, options, None)
    }

    /// [`Session::load_file`] of a file of which it is known what no recorded run may have.
    pub(crate) fn load_known(
        runtime: &Arc<Runtime>,
        path: &Path,
        signature: Option<(&[TensorSpec], &[TensorSpec])>,
        options: &SessionOptions,
        unrepeatable: Option<&[String]>,
    ) -> Result<Arc<Self>> {
        let (name, loaded) = Loaded::from_file(runtime, path, options, unrepeatable)?;
        let (inputs, outputs) = loaded.check_static(&name)?;
        if let Some((inputs, outputs)) = signature {
            loaded.check(&name, inputs, outputs)?;
        }
        Ok(Arc::new(Self { name, inputs, outputs, loaded: Arc::new(loaded) }))
    }

    /// The program's name, or the model file's path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The library that it is loaded in.
    pub fn runtime(&self) -> &Arc<Runtime> {
        &self.loaded.runtime
    }

    /// Inputs in order.
    pub fn inputs(&self) -> &[TensorSpec] {
        &self.inputs
    }

    /// Outputs in order.
    pub fn outputs(&self) -> &[TensorSpec] {
        &self.outputs
    }

    /// The GPU that runs it.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.loaded.gpu.as_ref()
    }

    /// Whether its runs are recorded as CUDA graphs.
    pub fn recording(&self) -> &Recording {
        &self.loaded.recording
    }

    /// Stops profiling and returns the file that was written.
    ///
    /// # Errors
    /// [`RuntimeError::Ort`] when the session was loaded without [`SessionOptions::profile`].
    pub fn finish_profile(&self) -> Result<PathBuf> {
        self.lock().end_profiling().map(PathBuf::from).map_err(|e| RuntimeError::ort("end profiling", &e))
    }

    /// The session for one run. Runs take turns: a kernel may keep state.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ort::session::Session> {
        self.loaded.lock()
    }

    /// Whether it has one recorded run, so that it can be bound once.
    pub(crate) fn records_once(&self) -> bool {
        self.loaded.records_once
    }

    /// A number for the CUDA graph of a binding; 0 would be ONNX Runtime's default for all.
    ///
    /// # Errors
    /// As [`Loaded::next_graph`].
    pub(crate) fn next_graph(&self) -> Result<u32> {
        self.loaded.next_graph(&self.name)
    }

    /// The error of a run.
    pub(crate) fn run_error(&self, error: &ort::Error) -> RuntimeError {
        let run =
            || RuntimeError::Run { program: self.name.clone(), reason: self.loaded.runtime.in_full(error) };
        ran_out(self.gpu(), &self.name, &error.to_string()).unwrap_or_else(run)
    }
}

/// Memory of a GPU that ran out, told from ONNX Runtime's words or those of one of this crate's kernels.
fn ran_out(gpu: Option<&Arc<Gpu>>, program: &str, reason: &str) -> Option<RuntimeError> {
    let after = |text: &str| reason.split_once(text).map(|(_, rest)| rest.trim_start());
    let rest = after("requested buffer of size")
        .or_else(|| after(" cannot give "))
        .or_else(|| after("out of memory"))?;
    let bytes: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let what = format!("values inside `{program}`");
    Some(crate::cuda::out_of_memory(gpu?, bytes.parse().unwrap_or(0), &what))
}

pub(crate) fn load_error(program: &str, error: &dyn fmt::Display) -> RuntimeError {
    RuntimeError::Load { program: program.to_owned(), reason: error.to_string() }
}

/// A builder with every option applied, and the GPU that the session will run on.
pub(crate) fn builder(
    runtime: &Arc<Runtime>,
    options: &SessionOptions,
    program: &str,
) -> Result<(SessionBuilder, Option<Arc<Gpu>>)> {
    options.provider.check()?;
    options.provider.check_rounding(provider::tf32_forbidden())?;
    let gpu = match options.provider.device() {
        Device::Cpu => None,
        Device::Cuda { ordinal } => {
            runtime.library().require_gpu_providers()?;
            Some(Gpu::open(ordinal)?)
        }
    };
    let configured = configure(runtime, options, gpu.as_ref()).map_err(|e| load_error(program, &e))?;
    Ok((configured, gpu))
}

/// The builder with every option applied. A function of its own because a builder's error carries the builder,
/// which cannot leave the thread.
fn configure(
    runtime: &Arc<Runtime>,
    options: &SessionOptions,
    gpu: Option<&Arc<Gpu>>,
) -> ort::Result<SessionBuilder> {
    let level = match options.optimization {
        // TensorRT optimises by itself, and finds weights to be filled in by the names of the model's file: ONNX Runtime's
        // constant folding would hide them.
        _ if matches!(options.provider, Provider::TensorRt(_)) => GraphOptimizationLevel::Disable,
        Optimization::None => GraphOptimizationLevel::Disable,
        Optimization::Basic => GraphOptimizationLevel::Level1,
        Optimization::Extended => GraphOptimizationLevel::Level2,
        Optimization::All => GraphOptimizationLevel::All,
    };
    // A failed load or run comes back as an error with the same text: the log would say it twice.
    let mut builder = ort::session::Session::builder(runtime.environment())?
        .with_log_level(ort::logging::LogLevel::Fatal)?
        .with_optimization_level(level)?
        .with_intra_op_spinning(options.spinning)?
        .with_deterministic_compute(options.deterministic)?
        // A plan made in the first run is laid out anew in the second, beside what the first has taken: a training
        // step of DiT-S/2 held 2.1 GB instead of 1.4, at the same speed.
        .with_memory_pattern(false)?;
    if options.threads > 0 {
        builder = builder.with_intra_threads(options.threads)?;
    }
    builder = provider::register(builder, &options.provider, gpu.map(Arc::as_ref))?;
    if options.native_kernels {
        builder = match (&options.provider, gpu) {
            (Provider::Cpu(_), _) => builder.with_operators(kernels::domain()?)?,
            (Provider::Cuda(cuda), Some(gpu)) => {
                builder.with_operators(crate::cuda::kernels::operator::domain(gpu, cuda)?)?
            }
            // TensorRT gets programs without `mudit` ops.
            _ => builder,
        };
    }
    if options.record_placement || matches!(options.provider, Provider::TensorRt(_)) {
        builder = builder.with_config_entry("session.record_ep_graph_assignment_info", "1")?;
    }
    if let Some(prefix) = &options.profile {
        builder = builder.with_profiling(prefix)?;
    }
    if let Some(path) = &options.optimized_model_path {
        builder = builder.with_optimized_model_path(path)?;
        // Beside the model, so that large parameters do not pass a message's limit of 2 GB.
        let data = path.with_extension("data").file_name().unwrap_or_default().to_string_lossy().into_owned();
        builder =
            builder.with_config_entry("session.optimized_model_external_initializers_file_name", data)?;
    }
    Ok(builder)
}

#[cfg(test)]
mod tests;
