//! Small ONNX models and a started runtime, for the tests of this crate.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use graph_builder::{DType, OnnxProgram, Shape, TensorSpec};
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_proto::DataLocation;
use onnx_protobuf::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto,
    type_proto,
};
use protobuf::{Message, MessageField};

use crate::library::{Runtime, RuntimeOptions};

pub(crate) const OPSET: i64 = 21;

/// The process's runtime; fetched through the public code when the machine has none yet.
pub(crate) fn runtime() -> Arc<Runtime> {
    Runtime::start(&RuntimeOptions::default()).unwrap()
}

/// Runs a test body that touches a session, and fails when it takes longer than it ever should.
pub(crate) fn in_time(body: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let thread = thread::spawn(move || {
        body();
        let _ = done.send(());
    });
    match finished.recv_timeout(Duration::from_mins(1)) {
        Ok(()) => {}
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("no answer within a minute"),
        Err(mpsc::RecvTimeoutError::Disconnected) => std::panic::resume_unwind(thread.join().unwrap_err()),
    }
}

pub(crate) fn spec(name: &str, dims: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype: DType::F32, shape: Shape::from(dims) }
}

/// A node; `domain` is empty for ONNX's own ops.
pub(crate) fn node(domain: &str, op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: op.to_owned(),
        domain: domain.to_owned(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: vec![output.to_owned()],
        ..NodeProto::new()
    }
}

pub(crate) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        type_: AttributeType::FLOAT.into(),
        f: value,
        ..AttributeProto::new()
    }
}

/// A node whose answer is one constant.
pub(crate) fn constant(output: &str, value: f32) -> NodeProto {
    NodeProto { attribute: vec![float("value_float", value)], ..node("", "Constant", &[], output) }
}

/// A function of the domain `mudit`.
pub(crate) fn function(
    name: &str,
    inputs: &[&str],
    output: &str,
    attributes: &[&str],
    body: Vec<NodeProto>,
) -> FunctionProto {
    FunctionProto {
        name: name.to_owned(),
        domain: "mudit".to_owned(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: vec![output.to_owned()],
        attribute: attributes.iter().map(ToString::to_string).collect(),
        node: body,
        opset_import: vec![opset("", OPSET)],
        ..FunctionProto::new()
    }
}

/// An f32 initializer whose values are in a file beside the model.
pub(crate) fn external(name: &str, dims: &[usize], file: &str, offset: u64) -> TensorProto {
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: key.to_owned(),
        value,
        ..StringStringEntryProto::new()
    };
    let bytes = 4 * dims.iter().product::<usize>();
    TensorProto {
        name: name.to_owned(),
        dims: dims.iter().map(|&d| d as i64).collect(),
        data_type: 1,
        data_location: DataLocation::EXTERNAL.into(),
        external_data: vec![
            entry("location", file.to_owned()),
            entry("offset", offset.to_string()),
            entry("length", bytes.to_string()),
        ],
        ..TensorProto::new()
    }
}

/// A program from its nodes.
pub(crate) fn program(
    inputs: &[TensorSpec],
    outputs: &[TensorSpec],
    nodes: Vec<NodeProto>,
    functions: Vec<FunctionProto>,
    initializers: Vec<TensorProto>,
) -> OnnxProgram {
    let graph = GraphProto {
        name: "test".to_owned(),
        node: nodes,
        input: inputs.iter().map(value_info).collect(),
        output: outputs.iter().map(value_info).collect(),
        initializer: initializers,
        ..GraphProto::new()
    };
    let model = ModelProto {
        ir_version: 10,
        opset_import: vec![opset("", OPSET), opset("mudit", 1)],
        graph: MessageField::some(graph),
        functions,
        ..ModelProto::new()
    };
    OnnxProgram {
        name: "test".to_owned(),
        bytes: model.write_to_bytes().unwrap(),
        inputs: inputs.to_vec(),
        outputs: outputs.to_vec(),
        weights_file: None,
        native_ops: Vec::new(),
        native_operands: BTreeMap::new(),
        unrepeatable: Vec::new(),
    }
}

fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: domain.to_owned(), version, ..OperatorSetIdProto::new() }
}

fn value_info(spec: &TensorSpec) -> ValueInfoProto {
    let mut shape = TensorShapeProto::new();
    for &d in spec.shape.dims() {
        let mut dimension = tensor_shape_proto::Dimension::new();
        dimension.set_dim_value(d as i64);
        shape.dim.push(dimension);
    }
    let elem_type = match spec.dtype {
        DType::F32 => 1,
        DType::I64 => 7,
        DType::Bool => 9,
        DType::F16 => 10,
        DType::Bf16 => 16,
    };
    let tensor =
        type_proto::Tensor { elem_type, shape: MessageField::some(shape), ..type_proto::Tensor::new() };
    let mut kind = TypeProto::new();
    kind.set_tensor_type(tensor);
    ValueInfoProto { name: spec.name.clone(), type_: MessageField::some(kind), ..ValueInfoProto::new() }
}
