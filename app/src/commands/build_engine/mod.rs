//! `mudit build-engine`: programs of a model as ONNX files with their weights and a manifest, tried out before they are seen.

mod validation;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, ValueEnum};
use graph_builder::{DType, ExternalTensor, OnnxProgram, Precision, Shape, Weights};
use half::{bf16, f16};
use models::{DitConfig, Guidance, HYPERPARAMETERS, ProgramKind, program};
use runtime::engine::{EngineDraft, EngineKey, EngineNotes, FileStamp, KeyDifference, model_file_name};
use runtime::safetensors_file::SafetensorsReader;
use runtime::{Engine, HostData, HostTensor, Provider, RuntimeError, SessionOptions, write_safetensors_file};
use serde_json::json;
use train_engine::mup::{MupTable, check_stamp};
use train_engine::step::parameter_layout;

use self::validation::{Case, Report};
use super::{Machine, guided_channels, triton, weights};
use crate::Usage;
use crate::console;
use crate::external::tensors;

/// Who the engine is built for; nobody when programs are only emitted.
#[derive(Clone, Debug, PartialEq)]
struct BuiltFor(Option<Provider>);

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
    /// Element type of the computation: f32, bf16 or f16; other than f32 for GPUs only.
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Who the engine is built for: cpu, cuda, tensorrt; none only emits, nothing is loaded.
    #[arg(long, default_value = "cpu")]
    provider: BuiltFor,
    /// Write a model repository for another server instead of an engine: a model for each program and batch size.
    #[arg(long, value_enum)]
    export: Option<Export>,
    /// Tell why an engine that is there is built again: each part of its key that differs.
    #[arg(long)]
    explain: bool,
    /// Do not compare the built programs' answers with those of the reference before the engine is published.
    #[arg(long)]
    no_validation: bool,
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
            (Some(file), _) => Some(Parameters::open(&model, file, self.precision)?),
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
        let known = Engine::open(&self.out).ok();
        let stamp = weights.as_ref().filter(|_| carries).map(|w| w.stamp(known.as_ref())).transpose()?;
        let key = self.key(&programs, stamp.as_ref());
        let differences = known.as_ref().map(|engine| engine.manifest().key.differences(&key));
        self.tell_why(differences.as_deref())?;
        if let (Some(engine), Some([])) = (&known, differences.as_deref()) {
            return self.tell_nothing_to_do(engine, start.elapsed().as_secs_f64());
        }
        let mut draft = EngineDraft::new(&self.out, &programs, file.zip(stamp), self.notes(&model, key)?)?;
        let reports = match self.provider.0.clone() {
            Some(provider) => self.try_out(provider, &model, &draft)?,
            None => Vec::new(),
        };
        if !reports.is_empty()
            && let Some(extra) = draft.manifest_mut().extra.as_object_mut()
        {
            extra.insert("validation".to_owned(), reports.iter().map(Report::kept).collect());
        }
        let manifest = draft.publish()?;
        if self.json {
            return console::json(&json!({
                "engine": self.out, "emit_seconds": seconds, "manifest": manifest, "first_runs": reports,
                "up_to_date": false, "differences": differences,
            }));
        }
        for p in &manifest.programs {
            let path = self.out.join(&p.file);
            console::out(&format!("{}  {:.1} kB", path.display(), p.bytes as f64 / 1e3))?;
        }
        for report in reports {
            console::out(&format!("  {report}"))?;
        }
        console::out(&format!(
            "emitted in {seconds:.2} s, built in {:.2} s; the manifest is {}",
            start.elapsed().as_secs_f64(),
            self.out.join("engine.json").display()
        ))
    }

    /// Everything that decides what the engine is.
    fn key(&self, programs: &[(usize, &OnnxProgram)], weights: Option<&FileStamp>) -> EngineKey {
        let mut key = EngineKey::default();
        key.set("mudit", env!("CARGO_PKG_VERSION"));
        key.set("onnxruntime", runtime::library::PINNED_VERSION);
        key.set("provider", &self.provider);
        key.set("precision", self.precision);
        key.set("validation", if self.no_validation { "off" } else { "on" });
        for (batch, p) in programs {
            key.set(model_file_name(&p.name, *batch), runtime::file::sha256_bytes(&p.bytes));
        }
        if let Some(stamp) = weights {
            key.set("weights", &stamp.sha256);
        }
        key
    }

    fn tell_why(&self, differences: Option<&[KeyDifference]>) -> anyhow::Result<()> {
        if !self.explain || self.json {
            return Ok(());
        }
        match differences {
            None => console::out(&format!("`{}` holds no engine: everything is built", self.out.display())),
            Some([]) => console::out("every part of the key is that of the engine that is there"),
            Some(parts) => parts.iter().try_for_each(|part| console::out(&part.to_string())),
        }
    }

    fn tell_nothing_to_do(&self, engine: &Engine, seconds: f64) -> anyhow::Result<()> {
        if self.json {
            let none: [KeyDifference; 0] = [];
            return console::json(&json!({
                "engine": self.out, "manifest": engine.manifest(), "up_to_date": true, "differences": none,
            }));
        }
        console::out(&format!("`{}` is up to date ({seconds:.2} s)", self.out.display()))
    }

    /// Refuses what cannot be built here before any work is done.
    fn check_provider(&self) -> anyhow::Result<()> {
        if let Some(provider) = &self.provider.0 {
            provider.check()?;
        }
        if matches!(self.provider.0, Some(Provider::Cpu(_))) && self.precision != Precision::F32 {
            let text = format!(
                "programs for the CPU compute in f32: use --precision f32, or build for a GPU; --provider none only emits {}",
                self.precision
            );
            return Err(Usage(text).into());
        }
        Ok(())
    }

    fn emit(
        &self,
        model: &DitConfig,
        kind: ProgramKind,
        batch: usize,
        weights: Option<&Parameters>,
    ) -> anyhow::Result<OnnxProgram> {
        let graph =
            program(model, kind, batch, self.cfg_channels)?.optimised()?.in_precision(self.precision)?;
        let how = match weights {
            Some(w) if !kind.feeds_parameters() => Weights::External { file: &w.name, tensors: &w.tensors },
            _ => Weights::Inputs,
        };
        let emitted = graph.emit(how)?;
        if matches!(self.provider.0, Some(Provider::Cuda(_))) || self.precision != Precision::F32 {
            // Function bodies are what runs there: no fused op has a kernel of its own on a GPU.
            emitted.check_cuda(&|_, _| false)?;
        }
        Ok(emitted)
    }

    fn notes(&self, model: &DitConfig, key: EngineKey) -> anyhow::Result<EngineNotes> {
        let graph = program(model, ProgramKind::Loss, 1, Guidance::Off)?;
        let hyperparameters: BTreeMap<_, _> = HYPERPARAMETERS.into_iter().collect();
        Ok(EngineNotes {
            key,
            options: json!({
                "provider": self.provider.to_string(),
                "precision": self.precision.to_string(),
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

    /// Loads each program, compares its answers with the reference's and times a run.
    fn try_out(
        &self,
        provider: Provider,
        model: &DitConfig,
        draft: &EngineDraft,
    ) -> anyhow::Result<Vec<Report>> {
        let runtime = self.machine.runtime_for(&provider)?;
        let engine = draft.engine()?;
        let options = SessionOptions {
            threads: self.machine.threads,
            provider,
            record_placement: self.explain,
            ..SessionOptions::default()
        };
        let programs = &engine.manifest().programs;
        let mut reports = Vec::new();
        for (i, p) in programs.iter().enumerate() {
            console::note(&format!("trying {} ({} of {})", p.file, i + 1, programs.len()));
            let start = Instant::now();
            let session = engine.session(&runtime, &p.name, p.batch, &options)?;
            let load_seconds = start.elapsed().as_secs_f64();
            if self.explain && !self.json {
                let placement = session.placement()?;
                let places =
                    placement.by_provider().into_iter().map(|(who, nodes)| format!("{nodes} nodes on {who}"));
                console::out(&format!("{}: {}", p.file, places.collect::<Vec<_>>().join(", ")))?;
            }
            let case = Case {
                model,
                kind: p.name.parse()?,
                batch: p.batch,
                guidance: self.cfg_channels,
                precision: self.precision,
                weights: self.weights.as_deref(),
            };
            let place = || format!("trying {}", p.file);
            let report = case.run(&session, load_seconds, !self.no_validation).with_context(place)?;
            reports.push(report);
        }
        Ok(reports)
    }
}

/// A weights file that programs can point into.
struct Parameters {
    /// The file as given.
    source: PathBuf,
    file: PathBuf,
    name: String,
    tensors: BTreeMap<String, ExternalTensor>,
    /// Holds the converted file until the engine has its own.
    _converted: Option<tempfile::TempDir>,
}

impl Parameters {
    /// Checks a file's header against the model; converts the file where its tensors have not the types that the
    /// programs take.
    fn open(model: &DitConfig, file: &Path, precision: Precision) -> anyhow::Result<Self> {
        let graph = program(model, ProgramKind::Denoise, 1, Guidance::Off)?;
        let layout = parameter_layout(&graph)?;
        let graph = graph.optimised()?.in_precision(precision)?;
        let dtypes: BTreeMap<&str, DType> =
            graph.parameters().iter().map(|p| (p.name.as_str(), p.dtype)).collect();
        let dtype = |name: &str| dtypes.get(name).copied().unwrap_or(DType::F32);
        let reader = SafetensorsReader::open(file)?;
        check_stamp(&reader.metadata(), model, file)?;
        layout
            .expect(&reader, false)
            .with_context(|| format!("`{}` does not hold this model's parameters", file.display()))?;
        let fits = |name: &String| {
            matches!(
                (reader.dtype(name), dtype(name)),
                (Ok(safetensors::Dtype::F32), DType::F32)
                    | (Ok(safetensors::Dtype::BF16), DType::Bf16)
                    | (Ok(safetensors::Dtype::F16), DType::F16)
            )
        };
        let source = file.to_path_buf();
        if layout.entries().keys().all(fits) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let tensors = tensors(&reader, &layout, dtype)?;
            return Ok(Self { source: source.clone(), file: source, name, tensors, _converted: None });
        }
        let directory = tempfile::tempdir().context("a place for the converted weights")?;
        let path = directory.path().join(CONVERTED);
        let values = weights::read(model, file)?;
        let converted = values
            .iter()
            .map(|(name, entry, values)| Ok((name.to_owned(), narrowed(&entry.shape, values, dtype(name))?)))
            .collect::<anyhow::Result<_>>()?;
        write_safetensors_file(&path, &converted, &BTreeMap::new())?;
        let tensors = tensors(&SafetensorsReader::open(&path)?, &layout, dtype)?;
        Ok(Self { source, file: path, name: CONVERTED.into(), tensors, _converted: Some(directory) })
    }

    /// What the given file is; its hash is that of an earlier build where size and time are the same.
    fn stamp(&self, known: Option<&Engine>) -> anyhow::Result<FileStamp> {
        let weights = known.and_then(|engine| engine.manifest().weights.as_ref());
        Ok(FileStamp::of(&self.source, weights.and_then(|w| w.source.as_ref()))?)
    }
}

/// Values as a tensor of another float type.
fn narrowed(shape: &Shape, values: &[f32], dtype: DType) -> anyhow::Result<HostTensor> {
    let data = match dtype {
        DType::Bf16 => HostData::Bf16(values.iter().map(|v| bf16::from_f32(*v)).collect()),
        DType::F16 => HostData::F16(values.iter().map(|v| f16::from_f32(*v)).collect()),
        DType::F32 | DType::I64 | DType::Bool => HostData::F32(values.to_vec()),
    };
    Ok(HostTensor::new(shape.clone(), data)?)
}
