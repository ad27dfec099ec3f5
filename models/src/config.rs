//! What a diffusion transformer is: its sizes, its objective, how it is initialised and parameterised.
//!
//! The keys are those of the official constructor, so that a published `config.json` reads as it stands; mudit's
//! own keys (`objective`, `init`, `mup`, `class_names`) are optional.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{error::ModelError, nearest::hint};

mod json;
mod preset;

pub use preset::PRESETS;

/// The widest dimension accepted, so that no product of sizes overflows.
const LARGEST: usize = 1 << 20;
/// Most blocks: a graph has some hundred nodes for each.
const DEEPEST: usize = 1 << 12;
/// Most parameters, and most values of a position table or an input: what no machine of today holds.
const MOST_PARAMETERS: u128 = 1 << 40;
const MOST_VALUES: u128 = 1 << 32;

/// What the model is trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Objective {
    /// The noise of a DDPM chain of 1000 linear betas, with a learned variance range where `learn_sigma` is set.
    #[default]
    Ddpm,
    /// The velocity `e − x_0` of a linear flow from data at `t = 0` to noise at `t = 1`.
    Flow,
}

/// How the parameters start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum InitScheme {
    /// The original: Xavier-uniform linears and adaLN-Zero.
    #[default]
    Dit,
    /// That of the muP experiments: `N(0, 1/fan_in)` everywhere but in the output layer, which is 0.
    Mup,
}

impl Objective {
    const NAMES: [(&'static str, Self); 2] = [("ddpm", Self::Ddpm), ("flow", Self::Flow)];

    /// The name in `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ddpm => "ddpm",
            Self::Flow => "flow",
        }
    }
}

impl InitScheme {
    const NAMES: [(&'static str, Self); 2] = [("dit", Self::Dit), ("mup", Self::Mup)];

    /// The name in `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dit => "dit",
            Self::Mup => "mup",
        }
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for InitScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Objective {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        by_name("objective", name, &Self::NAMES)
    }
}

impl FromStr for InitScheme {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        by_name("init", name, &Self::NAMES)
    }
}

/// The maximal-update parameterisation: how the model relates to the base on which its settings were tuned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MupConfig {
    /// The `hidden_size` of the base.
    pub base_width: usize,
    /// `α`: the output layer computes `W·(α·x/m) + b`.
    pub output_multiplier: f64,
}

/// A class-conditional diffusion transformer.
///
/// Fields may be set freely; [`DitConfig::validate`] says whether they make a model. Reading one, from JSON or a
/// preset, has validated it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct DitConfig {
    /// The side of the square latent, in latent pixels.
    pub input_size: usize,
    /// The side of a patch, in latent pixels.
    pub patch_size: usize,
    /// The channels of the latent.
    pub in_channels: usize,
    /// The width `D`.
    pub hidden_size: usize,
    /// The number of blocks.
    pub depth: usize,
    /// The number of attention heads.
    pub num_heads: usize,
    /// The hidden width of the MLP over `hidden_size`.
    pub mlp_ratio: f64,
    /// The probability with which training replaces a label by the null class; at 0 there is no null class.
    pub class_dropout_prob: f64,
    /// The number of classes, without the null class.
    pub num_classes: usize,
    /// Whether the model also predicts the variance, in as many channels again.
    pub learn_sigma: bool,
    /// What the model is trained to predict.
    pub objective: Objective,
    /// How the parameters start.
    pub init: InitScheme,
    /// The maximal-update parameterisation; `None` is the standard one.
    pub mup: Option<MupConfig>,
    /// A name for each class.
    pub class_names: Option<Vec<String>>,
}

impl DitConfig {
    /// The number of patches, `T = (input_size / patch_size)²`.
    pub fn tokens(&self) -> usize {
        let side = self.input_size / self.patch_size;
        side * side
    }

    /// The channels of the model's output: those of the latent, twice over with a learned variance.
    pub fn out_channels(&self) -> usize {
        self.in_channels * if self.learn_sigma { 2 } else { 1 }
    }

    /// The width of one attention head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// The hidden width of the MLP, `hidden_size · mlp_ratio` rounded down.
    pub fn mlp_hidden(&self) -> usize {
        (self.hidden_size as f64 * self.mlp_ratio) as usize
    }

    /// The label that means "no class", if the model has it.
    pub fn null_class(&self) -> Option<usize> {
        (self.class_dropout_prob > 0.0).then_some(self.num_classes)
    }

    /// The rows of the label table: the classes and, if there is one, the null class.
    pub fn label_rows(&self) -> usize {
        self.num_classes + usize::from(self.null_class().is_some())
    }

    /// `m = hidden_size / base_width`; 1 under the standard parameterisation.
    pub fn width_multiplier(&self) -> f64 {
        self.mup.map_or(1.0, |mup| self.hidden_size as f64 / mup.base_width as f64)
    }

    /// Checks that the fields make a model.
    ///
    /// # Errors
    /// [`ModelError::BadValue`], for the first field that does not fit, with what it would have to be.
    pub fn validate(&self) -> Result<(), ModelError> {
        for (key, size) in [
            ("input_size", self.input_size),
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("hidden_size", self.hidden_size),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("num_classes", self.num_classes),
            ("mup.base_width", self.mup.map_or(1, |mup| mup.base_width)),
        ] {
            let most = if key == "depth" { DEEPEST } else { LARGEST };
            check((1..=most).contains(&size), key, size, || format!("within 1..={most}"))?;
        }
        let (d, heads, side, patch) = (self.hidden_size, self.num_heads, self.input_size, self.patch_size);
        check(side.is_multiple_of(patch), "input_size", side, || {
            format!("a multiple of patch_size {patch}")
        })?;
        check(d.is_multiple_of(heads), "hidden_size", d, || format!("a multiple of num_heads {heads}"))?;
        check(d.is_multiple_of(4), "hidden_size", d, || {
            "a multiple of 4, for the sines and cosines of two axes".into()
        })?;
        let hidden = d as f64 * self.mlp_ratio;
        check((1.0..=LARGEST as f64).contains(&hidden), "mlp_ratio", self.mlp_ratio, || {
            format!("such that hidden_size {d} times it is within 1..={LARGEST}")
        })?;
        self.check_amounts()?;
        let dropout = self.class_dropout_prob;
        check((0.0..=1.0).contains(&dropout), "class_dropout_prob", dropout, || "within 0..=1".into())?;
        if let Some(MupConfig { output_multiplier: alpha, .. }) = self.mup {
            check(alpha.is_finite() && alpha > 0.0, "mup.output_multiplier", alpha, || {
                "positive and finite".into()
            })?;
        }
        if let Some(names) = &self.class_names {
            check(names.len() == self.num_classes, "class_names", format!("{} names", names.len()), || {
                format!("one name for each of num_classes {}", self.num_classes)
            })?;
        }
        Ok(())
    }
}

impl DitConfig {
    /// Sizes that are each allowed may be too much together. Whoever builds the model asks for memory by them.
    fn check_amounts(&self) -> Result<(), ModelError> {
        let [d, depth, side, patch, channels, classes, out] = [
            self.hidden_size,
            self.depth,
            self.input_size,
            self.patch_size,
            self.in_channels,
            self.num_classes,
            self.out_channels(),
        ]
        .map(|size| size as u128);
        let (positions, mlp) = ((side / patch).pow(2) * d, self.mlp_hidden() as u128);
        let block = 10 * d * d + 2 * d * mlp;
        let parameters = depth * block + (channels + out) * patch * patch * d + classes * d + positions;
        let too_many = |what: &'static str, most: u128, got: u128, of: String| {
            check(got <= most, what, format!("{got}, from {of}"), || format!("at most {most}"))
        };
        too_many("the number of parameters", MOST_PARAMETERS, parameters, {
            format!("hidden_size {d}, depth {depth}, patch_size {patch} and num_classes {classes}")
        })?;
        too_many("the size of the position table", MOST_VALUES, positions, {
            format!("input_size {side}, patch_size {patch} and hidden_size {d}")
        })?;
        too_many("the number of values of an input", MOST_VALUES, channels * side * side, {
            format!("in_channels {channels} and input_size {side}")
        })
    }
}

fn check(
    holds: bool,
    key: &'static str,
    got: impl fmt::Display,
    expected: impl FnOnce() -> String,
) -> Result<(), ModelError> {
    if holds { Ok(()) } else { Err(ModelError::BadValue { key, expected: expected(), got: got.to_string() }) }
}

fn by_name<T: Copy>(key: &'static str, name: &str, all: &[(&'static str, T)]) -> Result<T, ModelError> {
    let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
    all.iter().find(|(n, _)| *n == name).map(|(_, value)| *value).ok_or_else(|| ModelError::BadValue {
        key,
        expected: names.join(" or "),
        got: format!("\"{name}\" ({})", hint(name, &names)),
    })
}

#[cfg(test)]
mod tests;
