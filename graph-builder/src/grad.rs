//! Reverse-mode differentiation over the IR.
//!
//! The rules build graph and know nothing of broadcasting or accumulation; this driver visits nodes in reverse,
//! sums a cotangent down to its operand's shape, adds up the contributions, and stays on paths that lead from a
//! wanted value to the loss.

use crate::builder::Builder;
use crate::error::{GraphError, Result};
use crate::graph::ValueId;
use crate::op::Grad;
use crate::shape::Shape;
use crate::value::Value;

impl Builder {
    /// Gradients of the scalar `loss` with respect to `wrt`, as graph. A value that does not reach the loss gets zeros.
    ///
    /// # Errors
    /// [`GraphError::Loss`] when the loss is not a float scalar, [`GraphError::NotDifferentiable`] when a wanted
    /// path runs through an op without a rule.
    pub fn gradients<'g>(&'g self, loss: Value<'g>, wrt: &[Value<'g>]) -> Result<Vec<Value<'g>>> {
        if self.failed() {
            return Ok(wrt.to_vec()); // `finish` reports the first error
        }
        let ty = loss.ty();
        if ty.shape.numel() != 1 || !ty.dtype.is_float() {
            return Err(GraphError::Loss { got: ty.to_string() });
        }
        let count = loss.id.index() + 1;
        let wanted = self.reachable_from(wrt, count);
        let mut cotangents: Vec<Option<Value<'g>>> = vec![None; count];
        cotangents[loss.id.index()] = Some(self.constant(ty.dtype, ty.shape, vec![1.0]));

        for i in (0..count).rev() {
            let Some(ct) = cotangents[i] else { continue };
            let node = self.with_graph(|g| g.nodes[i].clone());
            if !wanted[i] || node.args.is_empty() {
                continue;
            }
            let args: Vec<Value<'g>> = node.args.iter().map(|a| self.value(*a)).collect();
            let out = self.value(ValueId(i as u32));
            self.backward(node.place.clone(), || -> Result<()> {
                for (k, grad) in node.op.rules().vjp(&args, out, ct).into_iter().enumerate() {
                    let target = args[k].id.index();
                    if !wanted[target] {
                        continue;
                    }
                    match grad {
                        Grad::Zero => {}
                        Grad::None => {
                            return Err(GraphError::NotDifferentiable {
                                op: node.op.name(),
                                place: node.place.clone(),
                                operand: k,
                            });
                        }
                        Grad::Value(g) => {
                            let g = unbroadcast(g, &args[k].shape());
                            cotangents[target] = Some(cotangents[target].map_or(g, |sum| sum + g));
                        }
                    }
                }
                Ok(())
            })?;
        }
        Ok(wrt
            .iter()
            .map(|v| {
                let found = cotangents.get(v.id.index()).copied().flatten();
                found.unwrap_or_else(|| self.constant(v.ty().dtype, v.shape(), vec![0.0]))
            })
            .collect())
    }

    /// Which of the first `count` nodes depend on one of `sources`.
    fn reachable_from(&self, sources: &[Value<'_>], count: usize) -> Vec<bool> {
        self.with_graph(|g| {
            let mut reached = vec![false; count];
            for v in sources.iter().filter(|v| v.id.index() < count) {
                reached[v.id.index()] = true;
            }
            for i in 0..count {
                reached[i] |= g.nodes[i].args.iter().any(|a| reached[a.index()]);
            }
            reached
        })
    }
}

/// Sums the copies that broadcasting made.
fn unbroadcast<'g>(ct: Value<'g>, shape: &Shape) -> Value<'g> {
    let from = ct.shape();
    if from == *shape {
        return ct;
    }
    let extra = from.rank() - shape.rank();
    let axes: Vec<usize> =
        (0..from.rank()).filter(|&i| i < extra || (shape.0[i - extra] == 1 && from.0[i] != 1)).collect();
    let summed = if axes.is_empty() { ct } else { ct.sum(&axes) };
    if extra == 0 { summed } else { summed.reshape(shape.clone()) }
}
