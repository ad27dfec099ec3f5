//! Memory that one run of a graph needs, predicted from the lifetimes of its values.

use crate::graph::{Graph, ValueId};
use crate::op::Op;

impl Graph {
    /// Bytes of the values that are alive at once, at the worst node of a run in node order.
    ///
    /// Counted are values that the run itself holds: not inputs, parameters and constants, and not outputs, whose
    /// memory is the caller's. A reshaped value and a part of several results need no memory of their own; every
    /// other answer does, also where a runtime might compute it in place.
    pub fn activation_peak(&self) -> u64 {
        let count = self.nodes.len();
        let mut outputs = vec![false; count];
        for (_, id) in &self.outputs {
            outputs[self.storage(*id).index()] = true;
        }
        let live = self.live();
        let mut last: Vec<usize> = (0..count).collect();
        for (i, node) in self.nodes.iter().enumerate().filter(|(i, _)| live[*i]) {
            for arg in &node.args {
                last[self.storage(*arg).index()] = i;
            }
        }
        // Bytes that appear before a node and that go after it.
        let (mut appear, mut go) = (vec![0_u64; count], vec![0_u64; count]);
        for (i, node) in self.nodes.iter().enumerate().filter(|(i, _)| live[*i]) {
            let id = ValueId(i as u32);
            let whole = self.results(id).len() > 1; // held by its parts
            if node.args.is_empty() || whole || outputs[i] || self.storage(id) != id {
                continue;
            }
            let birth = if matches!(node.op, Op::Part(_)) { node.args[0].index() } else { i };
            appear[birth] += node.ty.bytes() as u64;
            go[last[i]] += node.ty.bytes() as u64;
        }
        let (mut alive, mut peak) = (0, 0);
        for (more, less) in appear.iter().zip(&go) {
            alive += more;
            peak = peak.max(alive);
            alive -= less;
        }
        peak
    }

    /// The node whose memory the value lies in.
    fn storage(&self, id: ValueId) -> ValueId {
        let mut id = id;
        while let Op::Reshape(_) = self.node(id).op {
            id = self.node(id).args[0];
        }
        id
    }
}

#[cfg(test)]
mod tests {
    use crate::{Builder, Type, Value};

    /// The peak of a graph of one input (8 floats, 32 bytes).
    fn peak(build: impl for<'g> Fn(Value<'g>) -> Value<'g>) -> u64 {
        let b = Builder::new("memory");
        let x = b.input("x", Type::f32([2, 4]));
        b.output("y", build(x));
        b.finish().unwrap().activation_peak()
    }

    #[test]
    fn values_count_from_their_node_to_their_last_use() {
        assert_eq!(peak(|x| x.exp()), 0, "inputs and outputs are the caller's");
        assert_eq!(peak(|x| x.exp().sin()), 32);
        assert_eq!(peak(|x| x.exp().sin().cos().tanh()), 64, "operand and answer of one node");
        let kept = peak(|x| {
            let early = x.exp();
            early.sin().cos().tanh() + early
        });
        assert_eq!(kept, 96, "a value that is used late is kept");
    }

    #[test]
    fn views_and_several_results_share_memory() {
        assert_eq!(peak(|x| x.exp().reshape([8]).reshape([4, 2]).sin()), 32);
        let pieces = peak(|x| {
            let [a, b] = x.exp().chunk(0);
            (a + 1.0).sin() * b
        });
        assert_eq!(pieces, 64, "the operand of the split and its pieces, then less");
        let view = peak(|x| x.exp().reshape([8]));
        assert_eq!(view, 0, "what lies in an output's memory is the caller's");
    }
}
