//! Typed provider options. A provider that cannot be had is an error; nothing falls back to another one.

mod execution;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use graph_builder::DType;

use crate::cuda::Gpu;
use crate::cuda::libraries::{CudaLibrary, FOR_CUDA, FOR_TENSORRT};
use crate::device::Device;
use crate::error::{Result, RuntimeError};

pub(crate) use execution::{register, try_out};

/// Options of the CPU provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Keep freed intermediate buffers for the next run: about a quarter faster, more memory held.
    pub memory_arena: bool,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self { memory_arena: true }
    }
}

/// Options of the CUDA provider.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// The CUDA driver's number of the GPU.
    pub ordinal: usize,
    /// Record the kernels of a run once and start them all at once from then on, where that is safe; see
    /// [`Session::recording`](crate::Session::recording).
    pub cuda_graph: bool,
    /// Let f32 products round their operands to 10 bits of fraction: some eight times faster, no longer exact to 1e-4.
    pub tf32: bool,
}

/// Options of the TensorRT provider.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorRtOptions {
    /// The CUDA driver's number of the GPU.
    pub ordinal: usize,
    /// A float type of the programs other than f32. ONNX Runtime's provider makes networks whose types TensorRT may change: it
    /// is allowed f32 and this, and refuses a program with another type in it. For f32 [`TF32`] must be 0.
    pub narrow: Option<DType>,
    /// Record the kernels of a run once and start them all at once from then on.
    pub cuda_graph: bool,
    /// Weights are in memory, not in a file beside the model's: they are handed over one by one, as a model in one message
    /// ends at 2 GB. Where weights are in a file, TensorRT's parser reads that.
    pub weights_in_memory: bool,
    /// Folder that built engines are kept in and taken from.
    pub engine_cache: Option<PathBuf>,
    /// Start of the file names of engines in the cache.
    pub engine_prefix: Option<String>,
    /// Folder with the measurements of kernels, which make the next build shorter.
    pub timing_cache: Option<PathBuf>,
    /// Write a model that stands for the built engine to this file, and the engine beside it. It is loaded like any
    /// other model, without a build. Excludes `engine_cache`.
    pub context_file: Option<PathBuf>,
    /// Shapes that an engine is built for, where the model leaves an axis open.
    pub profiles: Vec<ShapeProfile>,
    /// Effort of the builder, 0 to 5; `None` leaves it to TensorRT (3).
    pub builder_level: Option<u8>,
    /// Largest size of the memory that one kernel may use while it runs, in bytes.
    pub workspace_limit: Option<usize>,
    /// Build an engine without weights, which takes them from the model in this folder when it is loaded. They must be those
    /// that it was built with: ONNX Runtime builds it so (`REFIT_IDENTICAL`), and with others TensorRT promises nothing.
    pub weights_from: Option<PathBuf>,
    /// Build an engine that runs on later GPUs too (Ampere and newer), at some loss of speed.
    pub hardware_compatible: bool,
}

/// The shapes of one input that an engine serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapeProfile {
    /// The input.
    pub input: String,
    /// The smallest.
    pub min: Vec<usize>,
    /// The one that kernels are chosen for.
    pub opt: Vec<usize>,
    /// The largest.
    pub max: Vec<usize>,
}

/// Who executes a program's nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Provider {
    /// ONNX Runtime's own CPU kernels.
    Cpu(CpuOptions),
    /// NVIDIA GPUs through CUDA libraries.
    Cuda(CudaOptions),
    /// NVIDIA GPUs through TensorRT engines; what TensorRT cannot do runs on the CUDA provider, nothing on the CPU.
    TensorRt(TensorRtOptions),
}

impl Default for Provider {
    fn default() -> Self {
        Self::Cpu(CpuOptions::default())
    }
}

/// NVIDIA's variable that, at 0, forbids rounding the operands of f32 products (TF32). TensorRT rounds by default, and ONNX
/// Runtime 1.31 has no option for that (microsoft/onnxruntime's issues 26029 and 28177): there the variable is the only
/// way. Libraries read it once, so that it must be set when the process starts.
pub const TF32: &str = "NVIDIA_TF32_OVERRIDE";

/// Whether [`TF32`] keeps f32 products f32.
pub fn tf32_forbidden() -> bool {
    std::env::var_os(TF32).is_some_and(|value| value == "0")
}

/// What stands behind a provider's name if runs are recorded.
const GRAPH: &str = "+graph";
/// What stands behind `cuda` if f32 products may be rounded.
const ROUNDED: &str = "+tf32";

impl fmt::Display for Provider {
    /// The name that [`FromStr`] takes; a GPU's number only where it is not 0.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self.device() {
            Device::Cuda { ordinal } if ordinal > 0 => write!(f, ":{ordinal}")?,
            _ => {}
        }
        f.write_str(if self.cuda_graph() { GRAPH } else { "" })?;
        f.write_str(if matches!(self, Self::Cuda(options) if options.tf32) { ROUNDED } else { "" })
    }
}

impl FromStr for Provider {
    type Err = RuntimeError;

    fn from_str(text: &str) -> Result<Self> {
        let (rest, tf32) = text.strip_suffix(ROUNDED).map_or((text, false), |rest| (rest, true));
        let (device, cuda_graph) = rest.strip_suffix(GRAPH).map_or((rest, false), |device| (device, true));
        let (name, ordinal) = match device.split_once(':') {
            Some((name, number)) => (name, number.parse().ok()),
            None => (device, Some(0)),
        };
        match (name, ordinal) {
            ("cpu", _) if text == name => Some(Self::default()),
            ("cuda", Some(ordinal)) => {
                Some(Self::Cuda(CudaOptions { ordinal, cuda_graph, tf32 }))
            }
            ("tensorrt", Some(ordinal)) if !tf32 => {
                Some(Self::TensorRt(TensorRtOptions { ordinal, cuda_graph, ..TensorRtOptions::default() }))
            }
            _ => None,
        }
        .ok_or_else(|| RuntimeError::InvalidValue {
            what: "provider".to_owned(),
            expected:
                "cpu, cuda, tensorrt, or cuda:<number> or tensorrt:<number> for another GPU than number 0; with +graph \
                 behind it, runs are recorded as CUDA graphs; with +tf32 behind cuda, products of f32 are rounded to 10 bits"
                    .to_owned(),
            got: format!("`{text}`"),
        })
    }
}

impl Provider {
    /// `cpu`, `cuda` or `tensorrt`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "cpu",
            Self::Cuda(_) => "cuda",
            Self::TensorRt(_) => "tensorrt",
        }
    }

    /// Whether a session keeps one recorded run only, whatever the binding: ONNX Runtime's TensorRT provider plays what it has
    /// recorded first, for all of them.
    pub(crate) fn records_once(&self) -> bool {
        matches!(self, Self::TensorRt(TensorRtOptions { cuda_graph: true, .. }))
    }

    /// The same for programs that compute in a type, which TensorRT has to know.
    #[must_use]
    pub fn computing_in(mut self, dtype: DType) -> Self {
        if let Self::TensorRt(options) = &mut self {
            options.narrow = Some(dtype).filter(|dtype| *dtype != DType::F32);
        }
        self
    }

    /// Whether it looks at a model's nodes without the model's functions, as TensorRT's parser does: programs for it are
    /// [`inlined`](graph_builder::OnnxProgram::inlined).
    pub fn reads_single_nodes(&self) -> bool {
        matches!(self, Self::TensorRt(_))
    }

    /// The same, keeping what TensorRT builds and measures in `folder` where nothing else was said.
    #[must_use]
    pub fn cached_in(mut self, folder: &Path) -> Self {
        if let Self::TensorRt(options) = &mut self
            && options.context_file.is_none()
        {
            options.engine_cache.get_or_insert_with(|| folder.join("engines"));
            options.timing_cache.get_or_insert_with(|| folder.to_path_buf());
        }
        self
    }

    /// The same, with engines in the cache told apart by `identity`: ONNX Runtime names them by the names inside a
    /// program, whatever its sizes and weights are.
    #[must_use]
    pub(crate) fn identified(mut self, identity: impl FnOnce() -> String) -> Self {
        if let Self::TensorRt(options) = &mut self
            && options.engine_cache.is_some()
        {
            options.engine_prefix.get_or_insert_with(identity);
        }
        self
    }

    /// [`Self::identified`] by a model's file. Where its weights are in other files, which nothing tells here, no engine is
    /// kept.
    ///
    /// # Errors
    /// [`RuntimeError::Io`].
    pub(crate) fn cached_by(mut self, model: &Path) -> Result<Self> {
        /// What ONNX calls the place of values that are elsewhere.
        const ELSEWHERE: &[u8] = b"location";
        if let Self::TensorRt(options) = &mut self
            && options.engine_cache.is_some()
        {
            let bytes = std::fs::read(model).map_err(|e| RuntimeError::io("read", model, e))?;
            if bytes.windows(ELSEWHERE.len()).any(|part| part == ELSEWHERE) {
                options.engine_cache = None;
            } else {
                options.engine_prefix = Some(crate::file::sha256_bytes(&bytes));
            }
        }
        Ok(self)
    }

    /// Where the provider's buffers live.
    pub fn device(&self) -> Device {
        match self {
            Self::Cpu(_) => Device::Cpu,
            Self::Cuda(CudaOptions { ordinal, .. }) | Self::TensorRt(TensorRtOptions { ordinal, .. }) => {
                Device::Cuda { ordinal: *ordinal }
            }
        }
    }

    /// Whether it runs programs on a GPU.
    pub fn is_gpu(&self) -> bool {
        self.device() != Device::Cpu
    }

    /// ONNX Runtime's name of the provider.
    pub fn onnx_runtime_name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "CPUExecutionProvider",
            Self::Cuda(_) => "CUDAExecutionProvider",
            Self::TensorRt(_) => "TensorrtExecutionProvider",
        }
    }

    /// Whether runs are recorded as CUDA graphs.
    pub fn cuda_graph(&self) -> bool {
        match self {
            Self::Cpu(_) => false,
            Self::Cuda(CudaOptions { cuda_graph, .. })
            | Self::TensorRt(TensorRtOptions { cuda_graph, .. }) => *cuda_graph,
        }
    }

    /// The same, with runs that are not recorded.
    #[must_use]
    pub fn without_cuda_graph(mut self) -> Self {
        match &mut self {
            Self::Cpu(_) => {}
            Self::Cuda(CudaOptions { cuda_graph, .. })
            | Self::TensorRt(TensorRtOptions { cuda_graph, .. }) => *cuda_graph = false,
        }
        self
    }

    /// Refuses a provider that cannot run programs here: a library is missing, or the GPU. It needs neither ONNX Runtime
    /// nor the network, so it can be asked before anything is fetched.
    ///
    /// # Errors
    /// [`RuntimeError::ProviderUnavailable`] with everything that is missing and what installs it.
    pub fn check(&self) -> Result<()> {
        let wanted = match self {
            Self::Cpu(_) => return Ok(()),
            Self::Cuda(_) => FOR_CUDA,
            Self::TensorRt(_) => FOR_TENSORRT,
        };
        let missing: Vec<&CudaLibrary> = wanted.iter().filter(|l| l.opened().is_none()).copied().collect();
        if !missing.is_empty() {
            return Err(self.unavailable(&missing));
        }
        match self.device() {
            Device::Cuda { ordinal } => Gpu::open(ordinal).map(|_| ()),
            Device::Cpu => Ok(()),
        }
    }

    /// Refuses TensorRT where its f32 products would not be f32.
    pub(crate) fn check_rounding(&self, forbidden: bool) -> Result<()> {
        if forbidden || !matches!(self, Self::TensorRt(_)) {
            return Ok(());
        }
        Err(RuntimeError::ProviderUnavailable {
            provider: self.to_string(),
            reason: format!("it would round the operands of f32 products to 10 bits, as {TF32} is not 0"),
            remedy: format!("start the process with {TF32}=0"),
        })
    }

    fn unavailable(&self, missing: &[&CudaLibrary]) -> RuntimeError {
        let reasons: Vec<String> = missing.iter().filter_map(|l| l.complaint()).collect();
        let mut installs: Vec<&str> = missing.iter().map(|l| l.install).collect();
        installs.dedup();
        RuntimeError::ProviderUnavailable {
            provider: self.to_string(),
            reason: reasons.join("; "),
            remedy: format!("{}; or use provider `cpu`; `mudit doctor` tells more", installs.join("; ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::libraries::{CUDNN, DRIVER, TENSORRT};

    #[test]
    fn everything_that_is_missing_is_named_with_what_installs_it() {
        Provider::default().check().unwrap();
        let error = Provider::TensorRt(TensorRtOptions::default()).unavailable(&[&DRIVER, &CUDNN, &TENSORRT]);
        let text = error.to_string();
        assert!(text.starts_with("provider `tensorrt` is not available: "), "{text}");
        for part in ["driver", "nvidia-cudnn-cu13==", "tensorrt-cu13==10.16.1.11", "use provider `cpu`"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn tensorrt_is_refused_where_it_would_round_f32() {
        let [cuda, tensorrt] = ["cuda", "tensorrt"].map(|name| name.parse::<Provider>().unwrap());
        cuda.check_rounding(false).unwrap();
        tensorrt.check_rounding(true).unwrap();
        let refused = tensorrt.check_rounding(false).unwrap_err().to_string();
        assert!(refused.contains("f32 products") && refused.contains("NVIDIA_TF32_OVERRIDE=0"), "{refused}");
    }

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for name in [
            "cpu",
            "cuda",
            "cuda:1",
            "tensorrt",
            "tensorrt:3",
            "cuda+graph",
            "cuda:1+graph",
            "tensorrt+graph",
            "cuda+tf32",
            "cuda:1+graph+tf32",
        ] {
            assert_eq!(name.parse::<Provider>().unwrap().to_string(), name);
        }
        for name in [
            "gpu",
            "cpu:0",
            "cpu+graph",
            "cuda:x",
            "cuda:",
            "cuda+",
            "cpu+tf32",
            "tensorrt+tf32",
            "cuda+tf32+graph",
            "",
            "CUDA",
        ] {
            assert!(
                name.parse::<Provider>().unwrap_err().to_string().contains("expected cpu, cuda"),
                "{name}"
            );
        }
    }

    #[test]
    fn f32_is_f32_unless_asked_otherwise() {
        let tf32 = |name: &str| match name.parse::<Provider>().unwrap() {
            Provider::Cuda(options) => options.tf32,
            other => panic!("{other}"),
        };
        assert_eq!(
            ["cuda", "cuda:1+graph", "cuda+tf32", "cuda+graph+tf32"].map(tf32),
            [false, false, true, true]
        );
    }

    #[test]
    fn engines_in_the_cache_are_told_apart() {
        let cached = "tensorrt".parse::<Provider>().unwrap().cached_in(Path::new("/cache"));
        let Provider::TensorRt(options) = cached.identified(|| "a program".to_owned()) else { panic!() };
        assert_eq!(options.engine_prefix.as_deref(), Some("a program"));
        let plain = "tensorrt".parse::<Provider>().unwrap().identified(|| panic!("nothing is kept"));
        assert!(matches!(plain, Provider::TensorRt(TensorRtOptions { engine_prefix: None, .. })));
    }

    #[test]
    fn a_gpu_provider_is_there_or_refused_with_a_remedy() {
        for provider in
            [Provider::Cuda(CudaOptions::default()), Provider::TensorRt(TensorRtOptions::default())]
        {
            if let Err(error) = provider.check() {
                let text = error.to_string();
                assert!(
                    text.contains(&format!("`{provider}`")) && text.contains("use provider `cpu`"),
                    "{text}"
                );
            }
        }
        let second = CudaOptions { ordinal: 2, ..CudaOptions::default() };
        assert_eq!(Provider::Cuda(second).device(), Device::Cuda { ordinal: 2 });
    }
}
