//! Values in a GPU's memory.

use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit};
use graph_builder::DType;
use half::{bf16, f16};
use runtime::cuda::kernels::Address;
use runtime::cuda::{DeviceMemory, Gpu};

/// A block of memory and its size in bytes.
pub(crate) struct Buffer(DeviceMemory);

impl Buffer {
    /// Filled with ones: no number in any float type.
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Self {
        Self::of(gpu, &vec![u8::MAX; bytes])
    }

    pub(crate) fn of<T: NoUninit>(gpu: &Arc<Gpu>, values: &[T]) -> Self {
        let bytes = bytemuck::cast_slice(values);
        let memory = DeviceMemory::zeros(gpu, bytes.len(), "a proof").unwrap();
        memory.upload(0, bytes).unwrap();
        Self(memory)
    }

    pub(crate) fn at(&self) -> Address {
        Address(self.0.address())
    }

    pub(crate) fn read<T: AnyBitPattern>(&self, count: usize) -> Vec<T> {
        let mut bytes = vec![0; count * size_of::<T>()];
        self.0.download(0, &mut bytes).unwrap();
        bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }

    /// Values rounded to a float type.
    pub(crate) fn floats(gpu: &Arc<Gpu>, dtype: DType, values: impl Iterator<Item = f64>) -> Self {
        match dtype {
            DType::Bf16 => Self::of(gpu, &values.map(|v| bf16::from_f32(v as f32)).collect::<Vec<_>>()),
            DType::F16 => Self::of(gpu, &values.map(|v| f16::from_f32(v as f32)).collect::<Vec<_>>()),
            _ => Self::of(gpu, &values.map(|v| v as f32).collect::<Vec<_>>()),
        }
    }

    pub(crate) fn widened(&self, dtype: DType, count: usize) -> Vec<f64> {
        match dtype {
            DType::Bf16 => self.read::<bf16>(count).iter().map(|v| v.to_f64()).collect(),
            DType::F16 => self.read::<f16>(count).iter().map(|v| v.to_f64()).collect(),
            _ => self.read::<f32>(count).iter().map(|v| f64::from(*v)).collect(),
        }
    }
}

/// A value rounded to a float type.
pub(crate) fn rounded(dtype: DType, v: f64) -> f64 {
    match dtype {
        DType::Bf16 => bf16::from_f32(v as f32).to_f64(),
        DType::F16 => f16::from_f32(v as f32).to_f64(),
        _ => f64::from(v as f32),
    }
}
