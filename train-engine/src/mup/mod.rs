//! muP: from a parameter's role and the width to its learning rate, weight decay and first value.
//!
//! Roles are derived from the graph ([`graph_builder::Role`]); the rules are those of the muP paper's table 1 in the
//! form relative to a base width: with m = width / base width, hidden weights learn m times slower, the output
//! weight's product is divided by m (in the graph), all else is as at the base width. The clip of the gradient's norm,
//! the warm-up in steps and the loss weights do not depend on the width (paper, appendix B.4). Where two conventions
//! are in use, [`Conventions`] names the one in force.

mod conventions;
mod draw;
mod stamp;

use graph_builder::{Dim, Graph, Parameter, Role};
use models::Model;
use runtime::ArenaLayout;
use serde::{Deserialize, Serialize};

pub use conventions::{Conventions, DecayRule, EpsRule};
pub use draw::draw_parameters;
pub use stamp::{Stamp, check_stamp};

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
    /// The same at the base width.
    #[serde(default)]
    pub base_init_std: Option<f64>,
    /// Factor on the parameter's product in the forward pass; 1 at the base width, α aside.
    #[serde(default = "one")]
    pub multiplier: f64,
    /// Factor on the base learning rate; 0 for what is never trained.
    pub lr: f64,
    /// Factor on the weight decay.
    pub weight_decay: f64,
    /// Factor on Adam's epsilon.
    #[serde(default = "one")]
    pub eps: f64,
}

fn one() -> f64 {
    1.0
}

/// The parameterisation of a model, saved with every checkpoint and engine.
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
    /// What was chosen where two conventions are in use.
    #[serde(default)]
    pub conventions: Conventions,
    /// One row a parameter, in order of declaration.
    pub parameters: Vec<MupRow>,
}

impl MupTable {
    /// The table of a model whose parameters `graph` declares, under the default [`Conventions`].
    pub fn new(graph: &Graph, model: &Model) -> Self {
        let base_width = model.mup.map_or(model.network.width(), |mup| mup.base_width);
        let rows = graph.parameters().iter().enumerate().map(|(i, p)| row(p, graph.role(i), model));
        let table = Self {
            enabled: model.mup.is_some(),
            width: model.network.width(),
            base_width,
            output_multiplier: model.mup.map_or(1.0, |mup| mup.output_multiplier),
            conventions: Conventions::default(),
            parameters: rows.collect(),
        };
        table.with_conventions(Conventions::default())
    }

    /// The same table under other conventions.
    #[must_use]
    pub fn with_conventions(mut self, conventions: Conventions) -> Self {
        let m = self.width_multiplier();
        for row in &mut self.parameters {
            row.weight_decay = conventions.weight_decay.factor(row.role, m);
            row.eps = conventions.eps.factor(row.role, m);
        }
        self.conventions = conventions;
        self
    }

    /// The same table with all random first values times `scale`, muP's σ.
    #[must_use]
    pub fn with_init_scale(mut self, scale: f64) -> Self {
        for row in &mut self.parameters {
            row.init_std = row.init_std.map(|std| std * scale);
            row.base_init_std = row.base_init_std.map(|std| std * scale);
        }
        self
    }

    /// m = width / base width; 1 under the standard parameterisation.
    pub fn width_multiplier(&self) -> f64 {
        self.width as f64 / self.base_width as f64
    }

    /// Learning rate and weight decay of each entry of `gradients`, in layout order.
    pub fn rates(&self, gradients: &ArenaLayout, lr: f64, weight_decay: f64) -> (Vec<f64>, Vec<f64>) {
        (self.pick(gradients, |row| row.lr * lr), self.pick(gradients, |row| row.weight_decay * weight_decay))
    }

    /// Adam's epsilon of each entry of `gradients`, in layout order.
    pub fn epsilons(&self, gradients: &ArenaLayout, eps: f64) -> Vec<f64> {
        self.pick(gradients, |row| row.eps * eps)
    }

    fn pick(&self, gradients: &ArenaLayout, of: impl Fn(&MupRow) -> f64) -> Vec<f64> {
        let row = |name: &str| self.parameters.iter().find(|row| row.name == name);
        gradients.entries().keys().map(|name| row(name).map_or(0.0, &of)).collect()
    }
}

fn row(parameter: &Parameter, role: Role, model: &Model) -> MupRow {
    let m = model.width_multiplier();
    let sizes: Vec<f64> = parameter.dims.iter().map(|d| d.size() as f64).collect();
    let at_base = |d: &Dim| match d {
        Dim::Fixed(n) => *n as f64,
        Dim::Width(n) => *n as f64 / m,
    };
    let base_sizes: Vec<f64> = parameter.dims.iter().map(at_base).collect();
    MupRow {
        name: parameter.name.clone(),
        shape: parameter.shape().0,
        role,
        init_std: draw::init_std(&parameter.init, &sizes),
        base_init_std: draw::init_std(&parameter.init, &base_sizes),
        multiplier: if role == Role::Output {
            model.mup.map_or(1.0, |mup| mup.output_multiplier) / m
        } else {
            1.0
        },
        lr: match role {
            _ if !parameter.trainable => 0.0,
            Role::Hidden => 1.0 / m,
            _ => 1.0,
        },
        weight_decay: 1.0,
        eps: 1.0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use models::{MupConfig, ProgramKind, ProgramSpec};
    use runtime::Arena;

    use super::*;

    fn model(width: usize) -> Model {
        let text = format!(
            r#"{{"model":"dit","input_size":8,"patch_size":2,"in_channels":4,"hidden_size":{width},"depth":1,"num_heads":2,"num_classes":10}}"#
        );
        let mut model = Model::from_json(&text).unwrap();
        model.init = models::InitScheme::Mup;
        model.mup = Some(MupConfig { base_width: 16, output_multiplier: 1.0 });
        model
    }

    fn rows(width: usize) -> MupTable {
        let graph = model(width).program(&ProgramSpec::new(ProgramKind::Loss, 1)).unwrap();
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
        let graph = model(64).program(&ProgramSpec::new(ProgramKind::Loss, 1)).unwrap();
        let entries = graph.parameters().iter().map(|p| (p.name.clone(), p.shape()));
        let layout = Arc::new(ArenaLayout::new(entries).unwrap());
        let mut arena = Arena::zeros(layout).unwrap();
        draw_parameters(&graph, 7, 1.0, &mut arena).unwrap();
        for row in rows(64).parameters.iter().filter(|r| r.name.ends_with("weight")) {
            let values = arena.view(&row.name).unwrap();
            let std =
                (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
            let expected = row.init_std.unwrap();
            assert!((std - expected).abs() <= 0.12 * expected, "{}: {std} for {expected}", row.name);
        }
    }

    #[test]
    fn the_base_width_has_the_spread_that_its_own_table_says() {
        let (wide, base) = (rows(64), rows(16));
        for (wide, base) in wide.parameters.iter().zip(&base.parameters) {
            assert_eq!(wide.base_init_std, base.init_std, "{}", wide.name);
            assert_eq!((base.multiplier, base.eps), (1.0, 1.0), "{}", base.name);
        }
        let factor = |t: &MupTable| t.parameters.iter().find(|r| r.role == Role::Output).unwrap().multiplier;
        assert_eq!(factor(&wide), 0.25);
    }

    #[test]
    fn conventions_change_decay_and_epsilon_only() {
        let other = Conventions { weight_decay: DecayRule::Constant, eps: EpsRule::Scaled };
        let (table, changed) = (rows(64), rows(64).with_conventions(other));
        for (row, new) in table.parameters.iter().zip(&changed.parameters) {
            assert_eq!((row.lr, row.multiplier), (new.lr, new.multiplier));
            assert_eq!((new.weight_decay, row.eps), (1.0, 1.0));
            assert_eq!(new.eps, if row.role == Role::Scalar { 1.0 } else { 0.25 }, "{}", row.name);
        }
        let text = serde_json::to_string(&changed).unwrap();
        assert_eq!(serde_json::from_str::<MupTable>(&text).unwrap(), changed);
    }
}
