//! Where a program's time goes: executed nodes joined with the graph they come from.
//!
//! Nothing is left out: nodes that ONNX Runtime put in and that serve no node of the graph have a line of their own, and
//! what a run takes beside its nodes is the session's overhead, so that the lines add up to the whole.

pub mod measure;
pub mod memory;
pub mod trace;

use std::collections::BTreeMap;

use graph_builder::Graph;
use graph_builder::graph::ValueId;
use indexmap::IndexMap;
use serde::Serialize;

use crate::render::icicle::Frame;
use trace::Run;

/// Scope of nodes that serve no node of the graph.
pub const UNJOINED: &str = "(put in by ONNX Runtime)";

/// Work and time of something, in one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spent {
    /// Executed nodes.
    pub calls: usize,
    /// Milliseconds.
    pub ms: f64,
    /// Floating-point operations as the graph counts them.
    pub flops: u64,
    /// Bytes of operands and answers, each counted once.
    pub bytes: u64,
}

impl Spent {
    /// 10⁹ operations a second.
    pub fn gflops_per_s(&self) -> f64 {
        rate(self.flops, self.ms)
    }

    /// 10⁹ bytes a second.
    pub fn gb_per_s(&self) -> f64 {
        rate(self.bytes, self.ms)
    }

    fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.ms += other.ms;
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

fn rate(amount: u64, ms: f64) -> f64 {
    if ms > 0.0 { amount as f64 / ms / 1e6 } else { 0.0 }
}

/// One node of the model as it was run.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Operator that ONNX Runtime ran.
    pub op: String,
    /// Scope of the graph node that it comes from, or [`UNJOINED`].
    pub scope: String,
    /// Whether autodiff made that node.
    pub backward: bool,
    /// What it took.
    pub spent: Spent,
}

/// A program's time, line by line.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// One run under the profiler, in milliseconds; the mean over the faster half of the runs, as are all times.
    pub run_ms: f64,
    /// What of it is no node: taking the inputs, the executor between nodes, handing out the answers.
    pub overhead_ms: f64,
    /// The nodes in order of execution.
    pub lines: Vec<Line>,
    /// Most bytes of intermediate values at once, as ONNX Runtime's allocator counted; 0 where it did not.
    pub activation_peak_bytes: u64,
}

impl Profile {
    /// Joins runs of `graph`'s program with the graph. `origins` knows the nodes of the rewritten model.
    pub fn new(graph: &Graph, origins: &BTreeMap<String, ValueId>, runs: &[Run]) -> Self {
        let mut chosen: Vec<&Run> = runs.iter().collect();
        chosen.sort_by(|a, b| a.ms.total_cmp(&b.ms));
        chosen.truncate(runs.len().div_ceil(2));
        let count = chosen.len().max(1) as f64;
        let mut lines: IndexMap<&str, (Line, Option<ValueId>)> = IndexMap::new();
        for (k, node) in chosen.iter().enumerate().flat_map(|(k, run)| run.nodes.iter().map(move |n| (k, n)))
        {
            let (line, _) = lines.entry(&node.name).or_insert_with(|| {
                let origin = origins.get(&node.name).copied().or_else(|| graph.origin_of(&node.name));
                let scope = origin.map_or(UNJOINED.to_owned(), |id| graph.node(id).place.scope.clone());
                let backward = origin.is_some_and(|id| graph.node(id).backward);
                let (name, op, spent) = (node.name.clone(), node.op.clone(), Spent::default());
                (Line { name, op, scope, backward, spent }, origin)
            });
            line.spent.ms += node.ms / count;
            if k == 0 {
                line.spent.calls += 1;
                line.spent.bytes += node.bytes;
            }
        }
        // Of several nodes that serve one node of the graph, the longest does its work.
        let mut longest: BTreeMap<ValueId, usize> = BTreeMap::new();
        for (i, (line, origin)) in lines.values().enumerate() {
            let Some(origin) = origin else { continue };
            let best = longest.entry(*origin).or_insert(i);
            if line.spent.ms > lines[*best].0.spent.ms {
                *best = i;
            }
        }
        for (origin, i) in longest {
            lines[i].0.spent.flops = graph.node_cost(origin).flops;
        }
        let lines: Vec<Line> = lines.into_values().map(|(line, _)| line).collect();
        let run_ms = chosen.iter().map(|run| run.ms).sum::<f64>() / count;
        let overhead_ms = run_ms - lines.iter().map(|l| l.spent.ms).sum::<f64>();
        let peaks = runs.iter().flat_map(|run| &run.nodes).map(|n| n.memory_peak);
        Self { run_ms, overhead_ms, lines, activation_peak_bytes: peaks.max().unwrap_or(0) }
    }

    /// Sums of the lines with the same key, the longest first.
    pub fn grouped<K: std::hash::Hash + Eq>(&self, key: impl Fn(&Line) -> K) -> Vec<(K, Spent)> {
        let mut groups: IndexMap<K, Spent> = IndexMap::new();
        for line in &self.lines {
            groups.entry(key(line)).or_default().add(&line.spent);
        }
        let mut groups: Vec<_> = groups.into_iter().collect();
        groups.sort_by(|a, b| b.1.ms.total_cmp(&a.1.ms));
        groups
    }

    /// Layer, then forward and backward, in order of first execution.
    pub fn by_layer(&self) -> IndexMap<String, [Spent; 2]> {
        let mut layers: IndexMap<String, [Spent; 2]> = IndexMap::new();
        for line in &self.lines {
            layers.entry(layer(&line.scope)).or_default()[usize::from(line.backward)].add(&line.spent);
        }
        layers
    }

    /// The nested picture: pass, block, part, operator. `after` are passes that are no part of the program.
    pub fn frame(&self, name: &str, after: &[(&str, f64)]) -> Frame {
        let mut root = Frame::new(name, 0.0);
        for line in &self.lines {
            let pass = match (line.scope.as_str(), line.backward) {
                (UNJOINED, _) => UNJOINED,
                (_, true) => "backward",
                (_, false) => "forward",
            };
            let (block, part) = block(&line.scope);
            root.add([pass, block, part, &line.op], line.spent.ms);
        }
        root.add(["session overhead"], self.overhead_ms.max(0.0));
        for (name, ms) in after {
            root.add([*name], *ms);
        }
        root
    }
}

/// The layer of a scope: blocks together, everything else by its first name.
pub fn layer(scope: &str) -> String {
    let mut names = scope.split('.');
    match (names.next(), names.next(), names.next()) {
        (Some("blocks"), Some(_), Some(part)) => format!("blocks.*.{part}"),
        (Some("blocks"), Some(_), None) => "blocks.*".into(),
        (Some("") | None, ..) => "(top)".into(),
        (Some(name), ..) => name.into(),
    }
}

/// Block and part of a scope: `blocks.3` and `attn.qkv`, `final_layer` and `linear`.
fn block(scope: &str) -> (&str, &str) {
    let names = if scope.starts_with("blocks.") { 2 } else { 1 };
    let cut = scope.match_indices('.').nth(names - 1).map_or(scope.len(), |(at, _)| at);
    let (block, part) = (&scope[..cut], scope[cut..].trim_start_matches('.'));
    (if block.is_empty() { "(top)" } else { block }, if part.is_empty() { "(own)" } else { part })
}

#[cfg(test)]
mod tests {
    use graph_builder::{Builder, Dim, Init, Type};

    use super::trace::Executed;
    use super::*;

    fn graph() -> Graph {
        let b = Builder::new("test");
        let x = b.input("x", Type::f32([4, 3]));
        let w = b.root().at("blocks.0.fc").param("weight", &[Dim::Fixed(3), Dim::Width(5)], Init::Zeros);
        let loss = b.root().within("blocks.0.fc", |_| x.matmul(w)).mean(&[0, 1]).reshape([]);
        let grads = b.gradients(loss, &[w]).unwrap();
        b.output("loss", loss);
        b.output("grad", grads[0]);
        b.finish().unwrap().optimised().unwrap()
    }

    fn executed(name: &str, op: &str, ms: f64) -> Executed {
        Executed { name: name.into(), op: op.into(), ms, bytes: 8, memory_peak: (ms * 10.0) as u64 }
    }

    #[test]
    fn lines_and_overhead_are_the_whole() {
        let graph = graph();
        let products: Vec<usize> =
            (0..graph.nodes().len()).filter(|&i| graph.nodes()[i].op.name() == "MatMul").collect();
        let [forward, backward] = products[..] else { panic!("{products:?}") };
        let name = |i: usize| {
            let node = &graph.nodes()[i];
            format!("{}{}/MatMul.{i}", if node.backward { "grad/" } else { "" }, node.place.scope)
        };
        let run = |ms: f64| Run {
            ms,
            nodes: vec![
                executed(&name(forward), "FusedMatMul", ms * 0.25),
                executed(&format!("{}/copy", name(forward)), "Transpose", ms * 0.125),
                executed(&name(backward), "MatMul", ms * 0.375),
                executed("mystery", "Cast", ms * 0.125),
            ],
        };
        // The slower half does not count.
        let profile = Profile::new(&graph, &BTreeMap::new(), &[run(8.0), run(80.0)]);
        assert_eq!((profile.run_ms, profile.overhead_ms), (8.0, 1.0));
        let sum: f64 = profile.grouped(|l| l.op.clone()).iter().map(|(_, s)| s.ms).sum();
        assert_eq!(sum + profile.overhead_ms, profile.run_ms);
        assert_eq!(profile.grouped(|l| l.op.clone())[0].0, "MatMul", "the longest is the first");
        let layers = profile.by_layer();
        let product = 2 * 4 * 3 * 5;
        let [there, back] = layers["blocks.*.fc"];
        assert_eq!((there.calls, there.ms, there.flops), (2, 3.0, product), "the work is counted once");
        assert_eq!((back.calls, back.ms, back.flops), (1, 3.0, product));
        assert_eq!(layers[UNJOINED][0].ms, 1.0, "what cannot be joined is not dropped");
        assert_eq!(profile.activation_peak_bytes, 300, "over all runs");
        let frame = profile.frame("test", &[("update", 2.0)]);
        assert_eq!(frame.ms, 10.0);
        let names: Vec<&str> = frame.children.iter().map(|c| c.label.as_str()).collect();
        assert_eq!(names, ["forward", "backward", UNJOINED, "session overhead", "update"]);
        assert_eq!(frame.children[0].children[0].label, "blocks.0");
        assert_eq!(frame.children[0].children[0].children[0].children.len(), 2);
    }

    #[test]
    fn scopes_have_a_layer_and_a_block() {
        for (scope, name, nested) in [
            ("blocks.11.attn.qkv", "blocks.*.attn", ("blocks.11", "attn.qkv")),
            ("blocks.0", "blocks.*", ("blocks.0", "(own)")),
            ("final_layer.linear", "final_layer", ("final_layer", "linear")),
            ("", "(top)", ("(top)", "(own)")),
            (UNJOINED, UNJOINED, (UNJOINED, "(own)")),
        ] {
            assert_eq!((layer(scope).as_str(), block(scope)), (name, nested), "{scope}");
        }
    }
}
