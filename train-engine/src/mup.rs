//! muP: from a parameter's role and the width to its learning rate, weight decay and first value.
//!
//! Roles are derived from the graph ([`graph_builder::Role`]); the rules are those of the muP paper's table 1 in the
//! form relative to a base width: with m = width / base width, hidden weights learn m times slower, the output
//! weight's product is divided by m (in the graph), all else is as at the base width.

use graph_builder::{Graph, Init, Role};
use models::DitConfig;
use runtime::{Arena, ArenaLayout};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::random::{Purpose, Stream};

/// What muP says of one parameter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MupRow {
    /// Name, as in the checkpoint.
    pub name: String,
    /// Axis sizes.
    pub shape: Vec<usize>,
    /// Derived role.
    pub role: Role,
    /// Standard deviation of the first value; `None` for fixed tables.
    pub init_std: Option<f64>,
    /// Factor on the base learning rate; 0 for what is never trained.
    pub lr: f64,
    /// Factor on the weight decay: the product of rate and decay does not depend on the width.
    pub weight_decay: f64,
}

/// The parameterisation of a model, saved with every checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MupTable {
    /// Whether muP's factors are in force; otherwise every factor is 1.
    pub enabled: bool,
    /// Width of the model.
    pub width: usize,
    /// Width at which the rates were tuned.
    pub base_width: usize,
    /// Factor α on the output layer, beside 1/m.
    pub output_multiplier: f64,
    /// One row a parameter, in order of declaration.
    pub parameters: Vec<MupRow>,
}

impl MupTable {
    /// The table of a model's training graph.
    pub fn new(graph: &Graph, model: &DitConfig) -> Self {
        let m = model.width_multiplier();
        let rows = graph.parameters().iter().enumerate().map(|(i, p)| {
            let role = graph.role(i);
            let hidden = role == Role::Hidden;
            let shape = p.shape();
            MupRow {
                name: p.name.clone(),
                role,
                init_std: init_std(&p.init, shape.dims()),
                lr: if !p.trainable {
                    0.0
                } else if hidden {
                    1.0 / m
                } else {
                    1.0
                },
                weight_decay: if hidden { m } else { 1.0 },
                shape: shape.0,
            }
        });
        Self {
            enabled: model.mup.is_some(),
            width: model.hidden_size,
            base_width: model.mup.map_or(model.hidden_size, |mup| mup.base_width),
            output_multiplier: model.mup.map_or(1.0, |mup| mup.output_multiplier),
            parameters: rows.collect(),
        }
    }

    /// Learning rate and weight decay of each entry of `gradients`, in layout order.
    pub fn rates(&self, gradients: &ArenaLayout, lr: f64, weight_decay: f64) -> (Vec<f64>, Vec<f64>) {
        let row = |name: &str| self.parameters.iter().find(|row| row.name == name);
        let pick = |factor: fn(&MupRow) -> f64, base: f64| {
            gradients.entries().keys().map(|name| row(name).map_or(0.0, factor) * base).collect()
        };
        (pick(|row| row.lr, lr), pick(|row| row.weight_decay, weight_decay))
    }
}

/// Fan-in and fan-out of a weight (out, in, …).
fn fans(shape: &[usize]) -> (usize, usize) {
    (shape.iter().skip(1).product(), shape.first().copied().unwrap_or(1))
}

/// Standard deviation of the first value.
fn init_std(init: &Init, shape: &[usize]) -> Option<f64> {
    let (fan_in, fan_out) = fans(shape);
    match init {
        Init::Zeros => Some(0.0),
        Init::Normal { std } => Some(*std),
        Init::XavierUniform => Some((2.0 / (fan_in + fan_out) as f64).sqrt()),
        Init::KaimingNormal => Some((1.0 / fan_in as f64).sqrt()),
        Init::Values(_) => None,
    }
}

/// Draws the first value of every parameter of `graph` into `parameters`; the same for any number of threads.
///
/// # Errors
/// [`crate::TrainError::Runtime`] when the arena lacks a parameter.
pub fn draw_parameters(graph: &Graph, seed: u64, parameters: &mut Arena) -> Result<()> {
    for (i, parameter) in graph.parameters().iter().enumerate() {
        let values = parameters.view_mut(&parameter.name)?;
        let mut stream = Stream::new(seed, Purpose::Init, 0, i as u64);
        let std = init_std(&parameter.init, parameter.shape().dims()).unwrap_or(0.0);
        match &parameter.init {
            Init::Zeros => values.fill(0.0),
            Init::Normal { .. } | Init::KaimingNormal => {
                stream.fill_normal(values);
                for v in values {
                    *v = (f64::from(*v) * std) as f32;
                }
            }
            Init::XavierUniform => {
                let bound = 3.0_f64.sqrt() * std; // a uniform's half width is √3 standard deviations
                for v in values {
                    *v = ((2.0 * stream.uniform_f64() - 1.0) * bound) as f32;
                }
            }
            Init::Values(table) => values.copy_from_slice(table),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use models::{Guidance, MupConfig, ProgramKind, program};

    use super::*;

    fn model(width: usize) -> DitConfig {
        let text = format!(
            r#"{{"model":"dit","input_size":8,"patch_size":2,"in_channels":4,"hidden_size":{width},"depth":1,"num_heads":2,"num_classes":10}}"#
        );
        let mut model = DitConfig::from_json(&text).unwrap();
        model.init = models::InitScheme::Mup;
        model.mup = Some(MupConfig { base_width: 16, output_multiplier: 1.0 });
        model
    }

    fn rows(width: usize) -> MupTable {
        let graph = program(&model(width), ProgramKind::Loss, 1, Guidance::Off).unwrap();
        MupTable::new(&graph, &model(width))
    }

    #[test]
    fn roles_and_rates_are_those_of_the_papers_table() {
        use Role::{Hidden, Input, Output, Scalar, Vector};
        let expected = [
            ("x_embedder.proj.weight", Input, 0.25, 1.0),
            ("x_embedder.proj.bias", Vector, 0.0, 1.0),
            ("t_embedder.mlp.0.weight", Input, 1.0 / 16.0, 1.0),
            ("t_embedder.mlp.2.weight", Hidden, 1.0 / 8.0, 0.25),
            ("y_embedder.embedding_table.weight", Input, 1.0, 1.0),
            ("blocks.0.adaLN_modulation.1.weight", Hidden, 1.0 / 8.0, 0.25),
            ("blocks.0.attn.qkv.weight", Hidden, 1.0 / 8.0, 0.25),
            ("blocks.0.attn.qkv.bias", Vector, 0.0, 1.0),
            ("blocks.0.mlp.fc2.weight", Hidden, 1.0 / 16.0, 0.25),
            ("final_layer.adaLN_modulation.1.weight", Hidden, 1.0 / 8.0, 0.25),
            ("final_layer.linear.weight", Output, 0.0, 1.0),
            ("final_layer.linear.bias", Scalar, 0.0, 1.0),
        ];
        let table = rows(64);
        for (name, role, std, lr) in expected {
            let row = table.parameters.iter().find(|r| r.name == name).unwrap();
            assert_eq!((row.role, row.init_std, row.lr), (role, Some(std), lr), "{name}");
            assert_eq!(row.weight_decay * row.lr, 1.0, "{name}");
        }
        assert_eq!(table.parameters.iter().find(|r| r.name == "pos_embed").unwrap().lr, 0.0);
    }

    #[test]
    fn at_the_base_width_every_factor_is_one() {
        assert!(rows(16).parameters.iter().filter(|r| r.name != "pos_embed").all(|r| r.lr == 1.0));
    }

    #[test]
    fn drawn_values_have_the_declared_spread() {
        let graph = program(&model(64), ProgramKind::Loss, 1, Guidance::Off).unwrap();
        let entries = graph.parameters().iter().map(|p| (p.name.clone(), p.shape()));
        let layout = Arc::new(ArenaLayout::new(entries).unwrap());
        let mut arena = Arena::zeros(layout).unwrap();
        draw_parameters(&graph, 7, &mut arena).unwrap();
        for row in rows(64).parameters.iter().filter(|r| r.name.ends_with("weight")) {
            let values = arena.view(&row.name).unwrap();
            let std =
                (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
            let expected = row.init_std.unwrap();
            assert!((std - expected).abs() <= 0.12 * expected, "{}: {std} for {expected}", row.name);
        }
    }
}
