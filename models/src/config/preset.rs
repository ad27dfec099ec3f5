//! The published presets by name, with overrides, and the way from a model's name to its configuration.

use std::{fs, path::Path};

use super::{DitConfig, InitScheme, Objective};
use crate::{error::ModelError, nearest::hint};

/// The twelve published configurations, for 32 × 32 × 4 latents and 1000 classes.
pub const PRESETS: [&str; 12] = [
    "DiT-S/2", "DiT-S/4", "DiT-S/8", "DiT-B/2", "DiT-B/4", "DiT-B/8", "DiT-L/2", "DiT-L/4", "DiT-L/8",
    "DiT-XL/2", "DiT-XL/4", "DiT-XL/8",
];

impl DitConfig {
    /// A published configuration by its name, one of [`PRESETS`].
    ///
    /// # Source
    /// Peebles and Xie 2023, table 1.
    pub fn preset(name: &str) -> Option<Self> {
        if !PRESETS.contains(&name) {
            return None;
        }
        let (size, patch) = name.strip_prefix("DiT-")?.split_once('/')?;
        let (depth, hidden_size, num_heads) = match size {
            "S" => (12, 384, 6),
            "B" => (12, 768, 12),
            "L" => (24, 1024, 16),
            "XL" => (28, 1152, 16),
            _ => return None,
        };
        Some(Self {
            input_size: 32,
            patch_size: patch.parse().ok()?,
            in_channels: 4,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio: 4.0,
            class_dropout_prob: 0.1,
            num_classes: 1000,
            learn_sigma: true,
            objective: Objective::Ddpm,
            init: InitScheme::Dit,
            mup: None,
            class_names: None,
        })
    }

    /// The configuration that `text` names: a preset, with overrides if wanted, a `.json` file, or a directory that
    /// holds a `config.json`.
    ///
    /// Overrides follow the preset as `@HEIGHTxWIDTHxCHANNELS` for the latent and `:CLASSES`:
    /// `DiT-S/2@8x8x4:10`. Height and width are equal.
    ///
    /// # Errors
    /// [`ModelError::UnknownModel`], [`ModelError::BadOverride`], [`ModelError::ReadConfig`],
    /// [`ModelError::InFile`] around the faults of [`DitConfig::from_json`], and those of [`DitConfig::validate`].
    pub fn resolve(text: &str) -> Result<Self, ModelError> {
        let path = Path::new(text);
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            return read(path);
        }
        let name = text.find(['@', ':']).map_or(text, |end| &text[..end]);
        if let Some(preset) = Self::preset(name) {
            return overridden(preset, text, &text[name.len()..]);
        }
        if path.is_dir() {
            return read(&path.join("config.json"));
        }
        Err(ModelError::UnknownModel { text: text.to_owned(), hint: hint(name, &PRESETS) })
    }
}

fn overridden(mut config: DitConfig, text: &str, overrides: &str) -> Result<DitConfig, ModelError> {
    let bad = |reason: String| ModelError::BadOverride { text: text.to_owned(), reason };
    let count = |part: &str| part.parse::<usize>().map_err(|_| bad(format!("\"{part}\" is no whole number")));
    let (latent, classes) = match overrides.split_once(':') {
        Some((latent, classes)) => (latent, Some(classes)),
        None => (overrides, None),
    };
    if let Some(classes) = classes {
        config.num_classes = count(classes)?;
    }
    if !latent.is_empty() {
        let Some(latent) = latent.strip_prefix('@') else {
            return Err(bad(format!("\"{latent}\" is no override")));
        };
        let (height, width, channels) = match latent.split('x').collect::<Vec<_>>()[..] {
            [height, width] => (count(height)?, count(width)?, config.in_channels),
            [height, width, channels] => (count(height)?, count(width)?, count(channels)?),
            _ => return Err(bad(format!("\"{latent}\" is no latent size"))),
        };
        if height != width {
            return Err(bad(format!("height {height} and width {width} differ; latents are square")));
        }
        (config.input_size, config.in_channels) = (height, channels);
    }
    config.validate()?;
    Ok(config)
}

fn read(path: &Path) -> Result<DitConfig, ModelError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ModelError::ReadConfig { path: path.to_owned(), source })?;
    DitConfig::from_json(&text)
        .map_err(|source| ModelError::InFile { path: path.to_owned(), source: Box::new(source) })
}
