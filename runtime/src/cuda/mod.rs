//! NVIDIA GPUs: their libraries, contexts and streams, memory and arenas on them.
//!
//! Everything here is asked for by name at run time: a machine without a GPU runs the same program, and is told what is
//! missing when a GPU is asked for.

mod arena;
mod gpu;
pub mod kernels;
pub mod libraries;
mod memory;
mod optimizer;
mod pinned;
mod turns;

pub use arena::DeviceArena;
pub use gpu::{Gpu, GpuInfo};
pub use memory::DeviceMemory;
pub(crate) use memory::out_of_memory;
pub use optimizer::{DeviceAdamW, DeviceUpdate, GradientGroup};
pub use pinned::PinnedMemory;
pub use turns::Turn;
