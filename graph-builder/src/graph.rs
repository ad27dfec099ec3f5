//! The intermediate representation: nodes in creation order, parameters, inputs, outputs.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::error::{GraphError, Place, Result};
use crate::op::{Cost, Op};
use crate::shape::{DType, Shape, Type};

/// Index of a node; operands always have a smaller one than their user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(crate) u32);

impl ValueId {
    /// Position in [`Graph::nodes`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One axis of a parameter: does it grow with the model's width?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// The size does not depend on the width (classes, patch features, frequencies).
    Fixed(usize),
    /// The size is proportional to the width.
    Width(usize),
}

impl Dim {
    /// Axis size.
    pub fn size(self) -> usize {
        match self {
            Self::Fixed(n) | Self::Width(n) => n,
        }
    }
}

/// Distribution of a parameter before the first step. Fan-in is the product of all axes but the first.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// `N(0, std²)`.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform with variance `2 / (fan_in + fan_out)`.
    XavierUniform,
    /// `N(0, 1 / fan_in)`.
    KaimingNormal,
    /// Given values, row-major (fixed tables).
    Values(Arc<[f32]>),
}

/// A parameter as its author declared it.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Scope path and name, equal to the published checkpoint's.
    pub name: String,
    /// Axes, outermost first.
    pub dims: Vec<Dim>,
    /// Distribution of the first value.
    pub init: Init,
    /// Whether it receives a gradient.
    pub trainable: bool,
    /// Element type in the program: f32, or the compute type of a program in mixed precision. Masters are f32.
    pub dtype: DType,
}

impl Parameter {
    /// Axis sizes.
    pub fn shape(&self) -> Shape {
        Shape(self.dims.iter().map(|d| d.size()).collect())
    }

    /// The declaration in words, fixed tables without their values.
    pub(crate) fn declaration(&self) -> String {
        let init = match &self.init {
            Init::Values(values) => format!("a table of {} values", values.len()),
            init => format!("{init:?}"),
        };
        format!("{:?}, {init}, {}", self.dims, if self.trainable { "trainable" } else { "frozen" })
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape().numel()
    }
}

/// One operation and what is known of its answer.
#[derive(Clone, Debug)]
pub struct Node {
    /// The operation with its attributes.
    pub op: Op,
    /// Operands.
    pub args: Vec<ValueId>,
    /// Type of the answer.
    pub ty: Type,
    /// Scope path and source line of the author; gradient nodes inherit those of their forward node.
    pub place: Place,
    /// Whether autodiff made the node.
    pub backward: bool,
}

/// A static graph. Nodes stand in topological order.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Program name.
    pub name: String,
    pub(crate) nodes: Vec<Node>,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) outputs: Vec<(String, ValueId)>,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// All nodes in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node that computes `id`.
    pub fn node(&self, id: ValueId) -> &Node {
        &self.nodes[id.index()]
    }

    /// Declared parameters in order of declaration.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Named outputs in order.
    pub fn outputs(&self) -> &[(String, ValueId)] {
        &self.outputs
    }

    /// Named inputs in order of declaration.
    pub fn inputs(&self) -> impl Iterator<Item = (&str, &Type)> {
        self.nodes.iter().filter_map(|n| match &n.op {
            Op::Input(i) => Some((i.name.as_str(), &n.ty)),
            _ => None,
        })
    }

    /// Elements of all parameters, and of the trainable ones.
    pub fn parameter_counts(&self) -> (usize, usize) {
        let all = self.parameters.iter().map(Parameter::numel).sum();
        let trainable = self.parameters.iter().filter(|p| p.trainable).map(Parameter::numel).sum();
        (all, trainable)
    }

    /// Appends a node after inferring its type.
    pub(crate) fn push(
        &mut self,
        op: Op,
        args: Vec<ValueId>,
        place: Place,
        backward: bool,
    ) -> Result<ValueId> {
        let types: Vec<&Type> = args.iter().map(|a| &self.nodes[a.index()].ty).collect();
        let ty = op.rules().infer(&types).map_err(|refusal| GraphError::Op {
            op: op.rules().name(),
            place: place.clone(),
            expected: refusal.0,
            got: types.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and "),
        })?;
        self.nodes.push(Node { op, args, ty, place, backward });
        Ok(ValueId(self.nodes.len() as u32 - 1))
    }

    /// Number of uses of every value, outputs included.
    pub(crate) fn use_counts(&self) -> Vec<usize> {
        let mut uses = vec![0; self.nodes.len()];
        for id in self.nodes.iter().flat_map(|n| &n.args).chain(self.outputs.iter().map(|(_, id)| id)) {
            uses[id.index()] += 1;
        }
        uses
    }

    /// Which nodes some output needs; inputs and parameters always count, so that a signature stays whole.
    pub(crate) fn live(&self) -> Vec<bool> {
        let mut live = vec![false; self.nodes.len()];
        for (_, id) in &self.outputs {
            live[id.index()] = true;
        }
        for i in (0..self.nodes.len()).rev() {
            let node = &self.nodes[i];
            live[i] |= matches!(node.op, Op::Input(_) | Op::Parameter(_));
            if live[i] {
                for a in &node.args {
                    live[a.index()] = true;
                }
            }
        }
        live
    }

    /// The reviewable text form: one line a node, the same for the same model.
    pub fn text(&self) -> String {
        let mut s = format!("graph {}\n", self.name);
        for i in 0..self.nodes.len() {
            let _ = writeln!(s, "{}", self.line(i));
        }
        for (name, id) in &self.outputs {
            let _ = writeln!(s, "return {name} = %{}", id.0);
        }
        s
    }

    pub(crate) fn line(&self, i: usize) -> String {
        let n = &self.nodes[i];
        let args = n.args.iter().map(|a| format!("%{}", a.0)).collect::<Vec<_>>().join(", ");
        let attributes = n.op.attributes();
        let mark = if n.backward { " ∂" } else { "" };
        let results = self.results(ValueId(i as u32)).into_iter();
        let types = results.map(|s| format!("{}{s}", n.ty.dtype)).collect::<Vec<_>>().join(", ");
        format!("%{i} = {}{attributes}({args}) : {types}  # {}{mark}", n.op.rules().name(), n.place.scope)
    }

    /// Shapes of the results of the node: one, or those of an op that has several.
    pub(crate) fn results(&self, id: ValueId) -> Vec<Shape> {
        let node = self.node(id);
        let types: Vec<&Type> = node.args.iter().map(|a| self.type_of(*a)).collect();
        node.op.rules().results(&types, &node.ty)
    }

    pub(crate) fn type_of(&self, id: ValueId) -> &Type {
        &self.nodes[id.index()].ty
    }
}

/// Element type that parameters are declared in; [`Graph::in_precision`] may narrow it. Masters are always f32.
pub const PARAMETER_DTYPE: DType = DType::F32;

impl Graph {
    /// Work of one run, summed over the nodes that some output needs.
    pub fn cost(&self) -> Cost {
        let live = self.live();
        (0..self.nodes.len())
            .filter(|&i| live[i])
            .fold(Cost::default(), |sum, i| sum + self.node_cost(ValueId(i as u32)))
    }

    /// Work of the nodes below each scope that `label` names, in order of first appearance.
    pub fn cost_by(&self, label: impl Fn(&str) -> String) -> indexmap::IndexMap<String, Cost> {
        let live = self.live();
        let mut costs: indexmap::IndexMap<String, Cost> = indexmap::IndexMap::new();
        for i in (0..self.nodes.len()).filter(|&i| live[i]) {
            let cost = costs.entry(label(&self.nodes[i].place.scope)).or_default();
            *cost = *cost + self.node_cost(ValueId(i as u32));
        }
        costs
    }

    /// Work of one node.
    pub fn node_cost(&self, id: ValueId) -> Cost {
        let node = self.node(id);
        let types: Vec<&Type> = node.args.iter().map(|a| self.type_of(*a)).collect();
        node.op.rules().cost(&types, &node.ty)
    }
}
