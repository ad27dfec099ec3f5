//! The header of an array in an `.npz`, and whole small arrays.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use runtime::npy::Kind;
use zip::ZipArchive;

use super::{inside, open_file};

/// Element types that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    U8,
    F32,
    F64,
}

impl Element {
    /// Bytes of an element.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// What an array is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) element: Element,
    pub(crate) shape: Vec<usize>,
    /// Bytes before the data.
    pub(crate) bytes: u64,
}

impl Header {
    /// Bytes of the data.
    pub(crate) fn data_bytes(&self) -> anyhow::Result<u64> {
        Ok(runtime::npy::data_bytes(&self.shape, self.element.size())?)
    }
}

/// Reads a header and leaves the reader at the data.
pub(crate) fn header(reader: &mut impl Read) -> anyhow::Result<Header> {
    let found = runtime::npy::Header::read(reader)?;
    let element = match (found.kind, found.width) {
        (Kind::Unsigned, 1) => Element::U8,
        (Kind::Float, 4) => Element::F32,
        (Kind::Float, 8) => Element::F64,
        (kind, width) => {
            bail!("its elements are {kind:?} of {width} bytes, expected bytes (|u1) or floats (<f4, <f8)")
        }
    };
    ensure!(!found.by_columns, "it is stored column by column (Fortran order)");
    Ok(Header { element, shape: found.shape, bytes: found.before })
}

/// What an element of a file becomes.
pub(crate) trait Number: Sized {
    fn from_f32(x: f32) -> Self;
    fn from_f64(x: f64) -> Self;
}

impl Number for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }
    fn from_f64(x: f64) -> Self {
        x as f32
    }
}

impl Number for f64 {
    fn from_f32(x: f32) -> Self {
        x.into()
    }
    fn from_f64(x: f64) -> Self {
        x
    }
}

/// Shape and values of a float array of an `.npz`, if it is there; `allowed` bounds its number of elements.
pub(crate) fn read_floats<T: Number>(
    archive: &mut ZipArchive<std::fs::File>,
    path: &Path,
    name: &str,
    allowed: u64,
) -> anyhow::Result<Option<(Vec<usize>, Vec<T>)>> {
    let at = || inside(path, name);
    let Some(index) = archive.index_for_name(&format!("{name}.npy")) else { return Ok(None) };
    let mut entry = archive.by_index(index).with_context(at)?;
    let header = header(&mut entry).with_context(at)?;
    let bytes = header.data_bytes().with_context(at)?;
    ensure!(
        bytes / header.element.size() as u64 <= allowed,
        "{}: shape {:?} is larger than any statistics",
        at(),
        header.shape
    );
    let mut data = Vec::new();
    // The file's own length, not the header, decides about memory.
    (&mut entry).take(bytes).read_to_end(&mut data).with_context(at)?;
    ensure!(
        data.len() as u64 == bytes && entry.read(&mut [0]).with_context(at)? == 0,
        "{}: shape {:?} needs {bytes} bytes, the file has {}",
        at(),
        header.shape,
        data.len()
    );
    let values = match header.element {
        Element::U8 => bail!("{}: bytes, expected numbers", at()),
        Element::F32 => data.as_chunks().0.iter().map(|b| T::from_f32(f32::from_le_bytes(*b))).collect(),
        Element::F64 => data.as_chunks().0.iter().map(|b| T::from_f64(f64::from_le_bytes(*b))).collect(),
    };
    Ok(Some((header.shape, values)))
}

/// Opens an `.npz`.
pub(crate) fn open_npz(path: &Path) -> anyhow::Result<ZipArchive<std::fs::File>> {
    ZipArchive::new(open_file(path)?)
        .with_context(|| format!("{} is no usable .npz (a zip of NumPy arrays)", path.display()))
}
