//! The CUDA kernels' own sources, compiled for the host and run thread by thread: what they compute, without a GPU.

mod emulator;
mod ops;
mod random;
mod update;
