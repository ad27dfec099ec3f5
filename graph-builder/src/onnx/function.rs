//! Function bodies: the plain-ONNX meaning of a fused op. They hold no shape, so one body serves every use.

use onnx_protobuf::{FunctionProto, NodeProto};

use super::message::{raw_tensor, tensor_type};
use super::native_name::NativeName;
use super::{Attribute, DOMAIN};
use crate::shape::{DType, Type};

/// A function of the domain `mudit` under construction.
pub(crate) struct FunctionBody {
    name: NativeName,
    message: FunctionProto,
}

impl FunctionBody {
    /// An empty body with the given operands and attributes; [`Self::result`] adds its results in order.
    pub(crate) fn new(name: &'static str, inputs: &[&str], attributes: &[&str]) -> Self {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let message = FunctionProto {
            domain: DOMAIN.into(),
            input: owned(inputs),
            attribute: owned(attributes),
            ..FunctionProto::default()
        };
        Self { name: NativeName { op: name, variant: "", dtype: DType::F32 }, message }
    }

    /// The body for operands and results of this type; [`Self::wide`] and [`Self::narrow`] know it from here on.
    pub(crate) fn of(self, dtype: DType) -> Self {
        Self { name: NativeName { dtype, ..self.name }, ..self }
    }

    /// One of several bodies of the op, by a word of [`super::NATIVE_OPS`]: a body cannot branch on an attribute or on an
    /// absent operand.
    pub(crate) fn variant(self, variant: &'static str) -> Self {
        Self { name: NativeName { variant, ..self.name }, ..self }
    }

    /// What tells the body from the model's others.
    pub(crate) fn name(&self) -> NativeName {
        self.name
    }

    /// The value in f32.
    pub(crate) fn wide(&mut self, x: &str) -> String {
        self.cast(x, DType::F32)
    }

    /// An f32 value in the body's type.
    pub(crate) fn narrow(&mut self, x: &str) -> String {
        self.cast(x, self.name.dtype)
    }

    fn cast(&mut self, x: &str, to: DType) -> String {
        if self.name.dtype == DType::F32 {
            return x.to_owned();
        }
        self.node_with("Cast", &[x], vec![Attribute::int("to", tensor_type(to))])
    }

    /// One node; returns the name of its answer.
    pub(crate) fn node(&mut self, op_type: &str, inputs: &[&str]) -> String {
        self.node_with(op_type, inputs, vec![])
    }

    /// One node with attributes; returns the name of its answer.
    pub(crate) fn node_with(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<Attribute>) -> String {
        let output = format!("b{}", self.message.node.len());
        self.push(op_type, inputs, vec![output.clone()], attributes);
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
        self.push(op_type, inputs, vec![output], attributes);
    }

    /// The node whose f32 answer, rounded to the body's type, is the function's next result.
    pub(crate) fn rounded_result(&mut self, op_type: &str, inputs: &[&str]) {
        self.rounded_result_with(op_type, inputs, vec![]);
    }

    /// [`Self::rounded_result`] of a node with attributes.
    pub(crate) fn rounded_result_with(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<Attribute>) {
        if self.name.dtype == DType::F32 {
            return self.result_with(op_type, inputs, attributes);
        }
        let answer = self.node_with(op_type, inputs, attributes);
        self.result_with("Cast", &[&answer], vec![Attribute::int("to", tensor_type(self.name.dtype))]);
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
        FunctionProto { name: self.name.to_string(), ..self.message }
    }

    fn value(&mut self, tensor: onnx_protobuf::TensorProto) -> String {
        self.node_with("Constant", &[], vec![Attribute::tensor("value", tensor)])
    }

    fn push(&mut self, op_type: &str, inputs: &[&str], output: Vec<String>, attributes: Vec<Attribute>) {
        self.message.node.push(NodeProto {
            // ONNX Runtime before 1.22 refuses models whose nodes have one name after its rewrites, which extend names.
            name: format!("{op_type}_{}", self.message.node.len()),
            op_type: op_type.into(),
            input: inputs.iter().map(ToString::to_string).collect(),
            output,
            attribute: attributes.into_iter().map(Attribute::into_message).collect(),
            ..NodeProto::default()
        });
    }
}
