//! How much memory the values between a program's inputs and outputs need at once.

use crate::graph::{Graph, ValueId};
use crate::op::{Op, Storage};

/// The moment at which most bytes of intermediate values are alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActivationPeak {
    /// Bytes of the values that are alive then.
    pub bytes: u64,
    /// The node that runs then; `None` for a graph without intermediate values.
    pub at: Option<ValueId>,
}

/// Memory of one or several values that share it.
struct Block {
    bytes: u64,
    birth: usize,
    last_use: usize,
}

impl Graph {
    /// The peak over the nodes in their order: a value is born at its node and dies after its last use.
    ///
    /// Where an answer lies is the op's rule ([`Storage`]). Of several results each counts for itself, from the node that
    /// makes them. Inputs, parameters, constants and the program's outputs do not count: their memory is the caller's or
    /// the model's.
    pub fn activation_peak(&self) -> ActivationPeak {
        let live = self.live();
        let mut last_use = vec![0; self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate().filter(|(i, _)| live[*i]) {
            node.args.iter().for_each(|a| last_use[a.index()] = i);
        }
        let mut given = vec![false; self.nodes.len()];
        self.outputs.iter().for_each(|(_, id)| given[id.index()] = true);

        let mut blocks: Vec<Block> = Vec::new();
        let mut block_of: Vec<Option<usize>> = vec![None; self.nodes.len()];
        // A shared block lives as long as the last of its values: views are followed before anything is freed.
        for (i, node) in self.nodes.iter().enumerate().filter(|(i, _)| live[*i]) {
            // Several results are values of their own, which the nodes that name them stand for.
            let several = self.results(ValueId(i as u32)).len() > 1;
            let storage = node.op.rules().storage();
            if given[i] || several || storage == Storage::Leaf {
                continue;
            }
            let bytes = node.ty.bytes() as u64;
            let shared = if storage == Storage::View {
                node.args.first().map(|a| block_of[a.index()])
            } else if storage == Storage::InPlace {
                let dying = node.args.iter().filter_map(|a| block_of[a.index()]).find(|&b| {
                    let only = node.args.iter().filter(|a| block_of[a.index()] == Some(b)).count() == 1;
                    only && blocks[b].bytes == bytes && dies_at(b, i, &block_of, &last_use)
                });
                dying.map(Some)
            } else {
                None
            };
            block_of[i] = shared.unwrap_or_else(|| {
                let birth = if matches!(node.op, Op::Part(_)) { node.args[0].index() } else { i };
                blocks.push(Block { bytes, birth, last_use: 0 });
                Some(blocks.len() - 1)
            });
            if let Some(b) = block_of[i] {
                blocks[b].last_use = blocks[b].last_use.max(last_use[i]).max(i);
            }
        }

        let (mut now, mut peak) = (0, ActivationPeak { bytes: 0, at: None });
        let (mut born, mut dying) = (vec![0; self.nodes.len()], vec![0; self.nodes.len()]);
        for block in &blocks {
            born[block.birth] += block.bytes;
            dying[block.last_use] += block.bytes;
        }
        for i in 0..self.nodes.len() {
            now += born[i];
            if now > peak.bytes {
                peak = ActivationPeak { bytes: now, at: Some(ValueId(i as u32)) };
            }
            now -= dying[i];
        }
        peak
    }

    /// Bytes of all constants that some output needs.
    pub fn constant_bytes(&self) -> u64 {
        let live = self.live();
        let constants =
            self.nodes.iter().zip(live).filter(|(n, live)| *live && matches!(n.op, Op::Constant(_)));
        constants.map(|(n, _)| n.ty.bytes() as u64).sum()
    }
}

/// Whether node `i` is the last to use any value in a block.
fn dies_at(block: usize, i: usize, block_of: &[Option<usize>], last_use: &[usize]) -> bool {
    // Views of a block that come after node `i` would need the old values.
    let later = |a: &ValueId| block_of[a.index()] == Some(block) && last_use[a.index()] > i;
    !(0..i).any(|k| later(&ValueId(k as u32)))
}

#[cfg(test)]
mod tests {
    use crate::{Builder, DType, Type};

    #[test]
    fn a_chain_needs_two_values_unless_one_takes_over_the_other() {
        // 1000 floats each; products cannot work in place, exp can.
        let bytes = 4000;
        let chain = |step: fn(crate::Value<'_>) -> crate::Value<'_>| {
            let b = Builder::new("chain");
            let x = b.input("x", Type::f32([10, 10, 10]));
            let out = (0..5).fold(x, |v, _| step(v));
            b.output("out", out);
            b.finish().unwrap().activation_peak().bytes
        };
        assert_eq!(chain(|v| v.exp()), bytes);
        assert_eq!(chain(|v| v.transpose(&[0, 2, 1])), 2 * bytes);
        assert_eq!(chain(|v| v.reshape([1000]).reshape([10, 10, 10]).exp()), bytes);
    }

    #[test]
    fn what_is_kept_for_later_counts_until_then() {
        let b = Builder::new("kept");
        let x = b.input("x", Type::f32([100]));
        let kept: Vec<_> = (0..4).map(|_| x.reshape([10, 10]).transpose(&[1, 0])).collect();
        let sum = kept.iter().skip(1).fold(kept[0], |a, b| a + *b);
        b.output("out", sum);
        let graph = b.finish().unwrap();
        assert_eq!(graph.activation_peak().bytes, 4 * 400);
        // The last transpose is where all four are there.
        let at = graph.activation_peak().at.unwrap();
        assert_eq!(graph.node(at).op.name(), "Transpose");
    }

    #[test]
    fn a_value_with_a_view_in_use_is_not_taken_over() {
        let b = Builder::new("view");
        let x = b.input("x", Type::f32([10, 10]));
        let y = x.transpose(&[1, 0]);
        let view = y.reshape([100]);
        let e = y.exp(); // y dies, its memory does not
        b.output("out", e.reshape([100]) + view);
        assert_eq!(b.finish().unwrap().activation_peak().bytes, 2 * 400);
    }

    #[test]
    fn several_results_count_one_by_one_from_the_node_that_makes_them() {
        let b = Builder::new("several");
        let x = b.input("x", Type::f32([2, 100]));
        let [first, second] = x.transpose(&[1, 0]).chunk(0); // 400 bytes each
        let late = second.exp() * 2.0;
        b.output("sum", late + first);
        b.output("early", first);
        let peak = b.finish().unwrap().activation_peak();
        // The operand (800 bytes) and the second piece; the first is an output.
        assert_eq!(peak.bytes, 800 + 400);
    }

    #[test]
    fn inputs_constants_and_outputs_are_not_counted() {
        let b = Builder::new("none");
        let x = b.input("x", Type::f32([100]));
        let c = b.constant(DType::F32, [100], vec![2.0]);
        b.output("out", x * c);
        let graph = b.finish().unwrap();
        assert_eq!((graph.activation_peak().bytes, graph.activation_peak().at), (0, None));
        assert_eq!(graph.constant_bytes(), 400);
    }
}
