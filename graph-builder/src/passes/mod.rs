//! Graph-to-graph passes: one visible list, the graph verified after each.
//!
//! A pass walks the nodes in order and rebuilds the graph through `Rewriter`; nothing is edited in place, and
//! code that no output needs is dropped on the way.

mod fuse;
mod precision;
mod recompute;
mod simplify;

use crate::error::{Place, Result};
use crate::graph::{Graph, Node, ValueId};
use crate::op::Op;
use crate::verify::verify;

/// One rewrite of a whole graph.
pub struct Pass {
    /// Name, as in error messages and in [`Graph::optimised_until`].
    pub name: &'static str,
    run: fn(&Graph) -> Result<Graph>,
}

/// All passes in order.
pub const PASSES: &[Pass] =
    &[Pass { name: "simplify", run: simplify::simplify }, Pass { name: "fuse", run: fuse::fuse }];

impl Graph {
    /// The graph after all [`PASSES`].
    ///
    /// # Errors
    /// [`crate::GraphError::Malformed`] naming the pass that broke an invariant.
    pub fn optimised(&self) -> Result<Graph> {
        self.optimised_until(PASSES[PASSES.len() - 1].name)
    }

    /// The graph after the passes up to and including `last`; for bisecting a wrong result.
    ///
    /// # Errors
    /// As [`Graph::optimised`].
    pub fn optimised_until(&self, last: &str) -> Result<Graph> {
        let mut graph = self.clone();
        for pass in PASSES {
            graph = (pass.run)(&graph)?;
            verify(&graph, pass.name)?;
            if pass.name == last {
                break;
            }
        }
        Ok(graph)
    }
}

/// Rebuilds a graph node by node with a table from old ids to new ones.
pub(crate) struct Rewriter<'a> {
    old: &'a Graph,
    pub(crate) new: Graph,
    map: Vec<Option<ValueId>>,
}

impl<'a> Rewriter<'a> {
    pub(crate) fn new(old: &'a Graph) -> Self {
        let new = Graph { name: old.name.clone(), parameters: old.parameters.clone(), ..Graph::default() };
        Self { old, new, map: vec![None; old.nodes.len()] }
    }

    /// Visits every live node; `rule` gets the rewriter, the old node and its new operands, and answers with the
    /// new value.
    pub(crate) fn run(
        mut self,
        mut rule: impl FnMut(&mut Self, &Node, ValueId, Vec<ValueId>) -> Result<ValueId>,
    ) -> Result<Graph> {
        let live = self.old.live();
        for (i, node) in self.old.nodes.iter().enumerate().filter(|(i, _)| live[*i]) {
            let args = node.args.iter().filter_map(|a| self.map[a.index()]).collect();
            let id = rule(&mut self, node, ValueId(i as u32), args)?;
            self.map[i] = Some(id);
        }
        self.new.outputs = self
            .old
            .outputs
            .iter()
            .filter_map(|(name, id)| self.map[id.index()].map(|new| (name.clone(), new)))
            .collect();
        Ok(self.new)
    }

    /// The new value of an old one that was visited.
    pub(crate) fn mapped(&self, old: ValueId) -> Option<ValueId> {
        self.map[old.index()]
    }

    /// Appends a node that stands for `origin`.
    pub(crate) fn push(&mut self, op: impl Into<Op>, args: Vec<ValueId>, origin: &Node) -> Result<ValueId> {
        let place: Place = origin.place.clone();
        self.new.push(op.into(), args, place, origin.backward)
    }
}

/// The graph without what no output needs.
pub(crate) fn sweep(graph: &Graph) -> Result<Graph> {
    Rewriter::new(graph).run(|rewriter, node, _, args| rewriter.push(node.op.clone(), args, node))
}
