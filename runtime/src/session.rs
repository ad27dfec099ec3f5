//! Loaded programs: ONNX models that ONNX Runtime accepted and whose signature was checked.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use graph_builder::{DType, OnnxProgram, Shape, TensorSpec};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{Outlet, TensorElementType, ValueType};

use crate::cuda::Gpu;
use crate::device::Device;
use crate::error::{Result, RuntimeError, nearest};
use crate::kernels;
use crate::library::Runtime;
use crate::provider::{self, Provider};

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

/// How a program is loaded and run.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent switches, each with a default")]
pub struct SessionOptions {
    /// Threads inside one op; 0 leaves it to ONNX Runtime (one per physical core).
    pub threads: usize,
    /// Graph rewriting.
    pub optimization: Optimization,
    /// Run `mudit` ops by this crate's kernels, on the CPU and on CUDA; otherwise, and always on TensorRT, by the function
    /// bodies inside the model. On CUDA the kernels need NVRTC and a GPU of compute capability 8.0 or more: a session of a
    /// program with such ops that cannot have them is refused.
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

/// A program that ONNX Runtime has loaded. Runs go through a [`Binding`](crate::Binding); one at a time.
pub struct Session {
    name: String,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    // Dropped before the weights, which it may point into.
    inner: Mutex<ort::session::Session>,
    _weights: Option<Arc<[u8]>>,
    /// The GPU on whose stream it runs.
    gpu: Option<Arc<Gpu>>,
    /// Bindings made so far.
    graphs: AtomicU32,
    runtime: Arc<Runtime>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Session {
    /// Loads a program from memory and checks the model against the program's signature.
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
        let failed = |e: ort::Error| load_error(&program.name, &e);
        let (builder, gpu) = builder(runtime, options, &program.name)?;
        let kernels = options.native_kernels && !program.native_ops.is_empty();
        // Asked now: what is missing is told by name, not in the words of a failed load.
        if let (Provider::Cuda(_), Some(gpu)) = (&options.provider, &gpu) {
            let native = |op: &str, dtype| options.native_kernels && crate::cuda::kernels::has(op, dtype);
            program.check_cuda(&native).map_err(|e| load_error(&program.name, &e))?;
            if kernels {
                gpu.loaded()?;
            }
        }
        let mut builder = with_weights(builder, program, weights)?;
        let turns = (runtime.loading(), gpu.as_ref().map(|gpu| gpu.turn()));
        let inner = builder.commit_from_memory(&program.bytes).map_err(failed)?;
        drop(turns);
        let session = Self::new(runtime, program.name.clone(), inner, weights, gpu)?;
        session.check("input", &program.inputs, &session.inputs)?;
        session.check("output", &program.outputs, &session.outputs)?;
        // Callers address inputs and outputs by the program's order and static shapes.
        let (inputs, outputs) = (program.inputs.clone(), program.outputs.clone());
        Ok(Arc::new(Self { inputs, outputs, ..session }))
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
        let path = path.as_ref();
        std::fs::metadata(path).map_err(|e| RuntimeError::io("read", path, e))?;
        let name = path.display().to_string();
        let (mut builder, gpu) = builder(runtime, options, &name)?;
        let turns = (runtime.loading(), gpu.as_ref().map(|gpu| gpu.turn()));
        let inner = builder.commit_from_file(path).map_err(|e| load_error(&name, &e))?;
        drop(turns);
        let session = Self::new(runtime, name, inner, &Weights::Inside, gpu)?;
        if let Some((inputs, outputs)) = signature {
            session.check("input", inputs, &session.inputs)?;
            session.check("output", outputs, &session.outputs)?;
        }
        Ok(Arc::new(session))
    }

    /// The program's name, or the model file's path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The library that it is loaded in.
    pub fn runtime(&self) -> &Arc<Runtime> {
        &self.runtime
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
        self.gpu.as_ref()
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
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for the CUDA graph of a binding; 0 would be ONNX Runtime's default for all.
    pub(crate) fn next_graph(&self) -> u32 {
        self.graphs.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The error of a run: memory that ran out on a GPU is told apart, whether ONNX Runtime or one of this crate's kernels
    /// asked for it.
    pub(crate) fn run_error(&self, error: &ort::Error) -> RuntimeError {
        let reason = error.to_string();
        let after = |text: &str| reason.split_once(text).map(|(_, rest)| rest.trim_start());
        let ran_out = after("requested buffer of size")
            .or_else(|| after(" cannot give "))
            .or_else(|| after("out of memory"));
        match (&self.gpu, ran_out) {
            (Some(gpu), Some(rest)) => {
                let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
                let what = format!("values inside `{}`", self.name);
                crate::cuda::out_of_memory(gpu, digits.parse().unwrap_or(0), &what)
            }
            _ => RuntimeError::Run { program: self.name.clone(), reason },
        }
    }

    fn new(
        runtime: &Arc<Runtime>,
        name: String,
        inner: ort::session::Session,
        weights: &Weights,
        gpu: Option<Arc<Gpu>>,
    ) -> Result<Self> {
        let specs = |side, outlets: &[Outlet]| -> Result<Vec<TensorSpec>> {
            outlets.iter().map(|o| spec(&name, side, o)).collect()
        };
        let (inputs, outputs) = (specs("input", inner.inputs())?, specs("output", inner.outputs())?);
        let kept = match weights {
            Weights::Memory(bytes) => Some(bytes.clone()),
            Weights::Inside | Weights::Directory(_) => None,
        };
        let (inner, runtime) = (Mutex::new(inner), runtime.clone());
        Ok(Self { name, inputs, outputs, inner, _weights: kept, gpu, graphs: AtomicU32::new(0), runtime })
    }

    fn check(&self, side: &'static str, expected: &[TensorSpec], found: &[TensorSpec]) -> Result<()> {
        let mismatch = |name: &str, expected: String, got: String| RuntimeError::Signature {
            program: self.name.clone(),
            side,
            name: name.to_owned(),
            expected,
            got,
        };
        for want in expected {
            let names = found.iter().map(|s| s.name.as_str());
            let got =
                found.iter().find(|s| s.name == want.name).ok_or_else(|| RuntimeError::UnknownName {
                    kind: side,
                    place: format!("program `{}`", self.name),
                    name: want.name.clone(),
                    nearest: nearest(&want.name, names),
                })?;
            if (got.dtype, &got.shape) != (want.dtype, &want.shape) {
                let text = |s: &TensorSpec| format!("{}{}", s.dtype, s.shape);
                return Err(mismatch(&want.name, text(want), text(got)));
            }
        }
        match found.iter().find(|s| expected.iter().all(|e| e.name != s.name)) {
            Some(extra) => Err(mismatch(&extra.name, "absent".to_owned(), "present".to_owned())),
            None => Ok(()),
        }
    }
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
            // TensorRT fuses the function bodies itself.
            _ => builder,
        };
    }
    if options.record_placement {
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

fn with_weights(builder: SessionBuilder, program: &OnnxProgram, weights: &Weights) -> Result<SessionBuilder> {
    const FOLDER: &str = "session.model_external_initializers_file_folder_path";
    let failed = |reason: String| RuntimeError::Load { program: program.name.clone(), reason };
    let builder = match (&program.weights_file, weights) {
        (None, _) => Ok(builder),
        (Some(file), Weights::Inside) => {
            return Err(failed(format!("its weights are in `{file}`, and no weights were given")));
        }
        (Some(file), Weights::Directory(directory)) => {
            let path = directory.join(file);
            std::fs::metadata(&path).map_err(|e| RuntimeError::io("read", &path, e))?;
            builder.with_config_entry(FOLDER, directory.to_string_lossy())
        }
        (Some(file), Weights::Memory(bytes)) => {
            builder.with_external_initializer_file_in_memory(file, bytes.clone())
        }
    };
    builder.map_err(|e| failed(e.to_string()))
}

/// An input or output as the model declares it.
fn spec(program: &str, side: &'static str, outlet: &Outlet) -> Result<TensorSpec> {
    let unsupported = |got: String| RuntimeError::Signature {
        program: program.to_owned(),
        side,
        name: outlet.name().to_owned(),
        expected: "a tensor of f32, f16, bf16, i64 or bool with a static shape".to_owned(),
        got,
    };
    let ValueType::Tensor { ty, shape, .. } = outlet.dtype() else {
        return Err(unsupported(outlet.dtype().to_string()));
    };
    let dtype = match ty {
        TensorElementType::Float32 => DType::F32,
        TensorElementType::Float16 => DType::F16,
        TensorElementType::Bfloat16 => DType::Bf16,
        TensorElementType::Int64 => DType::I64,
        TensorElementType::Bool => DType::Bool,
        other => return Err(unsupported(other.to_string())),
    };
    let dims: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let dims = dims.ok_or_else(|| unsupported(format!("a tensor of shape {shape:?}")))?;
    Ok(TensorSpec { name: outlet.name().to_owned(), dtype, shape: Shape(dims) })
}

#[cfg(test)]
mod tests;
