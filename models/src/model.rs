//! What everybody else holds of a model: its network, what it is trained to predict, how it is parameterised, the names of
//! its classes.
//!
//! The keys are those of the official constructors, so that a published `config.json` reads as it stands; mudit's own keys
//! (`objective`, `init`, `mup`, `class_names`) are optional.

use std::{fmt, fs, path::Path, str::FromStr};

use graph_builder::Parameter;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::class_names::composed;
use crate::condition::Conditioning;
use crate::error::ModelError;
use crate::fields::{Fields, check, check_sizes, wrong_type};
use crate::nearest::{by_name, hint};
use crate::network::{Latent, Network};
use crate::objective::Objective;
use crate::programs::{ProgramKind, ProgramSpec};

/// How the parameters start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum InitScheme {
    /// The original: Xavier-uniform linears and adaLN-Zero.
    #[default]
    Original,
    /// That of the muP experiments: `N(0, 1/fan_in)` everywhere but in the output layer, which is 0.
    Mup,
}

impl InitScheme {
    const NAMES: [(&'static str, Self); 2] = [("dit", Self::Original), ("mup", Self::Mup)];

    /// The name in `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Original => "dit",
            Self::Mup => "mup",
        }
    }
}

impl fmt::Display for InitScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
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
    /// The width of the base.
    pub base_width: usize,
    /// `α`: the output layer computes `W·(α·x/m) + b`.
    pub output_multiplier: f64,
}

/// A model.
///
/// Fields may be set freely; [`Model::validate`] says whether they make one. Reading one, from JSON or a preset, has
/// validated it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct Model {
    /// The network, of one of the families.
    pub network: Network,
    /// What it is trained to predict.
    pub objective: Objective,
    /// How its parameters start.
    pub init: InitScheme,
    /// The maximal-update parameterisation; `None` is the standard one.
    pub mup: Option<MupConfig>,
    /// A name for each class.
    pub class_names: Option<Vec<String>>,
}

const PLACE: &str = "model config";
const OWN: &[&str] = &["model", "objective", "init", "mup", "class_names"];

impl Model {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`ModelError::NotJson`], [`ModelError::UnknownKey`], [`ModelError::MissingKeys`], [`ModelError::WrongType`]
    /// and those of [`Model::validate`].
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        match serde_json::from_str(text).map_err(|source| ModelError::NotJson { source })? {
            Value::Object(map) => Self::try_from(map),
            other => Err(wrong_type(PLACE, "an object", &other)),
        }
    }

    /// Writes a `config.json` that [`Model::from_json`] reads back to the same value; the same model gives the same
    /// bytes.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", Value::Object(self.keys()))
    }

    /// The keys of its `config.json`, in the order in which they are written.
    pub fn keys(&self) -> Map<String, Value> {
        let mut map = Map::new();
        self.network.write(&mut map);
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("objective", self.objective.name().into());
        put("init", self.init.name().into());
        if let Some(MupConfig { base_width, output_multiplier }) = self.mup {
            put(
                "mup",
                serde_json::json!({ "base_width": base_width, "output_multiplier": output_multiplier }),
            );
        }
        if let Some(names) = &self.class_names {
            put("class_names", names.clone().into());
        }
        map
    }

    /// The keys of a family's constructor that images of a size and their number of classes fix; of the default family where
    /// `family` is `None`.
    ///
    /// # Errors
    /// [`ModelError::BadValue`] for an unknown family, and for images that it cannot take.
    pub fn fixed_by_data(
        family: Option<&str>,
        latent: Latent,
        classes: usize,
    ) -> Result<Map<String, Value>, ModelError> {
        Network::fixed_by_data(family, latent, classes)
    }

    /// A published model by its name, one of [`Network::presets`].
    pub fn preset(name: &str) -> Option<Self> {
        Network::preset(name).map(|network| Self {
            network,
            objective: Objective::default(),
            init: InitScheme::default(),
            mup: None,
            class_names: None,
        })
    }

    /// The model that `text` names: a preset, with overrides if wanted, a `.json` file, or a directory that holds a
    /// `config.json`.
    ///
    /// Overrides follow the preset as `@HEIGHTxWIDTHxCHANNELS` for the latent and `:CLASSES`: `DiT-S/2@8x8x4:10`.
    ///
    /// # Errors
    /// [`ModelError::UnknownModel`], [`ModelError::BadOverride`], [`ModelError::ReadConfig`], [`ModelError::InFile`]
    /// around the faults of [`Model::from_json`], and those of [`Model::validate`].
    pub fn resolve(text: &str) -> Result<Self, ModelError> {
        let path = Path::new(text);
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            return read(path);
        }
        let name = text.find(['@', ':']).map_or(text, |end| &text[..end]);
        if let Some(preset) = Self::preset(name) {
            return overridden(&preset, text, &text[name.len()..]);
        }
        if path.is_dir() {
            return read(&path.join("config.json"));
        }
        Err(ModelError::UnknownModel { text: text.to_owned(), hint: hint(name, &Network::presets()) })
    }

    /// Checks that the fields make a model.
    ///
    /// # Errors
    /// [`ModelError::BadValue`], for the first field that does not fit, with what it would have to be.
    pub fn validate(&self) -> Result<(), ModelError> {
        self.network.validate()?;
        if let Some(MupConfig { base_width, output_multiplier: alpha }) = self.mup {
            check_sizes(&[("mup.base_width", base_width)])?;
            check(alpha.is_finite() && alpha > 0.0, "mup.output_multiplier", alpha, || {
                "positive and finite".into()
            })?;
        }
        if let Some(names) = &self.class_names {
            let classes = self.conditioning().class_count();
            check(names.len() == classes, "class_names", format!("{} names", names.len()), || {
                format!("one name for each of num_classes {classes}")
            })?;
        }
        Ok(())
    }

    /// What is denoised.
    pub fn latent(&self) -> Latent {
        self.network.latent()
    }

    /// What it is conditioned on.
    pub fn conditioning(&self) -> Conditioning {
        self.network.conditioning()
    }

    /// Whether its answer holds variance logits, in as many channels again.
    pub fn learns_variance(&self) -> bool {
        self.network.out_channels() > self.latent().channels
    }

    /// `m`, the width over that of the base; 1 under the standard parameterisation.
    pub fn width_multiplier(&self) -> f64 {
        self.mup.map_or(1.0, |mup| self.network.width() as f64 / mup.base_width as f64)
    }

    /// Every parameter, in the order of its declaration.
    ///
    /// # Errors
    /// As [`Model::program`].
    pub fn parameters(&self) -> Result<Vec<Parameter>, ModelError> {
        Ok(self.program(&ProgramSpec::new(ProgramKind::Denoise, 1))?.parameters().to_vec())
    }
}

impl TryFrom<Map<String, Value>> for Model {
    type Error = ModelError;

    fn try_from(map: Map<String, Value>) -> Result<Self, ModelError> {
        let fields = Fields::new(PLACE, "", &map);
        let objective = fields.text("objective")?.map(str::parse).transpose()?.unwrap_or_default();
        let model = Self {
            network: Network::read(&fields, OWN, objective)?,
            objective,
            init: fields.text("init")?.map(str::parse).transpose()?.unwrap_or_default(),
            mup: mup(&fields)?,
            class_names: fields
                .texts("class_names")?
                .map(|names| names.iter().map(|name| composed(name)).collect()),
        };
        model.validate()?;
        Ok(model)
    }
}

impl From<Model> for Map<String, Value> {
    fn from(model: Model) -> Self {
        model.keys()
    }
}

fn mup(fields: &Fields<'_>) -> Result<Option<MupConfig>, ModelError> {
    let Some(map) = fields.object("mup")? else { return Ok(None) };
    let fields = Fields::new("mup of the model config", "mup.", map);
    fields.check_keys(&["base_width"], &["output_multiplier"])?;
    Ok(Some(MupConfig {
        base_width: fields.size("base_width")?,
        output_multiplier: fields.number("output_multiplier")?.unwrap_or(1.0),
    }))
}

fn overridden(preset: &Model, text: &str, overrides: &str) -> Result<Model, ModelError> {
    let bad = |reason: String| ModelError::BadOverride { text: text.to_owned(), reason };
    let count = |part: &str| part.parse::<usize>().map_err(|_| bad(format!("\"{part}\" is no whole number")));
    let (size, classes) = match overrides.split_once(':') {
        Some((size, classes)) => (size, Some(count(classes)?)),
        None => (overrides, None),
    };
    let mut latent = preset.latent();
    if !size.is_empty() {
        let Some(size) = size.strip_prefix('@') else {
            return Err(bad(format!("\"{size}\" is no override")));
        };
        (latent.height, latent.width, latent.channels) = match size.split('x').collect::<Vec<_>>()[..] {
            [height, width] => (count(height)?, count(width)?, latent.channels),
            [height, width, channels] => (count(height)?, count(width)?, count(channels)?),
            _ => return Err(bad(format!("\"{size}\" is no latent size"))),
        };
    }
    let classes = classes.unwrap_or_else(|| preset.conditioning().class_count());
    let mut keys = preset.keys();
    keys.extend(Network::fixed_by_data(Some(preset.network.name()), latent, classes)?);
    Model::try_from(keys)
}

fn read(path: &Path) -> Result<Model, ModelError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ModelError::ReadConfig { path: path.to_owned(), source })?;
    Model::from_json(&text)
        .map_err(|source| ModelError::InFile { path: path.to_owned(), source: Box::new(source) })
}

#[cfg(test)]
mod tests;
