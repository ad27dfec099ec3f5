//! ONNX messages from our types.

use half::{bf16, f16};
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_proto::{DataLocation, DataType};
use onnx_protobuf::tensor_shape_proto::Dimension;
use onnx_protobuf::{
    AttributeProto, StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    type_proto,
};
use protobuf::Enum;

use super::ExternalTensor;
use super::open::{BATCH_AXIS, OpenDim, OpenSpec};
use crate::program::TensorSpec;
use crate::shape::{DType, Type};

/// ONNX's number of an element type.
pub(crate) fn tensor_type(dtype: DType) -> i64 {
    let onnx = match dtype {
        DType::F32 => DataType::FLOAT,
        DType::F16 => DataType::FLOAT16,
        DType::Bf16 => DataType::BFLOAT16,
        DType::I64 => DataType::INT64,
        DType::Bool => DataType::BOOL,
    };
    i64::from(onnx.value())
}

/// A named attribute of an ONNX node.
#[derive(Clone, Debug)]
pub(crate) struct Attribute(AttributeProto);

impl Attribute {
    fn new(name: &str, kind: AttributeType, fill: impl FnOnce(&mut AttributeProto)) -> Self {
        let mut message =
            AttributeProto { name: name.into(), type_: kind.into(), ..AttributeProto::default() };
        fill(&mut message);
        Self(message)
    }

    pub(crate) fn int(name: &str, value: i64) -> Self {
        Self::new(name, AttributeType::INT, |m| m.i = value)
    }

    pub(crate) fn ints(name: &str, values: Vec<i64>) -> Self {
        Self::new(name, AttributeType::INTS, |m| m.ints = values)
    }

    pub(crate) fn float(name: &str, value: f64) -> Self {
        Self::new(name, AttributeType::FLOAT, |m| m.f = value as f32)
    }

    pub(crate) fn text(name: &str, value: &str) -> Self {
        Self::new(name, AttributeType::STRING, |m| m.s = value.as_bytes().to_vec())
    }

    pub(crate) fn tensor(name: &str, tensor: TensorProto) -> Self {
        Self::new(name, AttributeType::TENSOR, |m| m.t = Some(tensor).into())
    }

    /// An integer attribute `name` that takes the value of the function's attribute `from`.
    pub(crate) fn int_of(name: &str, from: &str) -> Self {
        Self::new(name, AttributeType::INT, |m| m.ref_attr_name = from.into())
    }

    /// A float attribute `name` that takes the value of the function's attribute `from`.
    pub(crate) fn float_of(name: &str, from: &str) -> Self {
        Self::new(name, AttributeType::FLOAT, |m| m.ref_attr_name = from.into())
    }

    pub(crate) fn into_message(self) -> AttributeProto {
        self.0
    }
}

/// A tensor with its values in the message, row-major, rounded to its element type.
pub(crate) fn raw_tensor(name: &str, ty: &Type, values: &[f64]) -> TensorProto {
    let raw_data = match ty.dtype {
        DType::F32 => values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f64(v).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|&v| bf16::from_f64(v).to_le_bytes()).collect(),
        DType::I64 => values.iter().flat_map(|&v| (v as i64).to_le_bytes()).collect(),
        DType::Bool => values.iter().map(|&v| u8::from(v != 0.0)).collect(),
    };
    TensorProto { raw_data, ..typed_tensor(name, ty) }
}

/// A tensor whose values lie in `file`.
pub(crate) fn external_tensor(name: &str, file: &str, at: &ExternalTensor) -> TensorProto {
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: key.into(),
        value,
        ..StringStringEntryProto::default()
    };
    TensorProto {
        data_location: DataLocation::EXTERNAL.into(),
        external_data: vec![
            entry("location", file.into()),
            entry("offset", at.offset.to_string()),
            entry("length", at.length.to_string()),
        ],
        ..typed_tensor(name, &at.ty)
    }
}

fn typed_tensor(name: &str, ty: &Type) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: ty.shape.0.iter().map(|&d| d as i64).collect(),
        data_type: tensor_type(ty.dtype) as i32,
        ..TensorProto::default()
    }
}

/// Declaration of a graph input or output.
pub(crate) fn value_info(spec: &TensorSpec) -> ValueInfoProto {
    let dims = spec.shape.0.iter().map(|&d| OpenDim::Fixed(d)).collect();
    open_value_info(&OpenSpec { name: spec.name.clone(), dtype: spec.dtype, dims })
}

/// Declaration of a graph input or output of a program with an open batch.
pub(crate) fn open_value_info(spec: &OpenSpec) -> ValueInfoProto {
    let dim = |dim: &OpenDim| {
        let mut dimension = Dimension::new();
        match dim {
            OpenDim::Fixed(size) => dimension.set_dim_value(*size as i64),
            OpenDim::PerSample(1) => dimension.set_dim_param(BATCH_AXIS.to_owned()),
            // A name says that sizes are equal, and nothing more.
            OpenDim::PerSample(_) => {}
        }
        dimension
    };
    let shape = TensorShapeProto { dim: spec.dims.iter().map(dim).collect(), ..TensorShapeProto::default() };
    let tensor = type_proto::Tensor {
        elem_type: tensor_type(spec.dtype) as i32,
        shape: Some(shape).into(),
        ..type_proto::Tensor::default()
    };
    let mut ty = TypeProto::new();
    ty.set_tensor_type(tensor);
    ValueInfoProto { name: spec.name.clone(), type_: Some(ty).into(), ..ValueInfoProto::default() }
}
