//! The header of an array in an `.npz`, and whole small arrays.

use std::io::{Read, Seek};
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
    /// Whether the first axis is the one that runs fastest (Fortran order).
    pub(crate) by_columns: bool,
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
            let letter = match kind {
                Kind::Unsigned => 'u',
                Kind::Signed => 'i',
                Kind::Float => 'f',
            };
            bail!(
                "its elements are `<{letter}{width}`, expected bytes (|u1) or little-endian floats (<f4, <f8): save it again by \
                 NumPy's `x.astype(numpy.uint8)` or `x.astype(numpy.float32)`"
            )
        }
    };
    Ok(Header { element, shape: found.shape, by_columns: found.by_columns, bytes: found.before })
}

/// What an element of a file becomes.
pub(crate) trait Number: Copy {
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
    let values = if header.by_columns { by_rows(&header.shape, values) } else { values };
    Ok(Some((header.shape, values)))
}

/// Values that were stored with the first axis running fastest, with the last one running fastest.
fn by_rows<T: Copy>(shape: &[usize], values: Vec<T>) -> Vec<T> {
    if shape.iter().filter(|d| **d > 1).count() < 2 {
        return values;
    }
    let mut steps = vec![1; shape.len()];
    for axis in 1..shape.len() {
        steps[axis] = steps[axis - 1] * shape[axis - 1];
    }
    let place = |mut index: usize| -> usize {
        let axes = shape.iter().zip(&steps).rev();
        axes.map(|(size, step)| {
            let at = index % size;
            index /= size;
            at * step
        })
        .sum()
    };
    (0..values.len()).map(|i| values[place(i)]).collect()
}

/// Opens an `.npz`.
pub(crate) fn open_npz(path: &Path) -> anyhow::Result<ZipArchive<std::fs::File>> {
    let mut file = open_file(path)?;
    let mut head = [0; 8];
    let read = file.read(&mut head).unwrap_or(0);
    file.rewind().with_context(|| format!("cannot read {}", path.display()))?;
    ZipArchive::new(file).with_context(|| {
        let is = if head[..read].starts_with(b"\x93NUMPY") {
            "; it is a single array: numpy.savez puts arrays into an .npz"
        } else if head[0] == 0x80 && (2..=5).contains(&head[1]) {
            "; it is a pickle, which only Python can open: load it there and save its arrays by numpy.savez"
        } else if head[..read].starts_with(b"version ") {
            "; it seems to be a pointer of Git LFS: fetch the file itself by `git lfs pull`"
        } else {
            ""
        };
        format!("{} is no usable .npz (a zip of NumPy arrays){is}", path.display())
    })
}

/// What an `.npz` may hold, and what this one does.
pub(crate) fn contents(archive: &ZipArchive<std::fs::File>) -> String {
    let names = archive.file_names().filter_map(Result::ok).map(std::borrow::Cow::into_owned);
    let mut names: Vec<String> = names.take(9).collect();
    names.sort();
    let has = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
    format!(
        "it has {has}; an .npz holds images as `arr_0` (N, H, W, C), or statistics as `mu` (D) and `sigma` (D, D): save the \
         arrays under these names"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_rows() {
        // numpy.asfortranarray(numpy.arange(6).reshape(2, 3)) is stored as 0 3 1 4 2 5.
        assert_eq!(by_rows(&[2, 3], vec![0, 3, 1, 4, 2, 5]), [0, 1, 2, 3, 4, 5]);
        assert_eq!(by_rows(&[1, 2, 3], vec![0, 3, 1, 4, 2, 5]), [0, 1, 2, 3, 4, 5]);
        // numpy.arange(8).reshape(2, 2, 2) is stored as 0 4 2 6 1 5 3 7.
        assert_eq!(by_rows(&[2, 2, 2], vec![0, 4, 2, 6, 1, 5, 3, 7]), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(by_rows(&[1, 4], vec![1, 2, 3, 4]), [1, 2, 3, 4]);
    }
}
