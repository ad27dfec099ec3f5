//! The weights file of an engine: checked at once, converted only when something is built.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use graph_builder::{DType, ExternalTensor, Precision, Shape};
use half::{bf16, f16};
use models::{Model, ProgramKind, ProgramSpec};
use runtime::engine::FileStamp;
use runtime::safetensors_file::SafetensorsReader;
use runtime::{ArenaLayout, Engine, HostData, HostTensor, write_safetensors_file};
use train_engine::mup::check_stamp;
use train_engine::step::parameter_layout;

use crate::commands::weights::{self, Which};
use crate::commands::weights_file::WeightsFile;
use crate::external::tensors;

/// Name of a weights file that had to be converted.
const CONVERTED: &str = "weights.safetensors";

/// A weights file that holds a model's parameters.
pub(super) struct Source<'a> {
    model: &'a Model,
    file: WeightsFile,
    reader: SafetensorsReader,
    layout: std::sync::Arc<ArenaLayout>,
    /// Types that the programs take, by parameter.
    dtypes: BTreeMap<String, DType>,
}

/// A weights file that programs can point into.
pub(super) struct Parameters {
    pub(super) file: PathBuf,
    pub(super) name: String,
    pub(super) tensors: BTreeMap<String, ExternalTensor>,
    /// Holds the converted file until the engine has its own.
    _converted: Option<tempfile::TempDir>,
}

impl<'a> Source<'a> {
    /// Checks a file's header against the model.
    pub(super) fn open(model: &'a Model, path: &Path, precision: Precision) -> anyhow::Result<Self> {
        let file = WeightsFile::open(model, path, Which::Ema)?;
        let graph = model.program(&ProgramSpec::new(ProgramKind::Denoise, 1))?;
        let layout = parameter_layout(graph.parameters())?;
        let graph = graph.optimised()?.in_precision(precision)?;
        let dtypes = graph.parameters().iter().map(|p| (p.name.clone(), p.dtype)).collect();
        let reader = SafetensorsReader::open(file.path())?;
        check_stamp(&reader.metadata(), model, path)?;
        layout
            .expect(&reader, false)
            .with_context(|| format!("`{}` does not hold this model's parameters", path.display()))?;
        Ok(Self { model, file, reader, layout, dtypes })
    }

    /// The safetensors file that holds them.
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    fn dtype(&self, name: &str) -> DType {
        self.dtypes.get(name).copied().unwrap_or(DType::F32)
    }

    /// Whether programs can point into the file as it is.
    pub(super) fn fits(&self) -> bool {
        self.layout.entries().keys().all(|name| {
            matches!(
                (self.reader.dtype(name), self.dtype(name)),
                (Ok(safetensors::Dtype::F32), DType::F32)
                    | (Ok(safetensors::Dtype::BF16), DType::Bf16)
                    | (Ok(safetensors::Dtype::F16), DType::F16)
            )
        })
    }

    /// The file where it fits, else a converted one.
    pub(super) fn place(&self) -> anyhow::Result<Parameters> {
        let dtype = |name: &str| self.dtype(name);
        if self.fits() {
            let file = self.file.path().to_path_buf();
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let tensors = tensors(&self.reader, &self.layout, dtype)?;
            return Ok(Parameters { file, name, tensors, _converted: None });
        }
        let directory = tempfile::tempdir().context("a place for the converted weights")?;
        let path = directory.path().join(CONVERTED);
        let values = weights::read(self.model, self.file.path())?;
        let converted = values
            .iter()
            .map(|(name, entry, values)| Ok((name.to_owned(), narrowed(&entry.shape, values, dtype(name))?)))
            .collect::<anyhow::Result<_>>()?;
        write_safetensors_file(&path, &converted, &BTreeMap::new())?;
        let tensors = tensors(&SafetensorsReader::open(&path)?, &self.layout, dtype)?;
        Ok(Parameters { file: path, name: CONVERTED.into(), tensors, _converted: Some(directory) })
    }

    /// What the file is; its hash is that of an earlier build where size and time are the same.
    pub(super) fn stamp(&self, known: Option<&Engine>) -> anyhow::Result<FileStamp> {
        let weights = known.and_then(|engine| engine.manifest().weights.as_ref());
        Ok(FileStamp::of(self.file.given(), weights.and_then(|w| w.source.as_ref()))?)
    }
}

/// Values as a tensor of another float type.
fn narrowed(shape: &Shape, values: &[f32], dtype: DType) -> anyhow::Result<HostTensor> {
    let data = match dtype {
        DType::Bf16 => HostData::Bf16(values.iter().map(|v| bf16::from_f32(*v)).collect()),
        DType::F16 => HostData::F16(values.iter().map(|v| f16::from_f32(*v)).collect()),
        DType::F32 | DType::I64 | DType::Bool => HostData::F32(values.to_vec()),
    };
    Ok(HostTensor::new(shape.clone(), data)?)
}
