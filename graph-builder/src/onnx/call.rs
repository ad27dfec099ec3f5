//! Uses of the `mudit` ops in an emitted model, as kernels see them.

use std::collections::BTreeMap;

use onnx_protobuf::{AttributeProto, ModelProto, NodeProto};
use protobuf::Message;

use super::{DOMAIN, NativeName};
use crate::error::{GraphError, Result};
use crate::program::OnnxProgram;
use crate::shape::{DType, Shape, Type};

/// One use of a `mudit` op, as a kernel of our own would get it.
#[derive(Debug)]
pub struct NativeCall<'a> {
    pub(super) node: &'a NodeProto,
    pub(super) dtype: DType,
    pub(super) shapes: Vec<&'a Shape>,
}

/// How a use of a `mudit` op is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NativeKernel {
    /// By its function body.
    Body,
    /// By a kernel of our own.
    Own,
    /// By a kernel of our own, which cannot take these operands: why not.
    Unfit(String),
}

impl NativeCall<'_> {
    /// Name of the op, whichever of its bodies is called.
    pub fn op(&self) -> &str {
        NativeName::parse(&self.node.op_type).map_or(&self.node.op_type, |name| name.op)
    }

    /// Element type of the first operand, by which the kernel is chosen.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shapes of the operands; fewer than there are when the program does not tell one.
    pub fn shapes(&self) -> &[&Shape] {
        &self.shapes
    }

    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.node.attribute.iter().find(|attribute| attribute.name == name)
    }

    /// An attribute that is a number.
    pub fn float(&self, name: &str) -> Option<f32> {
        self.attribute(name).map(|a| a.f)
    }

    /// An attribute that is a whole number.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.attribute(name).map(|a| a.i)
    }

    /// An attribute that is text.
    pub fn text(&self, name: &str) -> Option<String> {
        self.attribute(name).map(|a| String::from_utf8_lossy(&a.s).into_owned())
    }
}

/// Shapes of a node's operands, up to the first that is not known.
pub(super) fn shapes<'a>(node: &NodeProto, operands: &'a BTreeMap<String, Type>) -> Vec<&'a Shape> {
    node.input.iter().map_while(|name| operands.get(name)).map(|ty| &ty.shape).collect()
}

impl OnnxProgram {
    /// Shows every use of a `mudit` op, in the order in which they stand in the model.
    ///
    /// # Errors
    /// [`GraphError::Emit`] for bytes that are no model.
    pub fn each_native_call(&self, see: &mut dyn FnMut(&NativeCall<'_>)) -> Result<()> {
        let broken =
            |e: protobuf::Error| GraphError::Emit { graph: self.name.clone(), reason: e.to_string() };
        let model = ModelProto::parse_from_bytes(&self.bytes).map_err(broken)?;
        for node in model.graph.node.iter().filter(|node| node.domain == DOMAIN) {
            let first = node.input.first().and_then(|name| self.native_operands.get(name));
            if let Some(ty) = first {
                see(&NativeCall { node, dtype: ty.dtype, shapes: shapes(node, &self.native_operands) });
            }
        }
        Ok(())
    }
}
