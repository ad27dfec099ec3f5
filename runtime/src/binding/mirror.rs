//! A GPU's copies of a binding's inputs and outputs: what the program on the GPU reads and writes.
#![allow(unsafe_code, reason = "copies between addresses of the host and memory of the GPU")]

use std::sync::Arc;

use graph_builder::TensorSpec;

use crate::cuda::{DeviceMemory, Gpu};
use crate::error::Result;

/// One input or output.
struct Mirror {
    /// Where the host has it.
    host: *mut u8,
    memory: DeviceMemory,
}

/// The copies of all inputs and outputs, at addresses that never change.
pub(super) struct Mirrors {
    gpu: Arc<Gpu>,
    inputs: Vec<Mirror>,
    outputs: Vec<Mirror>,
}

impl Mirrors {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Self {
        Self { gpu: gpu.clone(), inputs: Vec::new(), outputs: Vec::new() }
    }

    /// Gives a tensor at `host` its copy; returns the address of the copy.
    ///
    /// # Errors
    /// [`GpuOutOfMemory`](crate::RuntimeError::GpuOutOfMemory).
    pub(super) fn add(&mut self, input: bool, spec: &TensorSpec, host: *mut u8) -> Result<*mut u8> {
        let bytes = spec.shape.numel() * spec.dtype.bytes();
        let memory = DeviceMemory::zeros(&self.gpu, bytes, &format!("`{}`", spec.name))?;
        let address = memory.address() as *mut u8;
        let side = if input { &mut self.inputs } else { &mut self.outputs };
        side.push(Mirror { host, memory });
        Ok(address)
    }

    /// Brings the inputs to the GPU.
    ///
    /// # Safety
    /// Every input's memory on the host must be alive, and nobody may write to it.
    pub(super) unsafe fn upload(&self) -> Result<()> {
        for mirror in &self.inputs {
            // SAFETY: the caller's promise; `add` made the copy as large as the tensor.
            let values = unsafe { std::slice::from_raw_parts(mirror.host, mirror.memory.bytes()) };
            mirror.memory.upload(0, values)?;
        }
        Ok(())
    }

    /// Brings the outputs to the host, after the run.
    ///
    /// # Safety
    /// Every output's memory on the host must be alive, and nobody else may touch it.
    pub(super) unsafe fn download(&self) -> Result<()> {
        for mirror in &self.outputs {
            // SAFETY: as in `upload`.
            let values = unsafe { std::slice::from_raw_parts_mut(mirror.host, mirror.memory.bytes()) };
            mirror.memory.download(0, values)?;
        }
        Ok(())
    }
}
