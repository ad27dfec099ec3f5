//! What is kept of a step whose loss or gradient is not finite, so that it can be looked into and replayed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use models::Model;
use runtime::HostTensor;
use serde_json::json;

use crate::data::Batch;
use crate::error::{Result, TrainError};
use crate::mup::Stamp;
use crate::step::{StepInputs, StepLoss};
use crate::trainer::{Part, TrainingState};

/// Writes the batch, the parameters before the update, and the size of each gradient below `run_dir`.
///
/// # Errors
/// [`TrainError::Runtime`] when a file cannot be written.
pub(crate) fn save(
    run_dir: &Path,
    state: &dyn TrainingState,
    model: &Model,
    batch: &Batch,
    inputs: &StepInputs<'_>,
    loss: &StepLoss,
    grad_norm: f64,
) -> Result<PathBuf> {
    let directory = run_dir.join(format!("not-finite-step-{:08}", batch.step + 1));
    std::fs::create_dir_all(&directory).map_err(TrainError::io("create", &directory))?;
    // The names that `replay` reads.
    let n = inputs.y.len();
    let image = model.latent().batch(n);
    let mut tensors = IndexMap::new();
    tensors.insert("step0.x0".to_owned(), HostTensor::f32(image, inputs.x0.to_vec())?);
    tensors.insert("step0.noise".to_owned(), HostTensor::f32(image, inputs.noise.to_vec())?);
    tensors.insert("step0.t".to_owned(), HostTensor::f32([n], inputs.t.to_vec())?);
    tensors.insert("step0.y".to_owned(), HostTensor::i64([n], inputs.y.to_vec())?);
    runtime::write_safetensors_file(directory.join("batch.safetensors"), &tensors, &BTreeMap::new())?;
    let stamp = Stamp::of(model).metadata()?;
    state.show(Part::Parameters, &mut |parameters| {
        Ok(parameters.write_safetensors(directory.join("model.safetensors"), &stamp)?)
    })?;
    let mut norms = serde_json::Map::new();
    state.show(Part::Gradients, &mut |gradients| {
        norms.extend(gradients.iter().map(|(name, _, values)| {
            let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            (name.to_owned(), if norm.is_finite() { json!(norm) } else { json!(norm.to_string()) })
        }));
        Ok(())
    })?;
    let report = json!({
        "step": batch.step + 1,
        "images": batch.indices,
        "loss": loss.loss.to_string(),
        "loss.mse": loss.mse.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "loss.vb": loss.vb.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "grad_norm": grad_norm.to_string(),
        "gradient_norms": norms,
    });
    runtime::file::write_atomically(directory.join("report.json"), |out| writeln!(out, "{report:#}"))?;
    Ok(directory)
}
