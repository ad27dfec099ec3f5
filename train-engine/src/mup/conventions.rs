//! Choices on which implementations of muP differ, by name.

use std::fmt;

use graph_builder::Role;
use models::InitScheme;
use serde::{Deserialize, Serialize};

use super::MupTable;
use crate::config::TrainConfig;

/// How the decoupled weight decay of hidden weights goes with the width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecayRule {
    /// Decay · m, so that rate · decay does not depend on the width, as the published muP package does.
    #[default]
    Scaled,
    /// The decay of the base width, so that rate · decay falls with the rate, as AdamW by itself does.
    Constant,
}

/// How Adam's epsilon goes with the width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EpsRule {
    /// The same at every width, as the published muP package leaves it.
    #[default]
    Constant,
    /// Epsilon / m wherever the gradient falls as 1 / m: all parameters with a scaled axis.
    Scaled,
}

impl DecayRule {
    pub(super) fn factor(self, role: Role, m: f64) -> f64 {
        if self == Self::Scaled && role == Role::Hidden { m } else { 1.0 }
    }
}

impl EpsRule {
    pub(super) fn factor(self, role: Role, m: f64) -> f64 {
        if self == Self::Scaled && role != Role::Scalar { 1.0 / m } else { 1.0 }
    }
}

impl fmt::Display for DecayRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scaled => "scaled",
            Self::Constant => "constant",
        })
    }
}

impl fmt::Display for EpsRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Constant => "constant",
            Self::Scaled => "scaled",
        })
    }
}

/// What was chosen where two conventions are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Conventions {
    /// `mup.weight_decay`.
    pub weight_decay: DecayRule,
    /// `mup.eps`.
    pub eps: EpsRule,
}

/// Below this epsilon no gradient of a transformer is so small that it matters.
const NEGLIGIBLE_EPS: f64 = 1e-12;

impl MupTable {
    /// A line for each setting of `config` that another implementation of muP would read differently at this width.
    pub fn warnings(&self, config: &TrainConfig) -> Vec<String> {
        let (train, m) = (&config.train, self.width_multiplier());
        if !self.enabled || m == 1.0 {
            return Vec::new();
        }
        let mut warnings = Vec::new();
        if train.weight_decay > 0.0 {
            warnings.push(format!(
                "two conventions for weight decay under muP: `mup.weight_decay = \"{}\"` is in force, so hidden weights \
                 decay by {} a step at the full rate; `\"{}\"` would give {}",
                self.conventions.weight_decay,
                shown(self.decay_a_step(self.conventions.weight_decay, config)),
                other_decay(self.conventions.weight_decay),
                shown(self.decay_a_step(other_decay(self.conventions.weight_decay), config)),
            ));
        }
        if train.eps > NEGLIGIBLE_EPS {
            let (now, other) = match self.conventions.eps {
                EpsRule::Constant => (train.eps, EpsRule::Scaled),
                EpsRule::Scaled => (train.eps / m, EpsRule::Constant),
            };
            warnings.push(format!(
                "two conventions for Adam's epsilon under muP, whose gradients fall as 1/m (here m = {}): `mup.eps = \
                 \"{}\"` is in force, which is {}; `\"{other}\"` is the other; the theory wants it 0, so a smaller \
                 `train.eps` makes them agree",
                (m * 1e4).round() / 1e4,
                self.conventions.eps,
                shown(now),
            ));
        }
        if config.mup.init == InitScheme::Original {
            warnings.push(
                "two inits under muP: `mup.init = \"dit\"` is the original's (standard and muP agree at the base width, \
                 but the embeddings' spread falls with the width); `\"mup\"` is that of the published muP models"
                    .to_owned(),
            );
        }
        warnings
    }

    fn decay_a_step(&self, rule: DecayRule, config: &TrainConfig) -> f64 {
        let m = self.width_multiplier();
        config.train.learning_rate / m * config.train.weight_decay * rule.factor(Role::Hidden, m)
    }
}

fn other_decay(rule: DecayRule) -> DecayRule {
    match rule {
        DecayRule::Scaled => DecayRule::Constant,
        DecayRule::Constant => DecayRule::Scaled,
    }
}

fn shown(x: f64) -> String {
    format!("{x:.3e}")
}

#[cfg(test)]
mod tests {
    use graph_builder::Graph;
    use models::{Model, MupConfig};

    use super::*;

    fn warnings(width: usize, change: impl Fn(&mut TrainConfig)) -> Vec<String> {
        let mut model = Model::preset("DiT-S/8").unwrap();
        model.network = model.network.resized(width, 64);
        model.mup = Some(MupConfig { base_width: 96, output_multiplier: 1.0 });
        let mut config = TrainConfig::default();
        change(&mut config);
        MupTable::new(&Graph::new("none"), &model).warnings(&config)
    }

    #[test]
    fn a_choice_is_named_where_there_are_two() {
        assert!(warnings(96, |c| c.train.weight_decay = 0.1).is_empty(), "at the base width all agree");
        let found = warnings(384, |c| {
            c.train.weight_decay = 0.1;
            c.train.learning_rate = 1e-2;
            c.mup.init = InitScheme::Original;
        });
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("`mup.weight_decay = \"scaled\"`"), "{}", found[0]);
        assert!(found[0].contains("1.000e-3") && found[0].contains("2.500e-4"), "{}", found[0]);
        assert!(found[1].contains("`mup.eps = \"constant\"`"), "{}", found[1]);
        assert!(found[2].contains("`mup.init = \"dit\"`"), "{}", found[2]);
        assert!(warnings(384, |c| c.train.eps = 1e-15).is_empty());
    }
}
