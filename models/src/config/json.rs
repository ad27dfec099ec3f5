//! `config.json`: every key read with its name in the message, every key written in a fixed order.

use serde_json::{Map, Value};

use super::{DitConfig, MupConfig};
use crate::{class_names::composed, error::ModelError, nearest::hint};

const PLACE: &str = "model config";
const REQUIRED: [&str; 7] =
    ["input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"];
const OPTIONAL: [&str; 8] =
    ["model", "mlp_ratio", "class_dropout_prob", "learn_sigma", "objective", "init", "mup", "class_names"];

impl DitConfig {
    /// Reads a `config.json`.
    ///
    /// Of the constructor's keys the sizes are required; `mlp_ratio` is 4, `class_dropout_prob` 0.1 and
    /// `learn_sigma` true for `ddpm` and false for `flow` where they are left out.
    ///
    /// # Errors
    /// [`ModelError::NotJson`], [`ModelError::UnknownKey`], [`ModelError::MissingKeys`], [`ModelError::WrongType`]
    /// and those of [`DitConfig::validate`].
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        match serde_json::from_str(text).map_err(|source| ModelError::NotJson { source })? {
            Value::Object(map) => Self::try_from(map),
            other => Err(wrong_type(PLACE, "an object", &other)),
        }
    }

    /// Writes a `config.json` that [`DitConfig::from_json`] reads back to the same value; the same config gives
    /// the same bytes.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", Value::Object(Map::from(self.clone())))
    }
}

impl TryFrom<Map<String, Value>> for DitConfig {
    type Error = ModelError;

    fn try_from(map: Map<String, Value>) -> Result<Self, ModelError> {
        let fields = Fields { place: PLACE, prefix: "", map: &map };
        fields.check_keys(&REQUIRED, &OPTIONAL)?;
        let family = fields.text("model")?.unwrap_or("dit");
        if family != "dit" {
            return Err(ModelError::BadValue {
                key: "model",
                expected: "\"dit\"".into(),
                got: format!("\"{family}\""),
            });
        }
        let objective = fields.text("objective")?.map(str::parse).transpose()?.unwrap_or_default();
        let config = Self {
            input_size: fields.size("input_size")?,
            patch_size: fields.size("patch_size")?,
            in_channels: fields.size("in_channels")?,
            hidden_size: fields.size("hidden_size")?,
            depth: fields.size("depth")?,
            num_heads: fields.size("num_heads")?,
            mlp_ratio: fields.number("mlp_ratio")?.unwrap_or(4.0),
            class_dropout_prob: fields.number("class_dropout_prob")?.unwrap_or(0.1),
            num_classes: fields.size("num_classes")?,
            learn_sigma: fields.truth("learn_sigma")?.unwrap_or(objective == super::Objective::Ddpm),
            objective,
            init: fields.text("init")?.map(str::parse).transpose()?.unwrap_or_default(),
            mup: fields.mup()?,
            class_names: fields
                .texts("class_names")?
                .map(|names| names.iter().map(|n| composed(n)).collect()),
        };
        config.validate()?;
        Ok(config)
    }
}

impl From<DitConfig> for Map<String, Value> {
    fn from(config: DitConfig) -> Self {
        let mut map = Self::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("model", "dit".into());
        put("input_size", config.input_size.into());
        put("patch_size", config.patch_size.into());
        put("in_channels", config.in_channels.into());
        put("hidden_size", config.hidden_size.into());
        put("depth", config.depth.into());
        put("num_heads", config.num_heads.into());
        put("mlp_ratio", config.mlp_ratio.into());
        put("class_dropout_prob", config.class_dropout_prob.into());
        put("num_classes", config.num_classes.into());
        put("learn_sigma", config.learn_sigma.into());
        put("objective", config.objective.name().into());
        put("init", config.init.name().into());
        if let Some(MupConfig { base_width, output_multiplier }) = config.mup {
            put(
                "mup",
                serde_json::json!({ "base_width": base_width, "output_multiplier": output_multiplier }),
            );
        }
        if let Some(names) = config.class_names {
            put("class_names", names.into());
        }
        map
    }
}

/// One JSON object, read key by key; an absent key and `null` are the same.
struct Fields<'a> {
    place: &'static str,
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn check_keys(&self, required: &[&'static str], optional: &[&'static str]) -> Result<(), ModelError> {
        let known: Vec<&str> = required.iter().chain(optional).copied().collect();
        if let Some(key) = self.map.keys().find(|key| !known.contains(&key.as_str())) {
            let hint = hint(key, &known);
            return Err(ModelError::UnknownKey { place: self.place, key: key.clone(), hint });
        }
        let keys: Vec<_> = required.iter().copied().filter(|key| self.get(key).is_none()).collect();
        if keys.is_empty() { Ok(()) } else { Err(ModelError::MissingKeys { place: self.place, keys }) }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong_type(&format!("{}{key}", self.prefix), expected, value))
    }

    /// A required key, whose presence [`Fields::check_keys`] has seen.
    fn size(&self, key: &'static str) -> Result<usize, ModelError> {
        let size = self.read(key, "a whole number", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))?;
        size.ok_or(ModelError::MissingKeys { place: self.place, keys: vec![key] })
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.read(key, "a number", Value::as_f64)
    }

    fn truth(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.read(key, "a text", Value::as_str)
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<String>>, ModelError> {
        self.read(key, "an array of texts", |v| {
            v.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect()
        })
    }

    fn mup(&self) -> Result<Option<MupConfig>, ModelError> {
        let Some(map) = self.read("mup", "an object", Value::as_object)? else { return Ok(None) };
        let fields = Fields { place: "mup of the model config", prefix: "mup.", map };
        fields.check_keys(&["base_width"], &["output_multiplier"])?;
        Ok(Some(MupConfig {
            base_width: fields.size("base_width")?,
            output_multiplier: fields.number("output_multiplier")?.unwrap_or(1.0),
        }))
    }
}

fn wrong_type(key: &str, expected: &'static str, got: &Value) -> ModelError {
    const SHOWN: usize = 60;
    let text = got.to_string();
    let mut got: String = text.chars().take(SHOWN).collect();
    if got.len() < text.len() {
        got.push('…');
    }
    ModelError::WrongType { key: key.to_owned(), expected, got }
}
