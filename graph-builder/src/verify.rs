//! The invariants of a well-formed graph, checked after the build and after every pass.

use crate::error::{GraphError, Result};
use crate::graph::{Graph, Node, Parameter};
use crate::op::Op;
use crate::shape::{Shape, Type};

/// Checks that operands come before their users, that every type is what the op infers, that several results are
/// taken apart before they are used, that parameter nodes agree with their declarations and that outputs exist.
///
/// # Errors
/// [`GraphError::Malformed`] with the stage, the node and its neighbours.
pub(crate) fn verify(graph: &Graph, stage: &str) -> Result<()> {
    let fault = |i: usize, what: String| {
        let lines = (i.saturating_sub(5)..(i + 6).min(graph.nodes.len())).map(|j| graph.line(j));
        let node = &graph.nodes[i];
        Err(GraphError::Malformed {
            stage: stage.into(),
            node: i,
            op: node.op.name(),
            place: node.place.clone(),
            what,
            context: lines.collect::<Vec<_>>().join("\n"),
        })
    };
    for (i, node) in graph.nodes.iter().enumerate() {
        if let Some(a) = node.args.iter().find(|a| a.index() >= i) {
            return fault(i, format!("operand %{} does not come before its user", a.0));
        }
        let types: Vec<&Type> = node.args.iter().map(|a| graph.type_of(*a)).collect();
        match node.op.rules().infer(&types) {
            Err(refusal) => return fault(i, format!("operands break {}", refusal.0)),
            Ok(ty) if ty != node.ty => return fault(i, format!("type {} recorded, {ty} inferred", node.ty)),
            Ok(_) => {}
        }
        if let Some(what) = misused_results(graph, node) {
            return fault(i, what);
        }
        if let Op::Parameter(p) = &node.op {
            let known = graph.parameters.get(p.index);
            let declared = |known: &Parameter| Type { dtype: known.dtype, shape: known.shape() };
            if known.is_none_or(|known| known.name != p.name || declared(known) != p.ty) {
                return fault(i, format!("parameter `{}` is not declared so", p.name));
            }
        }
    }
    for (name, id) in &graph.outputs {
        if id.index() >= graph.nodes.len() {
            return fault(graph.nodes.len().saturating_sub(1), format!("output `{name}` names no node"));
        }
        if graph.results(*id).len() > 1 {
            return fault(id.index(), format!("output `{name}` is several results"));
        }
    }
    Ok(())
}

/// How a node breaks the rule that an op with several results is used through its parts only.
fn misused_results(graph: &Graph, node: &Node) -> Option<String> {
    let Op::Part(part) = &node.op else {
        let several = node.args.iter().find(|a| graph.results(**a).len() > 1)?;
        return Some(format!("operand %{} is several results, not one", several.0));
    };
    let results = graph.results(node.args[0]);
    let offset: usize = results.iter().take(part.index).map(Shape::numel).sum();
    let is_one = results.len() > 1 && results.get(part.index) == Some(&part.shape) && part.offset == offset;
    (!is_one).then(|| format!("%{} has no such result", node.args[0].0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::several::Part;
    use crate::{Activation, Builder, Type, Value};

    /// What the verification says of a graph in which `misuse` uses both gradients of a linear layer at once.
    fn refusal(misuse: impl for<'g> FnOnce(&'g Builder, Value<'g>)) -> String {
        let b = Builder::new("misused");
        let (x, ct) = (b.input("x", Type::f32([4, 3])), b.input("ct", Type::f32([4, 2])));
        misuse(&b, ct.linear_grad_weight(Activation::None, x));
        b.finish().unwrap_err().to_string()
    }

    #[test]
    fn several_results_are_used_through_their_parts_only() {
        let used = refusal(|b, grads| b.output("y", grads.exp()));
        assert!(used.contains("operand %2 is several results, not one"), "{used}");
        let given = refusal(|b, grads| b.output("y", grads));
        assert!(given.contains("output `y` is several results"), "{given}");
        let moved = Part { index: 1, offset: 5, shape: Shape::from([2]) };
        let wrong = refusal(|b, grads| b.output("y", b.push(moved.into(), &[grads])));
        assert!(wrong.contains("%2 has no such result"), "{wrong}");
        let single = Part { index: 0, offset: 0, shape: Shape::from([12]) };
        let none = refusal(|b, grads| {
            let flat = grads.results()[0].reshape([6]);
            b.output("y", b.push(Part { shape: Shape::from([6]), ..single }.into(), &[flat]));
        });
        assert!(none.contains("has no such result"), "{none}");
    }
}
