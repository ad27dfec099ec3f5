//! Constant folding, common subexpressions, algebraic and layout identities.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Rewriter, sweep};
use crate::error::Result;
use crate::eval::Array;
use crate::graph::{Graph, Node, ValueId};
use crate::op::Op;
use crate::ops::elementwise::{Add, Mul, Sub};
use crate::ops::layout::{Concat, Pad, Reshape, Slice, Transpose};
use crate::ops::leaf::Constant;
use crate::ops::linalg::MatMul;
use crate::shape::Type;

/// Largest constant, in elements, that folding may create.
const FOLD_LIMIT: usize = 1 << 20;
/// Rounds until nothing changes; each is linear in the nodes.
const ROUNDS: usize = 8;

pub(super) fn simplify(graph: &Graph) -> Result<Graph> {
    let mut current = graph.clone();
    for _ in 0..ROUNDS {
        let next = sweep(&round(&current)?)?;
        if same(&next, &current) {
            break;
        }
        current = next;
    }
    Ok(current)
}

/// Whether two graphs compute the same nodes in the same order.
fn same(a: &Graph, b: &Graph) -> bool {
    let alike = |(a, b): (&Node, &Node)| a.op == b.op && a.args == b.args;
    a.nodes.len() == b.nodes.len() && a.nodes.iter().zip(&b.nodes).all(alike)
}

fn round(graph: &Graph) -> Result<Graph> {
    let uses = graph.use_counts();
    let mut seen: HashMap<String, ValueId> = HashMap::new();
    Rewriter::new(graph).run(|rewriter, node, _, args| {
        if let Some(id) = rewrite(rewriter, &uses, node, &args)? {
            return Ok(id);
        }
        if let Some(constant) = fold(&rewriter.new, node, &args) {
            return share(rewriter, &mut seen, constant.into(), vec![], node);
        }
        share(rewriter, &mut seen, node.op.clone(), args, node)
    })
}

/// The earlier node with the same op and operands, or a new one.
fn share(
    rewriter: &mut Rewriter<'_>,
    seen: &mut HashMap<String, ValueId>,
    op: Op,
    args: Vec<ValueId>,
    node: &Node,
) -> Result<ValueId> {
    if matches!(op, Op::Input(_) | Op::Parameter(_)) {
        return rewriter.push(op, args, node);
    }
    // Constants of equal values may differ in type.
    let key = format!("{op:?} {args:?} {}", node.ty);
    if let Some(&id) = seen.get(&key) {
        return Ok(id);
    }
    let id = rewriter.push(op, args, node)?;
    seen.insert(key, id);
    Ok(id)
}

/// The value of a node whose operands are all constants.
fn fold(new: &Graph, node: &Node, args: &[ValueId]) -> Option<Constant> {
    let several = matches!(node.op, Op::Split(_) | Op::Part(_));
    if args.is_empty() || several || node.ty.shape.numel() > FOLD_LIMIT {
        return None;
    }
    let constants: Vec<&Constant> = args.iter().map(|a| as_constant(new, *a)).collect::<Option<_>>()?;
    if constants.iter().any(|c| c.ty.shape.numel() > FOLD_LIMIT) {
        return None;
    }
    if let (Op::Broadcast(_) | Op::Reshape(_), Some(v)) = (&node.op, constants[0].splat()) {
        return Some(Constant { ty: node.ty.clone(), data: Arc::from([v]) });
    }
    let values: Vec<Array> = constants
        .iter()
        .map(|c| {
            let none: [&Array; 0] = [];
            Op::Constant((*c).clone()).rules().eval(&none, &c.ty)
        })
        .collect();
    let answer = node.op.rules().eval(&values.iter().collect::<Vec<_>>(), &node.ty);
    Some(Constant { ty: node.ty.clone(), data: answer.iter().copied().collect() })
}

fn as_constant(graph: &Graph, id: ValueId) -> Option<&Constant> {
    match &graph.node(id).op {
        Op::Constant(c) => Some(c),
        _ => None,
    }
}

/// The one value of all elements of a float constant.
fn splat(graph: &Graph, id: ValueId) -> Option<f64> {
    as_constant(graph, id).filter(|c| c.ty.dtype.is_float()).and_then(Constant::splat)
}

/// A simpler value for `node`, if a rule matches.
fn rewrite(rw: &mut Rewriter<'_>, uses: &[usize], node: &Node, args: &[ValueId]) -> Result<Option<ValueId>> {
    let ty = |rw: &Rewriter<'_>, i: usize| -> Type { rw.new.type_of(args[i]).clone() };
    match &node.op {
        Op::StopGradient(_) => Ok(Some(args[0])),
        Op::Cast(cast) if ty(rw, 0).dtype == cast.to => Ok(Some(args[0])),
        Op::Add(_) | Op::Sub(_) if splat(&rw.new, args[1]) == Some(0.0) && ty(rw, 0) == node.ty => {
            Ok(Some(args[0]))
        }
        Op::Add(_) if splat(&rw.new, args[0]) == Some(0.0) && ty(rw, 1) == node.ty => Ok(Some(args[1])),
        Op::Add(_) if args[0] == args[1] => {
            let two = number(rw, node, 2.0)?;
            rw.push(Mul, vec![args[0], two], node).map(Some)
        }
        Op::Add(_) => match (negated(rw, args[0]), negated(rw, args[1])) {
            (_, Some(y)) => rw.push(Sub, vec![args[0], y], node).map(Some),
            (Some(x), None) => rw.push(Sub, vec![args[1], x], node).map(Some),
            (None, None) => join_pads(rw, node, args),
        },
        Op::Sub(_) => match negated(rw, args[1]) {
            Some(y) => rw.push(Add, vec![args[0], y], node).map(Some),
            None => Ok(None),
        },
        Op::Mul(_) | Op::Div(_) if splat(&rw.new, args[1]) == Some(1.0) && ty(rw, 0) == node.ty => {
            Ok(Some(args[0]))
        }
        Op::Mul(_) if splat(&rw.new, args[0]) == Some(1.0) && ty(rw, 1) == node.ty => Ok(Some(args[1])),
        Op::Mul(_) => scales(rw, node, args),
        Op::Neg(_) => match rw.new.node(args[0]) {
            Node { op: Op::Neg(_), args: inner, .. } => Ok(Some(inner[0])),
            Node { op: Op::Sub(_), args: inner, .. } if uses[node.args[0].index()] == 1 => {
                let swapped = vec![inner[1], inner[0]];
                rw.push(Sub, swapped, node).map(Some)
            }
            _ => Ok(None),
        },
        Op::Reshape(_) | Op::Broadcast(_) if ty(rw, 0) == node.ty => Ok(Some(args[0])),
        Op::Slice(s) if s.end - s.start == ty(rw, 0).shape.0[s.axis] => Ok(Some(args[0])),
        Op::Slice(slice) => slice_of_concat(rw, node, slice, args[0]),
        Op::Pad(p) if p.before + p.after == 0 => Ok(Some(args[0])),
        Op::Concat(_) if args.len() == 1 => Ok(Some(args[0])),
        Op::Reshape(reshape) => match rw.new.node(args[0]).clone() {
            Node { op: Op::Reshape(_), args: inner, .. } => {
                rw.push(Reshape { shape: reshape.shape.clone() }, inner, node).map(Some)
            }
            _ => Ok(None),
        },
        Op::Transpose(transpose) => transposes(rw, uses, node, transpose, args[0]),
        _ => Ok(None),
    }
}

/// A scalar constant of the node's element type.
fn number(rw: &mut Rewriter<'_>, node: &Node, value: f64) -> Result<ValueId> {
    let constant = Constant { ty: Type::new(node.ty.dtype, [0; 0]), data: Arc::from([value]) };
    rw.push(constant, vec![], node)
}

/// `y` where `id` is `−y`.
fn negated(rw: &Rewriter<'_>, id: ValueId) -> Option<ValueId> {
    match rw.new.node(id) {
        Node { op: Op::Neg(_), args, .. } => Some(args[0]),
        _ => None,
    }
}

/// A factor of the answer's shape that is one number everywhere becomes a scalar, and scalars multiply.
fn scales(rw: &mut Rewriter<'_>, node: &Node, args: &[ValueId]) -> Result<Option<ValueId>> {
    for (filled, other) in [(0, 1), (1, 0)] {
        let fills = rw.new.type_of(args[filled]).shape.rank() > 0 && *rw.new.type_of(args[other]) == node.ty;
        if let Some(value) = splat(&rw.new, args[filled]).filter(|_| fills) {
            let scale = number(rw, node, value)?;
            return rw.push(Mul, vec![args[other], scale], node).map(Some);
        }
    }
    merge_scales(rw, node, args)
}

/// `(x · a) · b` with scalar constants becomes `x · (a·b)`.
fn merge_scales(rw: &mut Rewriter<'_>, node: &Node, args: &[ValueId]) -> Result<Option<ValueId>> {
    let scaled = |rw: &Rewriter<'_>, id: ValueId| -> Option<(ValueId, f64)> {
        let inner = rw.new.node(id);
        let scale = inner.args.get(1).and_then(|b| scalar(&rw.new, *b))?;
        matches!(inner.op, Op::Mul(_)).then(|| (inner.args[0], scale))
    };
    for (x, by) in [(0, 1), (1, 0)] {
        if let (Some((inner, a)), Some(b)) = (scaled(rw, args[x]), scalar(&rw.new, args[by])) {
            let scale = number(rw, node, a * b)?;
            return rw.push(node.op.clone(), vec![inner, scale], node).map(Some);
        }
    }
    Ok(None)
}

fn scalar(graph: &Graph, id: ValueId) -> Option<f64> {
    (graph.type_of(id).shape.rank() == 0).then(|| splat(graph, id)).flatten()
}

/// Gradients of neighbouring slices: `pad(a) + pad(b)` that do not overlap become one concatenation.
fn join_pads(rw: &mut Rewriter<'_>, node: &Node, args: &[ValueId]) -> Result<Option<ValueId>> {
    let pad = |rw: &Rewriter<'_>, id: ValueId| match rw.new.node(id) {
        Node { op: Op::Pad(p), args, .. } => Some((p.clone(), args[0])),
        _ => None,
    };
    let (Some((p, a)), Some((q, b))) = (pad(rw, args[0]), pad(rw, args[1])) else { return Ok(None) };
    let size = |rw: &Rewriter<'_>, id: ValueId, axis: usize| rw.new.type_of(id).shape.0[axis];
    if p.axis != q.axis {
        return Ok(None);
    }
    let axis = p.axis;
    let (first, second, before, after) = if p.before + size(rw, a, axis) == q.before {
        (a, b, p.before, q.after)
    } else if q.before + size(rw, b, axis) == p.before {
        (b, a, q.before, p.after)
    } else {
        return Ok(None);
    };
    let parts = |rw: &Rewriter<'_>, id: ValueId| match rw.new.node(id) {
        Node { op: Op::Concat(c), args, .. } if c.axis == axis => args.clone(),
        _ => vec![id],
    };
    let mut all = parts(rw, first);
    all.extend(parts(rw, second));
    let joined = rw.push(Concat { axis }, all, node)?;
    if before + after == 0 {
        return Ok(Some(joined));
    }
    rw.push(Pad { axis, before, after }, vec![joined], node).map(Some)
}

/// A slice that begins and ends where operands of a concatenation do is their concatenation.
fn slice_of_concat(
    rw: &mut Rewriter<'_>,
    node: &Node,
    slice: &Slice,
    joined: ValueId,
) -> Result<Option<ValueId>> {
    let Node { op: Op::Concat(concat), args, .. } = rw.new.node(joined) else { return Ok(None) };
    if concat.axis != slice.axis {
        return Ok(None);
    }
    let (mut end, mut ends) = (0, vec![0]);
    for arg in args {
        end += rw.new.type_of(*arg).shape.0[slice.axis];
        ends.push(end);
    }
    let at = |edge: usize| ends.iter().position(|e| *e == edge);
    let (Some(first), Some(last)) = (at(slice.start), at(slice.end)) else { return Ok(None) };
    match &args.clone()[first..last] {
        [one] => Ok(Some(*one)),
        several => rw.push(concat.clone(), several.to_vec(), node).map(Some),
    }
}

/// Transposes cancel, compose, and move from the answer of a matrix product to its operands.
fn transposes(
    rw: &mut Rewriter<'_>,
    uses: &[usize],
    node: &Node,
    transpose: &Transpose,
    arg: ValueId,
) -> Result<Option<ValueId>> {
    if transpose.perm.iter().enumerate().all(|(i, &a)| i == a) {
        return Ok(Some(arg));
    }
    let inner = rw.new.node(arg).clone();
    match &inner.op {
        Op::Transpose(before) => {
            let perm: Vec<usize> = transpose.perm.iter().map(|&a| before.perm[a]).collect();
            if perm.iter().enumerate().all(|(i, &a)| i == a) {
                return Ok(Some(inner.args[0]));
            }
            rw.push(Transpose { perm }, vec![inner.args[0]], node).map(Some)
        }
        // (A B)ᵀ = Bᵀ Aᵀ: a weight gradient is then one product with a transposed operand, which needs no copy.
        Op::MatMul(_) if transpose.perm == [1, 0] && uses[node.args[0].index()] == 1 => {
            let (a, b) = (inner.args[0], inner.args[1]);
            let mut turned = |id: ValueId| match rw.new.node(id).clone() {
                Node { op: Op::Transpose(t), args, .. } if t.perm == [1, 0] => Ok(args[0]),
                _ => rw.push(Transpose { perm: vec![1, 0] }, vec![id], node),
            };
            let (bt, at) = (turned(b)?, turned(a)?);
            rw.push(MatMul, vec![bt, at], node).map(Some)
        }
        _ => Ok(None),
    }
}
