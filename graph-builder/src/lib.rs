//! Graphs of diffusion transformers: intermediate representation, autodiff, passes and ONNX emission.
//!
//! The room knows nothing of models, runtimes or files. Map:
//!
//! | module | holds |
//! |---|---|
//! | [`builder`], [`value`] | what a model author holds: builder and scope, values and their methods |
//! | [`graph`] | nodes, parameters, the text form |
//! | [`op`], [`ops`] | the closed set of ops, five rules each |
//! | [`passes`] | rewrites, one visible list; recomputation; mixed precision by one visible table |
//! | [`precision`] | what a program computes in |
//! | [`onnx`] | emission |
//! | [`eval`] | the f64 interpreter that everything else is compared with |
//! | [`liveness`] | how much memory intermediate values need at once |
//! | [`role`] | muP roles, derived |
//! | [`probe`] | values inside a graph as outputs |
//!
//! ```
//! use graph_builder::{Builder, Dim, Init, Type, Weights};
//!
//! let b = Builder::new("loss");
//! let x = b.input("x", Type::f32([8, 3])); // (N, C)
//! let w = b.root().param("weight", &[Dim::Width(5), Dim::Fixed(3)], Init::XavierUniform);
//! let y = x.matmul(w.transpose(&[1, 0])).gelu(); // (N, D)
//! let loss = y.square().mean(&[0, 1]).reshape([]);
//! let grads = b.gradients(loss, &[w])?;
//! b.output("loss", loss);
//! b.output("grad.weight", grads[0]);
//! let program = b.finish()?.optimised()?.emit(Weights::Inputs)?;
//! assert_eq!(program.outputs[1].name, "grad.weight");
//! # Ok::<(), graph_builder::GraphError>(())
//! ```

pub mod builder;
pub mod error;
pub mod eval;
pub mod grad;
pub mod graph;
pub mod liveness;
pub mod onnx;
pub mod op;
pub mod ops;
pub mod passes;
pub mod precision;
pub mod probe;
pub mod program;
pub mod role;
pub mod shape;
pub mod value;
mod verify;

pub use builder::{Builder, Scope};
pub use error::GraphError;
pub use graph::{Dim, Graph, Init, Parameter};
pub use onnx::{
    ExternalTensor, NativeCall, NativeKernel, NativeName, OpenDim, OpenProgram, OpenSpec, Weights,
};
pub use op::{Cost, Op, Policy, Storage};
pub use ops::activation::Activation;
pub use ops::patch::PatchOrder;
pub use ops::window::Window;
pub use precision::Precision;
pub use program::{OnnxProgram, TensorSpec};
pub use role::Role;
pub use shape::{DType, Shape, Type};
pub use value::Value;
