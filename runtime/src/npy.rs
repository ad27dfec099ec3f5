//! The header of a NumPy array (`.npy`): what lies behind it, judged before any of it is read.

use std::io::Read;

/// No header that NumPy writes is longer, in bytes.
const MAX_HEADER: usize = 1 << 16;

/// What numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Integers from 0 on.
    Unsigned,
    /// Integers.
    Signed,
    /// IEEE floating point.
    Float,
}

/// Why a header is not read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NpyError(String);

/// What an array is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What its elements are.
    pub kind: Kind,
    /// Bytes of an element.
    pub width: usize,
    /// Its axes, slowest first.
    pub shape: Vec<usize>,
    /// Whether it is stored column by column.
    pub by_columns: bool,
    /// Bytes before the data.
    pub before: u64,
}

impl Header {
    /// Reads a header and leaves the reader at the data.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn read(reader: &mut impl Read) -> Result<Self, NpyError> {
        let cut = |what: &str| NpyError(format!("{what} is cut short"));
        let mut bytes = vec![0; 12];
        reader.read_exact(&mut bytes[..10]).map_err(|_| cut("it"))?;
        if !bytes.starts_with(b"\x93NUMPY") {
            return Err(NpyError("it is no NumPy array".into()));
        }
        let (start, length) = if bytes[6] == 1 {
            (10, u16::from_le_bytes([bytes[8], bytes[9]]) as usize)
        } else {
            reader.read_exact(&mut bytes[10..]).map_err(|_| cut("it"))?;
            (12, u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize)
        };
        if length > MAX_HEADER {
            let text = format!("its header says to have {length} bytes, at most {MAX_HEADER} are read");
            return Err(NpyError(text));
        }
        bytes.resize(start + length, 0);
        reader.read_exact(&mut bytes[start..]).map_err(|_| cut("its header"))?;
        let text = str::from_utf8(&bytes[start..]).map_err(|_| NpyError("its header is no text".into()))?;
        Self::described(text, bytes.len() as u64)
    }

    /// Reads `{'descr': '|u1', 'fortran_order': False, 'shape': (4, 8, 8, 3), }`.
    fn described(text: &str, before: u64) -> Result<Self, NpyError> {
        let after = |key: &str| {
            let found = text.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
            found.ok_or_else(|| NpyError(format!("its header has no `{key}`")))
        };
        let descr = after("descr")?.split('\'').nth(1).unwrap_or_default();
        let (kind, width) = element(descr).ok_or_else(|| {
            NpyError(format!(
                "its elements are `{descr}`, expected bytes (|u1) or little-endian numbers (<f4, <i8 …)"
            ))
        })?;
        let by_columns = !after("fortran_order")?.starts_with("False");
        let tuple = after("shape")?.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let sizes = tuple.map(|(sizes, _)| sizes.split(',').map(str::trim).filter(|s| !s.is_empty()));
        let shape = sizes.and_then(|sizes| sizes.map(|s| s.parse().ok()).collect::<Option<Vec<usize>>>());
        let shape = shape.ok_or_else(|| NpyError("its shape cannot be read".into()))?;
        Ok(Self { kind, width, shape, by_columns, before })
    }

    /// Bytes of the data.
    ///
    /// # Errors
    /// More than any file holds.
    pub fn data_bytes(&self) -> Result<u64, NpyError> {
        data_bytes(&self.shape, self.width)
    }
}

/// Bytes of an array of a shape whose elements have `width` bytes.
///
/// # Errors
/// More than any file holds.
pub fn data_bytes(shape: &[usize], width: usize) -> Result<u64, NpyError> {
    let product = shape.iter().try_fold(width as u64, |a, d| a.checked_mul(*d as u64));
    let product = product.filter(|bytes| *bytes < u64::MAX / 2);
    product.ok_or_else(|| NpyError(format!("no file holds an array of shape {shape:?}")))
}

/// `<f4`: byte order, kind, bytes.
fn element(descr: &str) -> Option<(Kind, usize)> {
    let (order, rest) = match descr.split_at_checked(1)? {
        (order @ ("<" | "|" | ">" | "="), rest) => (order, rest),
        _ => ("=", descr),
    };
    let (kind, width) = rest.split_at_checked(1)?;
    let (kind, widths): (Kind, &[usize]) = match kind {
        "u" => (Kind::Unsigned, &[1, 2, 4, 8]),
        "i" => (Kind::Signed, &[1, 2, 4, 8]),
        "f" => (Kind::Float, &[2, 4, 8]),
        _ => return None,
    };
    let width = width.parse().ok().filter(|width| widths.contains(width))?;
    (width == 1 || order == "<").then_some((kind, width))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(descr: &str, shape: &str) -> Result<Header, NpyError> {
        let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let bytes = [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], text.as_bytes()].concat();
        Header::read(&mut bytes.as_slice())
    }

    #[test]
    fn elements_and_shapes_are_read() {
        for (descr, kind, width) in [
            ("|u1", Kind::Unsigned, 1),
            ("u1", Kind::Unsigned, 1),
            ("|i1", Kind::Signed, 1),
            ("<i8", Kind::Signed, 8),
            ("<u4", Kind::Unsigned, 4),
            ("<f2", Kind::Float, 2),
            ("<f8", Kind::Float, 8),
        ] {
            let header = read(descr, "(4, 8)").unwrap();
            assert_eq!((header.kind, header.width, &header.shape[..]), (kind, width, &[4, 8][..]), "{descr}");
        }
        assert_eq!(read("<f4", "()").unwrap().data_bytes().unwrap(), 4);
        assert_eq!(read("<f4", "(3,)").unwrap().data_bytes().unwrap(), 12);
    }

    #[test]
    fn what_is_no_array_of_numbers_is_refused_in_words() {
        for (descr, shape, part) in [
            (">f4", "(1,)", "little-endian"),
            ("<f3", "(1,)", "`<f3`"),
            ("|O", "(1,)", "`|O`"),
            ("", "(1,)", "its elements"),
            ("<c8", "(1,)", "`<c8`"),
            ("<f4", "(-1,)", "shape"),
            ("<f4", "4", "shape"),
        ] {
            let error = read(descr, shape).unwrap_err().to_string();
            assert!(error.contains(part), "{descr} {shape}: {error}");
        }
        let huge = read("<f4", "(99999999999, 99999999999, 3)").unwrap();
        assert!(huge.data_bytes().unwrap_err().to_string().contains("no file"));
        for bytes in
            [&b""[..], b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\x00{", b"\x93NUMPY\x02\x00\xff\xff\xff\xff"]
        {
            Header::read(&mut &bytes[..]).unwrap_err();
        }
    }
}
