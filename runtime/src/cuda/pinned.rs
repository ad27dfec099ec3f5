//! Host memory that a GPU reads and writes by itself, beside what the host does.
#![allow(unsafe_code, reason = "owns memory of the driver and hands out slices of it")]

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::gpu::Gpu;
use crate::error::{Result, RuntimeError};

/// Page-locked bytes of the host, zero at first, at a fixed address that is a multiple of 256.
///
/// Copies to and from them go on while the host computes; who queues one sees to it that nobody touches the bytes before
/// it is done.
pub struct PinnedMemory {
    start: NonNull<u8>,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedMemory").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

// SAFETY: it owns its memory exclusively, like `Box<[u8]>`.
unsafe impl Send for PinnedMemory {}
// SAFETY: shared access only reads, like `Box<[u8]>`.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// `bytes` zeros.
    ///
    /// # Errors
    /// [`RuntimeError::OutOfMemory`] when the driver does not give them.
    pub fn zeros(gpu: &Arc<Gpu>, bytes: usize, what: &str) -> Result<Self> {
        let refused = || RuntimeError::OutOfMemory { bytes, what: format!("{what} (page-locked)") };
        // SAFETY: plain allocation with the GPU's context current; zero bytes would be refused.
        let given = gpu.call("allocate page-locked memory", || unsafe {
            result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE)
        });
        let start = given.ok().and_then(|start| NonNull::new(start.cast::<u8>())).ok_or_else(refused)?;
        // SAFETY: freshly allocated, of at least this size.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Ok(Self { start, bytes, gpu: gpu.clone() })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` points to `bytes` initialised bytes of this object.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// The bytes, writable.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let start = self.start.as_ptr();
        // SAFETY: allocated in `zeros`, freed once; freeing waits for copies that use it.
        drop(self.gpu.call("free page-locked memory", || unsafe { result::free_host(start.cast()) }));
    }
}
