//! A model repository as NVIDIA's Triton server loads it: one model a program and batch size.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use graph_builder::{DType, OnnxProgram, TensorSpec};
use runtime::file::{Placement, place_file, sync_directory, write_atomically};

/// Writes `repository/<program>-b<batch>/{config.pbtxt,1/model.onnx,1/<weights>}` for each program; returns the folders
/// of the models.
///
/// The repository is built beside its place and renamed, so it is whole or absent.
///
/// # Errors
/// `repository` exists, or cannot be written.
pub(super) fn write_repository(
    repository: &Path,
    programs: &[(usize, &OnnxProgram)],
    weights: Option<(&Path, Placement)>,
) -> anyhow::Result<Vec<PathBuf>> {
    ensure!(
        !repository.exists(),
        "`{}` exists; a model repository is written whole: choose another place or remove it",
        repository.display()
    );
    let parent = match repository.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let place = || format!("cannot write `{}`", repository.display());
    fs::create_dir_all(parent).with_context(place)?;
    let work = tempfile::Builder::new().prefix(".triton-").tempdir_in(parent).with_context(place)?;
    let whole = work.path().join("repository");
    let mut names = Vec::new();
    for (batch, program) in programs {
        let name = format!("{}-b{batch}", program.name);
        let version = whole.join(&name).join("1");
        fs::create_dir_all(&version).with_context(place)?;
        write_atomically(version.join("model.onnx"), |w| w.write_all(&program.bytes))?;
        if let (Some(file), Some((source, placement))) = (&program.weights_file, weights) {
            place_file(source, version.join(file), placement)?;
        }
        let config = config(&name, program);
        write_atomically(whole.join(&name).join("config.pbtxt"), |w| w.write_all(config.as_bytes()))?;
        names.push(repository.join(name));
    }
    fs::rename(&whole, repository).with_context(place)?;
    sync_directory(parent)?;
    Ok(names)
}

/// The model's configuration. The batch is a fixed axis of the tensors, so Triton's own batching is off.
fn config(name: &str, program: &OnnxProgram) -> String {
    let mut text = format!("name: \"{name}\"\nbackend: \"onnxruntime\"\nmax_batch_size: 0\n");
    for (side, tensors) in [("input", &program.inputs), ("output", &program.outputs)] {
        let entries: Vec<String> = tensors.iter().map(tensor).collect();
        let _ = write!(text, "{side} [\n{}\n]\n", entries.join(",\n"));
    }
    text.push_str("instance_group [\n  { count: 1 kind: KIND_AUTO }\n]\n");
    text
}

fn tensor(spec: &TensorSpec) -> String {
    let dims: Vec<String> = spec.shape.dims().iter().map(ToString::to_string).collect();
    format!(
        "  {{ name: \"{}\" data_type: {} dims: [ {} ] }}",
        spec.name,
        data_type(spec.dtype),
        dims.join(", ")
    )
}

fn data_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "TYPE_FP32",
        DType::F16 => "TYPE_FP16",
        DType::Bf16 => "TYPE_BF16",
        DType::I64 => "TYPE_INT64",
        DType::Bool => "TYPE_BOOL",
    }
}

#[cfg(test)]
mod tests {
    use graph_builder::Shape;

    use super::*;

    #[test]
    fn a_repository_is_whole_and_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let weights = folder.path().join("w.safetensors");
        fs::write(&weights, b"weights").unwrap();
        let spec = |name: &str, dtype, shape: &[usize]| TensorSpec {
            name: name.into(),
            dtype,
            shape: Shape(shape.to_vec()),
        };
        let program = OnnxProgram {
            name: "denoise".into(),
            bytes: b"model".to_vec(),
            inputs: vec![spec("x", DType::F32, &[2, 1, 4, 4]), spec("y", DType::I64, &[2])],
            outputs: vec![spec("out", DType::F32, &[2, 2, 4, 4])],
            weights_file: Some("w.safetensors".into()),
            native_ops: Vec::new(),
            native_operands: std::collections::BTreeMap::new(),
            unrepeatable: Vec::new(),
        };
        let place = folder.path().join("repository");
        let made = write_repository(&place, &[(2, &program)], Some((&weights, Placement::Copy))).unwrap();
        assert_eq!(made, [place.join("denoise-b2")]);
        assert_eq!(fs::read(place.join("denoise-b2/1/model.onnx")).unwrap(), b"model");
        assert_eq!(fs::read(place.join("denoise-b2/1/w.safetensors")).unwrap(), b"weights");
        let config = fs::read_to_string(place.join("denoise-b2/config.pbtxt")).unwrap();
        for line in [
            "name: \"denoise-b2\"",
            "max_batch_size: 0",
            "  { name: \"x\" data_type: TYPE_FP32 dims: [ 2, 1, 4, 4 ] },",
            "  { name: \"y\" data_type: TYPE_INT64 dims: [ 2 ] }",
            "  { name: \"out\" data_type: TYPE_FP32 dims: [ 2, 2, 4, 4 ] }",
        ] {
            assert!(config.lines().any(|l| l == line), "{line}: {config}");
        }
        let refused = write_repository(&place, &[(2, &program)], Some((&weights, Placement::Copy)))
            .unwrap_err()
            .to_string();
        assert!(refused.contains("exists"), "{refused}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside it");
    }
}
