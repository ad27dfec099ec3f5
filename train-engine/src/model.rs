//! From a run's configuration and its data set to the model that is trained.

use models::{DitConfig, MupConfig, Objective};
use serde_json::Value;

use crate::config::TrainConfig;
use crate::data::Dataset;
use crate::error::{Result, TrainError};

impl TrainConfig {
    /// The model of `[model]`, with the objective and parameterisation of this run, checked against the data.
    ///
    /// Inline constructor keys override those of a preset or a file. Sizes that the data set fixes (`input_size`,
    /// `in_channels`, `num_classes`) may be left out of an inline model.
    ///
    /// # Errors
    /// [`TrainError::Model`], [`TrainError::DataMismatch`], [`TrainError::BadValue`].
    pub fn model_config(&self, data: &dyn Dataset) -> Result<DitConfig> {
        let section = &self.model;
        let base = match (&section.preset, &section.config) {
            (Some(preset), _) => Some(DitConfig::resolve(preset)?),
            (None, Some(path)) => Some(DitConfig::resolve(&path.display().to_string())?),
            (None, None) => None,
        };
        let mut keys = match base {
            Some(model) => serde_json::from_str(&model.to_json()).unwrap_or_default(),
            None => serde_json::Map::from_iter([
                ("input_size".to_owned(), Value::from(data.height())),
                ("in_channels".to_owned(), Value::from(data.channels())),
                ("num_classes".to_owned(), Value::from(data.num_classes())),
                ("learn_sigma".to_owned(), Value::from(self.objective.kind == Objective::Ddpm)),
            ]),
        };
        keys.extend(section.constructor_keys());
        let mut model = DitConfig::from_json(&Value::Object(keys).to_string())?;
        model.objective = self.objective.kind;
        model.init = self.mup.init;
        model.mup = self.mup.enabled.then_some(MupConfig {
            base_width: self.mup.base_width,
            output_multiplier: self.mup.output_multiplier,
        });
        if model.class_names.is_none() && data.class_names().len() == model.num_classes {
            model.class_names = Some(data.class_names().to_vec());
        }
        model.validate()?;
        for (key, model, data) in [
            ("input_size", model.input_size, data.height()),
            ("input_size", model.input_size, data.width()),
            ("in_channels", model.in_channels, data.channels()),
        ] {
            if model != data {
                return Err(TrainError::DataMismatch { key, model, data });
            }
        }
        if data.num_classes() > model.num_classes {
            let (model, data) = (model.num_classes, data.num_classes());
            return Err(TrainError::DataMismatch { key: "num_classes", model, data });
        }
        Ok(model)
    }
}
