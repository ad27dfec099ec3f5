//! The coordinate check: do activations, and what training does to them, keep their size over widths?
//!
//! A model is trained for a few steps at several widths and seeds; after each step one fixed batch goes through it and
//! the mean size of every layer's answer is taken, and of its difference from the answer before the first step. Under
//! a right parameterisation neither grows nor shrinks with the width.
//!
//! # Source
//! Yang et al., "Tensor Programs V", appendix D.1; sizes are mean absolute values as in the published muP code.

use std::f64::consts::FRAC_PI_2;
use std::sync::Arc;

use graph_builder::probe::AT;
use graph_builder::{Graph, Role, Weights};
use models::{Model, ModelError, ProgramKind, ProgramSpec, TRAINING_STEPS};
use runtime::{Binding, Runtime, Session, SessionOptions};
use serde::Serialize;

use crate::config::TrainConfig;
use crate::data::Batch;
use crate::error::Result;
use crate::random::{Purpose, Stream};
use crate::trainer::Trainer;

/// What is varied.
#[derive(Debug, Clone)]
pub struct CheckPlan {
    /// Widths, each a multiple of the head size.
    pub widths: Vec<usize>,
    /// Optimizer steps.
    pub steps: u64,
    /// Seeds of first values and draws.
    pub seeds: Vec<u64>,
}

/// Which size of a layer is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantity {
    /// Mean |x| of the layer's answer.
    Activation,
    /// Mean |x − x before the first step|.
    Update,
}

/// Sizes of one layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerSizes {
    /// Scope path, as in the parameters' names.
    pub layer: String,
    /// Role of the layer's weight; none for a sum or a product of others.
    pub role: Option<Role>,
    /// Mean |x|, by step from 0, width and seed.
    pub activation: Vec<Vec<Vec<f64>>>,
    /// Mean change since step 0, by the same.
    pub update: Vec<Vec<Vec<f64>>>,
}

/// What a check measured.
#[derive(Debug, Clone, Serialize)]
pub struct Coordinates {
    /// Widths.
    pub widths: Vec<usize>,
    /// Optimizer steps.
    pub steps: u64,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// Every layer, in the order of the forward pass.
    pub layers: Vec<LayerSizes>,
}

/// How a size goes with the width: `size ∝ width^slope`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Trend {
    /// Mean slope over the seeds.
    pub slope: f64,
    /// Its standard error over the seeds; 0 with one seed.
    pub error: f64,
    /// The step.
    pub step: u64,
}

/// The judgement of one layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerVerdict {
    /// Scope path.
    pub layer: String,
    /// Role of its weight.
    pub role: Option<Role>,
    /// Steepest trend of the activation over the steps.
    pub activation: Option<Trend>,
    /// Steepest trend of the update; none where the layer did not move.
    pub update: Option<Trend>,
    /// Whether both are flat within the tolerance.
    pub passed: bool,
}

impl LayerVerdict {
    /// The steeper of its two trends, and of which quantity.
    pub fn steepest(&self) -> Option<(Quantity, Trend)> {
        let both = [(Quantity::Activation, self.activation), (Quantity::Update, self.update)];
        both.into_iter()
            .filter_map(|(quantity, trend)| Some((quantity, trend?)))
            .max_by(|a, b| steepness(a.1.slope).total_cmp(&steepness(b.1.slope)))
    }
}

/// What is not a number is steeper than any.
fn steepness(slope: f64) -> f64 {
    if slope.is_nan() { f64::INFINITY } else { slope.abs() }
}

/// The model at another width; heads keep their size.
///
/// # Errors
/// [`crate::TrainError::Model`] when the width is no multiple of the head size.
pub fn at_width(model: &Model, width: usize) -> Result<Model> {
    let head = model.network.head_size();
    if width == 0 || !width.is_multiple_of(head) {
        let expected = format!("a multiple of the head size {head}, which stays");
        let got = width.to_string();
        return Err(ModelError::BadValue { key: "hidden_size", expected, got }.into());
    }
    let wider = Model { network: model.network.resized(width, head), ..model.clone() };
    wider.validate()?;
    Ok(wider)
}

/// Trains `model` at every width and seed of `plan` on one batch of images and measures every layer.
///
/// Times, noise and label drops are drawn anew in each step; what is measured is one fixed batch of noised images.
/// `goes_on` is told how many of how many trainings are done, and says whether the next begins; none when it does not.
///
/// # Errors
/// [`crate::TrainError::Model`], [`crate::TrainError::Runtime`].
pub fn measure(
    runtime: &Arc<Runtime>,
    config: &TrainConfig,
    model: &Model,
    batch: &Batch,
    plan: &CheckPlan,
    goes_on: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Option<Coordinates>> {
    if config.train.provider.is_gpu() {
        return Err(crate::TrainError::BadValue {
            key: "train.provider",
            value: config.train.provider.to_string(),
            allowed: "`cpu` here: the check reads every layer in the host's memory".into(),
        });
    }
    let mut layers: Vec<LayerSizes> = Vec::new();
    let total = plan.widths.len() * plan.seeds.len();
    let mut config = config.clone();
    config.train.batch_size = batch.y.len();
    config.train.accumulate = 1;
    for (w, &width) in plan.widths.iter().enumerate() {
        let wide = at_width(model, width)?;
        let mut trainer = Trainer::shared(runtime, &config, &wide)?;
        let mut probe = Probe::new(runtime, &config, &wide, &trainer, batch)?;
        if layers.is_empty() {
            layers = probe.layers(plan);
        }
        for (s, &seed) in plan.seeds.iter().enumerate() {
            config.train.seed = seed;
            trainer.restart(&config, &wide)?;
            let mut start: Vec<Vec<f32>> = Vec::new();
            for step in 0..=plan.steps {
                if step > 0 {
                    trainer.step(&Batch { step: step - 1, ..batch.clone() })?;
                }
                probe.run()?;
                for (i, layer) in layers.iter_mut().enumerate() {
                    let values = probe.values(i)?;
                    if step == 0 {
                        start.push(values.to_vec());
                    }
                    layer.activation[step as usize][w][s] = mean(values.iter().map(|v| f64::from(*v)));
                    let moved = values.iter().zip(&start[i]).map(|(v, v0)| f64::from(*v) - f64::from(*v0));
                    layer.update[step as usize][w][s] = mean(moved);
                }
            }
            let done = w * plan.seeds.len() + s + 1;
            if !goes_on(done, total) && done < total {
                return Ok(None);
            }
        }
    }
    let (widths, seeds) = (plan.widths.clone(), plan.seeds.clone());
    Ok(Some(Coordinates { widths, steps: plan.steps, seeds, layers }))
}

/// Mean absolute value.
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.map(f64::abs).sum::<f64>() / count
}

/// The model's answer with every layer's as further outputs, on a fixed batch.
struct Probe {
    binding: Binding,
    scopes: Vec<(String, Option<Role>)>,
}

impl Probe {
    fn new(
        runtime: &Arc<Runtime>,
        config: &TrainConfig,
        model: &Model,
        trainer: &Trainer,
        batch: &Batch,
    ) -> Result<Self> {
        let n = batch.y.len();
        let graph = model.program(&ProgramSpec::new(ProgramKind::Denoise, n))?;
        let scopes: Vec<(String, Option<Role>)> = graph
            .scopes()
            .into_iter()
            .filter(|s| !s.is_empty())
            .map(|s| (s.to_owned(), role(&graph, s)))
            .collect();
        let emitted = graph
            .with_outputs_at(scopes.iter().map(|(s, _)| s.as_str()))
            .and_then(|graph| graph.optimised())
            .and_then(|graph| graph.emit(Weights::Inputs))
            .map_err(ModelError::from)?;
        let options = SessionOptions { threads: config.train.threads, ..SessionOptions::default() };
        let session = Session::load(runtime, &emitted, &runtime::Weights::Inside, &options)?;
        let mut builder = Binding::builder(&session);
        builder.bind_inputs_by_name(&trainer.compiled().host()?.parameters)?;
        let mut binding = builder.finish()?;
        let image = batch.x0.len() / n.max(1);
        let mut x = batch.x0.clone();
        let mut noise = vec![0.0; image];
        for (row, x) in x.chunks_mut(image).enumerate() {
            Stream::new(0, Purpose::Validation, 0, row as u64).fill_normal(&mut noise);
            let (sin, cos) = (FRAC_PI_2 * row as f64 / n as f64).sin_cos();
            for (x, z) in x.iter_mut().zip(&noise) {
                *x = (cos * f64::from(*x) + sin * f64::from(*z)) as f32;
            }
        }
        binding.set_input("x", &x)?;
        let times: Vec<f32> = (0..n).map(|i| (i * TRAINING_STEPS / n) as f32).collect();
        binding.set_input("t", &times)?;
        binding.set_input("y", &batch.y)?;
        Ok(Self { binding, scopes })
    }

    fn layers(&self, plan: &CheckPlan) -> Vec<LayerSizes> {
        let none = vec![vec![vec![0.0; plan.seeds.len()]; plan.widths.len()]; plan.steps as usize + 1];
        let empty = |(layer, role): &(String, Option<Role>)| LayerSizes {
            layer: layer.clone(),
            role: *role,
            activation: none.clone(),
            update: none.clone(),
        };
        self.scopes.iter().map(empty).collect()
    }

    fn run(&mut self) -> Result<()> {
        Ok(self.binding.run()?)
    }

    fn values(&self, layer: usize) -> Result<&[f32]> {
        Ok(self.binding.output_f32(&format!("{AT}{}", self.scopes[layer].0))?)
    }
}

/// Role of the weight that a scope holds itself.
fn role(graph: &Graph, scope: &str) -> Option<Role> {
    let own = [format!("{scope}.weight"), format!("{scope}.embedding_table.weight")];
    let index = graph.parameters().iter().position(|p| own.contains(&p.name))?;
    Some(graph.role(index))
}

impl Coordinates {
    /// The trend of a layer's size after `step` steps; none where it is zero at some width.
    pub fn trend(&self, layer: &LayerSizes, quantity: Quantity, step: u64) -> Option<Trend> {
        let sizes = match quantity {
            Quantity::Activation => &layer.activation,
            Quantity::Update => &layer.update,
        };
        let sizes = sizes.get(step as usize)?;
        if sizes.iter().flatten().any(|size| *size == 0.0) {
            return None;
        }
        let x: Vec<f64> = self.widths.iter().map(|w| (*w as f64).log2()).collect();
        let slopes: Vec<f64> = (0..self.seeds.len())
            .map(|s| {
                let y: Vec<f64> = sizes.iter().map(|of_width| of_width[s].log2()).collect();
                slope(&x, &y)
            })
            .collect();
        let (slope, error) = mean_and_error(&slopes);
        Some(Trend { slope, error, step })
    }

    /// The steepest trend over the steps, the first values' own (step 0) left out.
    fn steepest(&self, layer: &LayerSizes, quantity: Quantity) -> Option<Trend> {
        (1..=self.steps)
            .filter_map(|step| self.trend(layer, quantity, step))
            .max_by(|a, b| steepness(a.slope).total_cmp(&steepness(b.slope)))
    }

    /// Judges every layer: it passes when its sizes change at most by `width^±tolerance`, one standard error aside.
    pub fn verdict(&self, tolerance: f64) -> Vec<LayerVerdict> {
        let flat = |trend: Option<Trend>| {
            trend.is_none_or(|t| steepness(t.slope) - t.error.min(tolerance) <= tolerance)
        };
        let judge = |layer: &LayerSizes| {
            let activation = self.steepest(layer, Quantity::Activation);
            let update = self.steepest(layer, Quantity::Update);
            LayerVerdict {
                layer: layer.layer.clone(),
                role: layer.role,
                activation,
                update,
                passed: flat(activation) && flat(update),
            }
        };
        self.layers.iter().map(judge).collect()
    }
}

/// Least-squares slope of `y` over `x`; NaN when a value is not finite.
pub(crate) fn slope(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len() as f64;
    let (mx, my) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let along: f64 = x.iter().map(|x| (x - mx).powi(2)).sum();
    x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum::<f64>() / along
}

/// Mean, and standard error of the mean; the error of one value is 0.
pub(crate) fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return (mean, 0.0);
    }
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coordinates(size: impl Fn(f64, u64) -> f64) -> Coordinates {
        let (widths, seeds) = (vec![64, 128, 256], vec![0, 1]);
        let sizes = |step: u64| -> Vec<Vec<f64>> {
            let of = |w: &usize| vec![size(*w as f64, step), 1.1 * size(*w as f64, step)];
            widths.iter().map(of).collect()
        };
        let layer = LayerSizes {
            layer: "a".into(),
            role: Some(Role::Hidden),
            activation: (0..3).map(sizes).collect(),
            update: vec![vec![vec![0.0; 2]; 3]; 3],
        };
        Coordinates { widths, steps: 2, seeds, layers: vec![layer] }
    }

    #[test]
    fn a_power_of_the_width_is_found_in_its_steepest_step() {
        let grows = coordinates(|w, step| w.powf(if step == 2 { 0.75 } else { 0.1 }));
        let verdict = &grows.verdict(0.3)[0];
        let (quantity, trend) = verdict.steepest().unwrap();
        assert!((trend.slope - 0.75).abs() < 1e-12 && trend.error < 1e-12, "{trend:?}");
        assert_eq!((quantity, trend.step, verdict.passed), (Quantity::Activation, 2, false));
        assert!(verdict.update.is_none(), "what does not move has no trend");
    }

    #[test]
    fn a_flat_layer_passes_and_the_first_values_do_not_count() {
        assert!(coordinates(|w, step| if step == 0 { w } else { 1.0 }).verdict(0.1)[0].passed);
        assert!(!coordinates(|w, _| 1.0 / w).verdict(0.5)[0].passed, "shrinking is no better");
        assert!(!coordinates(|w, _| if w > 200.0 { f64::NAN } else { 1.0 }).verdict(0.5)[0].passed);
    }

    #[test]
    fn widths_keep_the_head_size() {
        let model = Model::preset("DiT-S/2").unwrap();
        let wide = at_width(&model, 576).unwrap().network;
        assert_eq!((wide.width(), wide.head_size()), (576, 64));
        let error = at_width(&model, 100).unwrap_err().to_string();
        assert!(error.contains("head size 64"), "{error}");
    }
}
