//! Recomputation: the same bits from less memory.

use graph_builder::{Graph, Weights as Parameters};
use models::{Model, ProgramKind, ProgramSpec, Recompute};
use mudit_tests::execution::run;
use runtime::Weights;

use crate::tiny;
use crate::tiny_run::{TinyRun, losses};

/// Blocks of the model: with one there is nothing to gain.
const DEPTH: usize = 3;

/// The optimised training step of a variant, plain and with its blocks recomputed.
fn graphs(variant: &str) -> [Graph; 2] {
    let model = tiny::changed(&tiny::config(variant), |dit| dit.depth = DEPTH);
    let spec = ProgramSpec::new(ProgramKind::TrainStep, tiny::BATCH);
    [Recompute::None, Recompute::Blocks]
        .map(|recompute| model.compiled(&spec.recomputing(recompute)).unwrap())
}

#[test]
fn recomputed_blocks_give_the_same_bits() {
    for variant in tiny::VARIANTS {
        let [plain, recomputed] = graphs(variant);
        let feeds = tiny::feeds(&plain, variant);
        assert_eq!(plain.eval(&feeds).unwrap(), recomputed.eval(&feeds).unwrap(), "{variant}");
        let programs = [&plain, &recomputed].map(|graph| graph.emit(Parameters::Inputs).unwrap());
        let [want, got] = programs.map(|program| run(&program, &Weights::Inside, &feeds, true));
        assert_eq!((want.calls("After"), got.calls("After")), (0, DEPTH as u64), "{variant}");
        assert_eq!(got.outputs, want.outputs, "{variant}: on ONNX Runtime");
    }
}

#[test]
fn every_block_is_computed_again_once_from_its_input() {
    let [plain, recomputed] = graphs("flow");
    let count = |graph: &Graph, op: &str| graph.nodes().iter().filter(|n| n.op.name() == op).count();
    for (op, more) in
        [("After", 1), ("Attention", 1), ("LayerNormModulate", 2), ("Split", 0), ("AttentionGrad", 0)]
    {
        assert_eq!(count(&recomputed, op), count(&plain, op) + more * DEPTH, "{op}");
    }
    // A forward value inside a block that the backward pass uses, but for rows of conditioning, would be kept.
    let mut inputs = 0;
    for node in recomputed.nodes().iter().filter(|n| n.backward) {
        for arg in node.args.iter().map(|a| recomputed.node(*a)) {
            let tokens = !arg.backward && !arg.args.is_empty() && arg.ty.shape.dims().get(1) == Some(&4);
            let block = |scope: &str| scope.split('.').nth(1).map(str::to_owned);
            if tokens && node.place.scope.starts_with("blocks.") {
                let own = arg.place.scope.starts_with("blocks.")
                    && block(&arg.place.scope) == block(&node.place.scope);
                assert!(!own, "{} keeps {} of its own block", node.op.name(), arg.op.name());
                inputs += 1;
            }
        }
    }
    // Each block's input serves its repetition and the gradient of its first layer norm.
    assert_eq!(inputs, 2 * DEPTH);
}

#[test]
fn recomputation_lowers_the_predicted_memory() {
    let model = Model::preset("DiT-S/2").unwrap();
    let spec = ProgramSpec::new(ProgramKind::TrainStep, 8);
    let peaks = [Recompute::None, Recompute::Blocks].map(|recompute| {
        model.compiled(&spec.recomputing(recompute)).unwrap().activation_peak().bytes as f64 / 1e6
    });
    println!(
        "DiT-S/2, batch 8: {:.0} MB of activations, {:.0} MB with blocks recomputed",
        peaks[0], peaks[1]
    );
    assert!(peaks[1] < peaks[0] / 4.0, "{peaks:?}");
}

#[test]
fn a_run_that_recomputes_writes_the_same_weights() {
    let tiny = TinyRun::new();
    for recompute in ["none", "blocks"] {
        tiny.train(recompute, &["train.steps=6", &format!("train.recompute={recompute}")]).succeeds();
    }
    let weights =
        |run: &str| std::fs::read(tiny.path(run).join("checkpoints/latest/model.safetensors")).unwrap();
    assert!(weights("none") == weights("blocks"));
    let loss = |run: &str| {
        losses(&tiny.path(run)).into_iter().map(|(_, row)| row["loss"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(loss("none"), loss("blocks"));
}
