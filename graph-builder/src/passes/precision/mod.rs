//! Mixed precision: conversions between f32 and the compute type where the ops' policies ask for them.

use std::collections::BTreeMap;

use super::{Rewriter, sweep};
use crate::error::{GraphError, Result};
use crate::graph::{Graph, Node, ValueId};
use crate::op::{Op, Policy};
use crate::ops::elementwise::Cast;
use crate::ops::leaf::{Constant, ParameterRef};
use crate::precision::Precision;
use crate::shape::{DType, Type};
use crate::verify::verify;

/// Name of the pass in errors.
const PASS: &str = "in_precision";
/// What the outputs that are gradients begin with; the parameter's name follows.
const GRADIENT: &str = "grad.";

impl Graph {
    /// The same computation in mixed precision, by each op's [`Policy`].
    ///
    /// Inputs and outputs keep their names and types, but for parameters and gradients: a parameter that is used in the
    /// compute type only has it ([`crate::Parameter::dtype`]), and the output `grad.<parameter>` has the type of the
    /// parameter. Each value is converted once, however many use it, and never back and forth.
    ///
    /// Not one of [`super::PASSES`]: it is the last step for an optimised graph, after [`Graph::recomputed`] where a
    /// program recomputes. [`Precision::F32`] changes nothing.
    ///
    /// # Errors
    /// [`GraphError::NotF32`] for a graph that has a narrower value already, [`GraphError::Malformed`] when the
    /// rewritten graph breaks an invariant.
    pub fn in_precision(&self, precision: Precision) -> Result<Graph> {
        self.in_precision_by(precision, Op::policy)
    }

    /// [`Graph::in_precision`] by other policies than the ops' own.
    ///
    /// # Errors
    /// As [`Graph::in_precision`].
    pub fn in_precision_by(&self, precision: Precision, policy: impl Fn(&Op) -> Policy) -> Result<Graph> {
        if precision == Precision::F32 {
            return Ok(self.clone());
        }
        let policies: Vec<Policy> = self.nodes.iter().map(|n| policy(&n.op)).collect();
        self.refuse_narrow()?;
        let types = Types::of(self, &policies, precision.dtype());
        let mut casts = Casts::default();
        let mut graph = Rewriter::new(self).run(|rw, node, id, mut args| {
            if let Op::Parameter(p) = &node.op {
                let dtype = types.parameters[p.index];
                rw.new.parameters[p.index].dtype = dtype;
                let ty = Type { dtype, shape: p.ty.shape.clone() };
                return rw.push(ParameterRef { ty, ..p.clone() }, args, node);
            }
            if let Some(dtype) = types.operands[id.index()] {
                for (k, arg) in args.iter_mut().enumerate() {
                    if converts(policies[id.index()], k) {
                        *arg = casts.get(&mut rw.new, *arg, dtype)?;
                    }
                }
            }
            rw.push(node.op.clone(), args, node)
        })?;
        for i in 0..graph.outputs.len() {
            let (name, id) = graph.outputs[i].clone();
            let dtype = self.output_dtype(&name, self.type_of(self.outputs[i].1).dtype, &types);
            graph.outputs[i].1 = casts.get(&mut graph, id, dtype)?;
        }
        let graph = sweep(&graph)?;
        verify(&graph, PASS)?;
        Ok(graph)
    }

    fn refuse_narrow(&self) -> Result<()> {
        let narrow = self.nodes.iter().find(|n| matches!(n.ty.dtype, DType::F16 | DType::Bf16));
        narrow.map_or(Ok(()), |node| {
            Err(GraphError::NotF32 {
                pass: PASS,
                op: node.op.name(),
                place: node.place.clone(),
                got: node.ty.to_string(),
            })
        })
    }

    fn output_dtype(&self, name: &str, declared: DType, types: &Types) -> DType {
        let of = name.strip_prefix(GRADIENT);
        let parameter = of.and_then(|of| self.parameters.iter().position(|p| p.name == of));
        parameter.map_or(declared, |index| types.parameters[index])
    }
}

/// Whether operand `k` of an op of this policy is converted.
fn converts(policy: Policy, k: usize) -> bool {
    policy != Policy::First || k == 0
}

/// The element types of a graph in mixed precision.
struct Types {
    /// What the float operands of each node are converted to; `None` for a node that has none.
    operands: Vec<Option<DType>>,
    /// Of each parameter.
    parameters: Vec<DType>,
}

impl Types {
    /// Parameters begin in the compute type; one that some use needs in f32 stays f32, which may widen other uses.
    fn of(graph: &Graph, policies: &[Policy], low: DType) -> Self {
        let mut parameters = vec![low; graph.parameters.len()];
        let mut used = vec![false; parameters.len()];
        loop {
            let operands = Self::operands(graph, policies, low, &parameters);
            let mut next = parameters.clone();
            for (i, node) in graph.nodes.iter().enumerate() {
                for (k, arg) in node.args.iter().enumerate() {
                    let Op::Parameter(p) = &graph.node(*arg).op else { continue };
                    used[p.index] = true;
                    if converts(policies[i], k) && operands[i] == Some(DType::F32) {
                        next[p.index] = DType::F32;
                    }
                }
            }
            for (dtype, used) in next.iter_mut().zip(&used) {
                *dtype = if *used { *dtype } else { DType::F32 };
            }
            if next == parameters {
                return Self { operands, parameters };
            }
            parameters = next;
        }
    }

    fn operands(graph: &Graph, policies: &[Policy], low: DType, parameters: &[DType]) -> Vec<Option<DType>> {
        let mut operands = Vec::with_capacity(graph.nodes.len());
        let mut results: Vec<DType> = Vec::with_capacity(graph.nodes.len());
        for (node, policy) in graph.nodes.iter().zip(policies) {
            let floats = || node.args.iter().filter(|a| graph.type_of(**a).dtype.is_float());
            let operand = floats().next().and_then(|_| match policy {
                Policy::Leaf => None,
                Policy::Compute => Some(low),
                Policy::F32 => Some(DType::F32),
                Policy::First => node.args.first().map(|a| results[a.index()]),
                Policy::Widest => {
                    let counted = floats().filter(|a| !is_number(graph.node(**a)));
                    let types: Vec<DType> = counted.map(|a| results[a.index()]).collect();
                    let narrow = !types.is_empty() && types.iter().all(|t| *t == low);
                    Some(if narrow { low } else { DType::F32 })
                }
            });
            results.push(match (&node.op, operand) {
                (Op::Parameter(p), _) => parameters[p.index],
                (Op::Cast(_), _) => node.ty.dtype,
                (_, Some(dtype)) if node.ty.dtype.is_float() => dtype,
                _ => node.ty.dtype,
            });
            operands.push(operand);
        }
        operands
    }
}

/// A constant of one value.
fn is_number(node: &Node) -> bool {
    matches!(&node.op, Op::Constant(c) if c.splat().is_some())
}

/// The values in other types that were made so far.
#[derive(Default)]
struct Casts(BTreeMap<(ValueId, DType), ValueId>);

impl Casts {
    /// The value `id` of the graph in the element type `dtype`; integers and truth values as they are.
    fn get(&mut self, graph: &mut Graph, id: ValueId, dtype: DType) -> Result<ValueId> {
        let from = graph.type_of(id).dtype;
        if from == dtype || !from.is_float() {
            return Ok(id);
        }
        if let Some(&made) = self.0.get(&(id, dtype)) {
            return Ok(made);
        }
        let node = graph.node(id).clone();
        let (op, args): (Op, Vec<ValueId>) = match &node.op {
            Op::Constant(c) => {
                let ty = Type { dtype, shape: c.ty.shape.clone() };
                (Constant { ty, data: c.data.clone() }.into(), vec![])
            }
            // A truth value becomes a number of any type at once, exactly.
            Op::Cast(_) if graph.type_of(node.args[0]).dtype == DType::Bool => {
                (Cast { to: dtype }.into(), node.args.clone())
            }
            _ => (Cast { to: dtype }.into(), vec![id]),
        };
        let made = graph.push(op, args, node.place, node.backward)?;
        self.0.insert((id, dtype), made);
        Ok(made)
    }
}

#[cfg(test)]
mod tests;
