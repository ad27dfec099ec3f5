//! Answers to given inputs for the comparison with PyTorch: the `denoise` program, and losses and gradients of the
//! training step.
//!
//! A GPU computes in any precision. The CPU has f32 alone: there the others are emulated, rounding after every op, which
//! small models bear.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use graph_builder::{Precision, Shape};
use indexmap::IndexMap;
use models::{HYPERPARAMETERS, LOSS_SCALE, Model, ProgramKind, ProgramSpec};
use mudit::execution::{Execution, Placed};
use mudit_tests::Feeds;
use mudit_tests::execution::array;
use runtime::{
    Arena, HostTensor, Provider, Runtime, SharedArena, read_safetensors_file, write_safetensors_file,
};
use train_engine::config::TrainConfig;
use train_engine::step::{StepInputs, parameter_layout, read_lock};
use train_engine::trainer::Trainer;

use crate::Result;

type Tensors = IndexMap<String, HostTensor>;

/// The factor on the loss where f16 is emulated.
const EMULATED_SCALE: f64 = 1024.0;

/// Reads `weights.safetensors` and `inputs.safetensors` of a folder; writes `answer.safetensors` there: `out` and, but by
/// TensorRT, `mse`, `vb` and `grad.*`.
pub(crate) fn write(runtime: &Arc<Runtime>, model: &str, folder: &Path, execution: &Execution) -> Result<()> {
    let dit = Model::resolve(model)?;
    let layout = parameter_layout(&dit.parameters()?)?;
    let weights = Arena::read_safetensors(&layout, folder.join("weights.safetensors"), false)?.into_shared();
    let inputs = read_safetensors_file(folder.join("inputs.safetensors"))?;
    let batch = inputs["y"].shape().numel();
    let mut answer = Tensors::new();
    let emulated = !execution.provider.is_gpu() && execution.precision != Precision::F32;
    if emulated {
        emulate(&dit, batch, &inputs, &weights, execution.precision, &mut answer)?;
    } else {
        execution.check()?;
        denoise(runtime, &dit, batch, &inputs, &weights, execution, &mut answer)?;
        // TensorRT does not train.
        if !matches!(execution.provider, Provider::TensorRt(_)) {
            train(runtime, &dit, batch, &inputs, &weights, execution, &mut answer)?;
        }
    }
    Ok(write_safetensors_file(folder.join("answer.safetensors"), &answer, &BTreeMap::new())?)
}

fn denoise(
    runtime: &Arc<Runtime>,
    dit: &Model,
    batch: usize,
    inputs: &Tensors,
    weights: &SharedArena,
    execution: &Execution,
    answer: &mut Tensors,
) -> Result<()> {
    let graph = dit.program(&ProgramSpec::new(ProgramKind::Denoise, batch))?;
    let placed = Placed::of(weights, dit, execution)?;
    let mut binding = placed.load(runtime, &graph, execution, &execution.session_options())?;
    binding.set_input("x", &inputs["x"].to_f32())?;
    binding.set_input("t", &inputs["t"].to_f32())?;
    binding.set_input("y", &labels(inputs)?)?;
    binding.run()?;
    let shape = binding.session().outputs()[0].shape.clone();
    answer.insert("out".to_owned(), HostTensor::f32(shape, binding.output_f32("out")?.to_vec())?);
    Ok(())
}

fn train(
    runtime: &Arc<Runtime>,
    dit: &Model,
    batch: usize,
    inputs: &Tensors,
    weights: &SharedArena,
    execution: &Execution,
    answer: &mut Tensors,
) -> Result<()> {
    let mut config = TrainConfig::default();
    config.objective.kind = dit.objective;
    let train = &mut config.train;
    (train.batch_size, train.precision, train.threads) = (batch, execution.precision, execution.threads);
    train.provider = execution.provider.clone();
    let options = execution.session_options();
    let mut trainer = Trainer::from_parameters(runtime, &config, dit, &*read_lock(weights)?, &options)?;
    let (x0, noise) = (inputs["x0"].to_f32(), inputs["noise"].to_f32());
    let (t, y) = (inputs["t"].to_f32(), labels(inputs)?);
    let given = StepInputs { x0: &x0, noise: &noise, t: &t, y: &y };
    let (loss, report) = trainer.step_given(0, &given)?;
    if !report.finite {
        return Err("a gradient is not finite".into());
    }
    let rows = |values: Vec<f32>| HostTensor::f32(Shape(vec![values.len()]), values);
    answer.insert("mse".to_owned(), rows(loss.mse)?);
    answer.insert("vb".to_owned(), rows(loss.vb)?);
    for (name, entry, values) in trainer.gradients()?.iter() {
        answer.insert(format!("grad.{name}"), HostTensor::f32(entry.shape.clone(), values.to_vec())?);
    }
    Ok(())
}

fn labels(inputs: &Tensors) -> Result<Vec<i64>> {
    Ok(inputs["y"].to_i64().ok_or("`y` must hold integers")?)
}

fn emulate(
    dit: &Model,
    batch: usize,
    inputs: &Tensors,
    weights: &SharedArena,
    precision: Precision,
    answer: &mut Tensors,
) -> Result<()> {
    let mut feeds: Feeds =
        inputs.iter().map(|(name, t)| (name.clone(), array(t.shape().dims(), &t.to_f32()))).collect();
    let scalar = |value: f64| array(&[], &[value as f32]);
    feeds.extend(HYPERPARAMETERS.map(|(name, value)| (name.to_owned(), scalar(f64::from(value)))));
    feeds.insert(LOSS_SCALE.to_owned(), scalar(EMULATED_SCALE));
    let weights = read_lock(weights)?;
    feeds.extend(weights.iter().map(|(name, e, values)| (name.to_owned(), array(e.shape.dims(), values))));
    for kind in [ProgramKind::Denoise, ProgramKind::TrainStep] {
        let graph = dit.compiled(&ProgramSpec::new(kind, batch).in_precision(precision))?;
        let graph = graph.in_precision(precision)?;
        let scaled = graph.inputs().any(|(name, _)| name == LOSS_SCALE);
        for ((name, _), values) in graph.outputs().iter().zip(graph.eval_rounded(&feeds)?) {
            let factor = if scaled && name.starts_with("grad.") { EMULATED_SCALE } else { 1.0 };
            let shape = Shape(values.shape().to_vec());
            let values = values.iter().map(|v| (v / factor) as f32).collect();
            let name = name.strip_prefix("loss.").unwrap_or(name);
            answer.insert(name.to_owned(), HostTensor::f32(shape, values)?);
        }
    }
    Ok(())
}
