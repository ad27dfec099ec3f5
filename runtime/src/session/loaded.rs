//! What ONNX Runtime holds of a program, and what the model declares of itself.
#![allow(unsafe_code, reason = "drops a session while it is its thread's turn")]

use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use graph_builder::{DType, NativeCall, NativeKernel, Shape, TensorSpec};
use ort::session::builder::SessionBuilder;
use ort::value::{Outlet, TensorElementType, ValueType};

use super::{Recording, SessionOptions, Weights, builder, load_error, ran_out};
use crate::cuda::{Gpu, kernels};
use crate::error::{Result, RuntimeError, nearest};
use crate::file::sha256_bytes;
use crate::library::Runtime;
use crate::placement::refuse_none;
use crate::provider::Provider;

/// A program in memory.
pub(super) struct LoadedFrom<'a> {
    pub(super) name: &'a str,
    pub(super) bytes: &'a [u8],
    pub(super) weights_file: Option<&'a str>,
    pub(super) native_ops: &'a [String],
    pub(super) unrepeatable: &'a [String],
}

/// Whether the CUDA provider can run a program whose native ops run as the function tells.
pub(super) type CudaCheck<'a> = &'a dyn Fn(&dyn Fn(&NativeCall<'_>) -> NativeKernel) -> Result<()>;

/// An axis as a model declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Axis {
    Fixed(usize),
    /// Any size; where it has a name, the same as all others of that name.
    Open(String),
}

/// An input or output as a model declares it.
struct Declared {
    name: String,
    dtype: DType,
    axes: Vec<Axis>,
}

/// A model in ONNX Runtime. Several sessions can be views of one.
pub(super) struct Loaded {
    inputs: Vec<Declared>,
    outputs: Vec<Declared>,
    // Dropped before the weights, which it may point into.
    inner: ManuallyDrop<Mutex<ort::session::Session>>,
    _weights: Option<Arc<[u8]>>,
    /// The GPU on whose stream it runs.
    pub(super) gpu: Option<Arc<Gpu>>,
    pub(super) recording: Recording,
    /// Bindings made so far.
    graphs: AtomicU32,
    /// As [`Provider::records_once`].
    pub(super) records_once: bool,
    pub(super) runtime: Arc<Runtime>,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // A session gives memory back, which spoils what another thread records meanwhile.
        let _turn = self.gpu.as_ref().map(|gpu| gpu.turn());
        // SAFETY: dropped here and nowhere else.
        unsafe { ManuallyDrop::drop(&mut self.inner) };
    }
}

impl Loaded {
    /// Where CUDA graphs are asked for and are not safe, it goes without.
    pub(super) fn from_memory(
        runtime: &Arc<Runtime>,
        program: &LoadedFrom<'_>,
        weights: &Weights,
        options: &SessionOptions,
        check_cuda: CudaCheck<'_>,
    ) -> Result<Self> {
        let (mut options, mut read) = (options.clone(), None);
        if let Provider::TensorRt(tensorrt) = &mut options.provider {
            // TensorRT's parser finds files beside a model's file only, and here is none.
            if let (Weights::Directory(folder), Some(file)) = (weights, program.weights_file) {
                let path = folder.join(file);
                let bytes = std::fs::read(&path).map_err(|e| RuntimeError::io("read", &path, e))?;
                read = Some(Weights::Memory(bytes.into()));
            }
            tensorrt.weights_in_memory = program.weights_file.is_some();
        }
        let weights = read.as_ref().unwrap_or(weights);
        options.provider = options.provider.identified(|| identity(program, weights));
        recorded(&options, Some(program.unrepeatable), |options, recording| {
            Self::load_as(runtime, program, weights, options, check_cuda, recording)
        })
    }

    fn load_as(
        runtime: &Arc<Runtime>,
        program: &LoadedFrom<'_>,
        weights: &Weights,
        options: &SessionOptions,
        check_cuda: CudaCheck<'_>,
        recording: Recording,
    ) -> Result<Self> {
        let (builder, gpu) = builder(runtime, options, program.name)?;
        let kernels = options.native_kernels && !program.native_ops.is_empty();
        // Asked now: what is missing is told by name, not in the words of a failed load.
        if let (Provider::Cuda(_), Some(gpu)) = (&options.provider, &gpu) {
            let native = |call: &NativeCall<'_>| {
                if options.native_kernels { kernels::kernel_for(call) } else { NativeKernel::Body }
            };
            check_cuda(&native)?;
            if kernels {
                gpu.loaded()?.require_kernels(gpu)?;
            }
        }
        let mut builder = with_weights(builder, program, weights)?;
        let turns = (runtime.loading(), gpu.as_ref().map(|gpu| gpu.turn()));
        let inner = builder
            .commit_from_memory(program.bytes)
            .map_err(|e| load_failed(runtime, gpu.as_ref(), program.name, &e))?;
        refuse_none(program.name, &options.provider, &inner, runtime)?;
        drop(turns);
        Self::new(runtime, program.name, inner, weights, gpu, recording, options)
    }

    /// The model's name is its path. Where CUDA graphs are asked for and are not safe, it goes without; `unrepeatable`
    /// is what no recorded run may have, as far as that is known.
    pub(super) fn from_file(
        runtime: &Arc<Runtime>,
        path: &Path,
        options: &SessionOptions,
        unrepeatable: Option<&[String]>,
    ) -> Result<(String, Self)> {
        std::fs::metadata(path).map_err(|e| RuntimeError::io("read", path, e))?;
        let name = path.display().to_string();
        let loaded = recorded(options, unrepeatable, |options, recording| {
            let (mut builder, gpu) = builder(runtime, options, &name)?;
            let turns = (runtime.loading(), gpu.as_ref().map(|gpu| gpu.turn()));
            let inner =
                builder.commit_from_file(path).map_err(|e| load_failed(runtime, gpu.as_ref(), &name, &e))?;
            refuse_none(&name, &options.provider, &inner, runtime)?;
            drop(turns);
            Self::new(runtime, &name, inner, &Weights::Inside, gpu, recording, options)
        })?;
        Ok((name, loaded))
    }

    fn new(
        runtime: &Arc<Runtime>,
        name: &str,
        inner: ort::session::Session,
        weights: &Weights,
        gpu: Option<Arc<Gpu>>,
        recording: Recording,
        options: &SessionOptions,
    ) -> Result<Self> {
        let declared = |side, outlets: &[Outlet]| -> Result<Vec<Declared>> {
            outlets.iter().map(|o| declared(name, side, o)).collect()
        };
        let (inputs, outputs) = (declared("input", inner.inputs())?, declared("output", inner.outputs())?);
        let kept = match weights {
            Weights::Memory(bytes) => Some(bytes.clone()),
            Weights::Inside | Weights::Directory(_) => None,
        };
        let (inner, runtime) = (ManuallyDrop::new(Mutex::new(inner)), runtime.clone());
        Ok(Self {
            inputs,
            outputs,
            inner,
            _weights: kept,
            gpu,
            recording,
            graphs: AtomicU32::new(0),
            records_once: options.provider.records_once(),
            runtime,
        })
    }

    /// The model for one run. Runs take turns: a kernel may keep state.
    pub(super) fn lock(&self) -> MutexGuard<'_, ort::session::Session> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for the CUDA graph of a binding of `program`; 0 would be ONNX Runtime's default for all.
    ///
    /// # Errors
    /// [`RuntimeError::Run`] where a binding has the only recording that there can be.
    pub(super) fn next_graph(&self, program: &str) -> Result<u32> {
        let number = self.graphs.fetch_add(1, Ordering::Relaxed) + 1;
        if self.records_once && number > 1 {
            let reason = "TensorRT keeps one recorded run of a session, and another binding has used it: load the program \
                          once more for this one, or leave CUDA graphs out";
            return Err(RuntimeError::Run { program: program.to_owned(), reason: reason.to_owned() });
        }
        Ok(number)
    }

    /// Inputs and outputs of a model without open axes.
    pub(super) fn check_static(&self, name: &str) -> Result<(Vec<TensorSpec>, Vec<TensorSpec>)> {
        let all = |side, declared: &[Declared]| -> Result<Vec<TensorSpec>> {
            let spec = |d: &Declared| {
                let sizes = d.axes.iter().map(|axis| match axis {
                    Axis::Fixed(size) => Some(*size),
                    Axis::Open(_) => None,
                });
                let dims: Option<Vec<usize>> = sizes.collect();
                let dims = dims.ok_or_else(|| RuntimeError::Signature {
                    program: name.to_owned(),
                    side,
                    name: d.name.clone(),
                    expected:
                        "of a static shape; a model with an open batch is an `OpenSession`, and runs at one \
                               batch size at a time"
                            .to_owned(),
                    got: d.text(),
                })?;
                Ok(TensorSpec { name: d.name.clone(), dtype: d.dtype, shape: Shape(dims) })
            };
            declared.iter().map(spec).collect()
        };
        Ok((all("input", &self.inputs)?, all("output", &self.outputs)?))
    }

    /// Whether the model is what a signature says; an open axis fits any size, and axes of one name have one size.
    pub(super) fn check(&self, program: &str, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Result<()> {
        let mut named: Vec<(&str, usize)> = Vec::new();
        check(program, "input", inputs, &self.inputs, &mut named)?;
        check(program, "output", outputs, &self.outputs, &mut named)
    }
}

/// What tells a program in memory from others with the same names inside: its bytes and its weights.
fn identity(program: &LoadedFrom<'_>, weights: &Weights) -> String {
    let weights = match weights {
        // What is in a folder was read before.
        Weights::Inside | Weights::Directory(_) => String::new(),
        Weights::Memory(bytes) => sha256_bytes(bytes),
    };
    sha256_bytes(format!("{} {weights}", sha256_bytes(program.bytes)).as_bytes())
}

/// Loads so that runs are recorded as CUDA graphs where that is asked for and is safe.
fn recorded(
    options: &SessionOptions,
    unrepeatable: Option<&[String]>,
    load: impl Fn(&SessionOptions, Recording) -> Result<Loaded>,
) -> Result<Loaded> {
    if !options.provider.cuda_graph() {
        return load(options, Recording::Off);
    }
    let reason = match unrepeatable {
        None => "a model's file does not tell whether its runs can be recorded".to_owned(),
        Some([]) => match load(options, Recording::On) {
            // ONNX Runtime's words for control flow, and for nodes that are not on the GPU.
            Err(RuntimeError::Load { reason, .. }) if reason.contains("graph capture feature") => reason,
            other => return other,
        },
        Some(nodes) => {
            format!("it would read tables of the host where they no longer are: {}", nodes.join(", "))
        }
    };
    let provider = options.provider.clone().without_cuda_graph();
    load(&SessionOptions { provider, ..options.clone() }, Recording::Refused(reason))
}

fn load_failed(runtime: &Runtime, gpu: Option<&Arc<Gpu>>, program: &str, error: &ort::Error) -> RuntimeError {
    // TensorRT's own words tell of memory that ran out for kernels that it then did without.
    ran_out(gpu, program, &error.to_string()).unwrap_or_else(|| load_error(program, &runtime.in_full(error)))
}

fn check<'l>(
    program: &str,
    side: &'static str,
    expected: &[TensorSpec],
    found: &'l [Declared],
    named: &mut Vec<(&'l str, usize)>,
) -> Result<()> {
    let mismatch = |name: &str, expected: String, got: String| RuntimeError::Signature {
        program: program.to_owned(),
        side,
        name: name.to_owned(),
        expected,
        got,
    };
    for want in expected {
        let names = found.iter().map(|s| s.name.as_str());
        let got = found.iter().find(|s| s.name == want.name).ok_or_else(|| RuntimeError::UnknownName {
            kind: side,
            place: format!("program `{program}`"),
            name: want.name.clone(),
            nearest: nearest(&want.name, names),
        })?;
        let dims = want.shape.dims();
        let fits = got.dtype == want.dtype
            && got.axes.len() == dims.len()
            && got.axes.iter().zip(dims).all(|(axis, size)| axis.fits(*size, named));
        if !fits {
            let known: Vec<String> =
                named.iter().map(|(axis, size)| format!(" where {axis} is {size}")).collect();
            let got = if got.is_open() { format!("{}{}", got.text(), known.concat()) } else { got.text() };
            return Err(mismatch(&want.name, format!("{}{}", want.dtype, want.shape), got));
        }
    }
    match found.iter().find(|s| expected.iter().all(|e| e.name != s.name)) {
        Some(extra) => Err(mismatch(&extra.name, "absent".to_owned(), "present".to_owned())),
        None => Ok(()),
    }
}

impl Axis {
    /// Whether the axis can have this size, beside the sizes that named axes have; a new name is noted.
    fn fits<'l>(&'l self, size: usize, named: &mut Vec<(&'l str, usize)>) -> bool {
        match self {
            Self::Fixed(own) => *own == size,
            Self::Open(name) if name.is_empty() => true,
            Self::Open(name) => {
                let known = named.iter().find(|(known, _)| known == name).map(|(_, size)| *size);
                if known.is_none() {
                    named.push((name, size));
                }
                known.is_none_or(|known| known == size)
            }
        }
    }
}

impl Declared {
    fn is_open(&self) -> bool {
        self.axes.iter().any(|axis| matches!(axis, Axis::Open(_)))
    }

    fn text(&self) -> String {
        let words = self.axes.iter().map(|axis| match axis {
            Axis::Fixed(size) => size.to_string(),
            Axis::Open(name) if name.is_empty() => "?".to_owned(),
            Axis::Open(name) => name.clone(),
        });
        format!("{}({})", self.dtype, words.collect::<Vec<_>>().join(", "))
    }
}

fn with_weights(
    builder: SessionBuilder,
    program: &LoadedFrom<'_>,
    weights: &Weights,
) -> Result<SessionBuilder> {
    const FOLDER: &str = "session.model_external_initializers_file_folder_path";
    let failed = |reason: String| RuntimeError::Load { program: program.name.to_owned(), reason };
    let builder = match (program.weights_file, weights) {
        (None, _) => Ok(builder),
        (Some(file), Weights::Inside) => {
            return Err(failed(format!("its weights are in `{file}`, and no weights were given")));
        }
        (Some(file), Weights::Directory(directory)) => {
            let path: PathBuf = directory.join(file);
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
fn declared(program: &str, side: &'static str, outlet: &Outlet) -> Result<Declared> {
    let unsupported = |got: String| RuntimeError::Signature {
        program: program.to_owned(),
        side,
        name: outlet.name().to_owned(),
        expected: "a tensor of f32, f16, bf16, i64 or bool".to_owned(),
        got,
    };
    let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else {
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
    let axis = |(i, size): (usize, &i64)| match usize::try_from(*size) {
        Ok(size) => Axis::Fixed(size),
        Err(_) => Axis::Open(dimension_symbols.get(i).cloned().unwrap_or_default()),
    };
    let axes = shape.iter().enumerate().map(axis).collect();
    Ok(Declared { name: outlet.name().to_owned(), dtype, axes })
}
