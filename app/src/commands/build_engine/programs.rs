//! From the options to graphs, and from graphs to ONNX.

use graph_builder::{Graph, NativeKernel, OnnxProgram, OpenProgram, Precision, Weights};
use models::{Model, ProgramKind, ProgramSpec};
use runtime::Provider;
use runtime::cuda::kernels;
use runtime::engine::model_file_name;
use runtime::library::cache_directory;

use super::BuildEngineArgs;
use super::built_for::Target;
use super::open::PlannedOpen;
use super::parameters::{Parameters, Source};
use super::stages::{Stage, Stages};

/// A program to be built.
pub(super) struct Planned {
    pub(super) kind: ProgramKind,
    pub(super) batch: usize,
    /// In the precision asked for.
    pub(super) graph: Graph,
}

impl Planned {
    pub(super) fn file(&self) -> String {
        model_file_name(&self.kind.to_string(), self.batch)
    }
}

impl BuildEngineArgs {
    pub(super) fn batches(&self) -> Vec<usize> {
        match (self.batch, self.buckets.as_slice()) {
            (Some(n), _) => vec![n],
            (None, []) => vec![1],
            (None, buckets) => buckets.to_vec(),
        }
    }

    fn graph(&self, model: &Model, kind: ProgramKind, batch: usize) -> anyhow::Result<Graph> {
        let graph = model.compiled(&ProgramSpec::new(kind, batch).guided(self.guidance(model)))?;
        Ok(graph.in_precision(self.precision)?)
    }

    /// The programs in every batch size, as graphs.
    pub(super) fn plan(&self, model: &Model) -> anyhow::Result<Vec<Planned>> {
        let mut planned: Vec<Planned> = Vec::new();
        for &kind in &self.programs {
            for batch in self.batches() {
                // Asked for twice, built once.
                if planned.iter().any(|p| (p.kind, p.batch) == (kind, batch)) {
                    continue;
                }
                planned.push(Planned { kind, batch, graph: self.graph(model, kind, batch)? });
            }
        }
        Ok(planned)
    }

    /// The programs that are compiled once for all batch sizes.
    pub(super) fn plan_open(&self, model: &Model, target: &Target) -> anyhow::Result<Vec<PlannedOpen>> {
        let kinds = self.programs.iter().filter(|kind| target.opens(**kind, &self.batches()));
        kinds.map(|&kind| PlannedOpen::new(kind, |n| self.graph(model, kind, n))).collect()
    }

    /// What is ahead.
    pub(super) fn stages(
        &self,
        planned: &[Planned],
        carried: Option<&Source<'_>>,
        target: &Target,
    ) -> Stages {
        let elsewhere = target.elsewhere().is_some();
        let tried = if self.provider.0.is_some() && !elsewhere { planned.len() } else { 0 };
        let batches = self.batches();
        let open = self.programs.iter().filter(|kind| target.opens(**kind, &batches)).count();
        let loads = match &self.provider.0 {
            // It compiles one form of a program for all of its batch sizes.
            Some(Provider::TensorRt(_)) => tried.saturating_sub(open * (batches.len() - 1)),
            _ if tried > 0 => tried + open,
            _ => 0,
        };
        // A model of another size takes another time.
        let declared = planned.first().map_or(&[][..], |p| p.graph.parameters());
        let parameters: usize = declared.iter().map(|p| p.shape().numel()).sum();
        Stages::new([
            (Stage::Convert, usize::from(carried.is_some_and(|source| !source.fits()))),
            (Stage::Emit, planned.len()),
            (Stage::Kernels, usize::from(target.kernels().is_some())),
            (Stage::Load, loads),
            (Stage::Validate, tried),
        ])
        .remembering(cache_directory(), &format!("{} {} {parameters}", self.provider, self.precision))
    }

    /// Whether the programs are to have no functions.
    fn inlines(&self) -> bool {
        self.inline || self.provider.0.as_ref().is_some_and(Provider::reads_single_nodes)
    }

    /// A program as its provider reads it.
    pub(super) fn emitted(&self, planned: &Planned, weights: Weights<'_>) -> anyhow::Result<OnnxProgram> {
        let program = planned.graph.emit(weights)?;
        Ok(if self.inlines() { program.inlined()? } else { program })
    }

    /// [`Self::emitted`] for all batch sizes.
    pub(super) fn emitted_open(
        &self,
        planned: &PlannedOpen,
        weights: Weights<'_>,
    ) -> anyhow::Result<OpenProgram> {
        let program = planned.emit(weights)?;
        Ok(if self.inlines() { program.inlined()? } else { program })
    }

    pub(super) fn emit(
        &self,
        planned: &[Planned],
        weights: Option<&Parameters>,
        stages: &mut Stages,
    ) -> anyhow::Result<Vec<(usize, OnnxProgram)>> {
        let mut built = Vec::new();
        for p in planned {
            stages.begin(Stage::Emit, &p.file());
            let how = initializers(weights.filter(|_| !p.kind.feeds_parameters()));
            let emitted = self.emitted(p, how)?;
            // Only the CUDA provider runs mudit's kernels; everybody else runs the function bodies.
            if matches!(self.provider.0, Some(Provider::Cuda(_))) {
                emitted.check_cuda(&kernels::kernel_for)?;
            } else if self.precision != Precision::F32 {
                emitted.check_cuda(&|_| NativeKernel::Body)?;
            }
            built.push((p.batch, emitted));
        }
        Ok(built)
    }
}

/// The parameters of a program: constants in a file, or inputs.
pub(super) fn initializers(weights: Option<&Parameters>) -> Weights<'_> {
    weights.map_or(Weights::Inputs, |w| Weights::External { file: &w.name, tensors: &w.tensors })
}

pub(super) fn place(source: &Source<'_>, stages: &mut Stages) -> anyhow::Result<Parameters> {
    if !source.fits() {
        stages.begin(Stage::Convert, "");
    }
    source.place()
}
