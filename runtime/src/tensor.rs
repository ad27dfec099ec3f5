//! Tensors in host memory of any element type, and their safetensors files: fixtures, batches, latents, images.

use std::collections::BTreeMap;
use std::path::Path;

use graph_builder::Shape;
use half::{bf16, f16};
use indexmap::IndexMap;
use safetensors::Dtype;

use crate::error::{Result, RuntimeError};
use crate::safetensors_file::{SafetensorsReader, TensorRecord, write_records};

/// The values of a [`HostTensor`], row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum HostData {
    /// IEEE binary32.
    F32(Vec<f32>),
    /// IEEE binary64.
    F64(Vec<f64>),
    /// IEEE binary16.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// Signed 64-bit integers.
    I64(Vec<i64>),
    /// Signed 32-bit integers.
    I32(Vec<i32>),
    /// Bytes.
    U8(Vec<u8>),
    /// Truth values, 0 or 1.
    Bool(Vec<u8>),
}

impl HostData {
    fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F64(_) => Dtype::F64,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::BF16,
            Self::I64(_) => Dtype::I64,
            Self::I32(_) => Dtype::I32,
            Self::U8(_) => Dtype::U8,
            Self::Bool(_) => Dtype::BOOL,
        }
    }

    fn len(&self) -> usize {
        self.bytes().len() * 8 / self.dtype().bitsize()
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::F32(v) => bytemuck::cast_slice(v),
            Self::F64(v) => bytemuck::cast_slice(v),
            Self::F16(v) => bytemuck::cast_slice(v),
            Self::Bf16(v) => bytemuck::cast_slice(v),
            Self::I64(v) => bytemuck::cast_slice(v),
            Self::I32(v) => bytemuck::cast_slice(v),
            Self::U8(v) | Self::Bool(v) => v,
        }
    }
}

/// A row-major tensor in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    shape: Shape,
    data: HostData,
}

impl HostTensor {
    /// A tensor from its shape and values.
    ///
    /// # Errors
    /// [`RuntimeError::WrongLength`] when the number of values is not the shape's.
    pub fn new(shape: impl Into<Shape>, data: HostData) -> Result<Self> {
        let shape = shape.into();
        if data.len() != shape.numel() {
            let (what, expected) = (format!("a tensor of shape {shape}"), shape.numel());
            return Err(RuntimeError::WrongLength { what, expected, got: data.len() });
        }
        Ok(Self { shape, data })
    }

    /// An f32 tensor.
    ///
    /// # Errors
    /// [`RuntimeError::WrongLength`].
    pub fn f32(shape: impl Into<Shape>, values: Vec<f32>) -> Result<Self> {
        Self::new(shape, HostData::F32(values))
    }

    /// An i64 tensor.
    ///
    /// # Errors
    /// [`RuntimeError::WrongLength`].
    pub fn i64(shape: impl Into<Shape>, values: Vec<i64>) -> Result<Self> {
        Self::new(shape, HostData::I64(values))
    }

    /// Axis sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The values as they are stored.
    pub fn data(&self) -> &HostData {
        &self.data
    }

    /// The values as f32, converted from any other real or integer type.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            HostData::F32(v) => v.clone(),
            HostData::F64(v) => v.iter().map(|&x| x as f32).collect(),
            HostData::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            HostData::Bf16(v) => v.iter().map(|x| x.to_f32()).collect(),
            HostData::I64(v) => v.iter().map(|&x| x as f32).collect(),
            HostData::I32(v) => v.iter().map(|&x| x as f32).collect(),
            HostData::U8(v) | HostData::Bool(v) => v.iter().map(|&x| f32::from(x)).collect(),
        }
    }

    /// The values as i64; `None` for a tensor of real numbers.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        match &self.data {
            HostData::I64(v) => Some(v.clone()),
            HostData::I32(v) => Some(v.iter().map(|&x| i64::from(x)).collect()),
            HostData::U8(v) | HostData::Bool(v) => Some(v.iter().map(|&x| i64::from(x)).collect()),
            HostData::F32(_) | HostData::F64(_) | HostData::F16(_) | HostData::Bf16(_) => None,
        }
    }
}

/// Reads every tensor of a safetensors file, in the order of the data.
///
/// # Errors
/// [`RuntimeError::Io`], [`RuntimeError::Safetensors`] (truncated or malformed), [`RuntimeError::WrongType`] for an
/// element type that [`HostData`] does not have.
pub fn read_safetensors_file(path: impl AsRef<Path>) -> Result<IndexMap<String, HostTensor>> {
    let mut file = SafetensorsReader::open(path)?;
    let names: Vec<_> = file.names().map(str::to_owned).collect();
    names
        .into_iter()
        .map(|name| {
            let tensor = read_tensor(&mut file, &name)?;
            Ok((name, tensor))
        })
        .collect()
}

/// Writes tensors as a safetensors file, atomically and in the map's order.
///
/// # Errors
/// [`RuntimeError::Io`]; the file at `path` is then untouched.
pub fn write_safetensors_file(
    path: impl AsRef<Path>,
    tensors: &IndexMap<String, HostTensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let records: Vec<_> = tensors
        .iter()
        .map(|(name, t)| TensorRecord { name, dtype: t.data.dtype(), shape: &t.shape, bytes: t.data.bytes() })
        .collect();
    write_records(path.as_ref(), &records, metadata)
}

fn read_tensor(file: &mut SafetensorsReader, name: &str) -> Result<HostTensor> {
    let shape = file.shape(name)?;
    let numel = shape.numel();
    let data = match file.dtype(name)? {
        Dtype::F32 => HostData::F32(read_values(file, name, numel)?),
        Dtype::F64 => HostData::F64(read_values(file, name, numel)?),
        Dtype::F16 => HostData::F16(read_values(file, name, numel)?),
        Dtype::BF16 => HostData::Bf16(read_values(file, name, numel)?),
        Dtype::I64 => HostData::I64(read_values(file, name, numel)?),
        Dtype::I32 => HostData::I32(read_values(file, name, numel)?),
        Dtype::U8 => HostData::U8(read_values(file, name, numel)?),
        Dtype::BOOL => HostData::Bool(read_values(file, name, numel)?),
        other => {
            return Err(RuntimeError::WrongType {
                place: file.path().display().to_string(),
                name: name.to_owned(),
                expected: "f32, f64, f16, bf16, i64, i32, u8 or bool".to_owned(),
                got: format!("{other:?}").to_lowercase(),
            });
        }
    };
    HostTensor::new(shape, data)
}

fn read_values<T: bytemuck::Pod>(file: &mut SafetensorsReader, name: &str, numel: usize) -> Result<Vec<T>> {
    let mut values = vec![T::zeroed(); numel];
    file.read_bytes_into(name, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{Arena, ArenaLayout};

    fn half_ladder() -> IndexMap<String, HostTensor> {
        let mut tensors = IndexMap::new();
        let mut add = |name: &str, data| {
            tensors.insert(name.to_owned(), HostTensor::new([2, 2], data).unwrap());
        };
        add("f32", HostData::F32(vec![0.5, -1.0, 2.0, 3.0]));
        add("f64", HostData::F64(vec![0.5, -1.0, 2.0, 3.0]));
        add("f16", HostData::F16([0.5, -1.0, 2.0, 3.0].map(f16::from_f32).to_vec()));
        add("bf16", HostData::Bf16([0.5, -1.0, 2.0, 3.0].map(bf16::from_f32).to_vec()));
        add("i64", HostData::I64(vec![1, 2, -3, 4]));
        add("i32", HostData::I32(vec![1, 2, -3, 4]));
        add("u8", HostData::U8(vec![1, 2, 3, 255]));
        add("bool", HostData::Bool(vec![1, 0, 1, 0]));
        tensors
    }

    #[test]
    fn every_element_type_round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("all");
        let tensors = half_ladder();
        write_safetensors_file(&path, &tensors, &BTreeMap::default()).unwrap();
        assert_eq!(read_safetensors_file(&path).unwrap(), tensors);
        assert_eq!(tensors["bf16"].to_f32(), [0.5, -1.0, 2.0, 3.0]);
        assert_eq!(tensors["i32"].to_i64().unwrap(), [1, 2, -3, 4]);
        assert_eq!(tensors["f16"].to_i64(), None);
    }

    #[test]
    fn arenas_accept_half_precision_and_refuse_integers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("all");
        write_safetensors_file(&path, &half_ladder(), &BTreeMap::default()).unwrap();
        let read = |name: &str| {
            let layout = ArenaLayout::new([(name.to_owned(), [2, 2].into())]).unwrap();
            Arena::read_safetensors(&layout.into(), &path, true).map(|a| a.view(name).unwrap().to_vec())
        };
        for name in ["f32", "f64", "f16", "bf16"] {
            assert_eq!(read(name).unwrap(), [0.5, -1.0, 2.0, 3.0], "{name}");
        }
        assert!(matches!(read("i64"), Err(RuntimeError::WrongType { .. })));
    }

    #[test]
    fn a_wrong_number_of_values_is_refused() {
        assert!(matches!(HostTensor::f32([2, 3], vec![0.0; 5]), Err(RuntimeError::WrongLength { .. })));
    }
}
