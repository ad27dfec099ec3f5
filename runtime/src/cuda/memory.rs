//! Memory on a GPU.
#![allow(unsafe_code, reason = "owns memory of the GPU and answers for the addresses of copies")]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaStream, result, sys};

use super::gpu::Gpu;
use crate::error::{Result, RuntimeError};

/// What to do when memory runs out and nothing better is known.
pub(crate) const USE_LESS: &str =
    "use a smaller batch, `train.accumulate`, `train.recompute` or a smaller precision";

/// A block of a GPU's memory, at a fixed address until it is dropped.
pub struct DeviceMemory {
    address: sys::CUdeviceptr,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl DeviceMemory {
    /// `bytes` zeros; `what` names them in the error when they cannot be had.
    ///
    /// # Errors
    /// [`RuntimeError::GpuOutOfMemory`], [`RuntimeError::Cuda`].
    pub fn zeros(gpu: &Arc<Gpu>, bytes: usize, what: &str) -> Result<Self> {
        let memory = Self::uninitialised(gpu, bytes, what)?;
        memory.clear()?;
        Ok(memory)
    }

    /// `bytes` bytes of anything; `what` names them in the error when they cannot be had.
    pub(crate) fn uninitialised(gpu: &Arc<Gpu>, bytes: usize, what: &str) -> Result<Self> {
        // SAFETY: plain allocation with the GPU's context current; zero bytes would be refused.
        let given = gpu.call("allocate memory", || Ok(unsafe { result::malloc_sync(bytes.max(1)) }))?;
        let address = given.map_err(|e| {
            if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                out_of_memory(gpu, bytes, what)
            } else {
                RuntimeError::cuda("allocate memory", e)
            }
        })?;
        Ok(Self { address, bytes, gpu: gpu.clone() })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU's address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The GPU it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Queues setting every byte to zero.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`].
    pub fn clear(&self) -> Result<()> {
        let stream = self.gpu.stream().cu_stream();
        // SAFETY: the block is this object's own and lives until the stream has come to what frees it.
        self.gpu
            .call("clear memory", || unsafe { result::memset_d8_async(self.address, 0, self.bytes, stream) })
    }

    /// Copies bytes of the host to `offset`, and waits.
    ///
    /// # Errors
    /// [`RuntimeError::WrongLength`] when they pass the end; [`RuntimeError::Cuda`].
    pub fn upload(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        // SAFETY: the slice outlives the copy, because this function waits for it.
        unsafe { self.queue_upload(self.gpu.stream(), offset, bytes) }?;
        self.gpu.synchronize()
    }

    /// Copies bytes from `offset` to the host, and waits.
    ///
    /// # Errors
    /// As [`DeviceMemory::upload`].
    pub fn download(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: as in `upload`.
        unsafe { self.queue_download(offset, bytes) }?;
        self.gpu.synchronize()
    }

    /// Queues a copy of bytes of the host to `offset`.
    ///
    /// # Safety
    /// The bytes must stay where they are, unchanged, until the copy is done.
    pub(crate) unsafe fn queue_upload(&self, stream: &CudaStream, offset: usize, bytes: &[u8]) -> Result<()> {
        let address = self.at(offset, bytes.len())?;
        let stream = stream.cu_stream();
        // SAFETY: `at` checked the range; the caller answers for the host's bytes.
        self.gpu.call("copy to the GPU", || unsafe { result::memcpy_htod_async(address, bytes, stream) })
    }

    /// Queues a copy from `offset` to bytes of the host.
    ///
    /// # Safety
    /// Nobody may touch the bytes until the copy is done.
    pub(crate) unsafe fn queue_download(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let address = self.at(offset, bytes.len())?;
        let stream = self.gpu.stream().cu_stream();
        // SAFETY: `at` checked the range; the caller answers for the host's bytes.
        self.gpu.call("copy from the GPU", || unsafe { result::memcpy_dtoh_async(bytes, address, stream) })
    }

    /// Queues a copy of another block of the same size on the same GPU.
    ///
    /// # Errors
    /// [`RuntimeError::WrongLength`], [`RuntimeError::Cuda`].
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        self.copy_range(0, other, 0..other.bytes)
    }

    /// Queues a copy of a part of another block on the same GPU to `offset`.
    ///
    /// # Errors
    /// [`RuntimeError::WrongLength`] when it passes an end; [`RuntimeError::Cuda`].
    pub fn copy_range(&self, offset: usize, other: &Self, range: Range<usize>) -> Result<()> {
        let (to, from) = (self.at(offset, range.len())?, other.at(range.start, range.len())?);
        let stream = self.gpu.stream().cu_stream();
        // SAFETY: both ranges are inside their blocks, and blocks do not overlap.
        self.gpu
            .call("copy on the GPU", || unsafe { result::memcpy_dtod_async(to, from, range.len(), stream) })
    }

    fn at(&self, offset: usize, len: usize) -> Result<sys::CUdeviceptr> {
        if offset.checked_add(len).is_some_and(|end| end <= self.bytes) {
            return Ok(self.address + offset as u64);
        }
        let what = format!("memory of the GPU from byte {offset}");
        Err(RuntimeError::WrongLength { what, expected: self.bytes.saturating_sub(offset), got: len })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let address = self.address;
        // SAFETY: allocated in `uninitialised`, freed once; freeing waits for queued work that uses it. A driver that is
        // already shutting down frees it itself.
        drop(self.gpu.call("free memory", || unsafe { result::free_sync(address) }));
    }
}

/// The error of a request that the GPU cannot serve.
pub(crate) fn out_of_memory(gpu: &Gpu, bytes: usize, what: &str) -> RuntimeError {
    let (free, total) = gpu.memory().unwrap_or((0, gpu.info().memory_bytes));
    RuntimeError::GpuOutOfMemory {
        ordinal: gpu.info().ordinal,
        bytes,
        what: what.to_owned(),
        free,
        total,
        advice: USE_LESS.to_owned(),
    }
}
