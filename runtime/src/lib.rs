//! Runs ONNX programs on ONNX Runtime: finds the library, owns the memory, binds, runs and updates.
//!
//! A map of the room, in the order of use:
//!
//! | module | holds |
//! |---|---|
//! | [`library`] | finding, fetching and loading ONNX Runtime once per process: [`Runtime`] |
//! | [`session`] | a loaded program whose signature was checked: [`Session`]; one for several batch sizes: [`OpenSession`] |
//! | [`placement`] | which provider runs which node of a session |
//! | [`foreign`] | models that somebody else made: [`ForeignModel`] |
//! | [`arena`] | one allocation for all parameters (or gradients, …), a named view each: [`Arena`] |
//! | [`binding`] | a program bound once to arenas and buffers, then run without copies: [`Binding`] |
//! | [`update`] | gradient norm, clip, AdamW and EMA over arenas in one sweep: [`AdamW`] |
//! | [`kernels`] | native kernels of the `mudit` ops, which replace the function bodies in the models |
//! | [`engine`] | engine directories: programs, weights and `engine.json`, written whole or not at all |
//! | [`memory`] | peak and present memory of the process |
//! | [`tensor`], [`safetensors_file`] | tensors in host memory and their files |
//! | [`mod@file`] | files written beside and renamed |
//! | [`lock`] | the sole right to a place, also where a file system has no locks |
//! | [`cuda`] | NVIDIA's libraries, a GPU's context and stream, memory and arenas on it, kernels compiled at need |
//! | [`device`], [`provider`] | where programs run; what is missing for it is said, never worked around |
//! | [`doctor`] | what this machine has: a list of checks with remedies |
//!
//! The crate knows programs and tensors, but no model, loss or training loop. It never prints: progress goes to
//! the caller's function, failures are [`RuntimeError`]s.

pub mod arena;
pub mod binding;
mod compiled;
pub mod cuda;
pub mod device;
pub mod doctor;
pub mod engine;
pub mod error;
pub mod file;
pub mod file_kind;
pub mod foreign;
pub mod hint;
mod huge_pages;
pub mod kernels;
pub mod library;
pub mod lock;
pub mod memory;
pub mod npy;
pub mod placement;
pub mod provider;
pub mod safetensors_file;
pub mod session;
mod storage;
pub mod tensor;
#[cfg(test)]
mod test_models;
pub mod update;
mod wheel;

pub use arena::{Arena, ArenaEntry, ArenaLayout, SharedArena};
pub use binding::{Binding, BindingBuilder};
pub use device::Device;
pub use engine::{Engine, EngineDraft, EngineKey, EngineManifest};
pub use error::{Result, RuntimeError};
pub use foreign::{ForeignModel, Port};
pub use library::{LibraryInfo, LibrarySource, Runtime, RuntimeOptions};
pub use placement::Placement;
pub use provider::{CpuOptions, CudaOptions, Provider, TensorRtOptions};
pub use session::{OpenSession, Optimization, Recording, Session, SessionOptions, Weights};
pub use tensor::{HostData, HostTensor, read_safetensors_file, write_safetensors_file};
pub use update::{AdamW, UpdateReport};
