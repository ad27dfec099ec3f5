//! Patterns that become fused ops. A pattern is taken only when nothing else needs its inner values.

use super::{Rewriter, sweep};
use crate::error::Result;
use crate::graph::{Graph, Node, ValueId};
use crate::op::Op;
use crate::ops::fused::{GateResidual, LayerNormModulate};

pub(super) fn fuse(graph: &Graph) -> Result<Graph> {
    let uses = graph.use_counts();
    let fused = Rewriter::new(graph).run(|rw, node, id, args| {
        let found = layer_norm_modulate(graph, &uses, id).or_else(|| gate_residual(graph, &uses, id));
        match found {
            Some((op, operands)) => {
                let operands = operands.iter().filter_map(|o| rw.mapped(*o)).collect();
                rw.push(op, operands, node)
            }
            None => rw.push(node.op.clone(), args, node),
        }
    })?;
    sweep(&fused)
}

/// The node behind `id` when only one other node needs it.
fn inner<'a>(graph: &'a Graph, uses: &[usize], id: ValueId) -> Option<&'a Node> {
    (uses[id.index()] == 1).then(|| graph.node(id))
}

/// Whether the value is the constant 1.
fn is_one(graph: &Graph, id: ValueId) -> bool {
    matches!(&graph.node(id).op, Op::Constant(c) if c.splat() == Some(1.0))
}

/// Whether `row` is `(N, 1, D)` for an `x` of `(N, T, D)`.
fn conditions(graph: &Graph, x: ValueId, row: ValueId) -> bool {
    let (x, row) = (graph.type_of(x).shape.dims(), graph.type_of(row).shape.dims());
    x.len() == 3 && row.len() == 3 && row == [x[0], 1, x[2]]
}

/// Both orders of a commutative node's two operands.
fn orders(node: &Node) -> [(ValueId, ValueId); 2] {
    [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
}

/// `LN(x) · (1 + scale) + shift`.
fn layer_norm_modulate(graph: &Graph, uses: &[usize], id: ValueId) -> Option<(Op, Vec<ValueId>)> {
    let add = graph.node(id);
    if !matches!(add.op, Op::Add(_)) {
        return None;
    }
    orders(add).into_iter().find_map(|(scaled, shift)| {
        let mul = inner(graph, uses, scaled).filter(|n| matches!(n.op, Op::Mul(_)))?;
        orders(mul).into_iter().find_map(|(normal, scale1)| {
            let Node { op: Op::LayerNorm(norm), args: x, .. } = inner(graph, uses, normal)? else {
                return None;
            };
            // `1 + scale` may serve the backward pass too: sharing it costs nothing.
            let plus = graph.node(scale1);
            if !matches!(plus.op, Op::Add(_)) {
                return None;
            }
            let (_, scale) = orders(plus).into_iter().find(|(one, _)| is_one(graph, *one))?;
            (conditions(graph, x[0], scale) && conditions(graph, x[0], shift))
                .then(|| (LayerNormModulate { epsilon: norm.epsilon }.into(), vec![x[0], shift, scale]))
        })
    })
}

/// `x + gate · y`.
fn gate_residual(graph: &Graph, uses: &[usize], id: ValueId) -> Option<(Op, Vec<ValueId>)> {
    let add = graph.node(id);
    if !matches!(add.op, Op::Add(_)) {
        return None;
    }
    orders(add).into_iter().find_map(|(x, gated)| {
        let mul = inner(graph, uses, gated).filter(|n| matches!(n.op, Op::Mul(_)))?;
        orders(mul).into_iter().find_map(|(gate, y)| {
            let fits = conditions(graph, x, gate) && graph.type_of(y) == graph.type_of(x);
            // With one token the two factors look alike; the plain form is as good.
            (fits && graph.type_of(gate) != graph.type_of(y)).then(|| (GateResidual.into(), vec![x, gate, y]))
        })
    })
}
