//! From a run's configuration and its data set to the model that is trained.

use models::{Latent, Model, MupConfig};

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
    pub fn model_config(&self, data: &dyn Dataset) -> Result<Model> {
        let section = &self.model;
        let base = match (&section.preset, &section.config) {
            (Some(preset), _) => Some(Model::resolve(preset)?),
            (None, Some(path)) => Some(Model::resolve(&path.display().to_string())?),
            (None, None) => None,
        };
        let latent = Latent { channels: data.channels(), height: data.height(), width: data.width() };
        let mut keys = if let Some(model) = base {
            model.keys()
        } else {
            let mut keys = Model::fixed_by_data(section.model.as_deref(), latent, data.num_classes())?;
            keys.insert("objective".to_owned(), self.objective.kind.name().into());
            keys
        };
        keys.extend(section.constructor_keys());
        let mut model = Model::try_from(keys)?;
        model.objective = self.objective.kind;
        model.init = self.mup.init;
        model.mup = self.mup.enabled.then_some(MupConfig {
            base_width: self.mup.base_width,
            output_multiplier: self.mup.output_multiplier,
        });
        let classes = model.conditioning().class_count();
        if model.class_names.is_none() && data.class_names().len() == classes {
            model.class_names = Some(data.class_names().to_vec());
        }
        model.validate()?;
        let taken = model.latent();
        for (key, model, data) in [
            ("input_size", taken.height, latent.height),
            ("input_size", taken.width, latent.width),
            ("in_channels", taken.channels, latent.channels),
        ] {
            if model != data {
                return Err(TrainError::DataMismatch { key, model, data });
            }
        }
        if data.num_classes() > classes {
            let (model, data) = (classes, data.num_classes());
            return Err(TrainError::DataMismatch { key: "num_classes", model, data });
        }
        Ok(model)
    }
}
