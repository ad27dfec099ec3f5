//! Looking into a graph: what is computed inside it, as further outputs.

use crate::error::{GraphError, Result};
use crate::graph::{Graph, Node, ValueId};
use crate::op::Op;
use crate::verify::verify;

/// What the names of the outputs of [`Graph::with_outputs_at`] begin with; the scope follows.
pub const AT: &str = "at.";

impl Graph {
    /// The scopes that the forward computation makes values in, in order of first appearance.
    pub fn scopes(&self) -> Vec<&str> {
        let mut scopes = indexmap::IndexSet::new();
        scopes.extend(self.nodes.iter().filter(|n| computes(n)).map(|n| n.place.scope.as_str()));
        scopes.into_iter().collect()
    }

    /// The same graph with one more output for each of `scopes`, called [`AT`] and the scope: the last value that the
    /// forward computation makes in the scope or below it, which is the layer's answer.
    ///
    /// Passes that run later keep these values, so ask an unoptimised graph.
    ///
    /// # Errors
    /// [`GraphError::NoScope`] for a scope in which nothing is computed, [`GraphError::DuplicateName`] for one named
    /// twice.
    pub fn with_outputs_at<'s>(&self, scopes: impl IntoIterator<Item = &'s str>) -> Result<Self> {
        let mut graph = self.clone();
        for scope in scopes {
            let inside = |n: &Node| {
                let rest = n.place.scope.strip_prefix(scope);
                computes(n) && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            let last = self.nodes.iter().rposition(inside);
            let missing = || GraphError::NoScope { graph: self.name.clone(), scope: scope.to_owned() };
            let (name, last) = (format!("{AT}{scope}"), last.ok_or_else(missing)?);
            if graph.outputs.iter().any(|(known, _)| *known == name) {
                return Err(GraphError::DuplicateName { graph: self.name.clone(), kind: "output", name });
            }
            graph.outputs.push((name, ValueId(last as u32)));
        }
        verify(&graph, "with_outputs_at")?;
        Ok(graph)
    }
}

/// Whether a node of the forward computation makes a new value.
fn computes(node: &Node) -> bool {
    !node.backward && !matches!(node.op, Op::Input(_) | Op::Parameter(_) | Op::Constant(_))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ndarray::{ArrayD, arr1};

    use super::*;
    use crate::{Builder, Type};

    fn graph() -> Graph {
        let b = Builder::new("layers");
        let x = b.input("x", Type::f32([2]));
        let (inner, outer) = b.root().within("a", |s| {
            let inner = s.within("b", |_| x * x);
            (inner, inner + 1.0)
        });
        let _ = b.root().within("ab", |_| x * 9.0);
        b.output("y", inner * outer);
        b.finish().unwrap()
    }

    #[test]
    fn a_scope_answers_with_its_last_value() {
        let graph = graph();
        assert_eq!(graph.scopes(), ["a.b", "a", "ab", ""]);
        let probed = graph.with_outputs_at(["a", "a.b"]).unwrap();
        let names: Vec<&str> = probed.outputs().iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["y", "at.a", "at.a.b"]);
        let feeds = BTreeMap::from([("x".to_owned(), arr1(&[2.0, 3.0]).into_dyn())]);
        let want: [ArrayD<f64>; 3] = [[20.0, 90.0], [5.0, 10.0], [4.0, 9.0]].map(|v| arr1(&v).into_dyn());
        for graph in [&probed, &probed.optimised().unwrap()] {
            assert_eq!(graph.eval(&feeds).unwrap(), want);
        }
    }

    #[test]
    fn an_empty_scope_and_a_repeated_one_are_refused() {
        let text = |scopes: &[&str]| graph().with_outputs_at(scopes.iter().copied()).unwrap_err().to_string();
        assert_eq!(text(&["c"]), "graph `layers` computes nothing in scope `c`");
        assert_eq!(text(&["a", "a"]), "graph `layers` has two outputs named `at.a`");
    }
}
