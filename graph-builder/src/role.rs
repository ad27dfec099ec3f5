//! Roles of parameters under muP, derived from what the graph does with them.

use serde::{Deserialize, Serialize};

use crate::graph::{Dim, Graph};
use crate::op::Op;

/// How a parameter meets the width (muP paper, table 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Fixed fan-in, scaled fan-out: patch and time embeddings, tables.
    Input,
    /// Scaled on both sides.
    Hidden,
    /// Scaled fan-in, fixed fan-out: the last layer's weight.
    Output,
    /// One scaled axis and no fan-in: biases and gains.
    Vector,
    /// No scaled axis: the last layer's bias.
    Scalar,
}

impl Graph {
    /// Role of parameter `index`: which of its axes scale, and whether it is a table.
    ///
    /// A weight is `(out, in, …)`; a parameter that is looked up by index is `(in, out)`.
    pub fn role(&self, index: usize) -> Role {
        let dims = &self.parameters()[index].dims;
        let scaled = |d: &Dim| matches!(d, Dim::Width(_));
        let Some((first, rest)) = dims.split_first() else { return Role::Scalar };
        if rest.is_empty() {
            return if scaled(first) { Role::Vector } else { Role::Scalar };
        }
        let (outer, inner) = (scaled(first), rest.iter().any(scaled));
        let (fan_in, fan_out) = if self.is_table(index) { (outer, inner) } else { (inner, outer) };
        match (fan_in, fan_out) {
            (true, true) => Role::Hidden,
            (true, false) => Role::Output,
            (false, true) => Role::Input,
            (false, false) => Role::Scalar,
        }
    }

    /// Whether the parameter is looked up by index or added as it is (a position table), rather than multiplied.
    fn is_table(&self, index: usize) -> bool {
        let node = self.nodes().iter().position(|n| matches!(&n.op, Op::Parameter(p) if p.index == index));
        let Some(node) = node else { return false };
        let mut users = self.nodes().iter().filter(|n| n.args.iter().any(|a| a.index() == node));
        users.any(|n| match n.op {
            Op::Gather(_) => n.args[0].index() == node,
            Op::Add(_) => true,
            _ => false,
        })
    }
}
