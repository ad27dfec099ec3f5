//! Recomputation: a layer's values are computed again when the backward pass comes to the layer, not kept until then.

use std::collections::BTreeMap;

use super::{Rewriter, sweep};
use crate::error::{Place, Result};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::several::After;
use crate::verify::verify;

impl Graph {
    /// The graph in which the backward pass of every layer `stack.0`, `stack.1`, … uses values computed again from
    /// the layer's input, so that of each layer only its input is kept. Every output has the same value, bit for bit.
    ///
    /// The layer's input is the largest value that it takes from outside. What does not depend on it (conditioning,
    /// one row a sample) is kept. The input is read again [`After`] the layer's answer has its cotangent: that orders
    /// the recomputation, and keeps it from being merged with what it repeats.
    ///
    /// Not one of [`super::PASSES`]: it costs a forward pass. It is for the optimised graph, and no pass should follow.
    ///
    /// # Errors
    /// [`crate::GraphError::Malformed`] when the rewritten graph breaks an invariant.
    pub fn recomputed(&self, stack: &str) -> Result<Graph> {
        let layers = Layers::of(self, stack);
        let mut again = Again { layers: &layers, made: BTreeMap::new() };
        let graph = Rewriter::new(self).run(|rw, node, id, mut args| {
            if let Some(layer) = layers.name(self.node(id)).filter(|_| node.backward) {
                for (arg, old) in args.iter_mut().zip(&node.args) {
                    if layers.repeats(*old, layer) {
                        *arg = again.make(rw, *old, layer)?.unwrap_or(*arg);
                    }
                }
            }
            rw.push(node.op.clone(), args, node)
        })?;
        let graph = sweep(&graph)?;
        verify(&graph, "recomputed")?;
        Ok(graph)
    }
}

/// What a layer takes from outside.
#[derive(Clone, Copy)]
struct Edge {
    /// The value that the layer's values are computed from.
    input: ValueId,
    /// The cotangent of the layer's answer: the first backward value that its backward pass takes.
    token: ValueId,
}

/// The layers of a stack.
struct Layers<'a> {
    graph: &'a Graph,
    stack: &'a str,
    edges: BTreeMap<&'a str, Edge>,
    /// Forward values of a layer that depend on its input.
    dependent: Vec<bool>,
}

impl<'a> Layers<'a> {
    fn of(graph: &'a Graph, stack: &'a str) -> Self {
        let mut layers =
            Self { graph, stack, edges: BTreeMap::new(), dependent: vec![false; graph.nodes.len()] };
        let mut inputs: BTreeMap<&str, ValueId> = BTreeMap::new();
        let mut tokens: BTreeMap<&str, ValueId> = BTreeMap::new();
        for node in graph.nodes() {
            let Some(layer) = layers.name(node) else { continue };
            let outside = |id: &&ValueId| {
                let taken = graph.node(**id);
                let computed = !taken.args.is_empty() && taken.backward == node.backward;
                computed && layers.name(taken) != Some(layer) && taken.ty.dtype.is_float()
            };
            for id in node.args.iter().filter(outside) {
                if node.backward {
                    tokens.entry(layer).or_insert(*id);
                } else {
                    let largest = inputs.entry(layer).or_insert(*id);
                    if graph.type_of(*id).bytes() > graph.type_of(*largest).bytes() {
                        *largest = *id;
                    }
                }
            }
        }
        for (layer, input) in inputs {
            if let Some(&token) = tokens.get(layer) {
                layers.edges.insert(layer, Edge { input, token });
            }
        }
        for (i, node) in graph.nodes().iter().enumerate() {
            let Some(layer) = layers.name(node).filter(|_| !node.backward) else { continue };
            let input = layers.edges.get(layer).map(|edge| edge.input);
            layers.dependent[i] = node.args.iter().any(|a| Some(*a) == input || layers.repeats(*a, layer));
        }
        layers
    }

    /// The layer that a node is in: the name after the stack's.
    fn name(&self, node: &'a Node) -> Option<&'a str> {
        node.place.scope.strip_prefix(self.stack)?.strip_prefix('.')?.split('.').next()
    }

    /// Whether the value is one that the backward pass of `layer` computes again.
    fn repeats(&self, id: ValueId, layer: &str) -> bool {
        self.dependent[id.index()] && self.name(self.graph.node(id)) == Some(layer)
    }
}

/// The repeated values so far, by layer and original; that of the layer's input is the ordered one.
struct Again<'a, 'b> {
    layers: &'b Layers<'a>,
    made: BTreeMap<(&'a str, ValueId), ValueId>,
}

impl<'a> Again<'a, '_> {
    /// The repetition of `id`; `None` when the layer's cotangent does not exist yet.
    fn make(&mut self, rw: &mut Rewriter<'_>, id: ValueId, layer: &'a str) -> Result<Option<ValueId>> {
        if let Some(&made) = self.made.get(&(layer, id)) {
            return Ok(Some(made));
        }
        let edge = self.layers.edges[layer];
        let node = self.layers.graph.node(id);
        let made = if id == edge.input {
            let (Some(input), Some(token)) = (rw.mapped(id), rw.mapped(edge.token)) else { return Ok(None) };
            let scope = format!("{}.{layer}", self.layers.stack);
            rw.new.push(After.into(), vec![input, token], Place { scope, ..node.place.clone() }, true)?
        } else {
            let mut args = Vec::with_capacity(node.args.len());
            for &arg in &node.args {
                let again = arg == edge.input || self.layers.repeats(arg, layer);
                let new = if again { self.make(rw, arg, layer)? } else { rw.mapped(arg) };
                let Some(new) = new else { return Ok(None) };
                args.push(new);
            }
            rw.new.push(node.op.clone(), args, node.place.clone(), true)?
        };
        self.made.insert((layer, id), made);
        Ok(Some(made))
    }
}
