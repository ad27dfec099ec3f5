//! What the compiler hands over: ONNX bytes with a typed signature.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::shape::{DType, Shape, Type};

/// Name, element type and shape of one program input or output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// The stable name that callers feed or read.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Static shape.
    pub shape: Shape,
}

/// One emitted program: a serialised ONNX model and its signature.
#[derive(Clone, Debug)]
pub struct OnnxProgram {
    /// `denoise`, `train-step`, …
    pub name: String,
    /// The serialised `ModelProto`; the same graph always gives the same bytes.
    pub bytes: Vec<u8>,
    /// Graph inputs in order.
    pub inputs: Vec<TensorSpec>,
    /// Graph outputs in order.
    pub outputs: Vec<TensorSpec>,
    /// File name, relative to the model file, that the initializers point into; `None` when there are none.
    pub weights_file: Option<String>,
    /// Names of the `mudit` domain's ops that the model uses, each with a function body inside the model.
    pub native_ops: Vec<String>,
    /// Types of the operands of those ops, by the operand's name in the model: what a kernel can take, and the memory that
    /// it needs, depend on them.
    pub native_operands: BTreeMap<String, Type>,
    /// Nodes for which the CUDA provider brings a table from the host in each run: a recorded CUDA graph would read it
    /// where it no longer is. They join or cut tensors of unequal sizes, or more than 32.
    pub unrepeatable: Vec<String>,
}
