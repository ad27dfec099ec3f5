//! Function bodies: the plain-ONNX meaning of a fused op. They hold no shape, so one body serves every use.

use onnx_protobuf::{FunctionProto, NodeProto, OperatorSetIdProto};

use super::message::raw_tensor;
use super::{Attribute, DOMAIN, OPSET};
use crate::shape::{DType, Type};

/// A function of the domain `mudit` under construction.
pub(crate) struct FunctionBody {
    name: &'static str,
    overload: &'static str,
    message: FunctionProto,
}

impl FunctionBody {
    /// An empty body with the given operands and attributes; [`Self::result`] adds its results in order.
    pub(crate) fn new(name: &'static str, inputs: &[&str], attributes: &[&str]) -> Self {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let standard = OperatorSetIdProto { version: OPSET, ..OperatorSetIdProto::default() };
        let message = FunctionProto {
            name: name.into(),
            domain: DOMAIN.into(),
            input: owned(inputs),
            attribute: owned(attributes),
            opset_import: vec![standard],
            ..FunctionProto::default()
        };
        Self { name, overload: "", message }
    }

    /// One of several bodies of the op: a body cannot branch on an attribute or on an absent operand.
    pub(crate) fn overload(mut self, overload: &'static str) -> Self {
        self.message.overload = overload.into();
        self.overload = overload;
        self
    }

    /// What tells the body from the model's others: name of the op and of the overload.
    pub(crate) fn key(&self) -> (&'static str, &'static str) {
        (self.name, self.overload)
    }

    /// One node; returns the name of its answer.
    pub(crate) fn node(&mut self, op_type: &str, inputs: &[&str]) -> String {
        self.node_with(op_type, inputs, vec![])
    }

    /// One node with attributes; returns the name of its answer.
    pub(crate) fn node_with(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<Attribute>) -> String {
        let output = format!("b{}", self.message.node.len());
        self.push(op_type, inputs, output.clone(), attributes);
        output
    }

    /// The node whose answer is the function's next result.
    pub(crate) fn result(&mut self, op_type: &str, inputs: &[&str]) {
        self.result_with(op_type, inputs, vec![]);
    }

    /// The node with attributes whose answer is the function's next result.
    pub(crate) fn result_with(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<Attribute>) {
        let output = format!("result{}", self.message.output.len());
        self.message.output.push(output.clone());
        self.push(op_type, inputs, output, attributes);
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

    /// An integer scalar.
    pub(crate) fn int_scalar(&mut self, value: i64) -> String {
        self.value(raw_tensor("", &Type::new(DType::I64, []), &[value as f64]))
    }

    /// The value of one of the function's float attributes, as a scalar.
    pub(crate) fn scalar_attribute(&mut self, attribute: &str) -> String {
        self.node_with("Constant", &[], vec![Attribute::float_of("value_float", attribute)])
    }

    /// The value of one of the function's integer attributes, as a list of one.
    pub(crate) fn int_attribute(&mut self, attribute: &str) -> String {
        let scalar = self.node_with("Constant", &[], vec![Attribute::int_of("value_int", attribute)]);
        let first = self.int_list(&[0]);
        self.node("Unsqueeze", &[&scalar, &first])
    }

    pub(crate) fn into_message(self) -> FunctionProto {
        self.message
    }

    fn value(&mut self, tensor: onnx_protobuf::TensorProto) -> String {
        self.node_with("Constant", &[], vec![Attribute::tensor("value", tensor)])
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
