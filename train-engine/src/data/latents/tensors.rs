//! Latents in a `.safetensors` file.

use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;

use super::rows::Rows;
use super::{Classes, Parts, Posterior};
use crate::error::{Result, TrainError};
use crate::tensor_file::{TensorEntry, TensorFile};

/// Opens a file and checks names, types and shapes.
pub(super) fn open(path: &Path) -> Result<Parts> {
    let file = Arc::new(TensorFile::open(path)?);
    let check = Check { path, file: &file };
    let mean = check.latents("latents", None)?;
    let shape = mean.shape.clone();
    let std = check.optional("std", &shape)?;
    let rows = |entry| Rows::tensor(&file, entry);
    let flipped = match check.optional("latents_flipped", &shape)? {
        None => None,
        Some(mean) => {
            let flipped_std = check.optional("std_flipped", &shape)?;
            if flipped_std.is_some() != std.is_some() {
                let expected = "`std` and `std_flipped` together or neither";
                return Err(TrainError::bad_file(path, "tensors", expected, "one of the two"));
            }
            let std = flipped_std.map(rows);
            Some(Posterior { mean: rows(mean), std })
        }
    };
    let labels = check.labels(shape[0])?;
    let plain = Posterior { mean: rows(mean), std: std.map(rows) };
    let classes = check.number("num_classes")?.map_or(Classes::ByLabels, Classes::Number);
    Ok(Parts { plain, flipped, labels, scale: check.number("scale")?.unwrap_or(1.0), classes })
}

struct Check<'a> {
    path: &'a Path,
    file: &'a TensorFile,
}

impl Check<'_> {
    /// A float tensor `(M, C, H, W)`, of the given shape where one is given.
    fn latents(&self, name: &str, shape: Option<&[usize]>) -> Result<TensorEntry> {
        let tensor = self.file.entry(name)?;
        let bad = |what: &str, expected: String, got: String| {
            Err(TrainError::bad_file(self.path, format!("{what} of `{name}`"), expected, got))
        };
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return bad("element type", "F32, F16 or BF16".into(), format!("{:?}", tensor.dtype));
        }
        match shape {
            Some(shape) if shape != tensor.shape => {
                bad("shape", format!("{shape:?}, as `latents` has"), format!("{:?}", tensor.shape))
            }
            None if tensor.shape.len() != 4 || tensor.shape.contains(&0) => {
                bad("shape", "(M, C, H, W), none of them 0".into(), format!("{:?}", tensor.shape))
            }
            _ => Ok(tensor),
        }
    }

    fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<TensorEntry>> {
        self.file.has(name).then(|| self.latents(name, Some(shape))).transpose()
    }

    fn labels(&self, count: usize) -> Result<Vec<i64>> {
        let tensor = self.file.entry("labels")?;
        if tensor.dtype != Dtype::I64 || tensor.shape != [count] {
            let got = format!("{:?} {:?}", tensor.dtype, tensor.shape);
            return Err(TrainError::bad_file(self.path, "`labels`", format!("I64 [{count}]"), got));
        }
        let bytes = self.file.read_rows(&tensor, 0, count)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect())
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.file.note(key) else { return Ok(None) };
        let number = text.trim().parse().map_err(|_| {
            TrainError::bad_file(self.path, format!("metadata `{key}`"), "a number", format!("`{text}`"))
        });
        number.map(Some)
    }
}
