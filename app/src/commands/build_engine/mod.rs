//! `mudit build-engine`: programs of a model as ONNX files with their weights and a manifest, tried out before they are seen.

mod built_for;
mod difference;
mod open;
mod parameters;
mod programs;
mod stages;
mod trial;
mod validation;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use graph_builder::{OnnxProgram, Precision, Weights};
use models::{Guidance, HYPERPARAMETERS, Model, ProgramKind, ProgramSpec};
use runtime::cuda::kernels::Architecture;
use runtime::engine::{EngineDraft, EngineKey, EngineNotes, FileStamp, KeyDifference, MANIFEST, WeightsFile};
use runtime::file::{Placement, check_writable};
use runtime::{Engine, EngineManifest, Provider};
use serde_json::json;
use train_engine::mup::MupTable;

use self::built_for::{BuiltFor, ForTensorRt, Target};
use self::open::PlannedOpen;
use self::parameters::Source;
use self::programs::{Planned, initializers, place};
use self::stages::Stage;
use self::validation::Report;
use super::{Machine, triton, weights};
use crate::Usage;
use crate::console;
use crate::sampler::{channels, channels_text};

/// Another program's layout of the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Export {
    /// A model repository of NVIDIA's Triton server.
    Triton,
}

/// Arguments of `mudit build-engine`.
#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "independent switches of a command line")]
pub struct BuildEngineArgs {
    /// A preset such as `DiT-XL/2` or `DiT-S/2@8x8x4:10`, a config.json, a checkpoint or run directory, or an engine of the
    /// model.
    #[arg(long)]
    model: String,
    /// Programs to build: denoise, denoise-cfg, step, step-rows, loss, train-step.
    #[arg(long = "program", required = true, value_delimiter = ',')]
    programs: Vec<ProgramKind>,
    /// Parameters (safetensors or a PyTorch file) for the programs that carry them; left out, those of the checkpoint or run
    /// that --model names, the moving average where there is one.
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Samples of one run.
    #[arg(long, conflicts_with = "buckets")]
    batch: Option<usize>,
    /// Several batch sizes, one file each.
    #[arg(long, value_delimiter = ',')]
    buckets: Vec<usize>,
    /// Channels that guidance changes: a number, `all`, or `off` for a `step` without guidance. Default 3 for DDPM models as in
    /// the reference, else all.
    #[arg(long, value_parser = channels, alias = "guided-channels")]
    cfg_channels: Option<Guidance>,
    /// Element type of the computation: f32, bf16 or f16; other than f32 for GPUs only.
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Who the engine is built for: cpu, cuda, tensorrt; none only emits, nothing is loaded.
    #[arg(long, default_value = "cpu")]
    provider: BuiltFor,
    /// The GPUs it is for: sm_80 (A100) or sm_90 (H100, H200); default this machine's. A CUDA engine for others than
    /// this machine's is not tried out here; TensorRT builds on the GPU itself.
    #[arg(long = "for", value_name = "SM")]
    architecture: Option<Architecture>,
    #[command(flatten)]
    tensorrt: ForTensorRt,
    /// Write programs of standard ONNX nodes alone, for readers that know no functions (OpenVINO, tract, converters): each
    /// fused op is its body. mudit's own kernels do not run in them.
    #[arg(long)]
    inline: bool,
    /// Give the weights file a second name in the engine (a hard link, made read-only) instead of a copy. Saves disk space
    /// where the file system cannot share blocks; whoever writes to one of the two then spoils both.
    #[arg(long)]
    link_weights: bool,
    /// Write a model repository for another server instead of an engine: a model for each program and batch size.
    #[arg(long, value_enum)]
    export: Option<Export>,
    /// Tell why an engine that is there is built again: each part of its key that differs; and who runs which nodes.
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

impl BuildEngineArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let start = Instant::now();
        let weights = self.weights_path()?;
        let target = self.check(weights.is_some())?;
        let model = weights::model(&self.model)?;
        let weights = weights.map(|file| Source::open(&model, &file, self.precision)).transpose()?;
        let planned = self.plan(&model)?;
        let open = self.plan_open(&model, &target)?;
        let carried = weights.as_ref().filter(|_| planned.iter().any(|p| !p.kind.feeds_parameters()));
        if let Some(Export::Triton) = self.export {
            return self.export_triton(&planned, carried, &target);
        }
        let known = Engine::open(&self.out).ok();
        let stamp = carried.map(|w| w.stamp(known.as_ref())).transpose()?;
        let key = self.key(&planned, &open, stamp.as_ref(), &target)?;
        let differences = known.as_ref().map(|engine| engine.manifest().key.differences(&key));
        self.tell_why(differences.as_deref())?;
        if let (Some(engine), Some([])) = (&known, differences.as_deref()) {
            return self.tell_nothing_to_do(engine, start.elapsed().as_secs_f64());
        }
        check_writable(self.out.join(MANIFEST))?;
        let mut stages = self.stages(&planned, carried, &target);
        let parameters = carried.map(|source| place(source, &mut stages)).transpose()?;
        let built = self.emit(&planned, parameters.as_ref(), &mut stages)?;
        let emit_seconds = start.elapsed().as_secs_f64();
        let programs: Vec<(usize, &OnnxProgram)> = built.iter().map(|(n, p)| (*n, p)).collect();
        let file = parameters.as_ref().map(|w| w.file.as_path());
        let placement = self.placement();
        let placed = file.zip(stamp).map(|(file, source)| WeightsFile { file, source, placement });
        let mut draft = EngineDraft::new(&self.out, &programs, placed, self.notes(&model, key)?)?;
        for program in &open {
            draft.add_open(&self.emitted_open(program, initializers(parameters.as_ref()))?)?;
        }
        if let Some(architecture) = target.kernels() {
            stages.begin(Stage::Kernels, &format!("for {architecture}"));
            Target::compile_kernels(architecture, &mut draft, self.machine.offline)?;
        }
        let reports = self.try_out(&target, &model, weights.as_ref(), &mut draft, &mut stages)?;
        stages.finish();
        if !reports.is_empty()
            && let Some(extra) = draft.manifest_mut().extra.as_object_mut()
        {
            extra.insert("validation".to_owned(), reports.iter().map(Report::kept).collect());
        }
        let manifest = draft.publish()?;
        if self.json {
            return console::json(&json!({
                "engine": self.out, "emit_seconds": emit_seconds, "manifest": manifest, "first_runs": reports,
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
        self.tell_who_runs(&manifest)?;
        if let Some(architecture) = target.elsewhere() {
            console::out(&format!("  not tried out: this machine has no GPU of {architecture}"))?;
        }
        console::out(&format!(
            "emitted in {emit_seconds:.2} s, built in {:.2} s; the manifest is {}",
            start.elapsed().as_secs_f64(),
            self.out.join("engine.json").display()
        ))
    }

    /// The weights file: the one given, else, where a program carries parameters, that of the checkpoint that `--model`
    /// names.
    fn weights_path(&self) -> anyhow::Result<Option<PathBuf>> {
        if self.weights.is_some() || self.programs.iter().all(|p| p.feeds_parameters()) {
            return Ok(self.weights.clone());
        }
        weights::beside(&self.model)
    }

    /// Refuses what cannot be built here before any work is done.
    fn check(&self, has_weights: bool) -> anyhow::Result<Target> {
        if let (Some(_), Some(kind)) = (self.export, self.programs.iter().find(|p| p.feeds_parameters())) {
            let text =
                format!("{kind} takes the parameters as inputs; a model repository is for sampling programs");
            return Err(Usage(text).into());
        }
        if matches!(self.provider.0, Some(Provider::Cpu(_))) && self.precision != Precision::F32 {
            let text = format!(
                "programs for the CPU compute in f32: use --precision f32, or build for a GPU; --provider none only emits {}",
                self.precision
            );
            return Err(Usage(text).into());
        }
        let carrying: Vec<_> =
            self.programs.iter().filter(|p| !p.feeds_parameters()).map(ToString::to_string).collect();
        if !has_weights && !carrying.is_empty() {
            let text = format!(
                "{} carries the model's parameters: give them with --weights FILE.safetensors, or a checkpoint or a run as --model",
                carrying.join(", ")
            );
            return Err(Usage(text).into());
        }
        Target::find(&self.provider, self.architecture, self.tensorrt)
    }

    /// Everything that decides what the engine is. Programs count without their weights, which count by themselves: so
    /// nothing has to be converted before it is known that there is something to do.
    fn key(
        &self,
        planned: &[Planned],
        open: &[PlannedOpen],
        weights: Option<&FileStamp>,
        target: &Target,
    ) -> anyhow::Result<EngineKey> {
        let mut key = EngineKey::default();
        key.set("mudit", env!("CARGO_PKG_VERSION"));
        key.set("onnxruntime", onnx_runtime());
        key.set("provider", &self.provider);
        key.set("precision", self.precision);
        key.set("functions", if self.inline { "inlined" } else { "kept" });
        key.set("validation", if self.no_validation { "off" } else { "on" });
        target.add_to(&mut key);
        for p in planned {
            let emitted = self.emitted(p, Weights::Inputs)?;
            key.set(p.file(), runtime::file::sha256_bytes(&emitted.bytes));
        }
        for p in open {
            let emitted = self.emitted_open(p, Weights::Inputs)?;
            key.set(p.file(), runtime::file::sha256_bytes(&emitted.bytes));
        }
        if let Some(stamp) = weights {
            key.set("weights", &stamp.sha256);
        }
        Ok(key)
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
        self.tell_who_runs(engine.manifest())?;
        console::out(&format!("`{}` is up to date ({seconds:.2} s)", self.out.display()))
    }

    /// The build has noted it, so an engine that is there tells it, too.
    fn tell_who_runs(&self, manifest: &EngineManifest) -> anyhow::Result<()> {
        if !self.explain {
            return Ok(());
        }
        if manifest.placements.is_empty() {
            return console::out("who runs which nodes is not known: nobody has loaded the programs");
        }
        manifest.placements.iter().try_for_each(|(file, who)| console::out(&format!("{file}: {who}")))
    }

    fn export_triton(
        &self,
        planned: &[Planned],
        carried: Option<&Source<'_>>,
        target: &Target,
    ) -> anyhow::Result<()> {
        check_writable(self.out.join("models"))?;
        let mut stages = self.stages(planned, carried, target);
        let parameters = carried.map(|source| place(source, &mut stages)).transpose()?;
        let built = self.emit(planned, parameters.as_ref(), &mut stages)?;
        let programs: Vec<(usize, &OnnxProgram)> = built.iter().map(|(n, p)| (*n, p)).collect();
        let file = parameters.as_ref().map(|w| w.file.as_path());
        let models =
            triton::write_repository(&self.out, &programs, file.map(|file| (file, self.placement())))?;
        if self.json {
            return console::json(&json!({"repository": self.out, "models": models}));
        }
        models.iter().try_for_each(|m| console::out(&m.display().to_string()))
    }

    fn guidance(&self, model: &Model) -> Guidance {
        self.cfg_channels.unwrap_or(Guidance::usual(model.objective))
    }

    fn placement(&self) -> Placement {
        if self.link_weights { Placement::HardLink } else { Placement::Copy }
    }

    fn notes(&self, model: &Model, key: EngineKey) -> anyhow::Result<EngineNotes> {
        let graph = model.program(&ProgramSpec::new(ProgramKind::Loss, 1))?;
        let hyperparameters: BTreeMap<_, _> = HYPERPARAMETERS.into_iter().collect();
        Ok(EngineNotes {
            key,
            options: json!({
                "provider": self.provider.to_string(),
                "precision": self.precision.to_string(),
                "guided_channels": channels_text(self.guidance(model)),
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
}

/// The ONNX Runtime that loads the programs: the pinned version, or a library that the user names.
fn onnx_runtime() -> String {
    match std::env::var("ORT_DYLIB_PATH") {
        Ok(path) if !path.is_empty() => path,
        _ => runtime::library::PINNED_VERSION.to_owned(),
    }
}
