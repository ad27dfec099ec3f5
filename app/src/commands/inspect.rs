//! `mudit inspect`: a model's parameters and work, counted from its graphs; signatures of programs and engines.

use std::path::Path;

use clap::Args;
use graph_builder::{DType, Graph, Precision, TensorSpec};
use models::{Guidance, Model, ProgramKind, ProgramSpec};
use runtime::{Engine, engine};
use serde_json::json;

use super::{mup_table, weights};
use crate::console;
use crate::profile::layer;
use crate::profile::memory::Prediction;
use crate::sampler::channels;

/// Arguments of `mudit inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A preset such as `DiT-XL/2` or `DiT-S/2@8x8x4:10`, a config.json, a checkpoint or run directory, or an
    /// engine.
    model: String,
    /// Print the signature of this program instead of the counts.
    #[arg(long)]
    program: Option<ProgramKind>,
    /// Samples of the program.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Channels that guidance changes: a number, `all` or `off`. Default 3 for DDPM models as in the reference, else all.
    #[arg(long, value_parser = channels, alias = "guided-channels")]
    cfg_channels: Option<Guidance>,
    /// What the program computes in: f32, bf16 or f16.
    #[arg(long, requires = "program", default_value = "f32")]
    precision: Precision,
    /// Print the program's graph instead: the text form after all passes.
    #[arg(long, requires = "program")]
    graph: bool,
    /// Print the muP table: each parameter's role, first spread, factor and rate at this width and the base width.
    #[arg(long, conflicts_with_all = ["program"])]
    mup: bool,
    /// With --mup: the base width, where the model names none.
    #[arg(long, requires = "mup")]
    base_width: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl InspectArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.mup {
            return mup_table::show(&self.model, self.base_width, self.json);
        }
        if Path::new(&self.model).join(engine::MANIFEST).is_file() {
            return self.engine();
        }
        let model = weights::model(&self.model)?;
        match self.program {
            Some(kind) => self.signature(&model, kind),
            None => self.counts(&model),
        }
    }

    fn engine(&self) -> anyhow::Result<()> {
        let engine = Engine::open(&self.model)?;
        let manifest = engine.manifest();
        if self.json {
            return console::json(manifest);
        }
        for p in &manifest.programs {
            console::out(&format!("{}  batch {}  {}  {} bytes", p.name, p.batch, p.file, p.bytes))?;
            specs("in ", &p.inputs)?;
            specs("out", &p.outputs)?;
        }
        if let Some(w) = &manifest.weights {
            console::out(&format!("weights  {}  {} bytes  sha256 {}", w.file, w.bytes, w.sha256))?;
        }
        Ok(())
    }

    fn signature(&self, model: &Model, kind: ProgramKind) -> anyhow::Result<()> {
        let precision = self.precision;
        let graph = model.compiled(
            &ProgramSpec::new(kind, self.batch)
                .guided(self.cfg_channels.unwrap_or(Guidance::usual(model.objective)))
                .in_precision(precision),
        )?;
        if self.graph {
            return console::out(graph.text().trim_end());
        }
        let inputs: Vec<TensorSpec> =
            graph.inputs().map(|(name, ty)| spec(name, ty.dtype, &ty.shape)).collect();
        let outputs: Vec<TensorSpec> = graph
            .outputs()
            .iter()
            .map(|(name, id)| spec(name, graph.node(*id).ty.dtype, &graph.node(*id).ty.shape))
            .collect();
        let parameters = graph.parameters().len();
        let narrow = graph.parameters().iter().filter(|p| p.dtype != DType::F32).count();
        let memory = Prediction::new(&graph, kind);
        let how = if kind.feeds_parameters() { "inputs of their own names" } else { "initializers" };
        if self.json {
            return console::json(&json!({
                "program": kind.name(), "batch": self.batch, "inputs": inputs, "outputs": outputs,
                "precision": precision, "parameters": parameters, "parameters_are": how,
                "parameters_in_precision": if precision == Precision::F32 { parameters } else { narrow },
                "memory": memory,
                "memory_bytes": memory.total(),
            }));
        }
        let narrow = if narrow > 0 { format!(", {narrow} of them {precision}") } else { String::new() };
        console::out(&format!("{kind}, batch {}; {parameters} parameters as {how}{narrow}", self.batch))?;
        console::out(&memory.words())?;
        specs("in ", &inputs)?;
        specs("out", &outputs)
    }

    fn counts(&self, model: &Model) -> anyhow::Result<()> {
        let forward = model.compiled(&ProgramSpec::new(ProgramKind::Denoise, 1))?;
        let train = model.compiled(&ProgramSpec::new(ProgramKind::TrainStep, 1))?;
        let (parameters, trainable) = forward.parameter_counts();
        let gmacs = forward.cost().macs as f64 / 1e9;
        let train_gflops = 2.0 * train.cost().macs as f64 / 1e9;
        if self.json {
            return console::json(&json!({
                "model": self.model, "config": model, "parameters": parameters,
                "trainable_parameters": trainable, "forward_gmacs": gmacs, "train_gflops": train_gflops,
            }));
        }
        console::out(&format!("{}  {}", self.model, model.to_json().replace('\n', "").replace("  ", " ")))?;
        console::out(&format!(
            "parameters {:.2} M ({:.2} M trainable), forward {gmacs:.2} GMAC, training {train_gflops:.2} GFLOP an image",
            parameters as f64 / 1e6,
            trainable as f64 / 1e6,
        ))?;
        layers(&forward, &train)
    }
}

fn spec(name: &str, dtype: DType, shape: &graph_builder::Shape) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, shape: shape.clone() }
}

fn specs(side: &str, specs: &[TensorSpec]) -> anyhow::Result<()> {
    for s in specs {
        console::out(&format!("  {side} {}: {}{}", s.name, s.dtype, s.shape))?;
    }
    Ok(())
}

fn layers(forward: &Graph, train: &Graph) -> anyhow::Result<()> {
    let (forward_cost, train_cost) = (forward.cost_by(layer), train.cost_by(layer));
    console::out(&format!(
        "{:28} {:>14} {:>14} {:>16} {:>14}",
        "layer", "parameters", "forward MMAC", "training MFLOP", "forward MB"
    ))?;
    for (name, cost) in &forward_cost {
        let owned =
            forward.parameters().iter().filter(|p| layer(&p.name) == *name || owner(&p.name) == *name);
        let parameters: usize = owned.map(graph_builder::Parameter::numel).sum();
        let training = train_cost.get(name).copied().unwrap_or_default();
        console::out(&format!(
            "{name:28} {parameters:>14} {:>14.3} {:>16.3} {:>14.3}",
            cost.macs as f64 / 1e6,
            training.flops as f64 / 1e6,
            cost.bytes as f64 / 1e6
        ))?;
    }
    Ok(())
}

/// The layer that a parameter at the top belongs to.
fn owner(parameter: &str) -> String {
    if parameter.contains('.') { String::new() } else { "(top)".into() }
}
