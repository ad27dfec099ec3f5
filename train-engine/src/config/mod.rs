//! A run's configuration: one TOML file and `section.key=value` overrides.
//!
//! Unknown keys are refused with the nearest valid name, values are checked before anything expensive starts, and the
//! resolved configuration can be written back in full.

mod by_name;
mod keys;
mod sections;
mod validate;

use std::fs;
use std::path::{Path, absolute};

use serde::{Deserialize, Serialize};

pub use sections::{
    CheckpointSection, DataKind, DataSection, LogSection, ModelSection, MupSection, ObjectiveSection, Orient,
    SampleSection, Schedule, TimeSampling, TrainSection,
};

use crate::error::{Result, TrainError};

/// Everything a training run is told.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainConfig {
    /// The model.
    pub model: ModelSection,
    /// What is minimised.
    pub objective: ObjectiveSection,
    /// Width transfer.
    pub mup: MupSection,
    /// The images.
    pub data: DataSection,
    /// The optimizer and the length of the run.
    pub train: TrainSection,
    /// When the run is saved.
    pub checkpoint: CheckpointSection,
    /// What is written while training.
    pub log: LogSection,
    /// Pictures drawn while training.
    pub sample: SampleSection,
}

/// Keys that may change when a run is resumed: none of them changes what the steps already done computed.
const FREE_ON_RESUME: [&str; 14] = [
    "train.steps",
    // What it comes to with `train.steps` stands in the checkpoint's state.
    "train.decay_steps",
    "train.from",
    "train.recompute",
    "train.provider",
    "train.threads",
    // A file may move; what it says about the model stands in the checkpoint's own `config.json`.
    "model.config",
    "data.path",
    "data.labels",
    "data.prefetch",
    "data.workers",
    "checkpoint",
    "log",
    "sample",
];

impl TrainConfig {
    /// Reads a TOML file, applies the overrides in their order and checks everything.
    ///
    /// # Errors
    /// [`TrainError::Io`], [`TrainError::ConfigSyntax`], [`TrainError::UnknownKey`], [`TrainError::Override`],
    /// [`TrainError::BadValue`].
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(TrainError::io("read", path))?;
        Self::parse(&text, &format!("`{}`", path.display()), overrides)
    }

    /// [`load`](Self::load) from text; `origin` names it in errors.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| TrainError::ConfigSyntax {
            origin: origin.to_owned(),
            reason: error.to_string().trim_end().to_owned(),
        })?;
        keys::refuse_unknown(&table, origin)?;
        Self::resolve(table, origin, overrides)
    }

    /// The same with every path made absolute, so that it means the same files from any directory.
    ///
    /// # Errors
    /// [`TrainError::Io`] when the system does not tell the working directory.
    pub fn anchored(&self) -> Result<Self> {
        let mut anchored = self.clone();
        let paths = [
            &mut anchored.model.config,
            &mut anchored.data.path,
            &mut anchored.data.labels,
            &mut anchored.train.from,
        ];
        for path in paths.into_iter().flatten() {
            *path = absolute(&*path).map_err(TrainError::io("find", path))?;
        }
        Ok(anchored)
    }

    /// This configuration with overrides on top, checked.
    pub fn with_overrides(&self, overrides: &[String]) -> Result<Self> {
        Self::resolve(self.to_table()?, "the configuration", overrides)
    }

    fn resolve(mut table: toml::Table, origin: &str, overrides: &[String]) -> Result<Self> {
        // Read before the overrides too, so that a wrong type is blamed on where it stands.
        let read = |table: &toml::Table, origin: &str| {
            Self::deserialize(table.clone()).map_err(|error| TrainError::ConfigSyntax {
                origin: origin.to_owned(),
                reason: error.to_string().trim_end().replace('\n', " "),
            })
        };
        let mut config = read(&table, origin)?;
        for given in overrides {
            let origin = format!("`--set {given}`");
            keys::apply_override(&mut table, given, &origin)?;
            config = read(&table, &origin)?;
        }
        config.validate()?;
        Ok(config)
    }

    /// The resolved configuration as TOML: every section, every key that has a value.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(unserialisable)
    }

    /// SHA-256, in hex, of all keys that decide what a step computes (all but those that are free on resume).
    pub fn hash(&self) -> Result<String> {
        let text = toml::to_string(&self.binding()?).map_err(unserialisable)?;
        Ok(runtime::file::sha256_bytes(text.as_bytes()))
    }

    /// The keys that differ from `other` and may not differ when its run is resumed: `key: other's value, own value`.
    pub fn conflicts_with(&self, other: &Self) -> Result<Vec<String>> {
        let (ours, theirs) = (self.binding()?, other.binding()?);
        let mut conflicts = Vec::new();
        for (section, fields) in keys::SECTIONS {
            for field in fields() {
                let value = |table: &toml::Table| {
                    let value = table.get(section).and_then(|keys| keys.get(field));
                    value.map_or_else(|| "unset".to_owned(), ToString::to_string)
                };
                let (own, before) = (value(&ours), value(&theirs));
                if own != before {
                    conflicts.push(format!("{section}.{field}: {before} before, {own} now"));
                }
            }
        }
        Ok(conflicts)
    }

    fn binding(&self) -> Result<toml::Table> {
        let mut table = self.to_table()?;
        for key in FREE_ON_RESUME {
            match key.split_once('.') {
                None => table.remove(key),
                Some((section, key)) => table.get_mut(section).and_then(|v| v.as_table_mut()?.remove(key)),
            };
        }
        Ok(table)
    }

    fn to_table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self).map_err(unserialisable)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "shape of map_err")]
fn unserialisable(error: toml::ser::Error) -> TrainError {
    TrainError::Internal(format!("the configuration does not serialise: {error}"))
}

#[cfg(test)]
mod tests;
