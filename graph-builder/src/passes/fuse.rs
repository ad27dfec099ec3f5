//! Fused ops that take their neighbours in. A neighbour is taken only when nothing else needs its value.

use std::collections::BTreeMap;

use super::{Rewriter, sweep};
use crate::error::Result;
use crate::graph::{Graph, Node, ValueId};
use crate::op::Op;
use crate::ops::activation::Activation;
use crate::ops::linear::{Linear, LinearGateResidual, LinearGradInput, LinearGradWeight};

pub(super) fn fuse(graph: &Graph) -> Result<Graph> {
    let plan = Plan::of(graph);
    let fused = Rewriter::new(graph).run(|rw, node, id, mut args| {
        if let Some(part) = plan.sums.get(&id).and_then(|part| rw.mapped(*part)) {
            return Ok(part);
        }
        if let Some(residual) = plan.residuals.get(&id).and_then(|residual| rw.mapped(*residual)) {
            args.push(residual);
        }
        let (op, args) = plan
            .linear_of_gelu(node, rw, &args)
            .or_else(|| plan.gelu_of_linear_grad(node, rw, &args))
            .or_else(|| plan.linear_gate_residual(node, rw, &args))
            .unwrap_or_else(|| (node.op.clone(), args));
        rw.push(op, args, node)
    })?;
    sweep(&fused)
}

/// What is known of the old graph before it is rewritten.
struct Plan<'a> {
    graph: &'a Graph,
    uses: Vec<usize>,
    /// Values of GELU that only linear layers and their weight gradients use: those compute it on the way in.
    taken: Vec<bool>,
    /// Gradients of modulated layer norms, with the cotangent that they add to their first result.
    residuals: BTreeMap<ValueId, ValueId>,
    /// The additions that become such a first result.
    sums: BTreeMap<ValueId, ValueId>,
}

type Fused = Option<(Op, Vec<ValueId>)>;

impl<'a> Plan<'a> {
    fn of(graph: &'a Graph) -> Self {
        let uses = graph.use_counts();
        let mut taken: Vec<bool> = graph.nodes().iter().map(|n| matches!(n.op, Op::Gelu(_))).collect();
        for node in graph.nodes() {
            let way_in = match &node.op {
                Op::Linear(Linear { activation: Activation::None }) => Some(0),
                Op::LinearGradWeight(LinearGradWeight { activation: Activation::None }) => Some(1),
                _ => None,
            };
            for (i, arg) in node.args.iter().enumerate() {
                taken[arg.index()] &= way_in == Some(i);
            }
        }
        for (_, id) in graph.outputs() {
            taken[id.index()] = false;
        }
        let mut plan = Self { graph, uses, taken, residuals: BTreeMap::new(), sums: BTreeMap::new() };
        for i in 0..graph.nodes().len() {
            plan.find_residual(ValueId(i as u32));
        }
        plan
    }

    /// The node behind `id` when only one other node needs it.
    fn inner(&self, id: ValueId) -> Option<&'a Node> {
        (self.uses[id.index()] == 1).then(|| self.graph.node(id))
    }

    /// `residual + dx` where `dx` is the first result of a modulated layer norm's gradient.
    fn find_residual(&mut self, id: ValueId) {
        let sum = self.graph.node(id);
        let &[a, b] = sum.args.as_slice() else { return };
        if !matches!(sum.op, Op::Add(_)) {
            return;
        }
        for (residual, part) in [(a, b), (b, a)] {
            let Some(Node { op: Op::Part(first), args, .. }) = self.inner(part) else { continue };
            let (grad, known) = (self.graph.node(args[0]), self.residuals.contains_key(&args[0]));
            // The residual must be there when the gradient is computed.
            let fits = residual < args[0] && self.graph.type_of(residual) == self.graph.type_of(part);
            let free = matches!(grad.op, Op::LayerNormModulateGrad(_)) && grad.args.len() == 3 && !known;
            if free && fits && first.index == 0 {
                self.residuals.insert(args[0], residual);
                self.sums.insert(id, part);
                return;
            }
        }
    }

    /// `Linear(gelu(h))`, and the weight gradient of the same.
    fn linear_of_gelu(&self, node: &Node, rw: &Rewriter<'_>, args: &[ValueId]) -> Fused {
        let activation = Activation::Gelu;
        let (way_in, op): (usize, Op) = match &node.op {
            Op::Linear(_) => (0, Linear { activation }.into()),
            Op::LinearGradWeight(_) => (1, LinearGradWeight { activation }.into()),
            _ => return None,
        };
        if !self.taken[node.args[way_in].index()] {
            return None;
        }
        let mut args = args.to_vec();
        args[way_in] = rw.new.node(args[way_in]).args[0];
        Some((op, args))
    }

    /// `gelu'(h) ⊙ ct W`.
    fn gelu_of_linear_grad(&self, node: &Node, rw: &Rewriter<'_>, args: &[ValueId]) -> Fused {
        let (Op::GeluGrad(_), Op::LinearGradInput(LinearGradInput { activation: Activation::None })) =
            (&node.op, &self.inner(*node.args.get(1)?)?.op)
        else {
            return None;
        };
        let product = &rw.new.node(args[1]).args;
        Some((LinearGradInput { activation: Activation::Gelu }.into(), vec![product[0], product[1], args[0]]))
    }

    /// `x + gate · (act(a) Wᵀ + b)`.
    fn linear_gate_residual(&self, node: &Node, rw: &Rewriter<'_>, args: &[ValueId]) -> Fused {
        if !matches!(node.op, Op::GateResidual(_)) {
            return None;
        }
        self.inner(node.args[2])?;
        let Node { op: Op::Linear(linear), args: branch, .. } = rw.new.node(args[2]) else { return None };
        let operands = [&args[..2], branch].concat();
        Some((LinearGateResidual { activation: linear.activation }.into(), operands))
    }
}
