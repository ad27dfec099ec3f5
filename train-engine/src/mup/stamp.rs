//! The parameterisation that a weights file was trained under, in the file itself.

use std::collections::BTreeMap;
use std::path::Path;

use models::Model;
use serde::{Deserialize, Serialize};

use crate::error::{Result, TrainError};

/// What a weights file says of its parameterisation: the forward pass and the rates depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Stamp {
    /// Whether muP was in force.
    pub enabled: bool,
    /// Width of the model.
    pub width: usize,
    /// Width at which the rates were tuned; the width itself without muP.
    pub base_width: usize,
    /// Factor α on the output layer.
    pub output_multiplier: f64,
}

impl Stamp {
    /// Key of the metadata of a safetensors file.
    pub const KEY: &str = "mup";

    /// The stamp of a model.
    pub fn of(model: &Model) -> Self {
        Self {
            enabled: model.mup.is_some(),
            width: model.network.width(),
            base_width: model.mup.map_or(model.network.width(), |mup| mup.base_width),
            output_multiplier: model.mup.map_or(1.0, |mup| mup.output_multiplier),
        }
    }

    /// The metadata of a weights file of this parameterisation.
    ///
    /// # Errors
    /// [`TrainError::Internal`]; none in practice.
    pub fn metadata(self) -> Result<BTreeMap<String, String>> {
        let text = serde_json::to_string(&self)
            .map_err(|e| TrainError::Internal(format!("a muP stamp does not serialise: {e}")))?;
        Ok(BTreeMap::from([(Self::KEY.to_owned(), text)]))
    }

    fn words(self) -> String {
        if self.enabled {
            format!(
                "muP with base width {} and output multiplier {} at width {}",
                self.base_width, self.output_multiplier, self.width
            )
        } else {
            format!("the standard parameterisation at width {}", self.width)
        }
    }
}

/// Refuses a weights file that was trained under another parameterisation than `model` computes with. A file without
/// a stamp, such as a published one, passes.
///
/// # Errors
/// [`TrainError::OtherParameterisation`].
pub fn check_stamp(metadata: &BTreeMap<String, String>, model: &Model, file: &Path) -> Result<()> {
    let Some(text) = metadata.get(Stamp::KEY) else { return Ok(()) };
    let Ok(saved) = serde_json::from_str::<Stamp>(text) else { return Ok(()) };
    let wanted = Stamp::of(model);
    // Without muP the base width is the width and the multiplier 1, which is muP at its base width.
    let same =
        |a: Stamp, b: Stamp| (a.base_width, a.output_multiplier) == (b.base_width, b.output_multiplier);
    if saved.width != wanted.width || same(saved, wanted) {
        return Ok(()); // another width is told by the shapes
    }
    Err(TrainError::OtherParameterisation {
        path: file.to_path_buf(),
        saved: saved.words(),
        wanted: wanted.words(),
        saved_scale: saved.output_multiplier * saved.base_width as f64 / saved.width as f64,
        wanted_scale: wanted.output_multiplier * wanted.base_width as f64 / wanted.width as f64,
    })
}

#[cfg(test)]
mod tests {
    use models::MupConfig;

    use super::*;

    fn model(mup: Option<(usize, f64)>) -> Model {
        let mut model = Model::preset("DiT-S/8").unwrap();
        model.mup = mup.map(|(base_width, output_multiplier)| MupConfig { base_width, output_multiplier });
        model
    }

    #[test]
    fn another_base_width_is_refused_with_the_reason() {
        let stamped = |m: &Model| Stamp::of(m).metadata().unwrap();
        let check = |saved, wanted| check_stamp(&stamped(&model(saved)), &model(wanted), Path::new("w"));
        for (saved, wanted) in [
            (Some((96, 1.0)), Some((192, 1.0))),
            (Some((96, 1.0)), Some((96, 2.0))),
            (Some((96, 1.0)), None),
            (None, Some((96, 1.0))),
        ] {
            assert!(check(saved, wanted).is_err(), "{saved:?} {wanted:?}");
        }
        let text = check(Some((96, 1.0)), Some((192, 1.0))).unwrap_err().to_string();
        for part in ["`w`", "base width 96", "base width 192", "0.25", "0.5", "--fold-output-multiplier"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        check(Some((96, 1.0)), Some((96, 1.0))).unwrap();
        check(Some((384, 1.0)), None).unwrap();
        check_stamp(&BTreeMap::new(), &model(None), Path::new("w")).unwrap();
    }
}
