//! A `.safetensors` file read row by row, from several threads at once.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use runtime::safetensors_file::SafetensorsReader;
use safetensors::Dtype;

use crate::error::{Result, TrainError};

/// An open file whose header agrees with its length.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    file: File,
    header: SafetensorsReader,
}

/// Where one tensor lies.
#[derive(Debug, Clone)]
pub(crate) struct TensorEntry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Offset in the file.
    start: u64,
    /// Bytes of one entry of the first axis.
    row_bytes: usize,
}

impl TensorFile {
    /// Opens a file and checks that it is whole.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let header = SafetensorsReader::open(path)?;
        let file = File::open(path).map_err(TrainError::io("open", path))?;
        Ok(Self { path: path.to_path_buf(), file, header })
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The free text under `key` in the file's metadata.
    pub(crate) fn note(&self, key: &str) -> Option<String> {
        self.header.metadata().remove(key)
    }

    /// Whether there is a tensor called `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.header.names().any(|other| other == name)
    }

    /// The tensor called `name`.
    pub(crate) fn entry(&self, name: &str) -> Result<TensorEntry> {
        let (dtype, shape) = (self.header.dtype(name)?, self.header.shape(name)?.0);
        let range = self.header.byte_range(name)?;
        let rows = shape.first().copied().unwrap_or(1).max(1);
        let row_bytes = (range.end - range.start) as usize / rows;
        Ok(TensorEntry { dtype, shape, start: range.start, row_bytes })
    }

    /// Reads `rows` entries of the first axis from `row` on, as bytes.
    pub(crate) fn read_rows(&self, tensor: &TensorEntry, row: usize, rows: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.row_bytes * rows];
        let offset = tensor.start + row as u64 * tensor.row_bytes as u64;
        self.file.read_exact_at(&mut bytes, offset).map_err(TrainError::io("read", &self.path))?;
        Ok(bytes)
    }
}

/// Widens little-endian f32, f16 or bf16 to `out`; `path` names the file in an error.
pub(crate) fn decode_floats(path: &Path, dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match dtype {
        Dtype::F32 => fill::<4>(bytes, out, f32::from_le_bytes),
        Dtype::F16 => fill::<2>(bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => fill::<2>(bytes, out, |b| half::bf16::from_le_bytes(b).to_f32()),
        other => {
            let got = format!("{other:?}");
            return Err(TrainError::bad_file(path, "element type", "F32, F16 or BF16", got));
        }
    }
    Ok(())
}

fn fill<const B: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; B]) -> f32) {
    let (elements, _) = bytes.as_chunks::<B>();
    for (value, element) in out.iter_mut().zip(elements) {
        *value = decode(*element);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_where_they_lie() {
        let values: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![3, 2], &values).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), safetensors::serialize([("w", view)], None).unwrap()).unwrap();
        let tensors = TensorFile::open(file.path()).unwrap();
        let w = tensors.entry("w").unwrap();
        let mut row = [0.0; 2];
        decode_floats(tensors.path(), w.dtype, &tensors.read_rows(&w, 2, 1).unwrap(), &mut row).unwrap();
        assert_eq!(row, [4.0, 5.0]);
        assert!(tensors.has("w") && !tensors.has("v"));
        assert!(tensors.entry("v").unwrap_err().to_string().contains('v'));
    }
}
