//! Who runs an engine, on which GPU, and what of that is on this machine.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use clap::Args;
use models::ProgramKind;
use runtime::cuda::kernels::{Architecture, COMMON, Compiler, SOURCES};
use runtime::cuda::libraries::{CudaLibrary, FOR_CUDA, FOR_TENSORRT, NVRTC, find_or_fetch_compiler};
use runtime::cuda::{Gpu, GpuInfo};
use runtime::engine::{EngineDraft, EngineKey};
use runtime::library::cache_directory;
use runtime::provider::{ShapeProfile, TensorRtOptions};
use runtime::{Device, Provider, RuntimeError, RuntimeOptions};

use crate::Usage;
use crate::console;
use crate::execution::keep_f32;

/// Who the engine is built for; nobody when programs are only emitted.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BuiltFor(pub(super) Option<Provider>);

impl FromStr for BuiltFor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self(None)),
            text => text.parse().map(|p| Self(Some(p))).map_err(|e: RuntimeError| format!("{e}; or none")),
        }
    }
}

impl fmt::Display for BuiltFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(provider) => provider.fmt(f),
            None => f.write_str("none"),
        }
    }
}

/// How TensorRT builds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub(super) struct ForTensorRt {
    /// TensorRT: keep the weights out of what is built; they are filled in from the engine's own copy when it is loaded. Half
    /// the disk space, and the same speed; other weights need another build.
    #[arg(long)]
    strip_weights: bool,
    /// TensorRT: effort of its builder, from 0 (short build) to 5 (fast engine). Default TensorRT's own, 3.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=5))]
    builder_level: Option<u8>,
    /// TensorRT: most memory of the GPU that one of its kernels may use for itself, in GiB. Default all.
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u16).range(1..))]
    workspace: Option<u16>,
}

impl ForTensorRt {
    /// The options that were given, as they are written.
    fn given(self) -> Vec<(&'static str, String)> {
        let level = self.builder_level.map(|level| ("builder-level", level.to_string()));
        let workspace = self.workspace.map(|gib| ("workspace", gib.to_string()));
        let stripped = self.strip_weights.then(|| ("strip-weights", true.to_string()));
        [stripped, level, workspace].into_iter().flatten().collect()
    }
}

/// Where the engine will run.
#[derive(Debug)]
pub(super) struct Target {
    provider: Option<Provider>,
    /// Of the GPUs it is for.
    architecture: Option<Architecture>,
    /// The GPU of this machine, where it is one of those.
    here: Option<GpuInfo>,
    tensorrt: ForTensorRt,
}

impl Target {
    /// Looks for the GPU; `wanted` is what the user says that the engine is for.
    ///
    /// # Errors
    /// [`Usage`] for options that do not go together; a provider that is missing.
    pub(super) fn find(
        built_for: &BuiltFor,
        wanted: Option<Architecture>,
        tensorrt: ForTensorRt,
    ) -> anyhow::Result<Self> {
        let mut provider = built_for.0.clone();
        match (&mut provider, tensorrt.given().first()) {
            (Some(Provider::TensorRt(options)), _) => {
                options.builder_level = tensorrt.builder_level;
                options.workspace_limit = tensorrt.workspace.map(|gib| usize::from(gib) << 30);
            }
            (_, Some((option, _))) => {
                let text = format!("--{option} says how TensorRT builds: give --provider tensorrt");
                return Err(Usage(text).into());
            }
            _ => {}
        }
        if let Some(provider) = &provider {
            keep_f32(provider)?;
        }
        let Some(Device::Cuda { ordinal }) = provider.as_ref().map(Provider::device) else {
            if let Some(wanted) = wanted {
                let text = format!("--for {wanted} names GPUs: give --provider cuda or tensorrt");
                return Err(Usage(text).into());
            }
            if let Some(provider) = &provider {
                provider.check()?;
            }
            return Ok(Self { provider, architecture: None, here: None, tensorrt });
        };
        let gpu = Gpu::open(ordinal).ok().map(|gpu| gpu.info().clone());
        let found = gpu.as_ref().map(architecture).transpose()?;
        match (&provider, wanted) {
            (Some(Provider::Cuda(_)), Some(wanted)) if found != Some(wanted) => {
                return Ok(Self { provider, architecture: Some(wanted), here: None, tensorrt });
            }
            (Some(Provider::TensorRt(_)), Some(wanted)) if found.is_some_and(|found| wanted > found) => {
                let found = found.map_or(String::new(), |f| f.to_string());
                let text = format!(
                    "TensorRT builds for GPUs like this machine's or newer, and this one is {found}: build for {wanted} \
                     on such a machine"
                );
                return Err(Usage(text).into());
            }
            _ => {}
        }
        if let Some(provider) = &provider {
            provider.check()?;
        }
        Ok(Self { provider, architecture: wanted.or(found), here: gpu, tensorrt })
    }

    /// The architecture, where no GPU of this machine can try the engine out.
    pub(super) fn elsewhere(&self) -> Option<Architecture> {
        self.architecture.filter(|_| self.here.is_none())
    }

    /// The architecture that kernels are compiled for: an engine for CUDA carries them.
    pub(super) fn kernels(&self) -> Option<Architecture> {
        self.architecture.filter(|_| matches!(self.provider, Some(Provider::Cuda(_))))
    }

    /// Whether there is one form of a program for all of several batch sizes, beside those for each: whoever loads it at
    /// several holds its weights once.
    pub(super) fn opens(&self, kind: ProgramKind, batches: &[usize]) -> bool {
        let several = batches.iter().min() != batches.iter().max();
        self.provider.is_some() && several && !kind.feeds_parameters()
    }

    /// Device and libraries, as far as they decide what the engine is.
    pub(super) fn add_to(&self, key: &mut EngineKey) {
        let Some(architecture) = self.architecture else { return };
        key.set("architecture", architecture);
        let libraries: &[&CudaLibrary] = match &self.provider {
            Some(Provider::TensorRt(_)) => {
                for (option, value) in self.tensorrt.given() {
                    key.set(option, value);
                }
                FOR_TENSORRT
            }
            _ => FOR_CUDA,
        };
        let texts = COMMON.map(|(_, text)| text).into_iter().chain(SOURCES.map(|s| s.text));
        key.set("kernels", runtime::file::sha256_bytes(texts.collect::<String>().as_bytes()));
        if let Some(gpu) = &self.here {
            key.set("gpu", &gpu.name);
            for library in libraries.iter().chain([&&NVRTC]) {
                key.set(library.title, library.version().unwrap_or_else(|| "unknown".to_owned()));
            }
        }
    }

    /// Compiles every kernel for an architecture into the engine.
    pub(super) fn compile_kernels(
        architecture: Architecture,
        draft: &mut EngineDraft,
        offline: bool,
    ) -> anyhow::Result<()> {
        find_or_fetch_compiler(&RuntimeOptions { gpu: true, offline, progress: &console::note })?;
        let compiler = Compiler::open(cache_directory().as_deref())?;
        for source in SOURCES {
            draft.add_kernels(source, architecture, &compiler.compile(source, architecture)?.cubin)?;
        }
        Ok(())
    }

    /// The provider that loads a program for the first time, and the model that it writes of what it compiles. `file` is
    /// the program's; `profiles` are the shapes that it is for, where its batch size is open.
    ///
    /// # Errors
    /// No folder for the caches.
    pub(super) fn building(
        &self,
        file: &str,
        profiles: Vec<ShapeProfile>,
        directory: &Path,
    ) -> anyhow::Result<(Provider, Option<String>)> {
        let Some(Provider::TensorRt(options)) = &self.provider else {
            return Ok((self.provider.clone().unwrap_or_default(), None));
        };
        let stem = format!("{}.tensorrt", file.trim_end_matches(".onnx"));
        let written = format!("{stem}.onnx");
        let found = self.here.as_ref().map(architecture).transpose()?;
        let options = TensorRtOptions {
            timing_cache: cache_directory().map(|cache| cache.join("tensorrt")),
            context_file: Some(directory.join(&written)),
            engine_prefix: Some(stem),
            weights_from: self.tensorrt.strip_weights.then(|| directory.to_path_buf()),
            hardware_compatible: self.architecture < found,
            profiles,
            // Several batch sizes are tried on one engine, which has one recording.
            cuda_graph: false,
            ..options.clone()
        };
        if let Some(folder) = &options.timing_cache {
            std::fs::create_dir_all(folder)?;
        }
        Ok((Provider::TensorRt(options), Some(written)))
    }
}

fn architecture(gpu: &GpuInfo) -> anyhow::Result<Architecture> {
    let (major, minor) = gpu.compute_capability;
    Ok(Architecture::of(u32::try_from(major)?, u32::try_from(minor)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(options: TensorRtOptions, wanted: (u32, u32), strip_weights: bool) -> Target {
        let here = GpuInfo { ordinal: 0, name: "GPU".into(), compute_capability: (9, 0), memory_bytes: 1 };
        let architecture = Some(Architecture::of(wanted.0, wanted.1).unwrap());
        let tensorrt = ForTensorRt { strip_weights, ..ForTensorRt::default() };
        Target { provider: Some(Provider::TensorRt(options)), architecture, here: Some(here), tensorrt }
    }

    #[test]
    fn tensorrt_writes_its_engine_beside_the_program_and_keeps_its_measurements() {
        let place = Path::new("/engine");
        let options = |target: &Target| match target.building("step-b4.onnx", Vec::new(), place).unwrap() {
            (Provider::TensorRt(options), written) => (options, written),
            other => panic!("{other:?}"),
        };
        let (built, written) = options(&target(TensorRtOptions::default(), (9, 0), false));
        assert_eq!(written.as_deref(), Some("step-b4.tensorrt.onnx"));
        assert_eq!(built.context_file.as_deref(), Some(Path::new("/engine/step-b4.tensorrt.onnx")));
        assert_eq!(built.engine_prefix.as_deref(), Some("step-b4.tensorrt"));
        assert!(built.timing_cache.is_some() && built.weights_from.is_none() && !built.hardware_compatible);
        let (older, _) = options(&target(TensorRtOptions::default(), (8, 0), false));
        assert!(older.hardware_compatible, "built on sm_90 for sm_80");
        let profile = ShapeProfile { input: "x".into(), min: vec![1], opt: vec![4], max: vec![4] };
        let all = target(TensorRtOptions::default(), (9, 0), false);
        match all.building("step.onnx", vec![profile.clone()], place).unwrap() {
            (Provider::TensorRt(options), Some(written)) => {
                assert_eq!(
                    (options.profiles.as_slice(), written.as_str()),
                    (&[profile][..], "step.tensorrt.onnx")
                );
            }
            other => panic!("{other:?}"),
        }
        assert!(all.opens(ProgramKind::Step, &[1, 4]) && !all.opens(ProgramKind::TrainStep, &[1, 4]));
        assert!(!all.opens(ProgramKind::Step, &[4]));
        let emitted = Target { provider: None, ..all };
        assert!(!emitted.opens(ProgramKind::Step, &[1, 4]));
        let (stripped, _) = options(&target(TensorRtOptions::default(), (9, 0), true));
        assert_eq!(stripped.weights_from.as_deref(), Some(place));
    }

    #[test]
    fn options_that_name_gpus_need_a_provider_that_has_some() {
        let sm_90 = Some(Architecture::SM_90);
        let none = ForTensorRt::default();
        for (provider, wanted, tensorrt, part) in [
            ("cpu", sm_90, none, "--provider cuda"),
            ("none", sm_90, none, "--provider cuda"),
            ("cuda", None, ForTensorRt { strip_weights: true, ..none }, "--strip-weights"),
            ("cpu", None, ForTensorRt { builder_level: Some(5), ..none }, "--builder-level"),
            ("none", None, ForTensorRt { workspace: Some(4), ..none }, "--workspace"),
        ] {
            let error = Target::find(&provider.parse().unwrap(), wanted, tensorrt).unwrap_err();
            assert!(error.is::<Usage>() && error.to_string().contains(part), "{provider}: {error}");
        }
        assert!("gpu".parse::<BuiltFor>().unwrap_err().contains("or none"));
    }
}
