//! Who computes a program, in which element type, and where its parameters are meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, LockResult, Mutex, PoisonError};

use anyhow::{Context, ensure};
use graph_builder::{DType, ExternalTensor, Graph, Precision, Shape, Type, Weights};
use half::{bf16, f16};
use models::{Model, ProgramKind, ProgramSpec};
use runtime::cuda::libraries::NVRTC;
use runtime::cuda::{DeviceArena, Gpu};
use runtime::library::cache_directory;
use runtime::provider::{TF32, tf32_forbidden};
use runtime::{
    Arena, ArenaLayout, Binding, BindingBuilder, CudaOptions, Provider, Recording, Runtime, RuntimeError,
    Session, SessionOptions, SharedArena,
};

use crate::Usage;
use crate::console;

/// Name under which programs refer to parameters in memory.
const IN_MEMORY: &str = "parameters";
/// Parameters start at multiples of this many bytes.
const ALIGNMENT: usize = 64;

/// How programs are computed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Execution {
    /// Who runs them.
    pub provider: Provider,
    /// What they compute in.
    pub precision: Precision,
    /// Threads inside one op on the CPU; 0 is one a core.
    pub threads: usize,
}

impl Execution {
    /// In f32 on the CPU.
    pub fn cpu(threads: usize) -> Self {
        Self { threads, ..Self::default() }
    }

    /// The same in f32.
    #[must_use]
    pub fn in_f32(&self) -> Self {
        Self { precision: Precision::F32, ..self.clone() }
    }

    /// Refuses what cannot be computed here before any work is done.
    ///
    /// # Errors
    /// [`Usage`] for a precision that the CPU does not have; a provider or a compiler that is missing, with what installs it.
    pub fn check(&self) -> anyhow::Result<()> {
        self.check_provider()?;
        if let (Provider::Cuda(_), Some(reason)) = (&self.provider, NVRTC.complaint()) {
            let remedy = NVRTC.install.to_owned();
            return Err(RuntimeError::ProviderUnavailable {
                provider: self.provider.to_string(),
                reason,
                remedy,
            }
            .into());
        }
        Ok(())
    }

    /// [`Self::check`] for training.
    ///
    /// # Errors
    /// As [`Self::can_train`] and [`Self::check`].
    pub fn check_training(&self) -> anyhow::Result<()> {
        self.can_train()?;
        self.check()
    }

    /// Refuses a provider that trains nowhere.
    ///
    /// # Errors
    /// [`Usage`] for TensorRT.
    pub fn can_train(&self) -> anyhow::Result<()> {
        if !matches!(self.provider, Provider::TensorRt(_)) {
            return Ok(());
        }
        let text = "TensorRT does not train: each step changes the weights, which it lays out anew in minutes of building; use \
                    --provider cuda";
        Err(Usage(text.to_owned()).into())
    }

    /// [`Self::check`] for programs of an engine, which may carry its kernels: no compiler is asked for.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn check_provider(&self) -> anyhow::Result<()> {
        if !self.provider.is_gpu() && self.precision != Precision::F32 {
            let text = format!(
                "programs on the CPU compute in f32: use --precision f32, or --provider cuda for {}",
                self.precision
            );
            return Err(Usage(text).into());
        }
        keep_f32(&self.provider)?;
        Ok(self.provider.check()?)
    }

    /// How sessions are loaded.
    pub fn session_options(&self) -> SessionOptions {
        let provider = self.provider.clone().computing_in(self.precision.dtype());
        let provider = match cache_directory() {
            Some(cache) => provider.cached_in(&cache.join("tensorrt")),
            None => provider,
        };
        SessionOptions { threads: self.threads, provider, ..SessionOptions::default() }
    }

    /// Provider and precision in a few words.
    pub fn in_words(&self) -> String {
        format!("{}, {}", self.provider, self.precision)
    }
}

/// Sees to it that TensorRT's f32 products are f32: the process starts once more, with [`TF32`] at 0. A command is at its
/// beginning here.
///
/// # Errors
/// [`Usage`] where the variable says otherwise; the process cannot start.
pub fn keep_f32(provider: &Provider) -> anyhow::Result<()> {
    if !matches!(provider, Provider::TensorRt(_)) || tf32_forbidden() {
        return Ok(());
    }
    if let Some(value) = env::var_os(TF32) {
        let value = value.display();
        let text =
            format!("{TF32}={value} lets TensorRT round f32 products to 10 bits: unset it, or set it to 0");
        return Err(Usage(text).into());
    }
    console::note(&format!("TensorRT: starting again with {TF32}=0, so that f32 products are f32"));
    let program = env::current_exe().with_context(|| format!("cannot start again: set {TF32}=0"))?;
    // It comes back only if it fails.
    let error = Command::new(program).args(env::args_os().skip(1)).env(TF32, "0").exec();
    Err(error).with_context(|| format!("cannot start again: set {TF32}=0"))
}

/// Inputs of a sampling step that may be normal draws.
const DRAWN: [&str; 2] = ["x", "noise"];

/// Lets a GPU draw the noise of seeds, which then need not cross the bus.
///
/// # Errors
/// As [`BindingBuilder::draw_input`].
pub(crate) fn draw_noise(session: &Session, builder: &mut BindingBuilder) -> anyhow::Result<()> {
    for input in session.inputs().iter().filter(|input| DRAWN.contains(&input.name.as_str())) {
        builder.draw_input(&input.name)?;
    }
    Ok(())
}

/// Tells, once a program, that its runs are not recorded as CUDA graphs though that was asked for.
pub(crate) fn tell_recording(session: &Session) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let Recording::Refused(reason) = session.recording() else { return };
    let line = format!("`{}` is not recorded as a CUDA graph: {reason}", session.name());
    if TOLD.lock().unwrap_or_else(PoisonError::into_inner).insert(line.clone()) {
        console::note(&line);
    }
}

/// A model's parameters where its programs read them. Copies are the same memory.
#[derive(Clone, Debug)]
pub struct Placed(Place);

#[derive(Clone, Debug)]
enum Place {
    /// Inputs of the program, in the host's memory; a GPU has a copy that follows.
    Host(SharedArena),
    /// Inputs of the program, on the GPU, one arena for each element type.
    Device(Vec<Arc<DeviceArena>>),
    /// Constants of the program, which its provider moves where it wants them.
    Constants { bytes: Arc<[u8]>, tensors: Arc<BTreeMap<String, ExternalTensor>> },
}

impl Placed {
    /// A model's parameters for all of its sampling programs, as they are now: in place on the CPU, one copy in the
    /// programs' types on a GPU.
    ///
    /// # Errors
    /// An arena that lacks a parameter of the model; no memory on the GPU.
    pub fn of(parameters: &SharedArena, model: &Model, execution: &Execution) -> anyhow::Result<Self> {
        if !execution.provider.is_gpu() {
            return Ok(Self(Place::Host(parameters.clone())));
        }
        let graph = model.compiled(&ProgramSpec::new(ProgramKind::Denoise, 1))?;
        let graph = graph.in_precision(execution.precision)?;
        let arena = lock(parameters.read())?;
        if let Provider::Cuda(CudaOptions { ordinal, .. }) = execution.provider {
            let gpu = Gpu::open(ordinal)?;
            let mut arenas = Vec::new();
            for dtype in [DType::F32, DType::Bf16, DType::F16] {
                let of_type = graph.parameters().iter().filter(|p| p.dtype == dtype);
                let layout = ArenaLayout::new(of_type.map(|p| (p.name.clone(), p.shape())))?;
                if layout.is_empty() {
                    continue;
                }
                let mut values = Arena::zeros(Arc::new(layout))?;
                let layout = values.layout().clone();
                for name in layout.entries().keys() {
                    values.view_mut(name)?.copy_from_slice(arena.view(name)?);
                }
                let device = DeviceArena::zeros(&gpu, layout, dtype, "the model's parameters")?;
                device.upload(&values)?;
                arenas.push(Arc::new(device));
            }
            return Ok(Self(Place::Device(arenas)));
        }
        // TensorRT chooses kernels by the weights and lays them out anew: they must be constants.
        let values = graph.parameters().iter();
        Self::constants(values.map(|p| Ok((p.name.as_str(), p.shape(), p.dtype, arena.view(&p.name)?))))
    }

    /// A model's parameters that go on changing: every run takes them as they are then. TensorRT cannot.
    pub fn following(parameters: &SharedArena) -> Self {
        Self(Place::Host(parameters.clone()))
    }

    /// Parameters that become constants of the program, given as name, shape, type in the program, and values.
    ///
    /// # Errors
    /// What the iterator says; a parameter with the wrong number of values.
    pub fn constants<'a>(
        parameters: impl Iterator<Item = anyhow::Result<(&'a str, Shape, DType, &'a [f32])>>,
    ) -> anyhow::Result<Self> {
        let (mut tensors, mut bytes) = (BTreeMap::new(), Vec::new());
        for parameter in parameters {
            let (name, shape, dtype, values) = parameter?;
            ensure!(
                values.len() == shape.numel(),
                "internal: parameter `{name}` has {} values, expected {}",
                values.len(),
                shape.numel()
            );
            let offset = bytes.len();
            match dtype {
                DType::Bf16 => {
                    let narrow: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                    bytes.extend_from_slice(bytemuck::cast_slice(&narrow));
                }
                DType::F16 => {
                    let narrow: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
                    bytes.extend_from_slice(bytemuck::cast_slice(&narrow));
                }
                DType::F32 | DType::I64 | DType::Bool => {
                    bytes.extend_from_slice(bytemuck::cast_slice(values));
                }
            }
            let (ty, length) = (Type::new(dtype, shape), (bytes.len() - offset) as u64);
            tensors.insert(name.to_owned(), ExternalTensor { ty, offset: offset as u64, length });
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        }
        Ok(Self(Place::Constants { bytes: bytes.into(), tensors: tensors.into() }))
    }

    /// Compiles a graph, loads it and binds it to these parameters; every other input and output has its own buffer.
    ///
    /// # Errors
    /// A graph that the provider has no kernels for; a session that does not load; no memory.
    pub fn load(
        &self,
        runtime: &Arc<Runtime>,
        graph: &Graph,
        execution: &Execution,
        options: &SessionOptions,
    ) -> anyhow::Result<Binding> {
        let graph = graph.optimised()?.in_precision(execution.precision)?;
        let (weights, memory) = match &self.0 {
            Place::Host(_) | Place::Device(_) => (Weights::Inputs, runtime::Weights::Inside),
            Place::Constants { bytes, tensors } => {
                (Weights::External { file: IN_MEMORY, tensors }, runtime::Weights::Memory(bytes.clone()))
            }
        };
        let program = graph.emit(weights)?;
        let session = Session::load(runtime, &program, &memory, options)?;
        tell_recording(&session);
        let mut builder = Binding::builder(&session);
        let bound = match &self.0 {
            Place::Host(arena) => {
                lock(arena.write())?.freeze();
                builder.bind_inputs_by_name(arena)?
            }
            Place::Device(arenas) => {
                let mut bound = 0;
                for arena in arenas {
                    bound += builder.bind_device_inputs_by_name(arena)?;
                }
                bound
            }
            Place::Constants { .. } => graph.parameters().len(),
        };
        draw_noise(&session, &mut builder)?;
        // An input that nothing feeds would be zeros.
        ensure!(
            bound == graph.parameters().len(),
            "internal: {bound} of the program's {} parameters are bound",
            graph.parameters().len()
        );
        Ok(builder.finish()?)
    }
}

fn lock<T>(taken: LockResult<T>) -> anyhow::Result<T> {
    taken.map_err(|_| anyhow::anyhow!("a thread panicked while it held the parameters"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_refuses_other_types_than_f32_and_says_what_to_do() {
        Execution::cpu(1).check().unwrap();
        let text = Execution { precision: Precision::Bf16, ..Execution::default() }.check().unwrap_err();
        assert!(text.is::<Usage>() && text.to_string().contains("--precision f32"), "{text}");
    }

    #[test]
    fn tensorrt_trains_nowhere() {
        let with = |name: &str| Execution { provider: name.parse().unwrap(), ..Execution::default() };
        with("cpu").check_training().unwrap();
        with("cuda").can_train().unwrap();
        let refused = with("tensorrt").check_training().unwrap_err();
        assert!(refused.is::<Usage>() && refused.to_string().contains("--provider cuda"), "{refused}");
    }

    #[test]
    fn constants_are_in_the_types_of_the_program_and_aligned() {
        let shape = || Shape(vec![2]);
        let values = [("a", DType::Bf16), ("b", DType::F32), ("c", DType::F16)];
        let placed = Placed::constants(
            values.iter().map(|&(name, dtype)| Ok((name, shape(), dtype, [1.0_f32, -2.5].as_slice()))),
        );
        let Place::Constants { bytes, tensors } = placed.unwrap().0 else { panic!() };
        assert_eq!((tensors["a"].length, tensors["b"].length, tensors["c"].offset), (4, 8, 128));
        assert_eq!(bytes[..4], [0x80, 0x3F, 0x20, 0xC0]);
        assert_eq!(bytes[64..72], [0, 0, 0x80, 0x3F, 0, 0, 0x20, 0xC0]);
        assert_eq!(bytes[128..132], [0x00, 0x3C, 0x00, 0xC1]);
        let wrong = Placed::constants([Ok(("a", shape(), DType::F32, [1.0_f32].as_slice()))].into_iter());
        assert!(wrong.unwrap_err().to_string().contains("`a` has 1 values, expected 2"));
    }
}
