//! A run that begins with another's weights: `train.from`.

use std::path::{Path, PathBuf};

use models::{Classes, Model};
use runtime::safetensors_file::SafetensorsReader;
use runtime::{Arena, RuntimeError};
use serde::{Deserialize, Serialize};

use super::Trainer;
use crate::checkpoint::{self, CONFIG_FILE, EMA_FILE, MODEL_FILE};
use crate::error::{Result, TrainError};
use crate::mup::{check_stamp, draw_parameters};

/// The one table with a row for each class.
const LABELS: &str = "y_embedder.embedding_table.weight";

/// Where a run's first parameters came from, as its state tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// `train.from` as given.
    pub from: PathBuf,
    /// The weights file that this meant.
    pub file: PathBuf,
    /// Its SHA-256.
    pub sha256: String,
}

/// Weights to begin with: a file and, where it lies beside, what it is a model of.
#[derive(Debug)]
pub(super) struct Start {
    from: PathBuf,
    file: PathBuf,
    model: Option<Model>,
}

impl Start {
    /// What `train.from` means.
    ///
    /// # Errors
    /// [`TrainError::BadCheckpoint`] for a directory without weights; [`TrainError::Io`] for nothing at all.
    pub(super) fn find(from: &Path, warn: &dyn Fn(&str)) -> Result<Self> {
        let is_directory = from.metadata().map_err(TrainError::io("read", from))?.is_dir();
        let (directory, file) = if is_directory {
            let directory = checkpoint::find(from, warn)?;
            let average = directory.join(EMA_FILE);
            let file = if average.is_file() { average } else { directory.join(MODEL_FILE) };
            (directory, file)
        } else {
            (from.parent().unwrap_or(Path::new("")).to_path_buf(), from.to_path_buf())
        };
        let config = directory.join(CONFIG_FILE);
        let model = config.is_file().then(|| Model::resolve(&config.display().to_string())).transpose()?;
        Ok(Self { from: from.to_path_buf(), file, model })
    }

    /// The rows of the label table that are taken over, as (own, theirs); none where all are.
    fn label_rows(&self, model: &Model, theirs: usize) -> Option<Vec<(usize, usize)>> {
        let own = model.conditioning().classes().map_or(0, Classes::rows);
        let names = |model: &Model| model.class_names.clone();
        let both = names(model).zip(self.model.as_ref().and_then(names));
        let same_names = both.as_ref().is_none_or(|(own, theirs)| own == theirs);
        if own == theirs && same_names {
            return None;
        }
        let (own_names, their_names) = both.unwrap_or_default();
        let by_name = own_names
            .iter()
            .enumerate()
            .filter_map(|(row, name)| Some((row, their_names.iter().position(|other| other == name)?)));
        let mut rows: Vec<(usize, usize)> = by_name.filter(|(_, row)| *row < theirs).collect();
        let null = self
            .model
            .as_ref()
            .and_then(|model| model.conditioning().null_class())
            .filter(|row| *row < theirs);
        rows.extend(model.conditioning().null_class().zip(null));
        Some(rows)
    }
}

impl Trainer {
    /// Replaces the first parameters by those of `start`: the average follows them, the moments are zero. What the user
    /// should know of it goes to `warn`.
    ///
    /// # Errors
    /// [`TrainError::Runtime`] for a file of another model; [`TrainError::OtherParameterisation`].
    pub(super) fn start_from(&mut self, start: &Start, warn: &mut dyn FnMut(&str)) -> Result<Origin> {
        let model = self.model.clone();
        let mut file = SafetensorsReader::open(&start.file)?;
        check_stamp(&file.metadata(), &model, &start.file)?;
        if let Some(other) = start.model.as_ref().filter(|other| other.objective != model.objective) {
            warn(&format!(
                "`{}` was trained for `{}`, and this run is for `{}`",
                start.file.display(),
                other.objective,
                model.objective
            ));
        }
        let parameters = self.state.parameters().clone();
        let width = model.network.width();
        let theirs = file.shape(LABELS).ok().filter(|shape| shape.dims().get(1) == Some(&width));
        let theirs = theirs.map(|shape| shape.dims()[0]);
        let rows = theirs.and_then(|theirs| start.label_rows(&model, theirs));
        if let Some(name) = file.names().find(|name| !parameters.entries().contains_key(*name)) {
            let (place, name) = (start.file.display().to_string(), name.to_owned());
            return Err(RuntimeError::UnexpectedTensor { place, name, nearest: None }.into());
        }
        for (name, entry) in parameters.entries() {
            if name != LABELS || rows.is_none() {
                file.expect_shape(name, &entry.shape)?;
            }
        }
        let declared = super::declarations(&model)?;
        let (seed, scale) = (self.config.train.seed, self.config.mup.init_scale);
        self.state.begin(&mut |values: &mut Arena| {
            draw_parameters(&declared, seed, scale, values)?;
            for name in parameters.entries().keys() {
                let (Some(rows), true) = (&rows, name == LABELS) else {
                    file.read_f32_into(name, values.view_mut(name)?)?;
                    continue;
                };
                let mut table = vec![0.0; theirs.unwrap_or(0) * width];
                file.read_f32_into(name, &mut table)?;
                let own = values.view_mut(name)?;
                for (to, from) in rows {
                    own[to * width..][..width].copy_from_slice(&table[from * width..][..width]);
                }
            }
            Ok(())
        })?;
        if let Some(rows) = rows {
            let kept = rows.iter().filter(|(row, _)| *row < model.conditioning().class_count()).count();
            warn(&format!(
                "`{}` has other classes: {kept} of {} rows of the label table are taken over by name, the others are \
                 drawn anew",
                start.file.display(),
                model.conditioning().class_count()
            ));
        }
        let sha256 = runtime::file::sha256_file(&start.file)?;
        Ok(Origin { from: start.from.clone(), file: start.file.clone(), sha256 })
    }
}
