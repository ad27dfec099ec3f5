//! The safetensors format, read without loading the whole file and written with reproducible bytes.
//!
//! A file is a little-endian u64 header length, a JSON header (name → dtype, shape, byte range) and the data.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use graph_builder::Shape;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::{Result, RuntimeError, nearest};
use crate::file::write_atomically;

/// Largest header that is read, in bytes: the limit of the format's own implementation.
const MAX_HEADER: u64 = 100_000_000;
/// Values converted at a time when a file's element type is not f32.
const CONVERT: usize = 1 << 16;

/// An open safetensors file: its header is checked against the file's length, its data is read on demand.
#[derive(Debug)]
pub struct SafetensorsReader {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Names in the order of their data.
    names: Vec<String>,
    /// Where the data begin in the file.
    data_start: u64,
}

impl SafetensorsReader {
    /// Opens a file and checks that its header is well-formed and its data complete.
    ///
    /// # Errors
    /// [`RuntimeError::Io`], [`RuntimeError::Safetensors`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |e| RuntimeError::io("read", path, e);
        let malformed = |reason: String| RuntimeError::Safetensors { path: path.to_path_buf(), reason };
        // A length that makes no sense is mostly the beginning of another kind of file.
        let foreign = |reason: String| match crate::file_kind::told(path) {
            Some(kind) => malformed(format!("{kind} ({reason})")),
            None => malformed(reason),
        };
        let mut file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length < 8 {
            return Err(foreign(format!("it has {length} bytes, the header's length alone takes 8")));
        }
        let mut header_length = [0; 8];
        file.read_exact(&mut header_length).map_err(failed)?;
        let header_length = u64::from_le_bytes(header_length);
        if header_length > MAX_HEADER || header_length > length - 8 {
            let available = length - 8;
            let reason = format!("its header claims {header_length} bytes, {available} follow");
            return Err(if header_length > MAX_HEADER { foreign(reason) } else { malformed(reason) });
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact(&mut header).map_err(failed)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|e| malformed(format!("its header cannot be understood: {e}")))?;
        let data_start = 8 + header_length;
        let (expected, found) = (metadata.data_len() as u64, length - data_start);
        if expected != found {
            return Err(malformed(format!(
                "its header describes {expected} bytes of data, {found} are there"
            )));
        }
        let names = metadata.offset_keys();
        Ok(Self { path: path.to_path_buf(), file, metadata, names, data_start })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor names in the order of their data.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// The free text beside the tensors.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.metadata.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`] with the most similar name.
    pub fn shape(&self, name: &str) -> Result<Shape> {
        Ok(Shape(self.info(name)?.shape.clone()))
    }

    /// Element type of a tensor.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`].
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.info(name)?.dtype)
    }

    /// Byte range of a tensor in the file: what an ONNX initializer's external-data entry needs.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`].
    pub fn byte_range(&self, name: &str) -> Result<std::ops::Range<u64>> {
        let (start, end) = self.info(name)?.data_offsets;
        Ok(self.data_start + start as u64..self.data_start + end as u64)
    }

    /// Checks that a tensor is there with a shape.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongShape`].
    pub fn expect_shape(&self, name: &str, expected: &Shape) -> Result<()> {
        let got = self.shape(name)?;
        if got == *expected {
            return Ok(());
        }
        let (place, name) = (self.path.display().to_string(), name.to_owned());
        Err(RuntimeError::WrongShape { place, name, expected: expected.clone(), got })
    }

    /// Reads a tensor of f32, f16, bf16 or f64 values, converted to f32.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongLength`], [`RuntimeError::WrongType`],
    /// [`RuntimeError::Io`].
    pub fn read_f32_into(&mut self, name: &str, into: &mut [f32]) -> Result<()> {
        let expected = self.shape(name)?.numel();
        if expected != into.len() {
            let what = format!("`{name}` of {}", self.path.display());
            return Err(RuntimeError::WrongLength { what, expected, got: into.len() });
        }
        match self.dtype(name)? {
            Dtype::F32 => self.read_bytes_into(name, bytemuck::cast_slice_mut(into)),
            Dtype::F16 => self.read_converted::<f16>(name, into, f16::to_f32),
            Dtype::BF16 => self.read_converted::<bf16>(name, into, bf16::to_f32),
            Dtype::F64 => self.read_converted::<f64>(name, into, |x| x as f32),
            other => Err(RuntimeError::WrongType {
                place: self.path.display().to_string(),
                name: name.to_owned(),
                expected: "f32, f16, bf16 or f64".to_owned(),
                got: format!("{other:?}").to_lowercase(),
            }),
        }
    }

    /// Reads the raw little-endian bytes of a tensor.
    pub(crate) fn read_bytes_into(&mut self, name: &str, into: &mut [u8]) -> Result<()> {
        let start = self.byte_range(name)?.start;
        self.file
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.file.read_exact(into))
            .map_err(|e| RuntimeError::io("read", &self.path, e))
    }

    fn read_converted<T: bytemuck::Pod>(
        &mut self,
        name: &str,
        into: &mut [f32],
        convert: impl Fn(T) -> f32,
    ) -> Result<()> {
        let start = self.byte_range(name)?.start;
        let mut buffer = vec![T::zeroed(); CONVERT.min(into.len())];
        let mut read = || {
            self.file.seek(SeekFrom::Start(start))?;
            for chunk in into.chunks_mut(CONVERT) {
                let source = &mut buffer[..chunk.len()];
                self.file.read_exact(bytemuck::cast_slice_mut(source))?;
                for (to, from) in chunk.iter_mut().zip(source) {
                    *to = convert(*from);
                }
            }
            Ok(())
        };
        read().map_err(|e| RuntimeError::io("read", &self.path, e))
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| RuntimeError::UnknownName {
            kind: "tensor",
            place: self.path.display().to_string(),
            name: name.to_owned(),
            nearest: nearest(name, self.names()),
        })
    }
}

/// One tensor to be written.
pub(crate) struct TensorRecord<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a Shape,
    /// Little-endian values.
    pub(crate) bytes: &'a [u8],
}

/// Writes tensors in the given order, atomically: the same tensors and metadata give the same bytes.
pub(crate) fn write_records(
    path: &Path,
    records: &[TensorRecord<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let header = header(records, metadata);
    write_atomically(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(header.as_bytes())?;
        records.iter().try_for_each(|r| w.write_all(r.bytes))
    })
}

/// The JSON header, padded with spaces so that the data start at a multiple of 8 bytes.
fn header(records: &[TensorRecord<'_>], metadata: &BTreeMap<String, String>) -> String {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), serde_json::json!(metadata));
    }
    let mut offset = 0;
    for record in records {
        let end = offset + record.bytes.len();
        let info = TensorInfo {
            dtype: record.dtype,
            shape: record.shape.dims().to_vec(),
            data_offsets: (offset, end),
        };
        header.insert(record.name.to_owned(), serde_json::json!(info));
        offset = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    text
}
