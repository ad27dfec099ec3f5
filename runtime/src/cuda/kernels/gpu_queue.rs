//! The queue of a GPU: its stream.
#![allow(unsafe_code, reason = "launches kernels on the addresses that callers answer for")]

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;

use cudarc::driver::result;

use super::loaded::Loaded;
use super::products::Workspace;
use super::queue::{Address, Launch, Product, Queue};
use super::scratch::{Pool, Scratch};
use crate::cuda::Gpu;
use crate::error::{Result, RuntimeError};

/// Work on a GPU's stream. Nothing waits: a call returns when the work is enqueued.
///
/// Kernels are compiled and loaded when they are first asked for, once for all queues of the GPU. What
/// [`Queue::scratch`] gives is the queue's own until it is dropped; then the next queue has it, whose work comes later on
/// the same stream.
pub struct GpuQueue {
    gpu: Arc<Gpu>,
    tf32: bool,
    pool: Arc<Pool>,
    scratch: RefCell<Scratch>,
    /// Memory of products, one after the other.
    workspace: Cell<Workspace>,
}

impl fmt::Debug for GpuQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GpuQueue").field(&self.gpu).finish()
    }
}

impl GpuQueue {
    /// A queue on the GPU's stream.
    ///
    /// # Errors
    /// [`RuntimeError::ProviderUnavailable`] without NVRTC or cuBLASLt; [`RuntimeError::InvalidValue`] for a GPU older
    /// than the kernels.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        Ok(Self::lending(gpu, &gpu.loaded()?.pool))
    }

    /// A queue with memory of a pool.
    pub(crate) fn lending(gpu: &Arc<Gpu>, pool: &Arc<Pool>) -> Self {
        let scratch = RefCell::new(pool.lend());
        Self { gpu: gpu.clone(), tf32: false, pool: pool.clone(), scratch, workspace: Cell::default() }
    }

    /// Lets products of f32 round their operands to 10 bits of fraction.
    #[must_use]
    pub fn with_tf32(mut self, tf32: bool) -> Self {
        self.tf32 = tf32;
        self
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    fn loaded(&self) -> Result<&Loaded> {
        self.gpu.loaded()
    }
}

impl Drop for GpuQueue {
    fn drop(&mut self) {
        self.pool.give_back(self.scratch.take());
    }
}

impl Queue for GpuQueue {
    fn launch(&self, mut launch: Launch<'_>) -> Result<()> {
        let function = self.loaded()?.function(&self.gpu, launch.source, launch.kernel)?;
        function.allow_shared(&self.gpu, launch.shared_bytes)?;
        let mut pointers = launch.arguments.pointers();
        let (grid, block) = (launch.grid.into(), (launch.threads, 1, 1));
        let stream = self.gpu.stream().cu_stream();
        let launched = self.gpu.call("launch a kernel", || {
            // SAFETY: callers give the arguments of the kernel's parameters, and addresses that outlive the work.
            unsafe {
                let handle = function.handle();
                result::launch_kernel(handle, grid, block, launch.shared_bytes, stream, &mut pointers)
            }
        });
        launched.map_err(|e| RuntimeError::Kernel {
            source_file: launch.source.name.to_owned(),
            reason: format!("`{}` with {} bytes of shared memory: {e}", launch.kernel, launch.shared_bytes),
        })
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        let products = &self.loaded()?.products;
        let plan = products.plan(&self.gpu, product, self.tf32)?;
        let needed = plan.workspace_bytes();
        if self.workspace.get().bytes < needed {
            self.workspace.set(Workspace { at: self.scratch(needed)?, bytes: needed });
        }
        products.enqueue(&self.gpu, product, &plan, self.workspace.get())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        let stream = self.gpu.stream().cu_stream();
        // SAFETY: callers give addresses of that many bytes.
        self.gpu.call("copy on the GPU", || unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, stream) })
    }

    fn scratch(&self, bytes: usize) -> Result<Address> {
        self.scratch.borrow_mut().take(&self.gpu, bytes)
    }
}
