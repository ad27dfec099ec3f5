//! `mudit build-engine`: programs of a model as ONNX files with their weights and a manifest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::{Args, ValueEnum};
use graph_builder::{ExternalTensor, OnnxProgram, Weights};
use models::{DitConfig, Guidance, HYPERPARAMETERS, ProgramKind, program};
use runtime::engine::{EngineNotes, model_file_name, write_engine};
use runtime::provider::{CudaOptions, TensorRtOptions};
use runtime::safetensors_file::SafetensorsReader;
use runtime::{Engine, Provider, SessionOptions};
use serde_json::json;
use train_engine::mup::{MupTable, check_stamp};
use train_engine::step::parameter_layout;

use super::{Machine, guided_channels, triton, weights};
use crate::Usage;
use crate::console;
use crate::external::tensors;

/// Who the engine is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProviderName {
    /// Emit only; nothing is loaded.
    None,
    /// Emit, load on ONNX Runtime's CPU kernels, and time a first run.
    Cpu,
    /// NVIDIA GPUs through CUDA libraries.
    Cuda,
    /// NVIDIA GPUs through TensorRT.
    Tensorrt,
}

/// Element type that the program computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Precision {
    /// IEEE binary32.
    F32,
    /// bfloat16, with f32 masters.
    Bf16,
    /// IEEE binary16, with f32 masters.
    F16,
}

/// Another program's layout of the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Export {
    /// A model repository of NVIDIA's Triton server.
    Triton,
}

/// Arguments of `mudit build-engine`.
#[derive(Debug, Args)]
pub struct BuildEngineArgs {
    /// A preset such as `DiT-XL/2` or `DiT-S/2@8x8x4:10`, a config.json, or a checkpoint directory.
    #[arg(long)]
    model: String,
    /// Programs to build: denoise, denoise-cfg, step, step-rows, loss, train-step.
    #[arg(long = "program", required = true, value_delimiter = ',')]
    programs: Vec<ProgramKind>,
    /// Parameters (safetensors) for the programs that carry them.
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Samples of one run.
    #[arg(long, conflicts_with = "buckets")]
    batch: Option<usize>,
    /// Several batch sizes, one file each.
    #[arg(long, value_delimiter = ',')]
    buckets: Vec<usize>,
    /// Channels that guidance changes: a number, `all`, or `off` for a `step` without guidance.
    #[arg(long, default_value = "3", value_parser = guided_channels, alias = "guided-channels")]
    cfg_channels: Guidance,
    /// Element type of the computation.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Who the engine is built for.
    #[arg(long, value_enum, default_value = "cpu")]
    provider: ProviderName,
    /// Write a model repository for another server instead of an engine: a model for each program and batch size.
    #[arg(long, value_enum)]
    export: Option<Export>,
    /// The engine's directory, or the repository.
    #[arg(long)]
    out: PathBuf,
    /// Print the manifest as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

/// Name of a weights file that had to be converted.
const CONVERTED: &str = "weights.safetensors";

impl BuildEngineArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        self.check_provider()?;
        if let (Some(_), Some(kind)) = (self.export, self.programs.iter().find(|p| p.feeds_parameters())) {
            let text =
                format!("{kind} takes the parameters as inputs; a model repository is for sampling programs");
            return Err(Usage(text).into());
        }
        let model = DitConfig::resolve(&self.model)?;
        let carries = self.programs.iter().any(|p| !p.feeds_parameters());
        let weights = match (&self.weights, carries) {
            (Some(file), _) => Some(Parameters::open(&model, file)?),
            (None, true) => {
                let names: Vec<_> =
                    self.programs.iter().filter(|p| !p.feeds_parameters()).map(ToString::to_string).collect();
                return Err(Usage(format!(
                    "{} carries the model's parameters: give them with --weights FILE.safetensors",
                    names.join(", ")
                ))
                .into());
            }
            (None, false) => None,
        };
        let batches = match (self.batch, self.buckets.as_slice()) {
            (Some(n), _) => vec![n],
            (None, []) => vec![1],
            (None, buckets) => buckets.to_vec(),
        };
        let start = Instant::now();
        let mut built: Vec<(usize, OnnxProgram)> = Vec::new();
        for &kind in &self.programs {
            for &batch in &batches {
                built.push((batch, self.emit(&model, kind, batch, weights.as_ref())?));
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let programs: Vec<(usize, &OnnxProgram)> = built.iter().map(|(n, p)| (*n, p)).collect();
        let file = weights.as_ref().filter(|_| carries).map(|w| w.file.as_path());
        if let Some(Export::Triton) = self.export {
            let models = triton::write_repository(&self.out, &programs, file)?;
            if self.json {
                return console::json(&json!({"repository": self.out, "models": models}));
            }
            return models.iter().try_for_each(|m| console::out(&m.display().to_string()));
        }
        let manifest = write_engine(&self.out, &programs, file, self.notes(&model)?)?;
        let report = if self.provider == ProviderName::Cpu { self.first_runs()? } else { Vec::new() };
        if self.json {
            return console::json(&json!({
                "engine": self.out, "emit_seconds": seconds, "manifest": manifest, "first_runs": report,
            }));
        }
        for p in &manifest.programs {
            let path = self.out.join(&p.file);
            console::out(&format!("{}  {:.1} kB", path.display(), p.bytes as f64 / 1e3))?;
        }
        for line in report {
            console::out(&format!("  {line}"))?;
        }
        console::out(&format!(
            "emitted in {seconds:.2} s; the manifest is {}",
            self.out.join("engine.json").display()
        ))
    }

    /// Refuses what cannot be built here before any work is done.
    fn check_provider(&self) -> anyhow::Result<()> {
        match self.provider {
            ProviderName::None | ProviderName::Cpu => {}
            ProviderName::Cuda => Provider::Cuda(CudaOptions::default()).check()?,
            ProviderName::Tensorrt => Provider::TensorRt(TensorRtOptions::default()).check()?,
        }
        anyhow::ensure!(
            self.precision == Precision::F32,
            "precision {:?} is not there yet: programs of this version compute in f32; use --precision f32",
            self.precision
        );
        Ok(())
    }

    fn emit(
        &self,
        model: &DitConfig,
        kind: ProgramKind,
        batch: usize,
        weights: Option<&Parameters>,
    ) -> anyhow::Result<OnnxProgram> {
        let graph = program(model, kind, batch, self.cfg_channels)?.optimised()?;
        let how = match weights {
            Some(w) if !kind.feeds_parameters() => Weights::External { file: &w.name, tensors: &w.tensors },
            _ => Weights::Inputs,
        };
        Ok(graph.emit(how)?)
    }

    fn notes(&self, model: &DitConfig) -> anyhow::Result<EngineNotes> {
        let graph = program(model, ProgramKind::Loss, 1, Guidance::Off)?;
        let hyperparameters: BTreeMap<_, _> = HYPERPARAMETERS.into_iter().collect();
        Ok(EngineNotes {
            options: json!({
                "provider": format!("{:?}", self.provider).to_lowercase(),
                "precision": format!("{:?}", self.precision).to_lowercase(),
                "guided_channels": format!("{:?}", self.cfg_channels),
            }),
            versions: BTreeMap::from([
                ("mudit".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
                ("onnxruntime".to_owned(), runtime::library::PINNED_VERSION.to_owned()),
            ]),
            extra: json!({
                "model": model, "mup": MupTable::new(&graph, model), "hyperparameters": hyperparameters,
            }),
        })
    }

    /// Loads each program and runs it once on zeros.
    fn first_runs(&self) -> anyhow::Result<Vec<String>> {
        let runtime = self.machine.runtime()?;
        let engine = Engine::open(&self.out)?;
        let options = SessionOptions { threads: self.machine.threads, ..SessionOptions::default() };
        let mut lines = Vec::new();
        for p in &engine.manifest().programs {
            let start = Instant::now();
            let session = engine.session(&runtime, &p.name, p.batch, &options)?;
            let loaded = start.elapsed();
            let mut binding = runtime::Binding::owned(&session)?;
            binding.run().with_context(|| format!("a first run of {}", model_file_name(&p.name, p.batch)))?;
            let start = Instant::now();
            binding.run()?;
            lines.push(format!(
                "{} loads in {:.2} s and runs in {:.1} ms",
                p.file,
                loaded.as_secs_f64(),
                start.elapsed().as_secs_f64() * 1e3
            ));
        }
        Ok(lines)
    }
}

/// A weights file that programs can point into.
struct Parameters {
    file: PathBuf,
    name: String,
    tensors: BTreeMap<String, ExternalTensor>,
    /// Holds the converted file until the engine has its own.
    _converted: Option<tempfile::TempDir>,
}

impl Parameters {
    /// Checks a file's header against the model; converts the file where its tensors are not f32.
    fn open(model: &DitConfig, file: &Path) -> anyhow::Result<Self> {
        let layout = parameter_layout(&program(model, ProgramKind::Denoise, 1, Guidance::Off)?)?;
        let reader = SafetensorsReader::open(file)?;
        check_stamp(&reader.metadata(), model, file)?;
        layout
            .expect(&reader, false)
            .with_context(|| format!("`{}` does not hold this model's parameters", file.display()))?;
        let f32 = |name: &String| matches!(reader.dtype(name), Ok(safetensors::Dtype::F32));
        if layout.entries().keys().all(f32) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let tensors = tensors(&reader, &layout)?;
            return Ok(Self { file: file.to_path_buf(), name, tensors, _converted: None });
        }
        let directory = tempfile::tempdir().context("a place for the converted weights")?;
        let path = directory.path().join(CONVERTED);
        weights::read(model, file)?.write_safetensors(&path, &BTreeMap::new())?;
        let tensors = tensors(&SafetensorsReader::open(&path)?, &layout)?;
        Ok(Self { file: path, name: CONVERTED.into(), tensors, _converted: Some(directory) })
    }
}
