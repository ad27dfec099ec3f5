//! Graphs of diffusion transformers: intermediate representation, ops, autodiff, passes and ONNX emission.

pub mod program;
pub mod shape;

pub use program::{OnnxProgram, TensorSpec};
pub use shape::{DType, Shape, Type};
