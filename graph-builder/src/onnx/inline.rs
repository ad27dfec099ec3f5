//! Programs without functions, for whoever reads a model's nodes one by one.

use std::collections::BTreeMap;

use onnx_protobuf::{FunctionProto, ModelProto, NodeProto};
use protobuf::Message;

use super::DOMAIN;
use super::open::OpenProgram;
use crate::error::{GraphError, Result};
use crate::program::OnnxProgram;

impl OnnxProgram {
    /// The same program with the function body of every `mudit` op in the place of its use. ONNX Runtime's TensorRT provider
    /// hands single nodes to TensorRT's parser, without the model's functions, and fails where a node is a call of one.
    ///
    /// # Errors
    /// [`GraphError::Emit`] for bytes that are no model, or calls of functions that it has not.
    pub fn inlined(&self) -> Result<Self> {
        let bytes = without_functions(&self.name, &self.bytes)?;
        let (native_ops, native_operands) = (Vec::new(), BTreeMap::new());
        Ok(Self { bytes, native_ops, native_operands, ..self.clone() })
    }
}

impl OpenProgram {
    /// As [`OnnxProgram::inlined`].
    ///
    /// # Errors
    /// As [`OnnxProgram::inlined`].
    pub fn inlined(&self) -> Result<Self> {
        let bytes = without_functions(&self.name, &self.bytes)?;
        let (native_ops, native_operands) = (Vec::new(), BTreeMap::new());
        Ok(Self { bytes, native_ops, native_operands, ..self.clone() })
    }
}

fn without_functions(program: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let emit = |reason: String| GraphError::Emit { graph: program.to_owned(), reason };
    let mut model = ModelProto::parse_from_bytes(bytes).map_err(|e| emit(e.to_string()))?;
    let functions = std::mem::take(&mut model.functions);
    let bodies: BTreeMap<&str, &FunctionProto> = functions.iter().map(|f| (f.name.as_str(), f)).collect();
    let graph = model.graph.mut_or_insert_default();
    let mut nodes = Vec::with_capacity(graph.node.len());
    for node in std::mem::take(&mut graph.node) {
        if node.domain != DOMAIN {
            nodes.push(node);
            continue;
        }
        let body = bodies.get(node.op_type.as_str());
        let body =
            body.ok_or_else(|| emit(format!("it has no function for {} {}", node.op_type, node.name)))?;
        nodes.extend(expanded(&node, body));
    }
    graph.node = nodes;
    model.opset_import.retain(|version| version.domain != DOMAIN);
    model.write_to_bytes().map_err(|e| emit(e.to_string()))
}

/// The nodes of a body for one call of it; what is inside is named after the call.
fn expanded(call: &NodeProto, body: &FunctionProto) -> Vec<NodeProto> {
    let pairs = |inside: &[String], outside: &[String]| {
        inside.iter().cloned().zip(outside.iter().cloned()).collect::<Vec<_>>()
    };
    let outside: BTreeMap<String, String> =
        [pairs(&body.input, &call.input), pairs(&body.output, &call.output)].into_iter().flatten().collect();
    let named = |name: &String| match outside.get(name) {
        Some(outside) => outside.clone(),
        None if name.is_empty() => String::new(),
        None => format!("{}/{name}", call.name),
    };
    let node = |(index, node): (usize, &NodeProto)| {
        let mut node = node.clone();
        node.name = format!("{}/{}.{index}", call.name, node.op_type);
        node.input = node.input.iter().map(named).collect();
        node.output = node.output.iter().map(named).collect();
        for attribute in &mut node.attribute {
            let from = std::mem::take(&mut attribute.ref_attr_name);
            if let Some(given) = call.attribute.iter().find(|a| !from.is_empty() && a.name == from) {
                let name = std::mem::take(&mut attribute.name);
                *attribute = given.clone();
                attribute.name = name;
            }
        }
        node
    };
    body.node.iter().enumerate().map(node).collect()
}
