//! Where the rows of a tensor lie: in one tensor, one array, or a file each.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use runtime::npy::{Header, Kind};
use safetensors::Dtype;

use super::super::Stored;
use crate::error::{Result, TrainError};
use crate::tensor_file::{TensorEntry, TensorFile, decode_floats};

/// Rows `(C, H, W)` that are read one at a time.
#[derive(Debug)]
pub(super) struct Rows {
    shape: [usize; 3],
    place: Place,
}

#[derive(Debug)]
enum Place {
    Tensor { file: Arc<TensorFile>, entry: TensorEntry },
    Array { path: PathBuf, file: File, dtype: Dtype, start: u64 },
    Files { paths: Vec<PathBuf>, dtype: Dtype },
}

/// The element type of an array of floats.
///
/// # Errors
/// [`TrainError::BadFile`] for one of something else, or stored by columns.
pub(super) fn float_type(path: &Path, header: &Header) -> Result<Dtype> {
    if header.by_columns {
        let expected = "rows one after another: save `numpy.ascontiguousarray(array)`";
        return Err(TrainError::bad_file(path, "order of the elements", expected, "columns (Fortran order)"));
    }
    match (header.kind, header.width) {
        (Kind::Float, 2) => Ok(Dtype::F16),
        (Kind::Float, 4) => Ok(Dtype::F32),
        (kind, width) => {
            let got = format!("{kind:?} of {width} bytes");
            Err(TrainError::bad_file(path, "element type", "floats of 4 or 2 bytes (<f4, <f2)", got))
        }
    }
}

/// Opens an `.npy` file and reads its header.
pub(super) fn open_npy(path: &Path) -> Result<(File, Header)> {
    let mut file = File::open(path).map_err(TrainError::io("open", path))?;
    let header = Header::read(&mut file).and_then(|header| Ok((header.data_bytes()?, header)));
    let (data, header) =
        header.map_err(|error| TrainError::bad_file(path, "NumPy header", "a whole one", error))?;
    let length = file.metadata().map_err(TrainError::io("read", path))?.len();
    if length != data + header.before {
        let what = format!("length for shape {:?}", header.shape);
        return Err(TrainError::bad_file(path, what, format!("{} bytes", data + header.before), length));
    }
    Ok((file, header))
}

impl Rows {
    /// The rows of a tensor `(M, C, H, W)`.
    pub(super) fn tensor(file: &Arc<TensorFile>, entry: TensorEntry) -> Self {
        let shape = [entry.shape[1], entry.shape[2], entry.shape[3]];
        Self { shape, place: Place::Tensor { file: Arc::clone(file), entry } }
    }

    /// The rows of an array `(M, C, H, W)` whose data begin at `start` of an open file.
    ///
    /// # Errors
    /// [`TrainError::BadFile`] for another shape or type.
    pub(super) fn array(
        name: &str,
        path: &Path,
        file: File,
        header: &Header,
        start: u64,
    ) -> Result<(Self, usize)> {
        let dtype = float_type(path, header)?;
        match header.shape[..] {
            [count, c, h, w] if count * c * h * w > 0 => {
                let place = Place::Array { path: path.to_path_buf(), file, dtype, start };
                Ok((Self { shape: [c, h, w], place }, count))
            }
            _ => {
                let (what, got) = (format!("shape of `{name}`"), format!("{:?}", header.shape));
                Err(TrainError::bad_file(path, what, "(M, C, H, W), none of them 0", got))
            }
        }
    }

    /// A file for each row, as `(C, H, W)` or `(1, C, H, W)`.
    ///
    /// # Errors
    /// [`TrainError::BadFile`] for a first file of another shape or type.
    pub(super) fn files(paths: Vec<PathBuf>) -> Result<Self> {
        let Some(first) = paths.first() else {
            return Err(TrainError::Internal("rows of no files".into()));
        };
        let (_, header) = open_npy(first)?;
        let dtype = float_type(first, &header)?;
        let shape = image_shape(first, &header)?;
        Ok(Self { shape, place: Place::Files { paths, dtype } })
    }

    /// Channels, rows and columns.
    pub(super) fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Where a row lies, in words.
    pub(super) fn place(&self, index: usize) -> String {
        match &self.place {
            Place::Files { paths, .. } => format!("`{}`", paths[index].display()),
            _ => format!("row {index} of `{}`", self.file(index).display()),
        }
    }

    /// The file that a row is in.
    fn file(&self, index: usize) -> &Path {
        match &self.place {
            Place::Tensor { file, .. } => file.path(),
            Place::Array { path, .. } => path,
            Place::Files { paths, .. } => &paths[index],
        }
    }

    /// The names and sizes of files that are one row each.
    pub(super) fn add_files(&self, into: &mut Stored) -> Result<()> {
        let Place::Files { paths, .. } = &self.place else { return Ok(()) };
        for path in paths {
            let bytes = path.metadata().map_err(TrainError::io("read", path))?.len();
            into.file(Path::new(path.file_name().unwrap_or_default()), bytes);
        }
        Ok(())
    }

    /// A row as it is stored.
    pub(super) fn bytes(&self, index: usize) -> Result<Vec<u8>> {
        match &self.place {
            Place::Tensor { file, entry } => file.read_rows(entry, index, 1),
            Place::Array { path, file, dtype, start } => {
                let mut bytes = vec![0; self.row_bytes(*dtype)];
                let offset = start + index as u64 * bytes.len() as u64;
                file.read_exact_at(&mut bytes, offset).map_err(TrainError::io("read", path))?;
                Ok(bytes)
            }
            Place::Files { paths, dtype } => {
                let path = &paths[index];
                let (mut file, header) = open_npy(path)?;
                let found = (float_type(path, &header)?, image_shape(path, &header)?);
                if found != (*dtype, self.shape) {
                    let expected = format!("{dtype:?} {:?}, as `{}` has", self.shape, paths[0].display());
                    let got = format!("{:?} {:?}", found.0, found.1);
                    return Err(TrainError::bad_file(path, "array", expected, got));
                }
                let mut bytes = vec![0; self.row_bytes(*dtype)];
                file.read_exact(&mut bytes).map_err(TrainError::io("read", path))?;
                Ok(bytes)
            }
        }
    }

    /// Reads a row as f32.
    pub(super) fn read(&self, index: usize, out: &mut [f32]) -> Result<()> {
        let dtype = match &self.place {
            Place::Tensor { entry, .. } => entry.dtype,
            Place::Array { dtype, .. } | Place::Files { dtype, .. } => *dtype,
        };
        decode_floats(self.file(index), dtype, &self.bytes(index)?, out)
    }

    fn row_bytes(&self, dtype: Dtype) -> usize {
        self.shape.iter().product::<usize>() * dtype.bitsize() / 8
    }
}

/// The shape of one image's array.
fn image_shape(path: &Path, header: &Header) -> Result<[usize; 3]> {
    match header.shape[..] {
        [c, h, w] | [1, c, h, w] if c * h * w > 0 => Ok([c, h, w]),
        _ => {
            let got = format!("{:?}", header.shape);
            Err(TrainError::bad_file(path, "shape", "(C, H, W) or (1, C, H, W): one image a file", got))
        }
    }
}
