//! Values in a GPU's memory.

use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit};
use graph_builder::DType;
use half::{bf16, f16};
use runtime::cuda::kernels::{Address, GpuQueue, Queue as _};
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

/// What a queue needs beside operands has the same addresses each time, however often it grew, and nobody else's meanwhile.
pub(crate) fn scratch_stays_where_it_is(gpu: &Arc<Gpu>) {
    let requests = [100, 3 << 20, 5 << 20, 1, 20 << 20];
    let take = |queue: &GpuQueue| requests.map(|bytes| queue.scratch(bytes).unwrap().0);
    let _grown = take(&GpuQueue::new(gpu).unwrap());
    let settled = take(&GpuQueue::new(gpu).unwrap());
    let free = gpu.memory().unwrap().0;
    let queue = GpuQueue::new(gpu).unwrap();
    assert_eq!(take(&queue), settled);
    assert_eq!(gpu.memory().unwrap().0, free, "memory that is there already was asked for again");
    let ranges =
        |starts: [u64; 5]| requests.iter().zip(starts).map(|(&n, at)| at..at + n as u64).collect::<Vec<_>>();
    let mut all = ranges(settled);
    all.extend(ranges(take(&GpuQueue::new(gpu).unwrap())));
    all.sort_by_key(|r| r.start);
    assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start), "two have the same bytes: {all:?}");
    assert!(all.iter().all(|r| r.start % 256 == 0));
}
