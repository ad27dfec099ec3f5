//! Programs whose batch size is open: one model that serves every batch size.
//!
//! Graphs have static shapes. The open form of a program is derived from two of its emissions at different batch sizes:
//! whatever differs between them stems from the batch, and must be one of the few things that can be written without
//! knowing it. Everything else that differs is refused, so an open program computes what the fixed ones do.

use std::collections::{BTreeMap, BTreeSet};

use onnx_protobuf::{ModelProto, NodeProto, OperatorSetIdProto, TensorProto};
use protobuf::Message;
use serde::{Deserialize, Serialize};

use super::message::{Attribute, open_value_info, raw_tensor, tensor_type};
use crate::error::{GraphError, Result};
use crate::program::{OnnxProgram, TensorSpec};
use crate::shape::{DType, Shape, Type};

/// Name of the open axis in the model.
pub const BATCH_AXIS: &str = "N";
/// Begins the names of values that an open program has beside those of the fixed ones.
const OPEN: &str = "open.";

/// Size of one axis of an open program's input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpenDim {
    /// The same at every batch size.
    Fixed(usize),
    /// So many for each sample of the batch.
    PerSample(usize),
}

impl OpenDim {
    /// The size at a batch size.
    pub fn at(self, batch: usize) -> usize {
        match self {
            Self::Fixed(size) => size,
            Self::PerSample(count) => count * batch,
        }
    }

    /// What has size `sizes[i]` at batch size `batches[i]`.
    fn of(batches: [usize; 2], sizes: [usize; 2]) -> Option<Self> {
        let count = sizes[0] / batches[0];
        match sizes {
            [a, b] if a == b => Some(Self::Fixed(a)),
            _ if sizes == batches.map(|batch| count * batch) => Some(Self::PerSample(count)),
            _ => None,
        }
    }
}

/// Name, element type and axes of one input or output of an open program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenSpec {
    /// The stable name that callers feed or read.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Axis sizes, outermost first.
    pub dims: Vec<OpenDim>,
}

impl OpenSpec {
    /// The same at a batch size.
    pub fn at(&self, batch: usize) -> TensorSpec {
        let dims = self.dims.iter().map(|dim| dim.at(batch)).collect();
        TensorSpec { name: self.name.clone(), dtype: self.dtype, shape: Shape(dims) }
    }
}

/// A program for every batch size: a serialised ONNX model whose batch axis is open, and its signature.
#[derive(Clone, Debug)]
pub struct OpenProgram {
    /// `denoise`, `step`, …
    pub name: String,
    /// The serialised `ModelProto`.
    pub bytes: Vec<u8>,
    /// Graph inputs in order.
    pub inputs: Vec<OpenSpec>,
    /// Graph outputs in order.
    pub outputs: Vec<OpenSpec>,
    /// As of [`OnnxProgram`].
    pub weights_file: Option<String>,
    /// As of [`OnnxProgram`].
    pub native_ops: Vec<String>,
    /// As of [`OnnxProgram`], at the first emission's batch size.
    pub native_operands: BTreeMap<String, Type>,
    /// As of [`OnnxProgram`]: those of either emission.
    pub unrepeatable: Vec<String>,
}

impl OpenProgram {
    /// The open form of a program that was emitted at two batch sizes, each given with its emission.
    ///
    /// Batch sizes that are no other dimension of the model, and are not 1, show best what stems from the batch: at batch
    /// size 1 some ops fall away.
    ///
    /// # Errors
    /// [`GraphError::OpenBatch`] naming the node where the programs differ in a way that no open program can have;
    /// [`GraphError::Emit`] for bytes that are no model.
    pub fn of(first: (usize, &OnnxProgram), second: (usize, &OnnxProgram)) -> Result<Self> {
        let program = &first.1.name;
        let ((m, _), (n, _)) = (first, second);
        if m == n || m == 0 || n == 0 {
            return Err(refused(program, "batch", format!("two batch sizes from 1 on, not {m} and {n}")));
        }
        let parsed = |p: &OnnxProgram| {
            ModelProto::parse_from_bytes(&p.bytes)
                .map_err(|e| GraphError::Emit { graph: p.name.clone(), reason: e.to_string() })
        };
        let models = [parsed(first.1)?, parsed(second.1)?];
        let specs = |a: &[TensorSpec], b: &[TensorSpec]| open_specs(program, [m, n], a, b);
        let inputs = specs(&first.1.inputs, &second.1.inputs)?;
        let mut opener = Opener::new(program, [m, n], &inputs, &models)?;
        let nodes = opener.nodes()?;
        let outputs = specs(&first.1.outputs, &second.1.outputs)?;
        let [mut model, _] = models.clone();
        let graph = model.graph.mut_or_insert_default();
        let (nodes, initializers) = opener.finish(nodes);
        (graph.node, graph.initializer) = (nodes, initializers);
        graph.input = inputs.iter().map(open_value_info).collect();
        graph.output = outputs.iter().map(open_value_info).collect();
        let bytes = model
            .write_to_bytes()
            .map_err(|e| GraphError::Emit { graph: program.clone(), reason: e.to_string() })?;
        let OnnxProgram { name, weights_file, native_ops, native_operands, mut unrepeatable, .. } =
            first.1.clone();
        let beside = second.1.unrepeatable.iter().filter(|node| !first.1.unrepeatable.contains(node));
        unrepeatable.extend(beside.cloned());
        Ok(Self { name, bytes, inputs, outputs, weights_file, native_ops, native_operands, unrepeatable })
    }

    /// Inputs at a batch size.
    pub fn inputs_at(&self, batch: usize) -> Vec<TensorSpec> {
        self.inputs.iter().map(|spec| spec.at(batch)).collect()
    }

    /// Outputs at a batch size.
    pub fn outputs_at(&self, batch: usize) -> Vec<TensorSpec> {
        self.outputs.iter().map(|spec| spec.at(batch)).collect()
    }
}

fn refused(program: &str, node: &str, reason: String) -> GraphError {
    GraphError::OpenBatch { program: program.to_owned(), node: node.to_owned(), reason }
}

fn open_specs(
    program: &str,
    batches: [usize; 2],
    first: &[TensorSpec],
    second: &[TensorSpec],
) -> Result<Vec<OpenSpec>> {
    let names = |specs: &[TensorSpec]| specs.iter().map(|s| s.name.clone()).collect::<Vec<_>>().join(", ");
    if names(first) != names(second) {
        let reason =
            format!("its inputs or outputs are {} at one and {} at the other", names(first), names(second));
        return Err(refused(program, "signature", reason));
    }
    let open = |(a, b): (&TensorSpec, &TensorSpec)| {
        let (left, right) = (a.shape.dims(), b.shape.dims());
        let dims: Option<Vec<OpenDim>> =
            left.iter().zip(right).map(|(&a, &b)| OpenDim::of(batches, [a, b])).collect();
        let dims = dims.filter(|_| left.len() == right.len() && a.dtype == b.dtype).ok_or_else(|| {
            let reason =
                format!("it is {}{} at one and {}{} at the other", a.dtype, a.shape, b.dtype, b.shape);
            refused(program, &a.name, reason)
        })?;
        Ok(OpenSpec { name: a.name.clone(), dtype: a.dtype, dims })
    };
    first.iter().zip(second).map(open).collect()
}

/// Two emissions of a program side by side, and what the open one has beside their nodes.
struct Opener<'a> {
    program: &'a str,
    batches: [usize; 2],
    models: &'a [ModelProto; 2],
    initializers: [BTreeMap<&'a str, &'a TensorProto>; 2],
    /// An input with an axis of the batch's size, and the axis.
    batch: (&'a str, usize),
    /// Nodes that compute what no constant can say, in order.
    made: Vec<NodeProto>,
    names: BTreeSet<String>,
    constants: Vec<TensorProto>,
}

impl<'a> Opener<'a> {
    fn new(
        program: &'a str,
        batches: [usize; 2],
        inputs: &'a [OpenSpec],
        models: &'a [ModelProto; 2],
    ) -> Result<Self> {
        let axis = |spec: &'a OpenSpec| {
            let axis = spec.dims.iter().position(|dim| *dim == OpenDim::PerSample(1))?;
            Some((spec.name.as_str(), axis))
        };
        let batch = inputs.iter().find_map(axis).ok_or_else(|| {
            refused(program, "signature", "no input has an axis of the batch's size".into())
        })?;
        let initializers = models.each_ref().map(|model| {
            model.graph.initializer.iter().map(|t| (t.name.as_str(), t)).collect::<BTreeMap<_, _>>()
        });
        let opener = Self {
            program,
            batches,
            models,
            initializers,
            batch,
            made: Vec::new(),
            names: BTreeSet::new(),
            constants: Vec::new(),
        };
        opener.check_rest()?;
        Ok(opener)
    }

    /// Everything but nodes and signature is the same.
    fn check_rest(&self) -> Result<()> {
        let [first, second] = self.models;
        for (a, b) in first.functions.iter().zip(&second.functions) {
            if a != b {
                return Err(self.refuse(&a.name, "its function body depends on the batch size".into()));
            }
        }
        let versions = |m: &ModelProto| -> Vec<OperatorSetIdProto> { m.opset_import.clone() };
        if first.functions.len() != second.functions.len() || versions(first) != versions(second) {
            return Err(self.refuse("model", "it uses other fused ops or operator sets at the other".into()));
        }
        for (name, a) in &self.initializers[0] {
            if let Some(b) = self.initializers[1].get(name).filter(|b| *a != **b) {
                let reason = format!("its constant is {:?} at one and {:?} at the other", a.dims, b.dims);
                let same = if a.dims == b.dims { ", with other values" } else { "" };
                return Err(self.refuse(self.user_of(name), format!("{reason}{same}")));
            }
        }
        Ok(())
    }

    /// The node that names what a constant is for.
    fn user_of<'n>(&'n self, constant: &'n str) -> &'n str {
        let mut users = self.models[0].graph.node.iter().filter(|n| n.input.iter().any(|i| i == constant));
        users.next().map_or(constant, |n| n.name.as_str())
    }

    fn refuse(&self, node: &str, reason: String) -> GraphError {
        refused(self.program, node, reason)
    }

    /// The first program's nodes with the batch taken out of their shapes.
    fn nodes(&mut self) -> Result<Vec<NodeProto>> {
        let [first, second] = self.models;
        let (first, second) = (&first.graph.node, &second.graph.node);
        let without = |n: &NodeProto| NodeProto { input: Vec::new(), ..n.clone() };
        let mut nodes = Vec::with_capacity(first.len());
        for (a, b) in first.iter().zip(second) {
            if without(a) != without(b) || a.input.len() != b.input.len() {
                let reason = format!("it is another node at the other: {} `{}`", b.op_type, b.name);
                return Err(self.refuse(&a.name, reason));
            }
            let mut node = a.clone();
            for (i, (left, right)) in a.input.iter().zip(&b.input).enumerate() {
                if left != right {
                    node.input[i] = self.shape(a, i, [left, right])?;
                }
            }
            nodes.push(node);
        }
        match (first.get(second.len()), second.get(first.len())) {
            (None, None) => Ok(nodes),
            (Some(extra), _) | (_, Some(extra)) => {
                Err(self.refuse(&extra.name, "the node is in one of them only".into()))
            }
        }
    }

    /// Name of the operand `i` of a node that is the shape `names` in the two programs.
    fn shape(&mut self, node: &NodeProto, i: usize, names: [&str; 2]) -> Result<String> {
        let shapes = i == 1 && node.domain.is_empty() && matches!(&*node.op_type, "Reshape" | "Expand");
        let lists = [0, 1].map(|k| self.initializers[k].get(names[k]).and_then(|t| int_list(t)));
        let (true, [Some(a), Some(b)]) = (shapes, &lists) else {
            let reason = format!("its operand {i} is `{}` at one and `{}` at the other", names[0], names[1]);
            return Err(self.refuse(&node.name, reason));
        };
        let open = |(a, b): (&i64, &i64)| {
            let sizes = [usize::try_from(*a).ok()?, usize::try_from(*b).ok()?];
            OpenDim::of(self.batches, sizes)
        };
        let dims: Option<Vec<OpenDim>> = a.iter().zip(b).map(open).collect();
        let dims = dims.filter(|_| a.len() == b.len()).ok_or_else(|| {
            self.refuse(&node.name, format!("its shape is {a:?} at one and {b:?} at the other"))
        })?;
        let open = dims.iter().filter(|dim| matches!(dim, OpenDim::PerSample(_))).count();
        Ok(if node.op_type == "Reshape" && open == 1 { self.inferred(&dims) } else { self.computed(&dims) })
    }

    /// A shape whose one open axis is what the number of elements leaves.
    fn inferred(&mut self, dims: &[OpenDim]) -> String {
        let sizes: Vec<i64> = dims
            .iter()
            .map(|dim| match dim {
                OpenDim::Fixed(size) => *size as i64,
                OpenDim::PerSample(_) => -1,
            })
            .collect();
        self.int_list(&sizes)
    }

    /// A shape that is put together when the program runs.
    fn computed(&mut self, dims: &[OpenDim]) -> String {
        let words: Vec<String> = dims
            .iter()
            .map(|dim| match dim {
                OpenDim::Fixed(size) => size.to_string(),
                OpenDim::PerSample(1) => BATCH_AXIS.to_owned(),
                OpenDim::PerSample(count) => format!("{count}{BATCH_AXIS}"),
            })
            .collect();
        let parts: Vec<String> = dims
            .iter()
            .map(|dim| match dim {
                OpenDim::Fixed(size) => self.int_list(&[*size as i64]),
                OpenDim::PerSample(count) => self.samples(*count),
            })
            .collect();
        self.made("Concat", &format!("[{}]", words.join(",")), parts, vec![Attribute::int("axis", 0)])
    }

    /// So many times the batch size, as a list of one.
    fn samples(&mut self, count: usize) -> String {
        let (input, axis) = (self.batch.0.to_owned(), self.batch.1 as i64);
        let range = vec![Attribute::int("start", axis), Attribute::int("end", axis + 1)];
        let batch = self.made("Shape", BATCH_AXIS, vec![input], range);
        if count == 1 {
            return batch;
        }
        let factor = self.int_list(&[count as i64]);
        self.made("Mul", &format!("{count}{BATCH_AXIS}"), vec![batch, factor], vec![])
    }

    /// Name of the answer of a node that the fixed programs do not have; one node for all uses.
    fn made(&mut self, op: &str, what: &str, input: Vec<String>, attributes: Vec<Attribute>) -> String {
        let name = format!("{OPEN}{what}");
        if self.names.insert(name.clone()) {
            self.made.push(NodeProto {
                name: format!("/{op}.{name}"),
                op_type: op.to_owned(),
                input,
                output: vec![name.clone()],
                attribute: attributes.into_iter().map(Attribute::into_message).collect(),
                ..NodeProto::default()
            });
        }
        name
    }

    /// Name of a constant with these integers.
    fn int_list(&mut self, values: &[i64]) -> String {
        let words: Vec<String> = values.iter().map(ToString::to_string).collect();
        let name = format!("{OPEN}ints[{}]", words.join(","));
        if self.names.insert(name.clone()) {
            let ty = Type::new(DType::I64, [values.len()]);
            let values: Vec<f64> = values.iter().map(|&v| v as f64).collect();
            self.constants.push(raw_tensor(&name, &ty, &values));
        }
        name
    }

    /// All nodes in an order that can be run, and the constants that they still use.
    fn finish(self, nodes: Vec<NodeProto>) -> (Vec<NodeProto>, Vec<TensorProto>) {
        let mut all = self.made;
        all.extend(nodes);
        let used: BTreeSet<&str> = all.iter().flat_map(|n| n.input.iter().map(String::as_str)).collect();
        let kept = self.models[0].graph.initializer.iter().filter(|t| used.contains(t.name.as_str()));
        let mut initializers: Vec<TensorProto> = kept.cloned().collect();
        initializers.extend(self.constants);
        (all, initializers)
    }
}

/// The integers of a constant list that the message holds.
fn int_list(tensor: &TensorProto) -> Option<Vec<i64>> {
    let whole = i64::from(tensor.data_type) == tensor_type(DType::I64) && tensor.dims.len() == 1;
    let values = tensor.raw_data.chunks_exact(8);
    let values =
        values.map(|bytes| Some(i64::from_le_bytes(bytes.try_into().ok()?))).collect::<Option<Vec<_>>>();
    values.filter(|v| whole && v.len() as i64 == tensor.dims[0])
}

#[cfg(test)]
mod tests;
