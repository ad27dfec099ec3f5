//! Arenas on a GPU: parameters, gradients, moments and averages that stay there.

use std::sync::Arc;

use graph_builder::DType;
use half::{bf16, f16};

use super::gpu::Gpu;
use super::memory::DeviceMemory;
use crate::arena::{Arena, ArenaLayout};
use crate::error::{Result, RuntimeError};

/// One block of a GPU's memory, divided by an [`ArenaLayout`], of one element type. Entries start at the layout's
/// element offsets, so arenas of several types with one layout go together element by element.
///
/// Everything that reads or writes it is queued on its GPU's stream, one after the other; that is why no lock guards it.
#[derive(Debug)]
pub struct DeviceArena {
    layout: Arc<ArenaLayout>,
    dtype: DType,
    memory: DeviceMemory,
}

impl DeviceArena {
    /// An arena of zeros; `what` names it in the error when it does not fit.
    ///
    /// # Errors
    /// [`RuntimeError::GpuOutOfMemory`]; [`RuntimeError::InvalidValue`] for a type that is not f32, bf16 or f16.
    pub fn zeros(gpu: &Arc<Gpu>, layout: Arc<ArenaLayout>, dtype: DType, what: &str) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::Bf16 | DType::F16) {
            return Err(RuntimeError::InvalidValue {
                what: format!("the element type of {what}"),
                expected: "f32, bf16 or f16".to_owned(),
                got: dtype.to_string(),
            });
        }
        let memory = DeviceMemory::zeros(gpu, layout.len() * dtype.bytes(), what)?;
        Ok(Self { layout, dtype, memory })
    }

    /// Names, shapes and places.
    pub fn layout(&self) -> &Arc<ArenaLayout> {
        &self.layout
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The memory.
    pub fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// The GPU it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        self.memory.gpu()
    }

    /// The GPU's address of the element at `offset`.
    pub fn address(&self, offset: usize) -> u64 {
        self.memory.address() + (offset * self.dtype.bytes()) as u64
    }

    /// Takes over the values of an arena of the host with the same layout, rounded to this element type.
    ///
    /// # Errors
    /// [`RuntimeError::LayoutMismatch`], [`RuntimeError::Cuda`].
    pub fn upload(&self, host: &Arena) -> Result<()> {
        self.same_layout(host, "copy an arena to the GPU")?;
        let values = host.as_slice();
        match self.dtype {
            DType::Bf16 => {
                let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
                self.memory.upload(0, bytemuck::cast_slice(&rounded))
            }
            DType::F16 => {
                let rounded: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                self.memory.upload(0, bytemuck::cast_slice(&rounded))
            }
            _ => self.memory.upload(0, bytemuck::cast_slice(values)),
        }
    }

    /// Gives its values to an arena of the host with the same layout, after everything queued is done.
    ///
    /// # Errors
    /// As [`DeviceArena::upload`].
    pub fn download(&self, host: &mut Arena) -> Result<()> {
        self.same_layout(host, "copy an arena from the GPU")?;
        let values = host.as_mut_slice();
        match self.dtype {
            DType::Bf16 => {
                let mut rounded = vec![bf16::ZERO; values.len()];
                self.memory.download(0, bytemuck::cast_slice_mut(&mut rounded))?;
                values.iter_mut().zip(rounded).for_each(|(v, r)| *v = r.to_f32());
            }
            DType::F16 => {
                let mut rounded = vec![f16::ZERO; values.len()];
                self.memory.download(0, bytemuck::cast_slice_mut(&mut rounded))?;
                values.iter_mut().zip(rounded).for_each(|(v, r)| *v = r.to_f32());
            }
            _ => self.memory.download(0, bytemuck::cast_slice_mut(values))?,
        }
        Ok(())
    }

    /// Queues taking over the values of an arena of the same layout and type on the same GPU.
    ///
    /// # Errors
    /// [`RuntimeError::LayoutMismatch`], [`RuntimeError::Cuda`].
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        if self.layout != other.layout || self.dtype != other.dtype {
            let (left, right) = (self.layout.entries().len(), other.layout.entries().len());
            return Err(RuntimeError::LayoutMismatch { action: "copy an arena on the GPU", left, right });
        }
        self.memory.copy_from(&other.memory)
    }

    fn same_layout(&self, host: &Arena, action: &'static str) -> Result<()> {
        if self.layout == *host.layout() {
            return Ok(());
        }
        let (left, right) = (self.layout.entries().len(), host.layout().entries().len());
        Err(RuntimeError::LayoutMismatch { action, left, right })
    }
}
