//! Where the numbers of a tensor lie in a file, and what they are.

use half::{bf16, f16};

/// Element types of storages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed 64-bit integers.
    I64,
    /// Signed 32-bit integers.
    I32,
    /// Signed 16-bit integers.
    I16,
    /// Signed bytes.
    I8,
    /// Bytes.
    U8,
    /// Truth values.
    Bool,
}

impl ElementType {
    /// The element type of a storage class of PyTorch.
    pub(crate) fn of_storage(name: &str) -> Option<Self> {
        Some(match name {
            "FloatStorage" => Self::F32,
            "DoubleStorage" => Self::F64,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::Bf16,
            "LongStorage" => Self::I64,
            "IntStorage" => Self::I32,
            "ShortStorage" => Self::I16,
            "CharStorage" => Self::I8,
            "ByteStorage" => Self::U8,
            "BoolStorage" => Self::Bool,
            _ => return None,
        })
    }

    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// One element as f32; `None` for integers and truth values.
    pub(crate) fn real(self, bytes: &[u8]) -> Option<f32> {
        fn exact<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
            bytes.try_into().ok()
        }
        match self {
            Self::F32 => exact(bytes).map(f32::from_le_bytes),
            Self::F64 => exact(bytes).map(|b| f64::from_le_bytes(b) as f32),
            Self::F16 => exact(bytes).map(|b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => exact(bytes).map(|b| bf16::from_le_bytes(b).to_f32()),
            _ => None,
        }
    }
}

/// A block of numbers in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StorageRef {
    /// Its name in the archive.
    pub(crate) key: String,
    pub(crate) element: ElementType,
    /// Number of elements.
    pub(crate) numel: u64,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorRef {
    pub(crate) storage: StorageRef,
    /// First element.
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    /// Distance between neighbours on each axis, in elements.
    pub(crate) strides: Vec<usize>,
}

impl TensorRef {
    /// Number of elements, if all of them lie inside the storage and there are no more than it has.
    pub(crate) fn numel_inside(&self) -> Option<usize> {
        let numel = self.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d))?;
        if numel == 0 {
            return Some(0);
        }
        let axes = self.shape.iter().zip(&self.strides);
        let last =
            axes.into_iter().try_fold(self.offset, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?))?;
        let limit = self.storage.numel;
        ((last as u64) < limit && numel as u64 <= limit).then_some(numel)
    }

    /// The elements in row-major order, from the whole storage's bytes. Asked for after [`Self::numel_inside`].
    pub(crate) fn gather(&self, storage: &[u8], numel: usize) -> Option<Vec<f32>> {
        let (element, size) = (self.storage.element, self.storage.element.bytes());
        let mut values = Vec::with_capacity(numel);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..numel {
            let at = self.offset + index.iter().zip(&self.strides).map(|(i, s)| i * s).sum::<usize>();
            values.push(element.real(storage.get(at * size..(at + 1) * size)?)?);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < self.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Some(values)
    }
}
