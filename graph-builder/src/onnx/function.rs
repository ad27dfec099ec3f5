//! Function bodies: the plain-ONNX meaning of a fused op. They hold no shape, so one body serves every use.

use onnx_protobuf::{FunctionProto, NodeProto, OperatorSetIdProto};

use super::message::raw_tensor;
use super::{Attribute, DOMAIN, OPSET};
use crate::shape::{DType, Type};

/// A function of the domain `mudit` under construction.
pub(crate) struct FunctionBody {
    name: &'static str,
    message: FunctionProto,
}

impl FunctionBody {
    /// An empty body with the given operands and attributes.
    pub(crate) fn new(name: &'static str, inputs: &[&str], attributes: &[&str]) -> Self {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let standard = OperatorSetIdProto { version: OPSET, ..OperatorSetIdProto::default() };
        let message = FunctionProto {
            name: name.into(),
            domain: DOMAIN.into(),
            input: owned(inputs),
            output: vec!["result".into()],
            attribute: owned(attributes),
            opset_import: vec![standard],
            ..FunctionProto::default()
        };
        Self { name, message }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// One node; returns the name of its answer.
    pub(crate) fn node(&mut self, op_type: &str, inputs: &[&str]) -> String {
        let output = format!("b{}", self.message.node.len());
        self.push(op_type, inputs, output.clone(), vec![]);
        output
    }

    /// The node whose answer is the function's.
    pub(crate) fn result(&mut self, op_type: &str, inputs: &[&str]) {
        self.push(op_type, inputs, "result".into(), vec![]);
    }

    /// An f32 scalar.
    pub(crate) fn scalar(&mut self, value: f64) -> String {
        self.value(raw_tensor("", &Type::f32([]), &[value]))
    }

    /// A list of integers.
    pub(crate) fn int_list(&mut self, values: &[i64]) -> String {
        let ty = Type::new(DType::I64, [values.len()]);
        self.value(raw_tensor("", &ty, &values.iter().map(|&v| v as f64).collect::<Vec<_>>()))
    }

    /// The value of one of the function's float attributes, as a scalar.
    pub(crate) fn scalar_attribute(&mut self, attribute: &str) -> String {
        let output = format!("b{}", self.message.node.len());
        self.push("Constant", &[], output.clone(), vec![Attribute::float_of("value_float", attribute)]);
        output
    }

    pub(crate) fn into_message(self) -> FunctionProto {
        self.message
    }

    fn value(&mut self, tensor: onnx_protobuf::TensorProto) -> String {
        let output = format!("b{}", self.message.node.len());
        self.push("Constant", &[], output.clone(), vec![Attribute::tensor("value", tensor)]);
        output
    }

    fn push(&mut self, op_type: &str, inputs: &[&str], output: String, attributes: Vec<Attribute>) {
        self.message.node.push(NodeProto {
            op_type: op_type.into(),
            input: inputs.iter().map(ToString::to_string).collect(),
            output: vec![output],
            attribute: attributes.into_iter().map(Attribute::into_message).collect(),
            ..NodeProto::default()
        });
    }
}
