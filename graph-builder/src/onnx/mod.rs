//! Emission: a graph becomes the bytes of an ONNX model.
//!
//! Opset 21, and 23 for mixed precision, IR 10. Weights are never copied into the message: a parameter is either a graph input or an
//! initializer whose data lies in a file beside the model. Nodes are named `scope/Op.index`, so that a profile
//! of the running model names its layers.

mod call;
mod function;
mod inline;
pub mod legality;
mod message;
mod native_name;
mod open;
mod origin;

use std::collections::{BTreeMap, BTreeSet};

use onnx_protobuf::{FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto};
use protobuf::Message;

pub use self::call::{NativeCall, NativeKernel};
pub(crate) use self::function::FunctionBody;
pub(crate) use self::message::{Attribute, tensor_type};
use self::message::{external_tensor, raw_tensor, value_info};
pub use self::native_name::{NATIVE_OPS, NativeName};
pub use self::open::{BATCH_AXIS, OpenDim, OpenProgram, OpenSpec};
use crate::error::{GraphError, Result};
use crate::graph::{Graph, ValueId};
use crate::op::Op;
use crate::ops::leaf::Constant;
use crate::program::{OnnxProgram, TensorSpec};
use crate::shape::{DType, Type};

/// Version of the standard operator set that f32 programs are written in.
pub const OPSET: i64 = 21;
/// Version for programs of mixed precision: the first with attention as an op, which CUDA and TensorRT have as one kernel.
pub const MIXED_OPSET: i64 = 23;
/// Version of the model format.
pub const IR_VERSION: i64 = 10;
/// Operator domain of the fused ops.
pub const DOMAIN: &str = "mudit";

/// Where one tensor lies in a weights file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalTensor {
    /// Element type and shape in the file.
    pub ty: Type,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

/// How parameters appear in the program.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// As graph inputs of their own names.
    Inputs,
    /// As initializers that point into a file beside the model.
    External {
        /// File name without a folder: ONNX Runtime refuses paths that leave the model's own.
        file: &'a str,
        /// Tensors of the file by name.
        tensors: &'a BTreeMap<String, ExternalTensor>,
    },
}

/// Writes the ONNX nodes of one graph node after another.
pub(crate) struct Emitter<'a> {
    graph: &'a Graph,
    /// Name of each value.
    names: Vec<String>,
    /// Names of the outputs of nodes with several results, by node and result.
    parts: BTreeMap<(usize, usize), String>,
    current: usize,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    shared: BTreeSet<String>,
    functions: BTreeMap<NativeName, FunctionProto>,
    /// Types of the operands of fused ops, by name.
    operands: BTreeMap<String, Type>,
}

impl Emitter<'_> {
    /// Name of operand `i` of the current node.
    pub(crate) fn arg(&self, i: usize) -> &str {
        &self.names[self.graph.nodes[self.current].args[i].index()]
    }

    /// Number of operands of the current node.
    pub(crate) fn arity(&self) -> usize {
        self.graph.nodes[self.current].args.len()
    }

    /// Element type of the current node's first operand, which the function body of a fused op is for.
    pub(crate) fn dtype(&self) -> DType {
        self.arg_type(0).dtype
    }

    /// Type of operand `i` of the current node.
    pub(crate) fn arg_type(&self, i: usize) -> &Type {
        self.graph.type_of(self.graph.nodes[self.current].args[i])
    }

    /// One ONNX node that gives the answer of the current node.
    pub(crate) fn node(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<Attribute>) {
        self.push((op_type, ""), inputs.iter().map(ToString::to_string).collect(), attributes);
    }

    /// One ONNX node whose inputs are the current node's operands.
    pub(crate) fn same(&mut self, op_type: &str, attributes: Vec<Attribute>) {
        self.push((op_type, ""), self.args(), attributes);
    }

    /// A fused op of our own domain, with its function body.
    pub(crate) fn native(&mut self, body: FunctionBody, attributes: Vec<Attribute>) {
        let name = body.name();
        self.functions.entry(name).or_insert_with(|| body.into_message());
        for i in 0..self.arity() {
            self.operands.insert(self.arg(i).to_owned(), self.arg_type(i).clone());
        }
        self.push((&name.to_string(), DOMAIN), self.args(), attributes);
    }

    /// The current node as an initializer.
    pub(crate) fn constant(&mut self, constant: &Constant) {
        let tensor = raw_tensor(&self.names[self.current], &constant.ty, &constant.values());
        self.initializers.push(tensor);
    }

    /// Name of an initializer with these integers.
    pub(crate) fn int_list(&mut self, values: &[i64]) -> String {
        let text: Vec<String> = values.iter().map(ToString::to_string).collect();
        let name = format!("ints[{}]", text.join(","));
        let ty = Type::new(DType::I64, [values.len()]);
        self.share(name, &ty, &values.iter().map(|&v| v as f64).collect::<Vec<_>>())
    }

    /// Name of an initializer with `n` ones.
    pub(crate) fn ones(&mut self, dtype: DType, n: usize) -> String {
        self.share(format!("ones[{dtype},{n}]"), &Type::new(dtype, [n]), &vec![1.0; n])
    }

    fn share(&mut self, name: String, ty: &Type, values: &[f64]) -> String {
        if self.shared.insert(name.clone()) {
            self.initializers.push(raw_tensor(&name, ty, values));
        }
        name
    }

    fn args(&self) -> Vec<String> {
        self.graph.nodes[self.current].args.iter().map(|a| self.names[a.index()].clone()).collect()
    }

    /// Names of the current node's results.
    fn outputs(&self) -> Vec<String> {
        let count = self.graph.results(ValueId(self.current as u32)).len();
        if count == 1 {
            return vec![self.names[self.current].clone()];
        }
        let unused = |i| format!("{}.{i}", self.names[self.current]);
        (0..count).map(|i| self.parts.get(&(self.current, i)).cloned().unwrap_or_else(|| unused(i))).collect()
    }

    fn push(&mut self, (op_type, domain): (&str, &str), input: Vec<String>, attributes: Vec<Attribute>) {
        self.nodes.push(NodeProto {
            name: origin::node_name(self.graph, self.current, op_type),
            op_type: op_type.into(),
            domain: domain.into(),
            input,
            output: self.outputs(),
            attribute: attributes.into_iter().map(Attribute::into_message).collect(),
            ..NodeProto::default()
        });
    }
}

impl Graph {
    /// The ONNX program of the graph. The same graph always gives the same bytes.
    ///
    /// # Errors
    /// [`GraphError::Weights`] when a parameter is missing from the weights file or differs in type or shape,
    /// [`GraphError::Emit`] when the message cannot be written.
    pub fn emit(&self, weights: Weights<'_>) -> Result<OnnxProgram> {
        let mut names: Vec<String> = self
            .nodes
            .iter()
            .enumerate()
            .map(|(i, n)| match &n.op {
                Op::Input(leaf) => leaf.name.clone(),
                Op::Parameter(leaf) => leaf.name.clone(),
                _ => format!("v{i}"),
            })
            .collect();
        // Equal parts of one node are one value.
        let firsts = self.first_parts();
        let first = |id: ValueId| match &self.node(id).op {
            Op::Part(part) => firsts[&(self.node(id).args[0].index(), part.index)],
            _ => id,
        };
        // A value that is an output takes the output's name; leaves and second names get an Identity.
        let mut aliases = Vec::new();
        let mut renamed = BTreeSet::new();
        for (name, id) in &self.outputs {
            let leaf = self.node(*id).args.is_empty();
            if leaf || !renamed.insert(first(*id)) {
                aliases.push((name, *id));
            } else {
                names[first(*id).index()].clone_from(name);
            }
        }
        let names: Vec<String> =
            (0..names.len()).map(|i| names[first(ValueId(i as u32)).index()].clone()).collect();
        let parts = firsts.iter().map(|(at, id)| (*at, names[id.index()].clone())).collect();
        let mut emitter = Emitter {
            graph: self,
            names,
            parts,
            current: 0,
            nodes: Vec::new(),
            initializers: Vec::new(),
            shared: BTreeSet::new(),
            functions: BTreeMap::new(),
            operands: BTreeMap::new(),
        };
        let mut inputs = Vec::new();
        for (i, node) in self.nodes.iter().enumerate() {
            emitter.current = i;
            match (&node.op, weights) {
                (Op::Parameter(p), Weights::External { file, tensors }) => {
                    emitter.initializers.push(self.external(&p.name, &node.ty, file, tensors)?);
                }
                (Op::Input(_) | Op::Parameter(_), _) => inputs.push(spec(&emitter.names[i], &node.ty)),
                (op, _) => op.rules().emit(&mut emitter),
            }
        }
        for (name, id) in aliases {
            emitter.nodes.push(NodeProto {
                name: format!("/Identity.{name}"),
                op_type: "Identity".into(),
                input: vec![emitter.names[id.index()].clone()],
                output: vec![name.clone()],
                ..NodeProto::default()
            });
        }
        let outputs: Vec<TensorSpec> =
            self.outputs.iter().map(|(n, id)| spec(n, self.type_of(*id))).collect();
        let native_ops: BTreeSet<&str> = emitter.functions.keys().map(|name| name.op).collect();
        let native_ops = native_ops.into_iter().map(str::to_owned).collect();
        let native_operands = std::mem::take(&mut emitter.operands);
        let bytes = self.message(emitter, &inputs, &outputs)?;
        let weights_file = match weights {
            Weights::External { file, .. } if !self.parameters.is_empty() => Some(file.to_owned()),
            _ => None,
        };
        let (name, unrepeatable) = (self.name.clone(), self.unrepeatable());
        Ok(OnnxProgram {
            name,
            bytes,
            inputs,
            outputs,
            weights_file,
            native_ops,
            native_operands,
            unrepeatable,
        })
    }

    /// See [`OnnxProgram::unrepeatable`].
    fn unrepeatable(&self) -> Vec<String> {
        /// Addresses that the CUDA provider gives a kernel as an argument.
        const MOST: usize = 32;
        let live = self.live();
        let nodes = self.nodes.iter().zip(live).filter(|(_, live)| *live).map(|(node, _)| node);
        let hazard = |node: &&crate::graph::Node| match &node.op {
            Op::Concat(concat) => {
                let size = |arg: &ValueId| self.type_of(*arg).shape.dims().get(concat.axis).copied();
                node.args.len() > MOST || node.args.windows(2).any(|pair| size(&pair[0]) != size(&pair[1]))
            }
            Op::Split(split) => split.count > MOST,
            _ => false,
        };
        nodes.filter(hazard).map(|node| format!("{} in `{}`", node.op.name(), node.place.scope)).collect()
    }

    /// The first part node of each result, by node and result.
    fn first_parts(&self) -> BTreeMap<(usize, usize), ValueId> {
        let mut firsts = BTreeMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            if let Op::Part(part) = &node.op {
                firsts.entry((node.args[0].index(), part.index)).or_insert(ValueId(i as u32));
            }
        }
        firsts
    }

    fn message(
        &self,
        emitter: Emitter<'_>,
        inputs: &[TensorSpec],
        outputs: &[TensorSpec],
    ) -> Result<Vec<u8>> {
        let graph = GraphProto {
            name: self.name.clone(),
            node: for_depth_first(emitter.nodes),
            initializer: emitter.initializers,
            input: inputs.iter().map(value_info).collect(),
            output: outputs.iter().map(value_info).collect(),
            ..GraphProto::default()
        };
        let version = |domain: &str, version| OperatorSetIdProto {
            domain: domain.into(),
            version,
            ..OperatorSetIdProto::default()
        };
        let mixed = self.nodes.iter().any(|n| matches!(n.ty.dtype, DType::F16 | DType::Bf16));
        let standard = version("", if mixed { MIXED_OPSET } else { OPSET });
        let mut model = ModelProto {
            ir_version: IR_VERSION,
            producer_name: "mudit".into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            opset_import: vec![standard.clone()],
            graph: Some(graph).into(),
            ..ModelProto::default()
        };
        if !emitter.functions.is_empty() {
            model.opset_import.push(version(DOMAIN, 1));
            let bodies = emitter.functions.into_values();
            model.functions =
                bodies.map(|body| FunctionProto { opset_import: vec![standard.clone()], ..body }).collect();
        }
        model
            .write_to_bytes()
            .map_err(|e| GraphError::Emit { graph: self.name.clone(), reason: e.to_string() })
    }

    fn external(
        &self,
        name: &str,
        ty: &Type,
        file: &str,
        tensors: &BTreeMap<String, ExternalTensor>,
    ) -> Result<TensorProto> {
        match tensors.get(name) {
            Some(found) if found.ty == *ty => Ok(external_tensor(name, file, found)),
            other => Err(GraphError::Weights {
                graph: self.name.clone(),
                name: name.into(),
                expected: ty.to_string(),
                got: other.map_or("no such tensor".into(), |t| t.ty.to_string()),
            }),
        }
    }
}

/// The nodes in the order that makes ONNX Runtime run them in ours.
///
/// It does not run nodes as they stand: it walks back from the nodes that nothing uses, the last one first, depth first.
/// Weight gradients are such nodes; were they left in place, all of them would run after the whole backward pass and
/// every value that they need would be kept until then. So they come last, in reverse.
fn for_depth_first(nodes: Vec<NodeProto>) -> Vec<NodeProto> {
    let used: BTreeSet<String> = nodes.iter().flat_map(|n| n.input.iter().cloned()).collect();
    let (mut ordered, mut ends): (Vec<_>, Vec<_>) =
        nodes.into_iter().partition(|n| n.output.iter().any(|name| used.contains(name)));
    ends.reverse();
    ordered.append(&mut ends);
    ordered
}

fn spec(name: &str, ty: &Type) -> TensorSpec {
    TensorSpec { name: name.into(), dtype: ty.dtype, shape: ty.shape.clone() }
}

#[cfg(test)]
mod tests;
