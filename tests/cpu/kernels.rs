//! What ONNX Runtime is left with when the native kernels run.

use std::collections::BTreeMap;

use graph_builder::{NativeName, Weights as Parameters};
use models::{DitConfig, Guidance, ProgramKind, program};
use mudit_tests::execution::{alone, options};
use onnx_protobuf::ModelProto;
use protobuf::Message as _;
use runtime::{Session, SessionOptions, Weights};

/// How often each op stands in the graph that ONNX Runtime executes after its own optimisations.
fn executed(cfg: &DitConfig, kind: ProgramKind) -> BTreeMap<String, usize> {
    let graph = program(cfg, kind, 2, Guidance::First(3)).unwrap().optimised().unwrap();
    let emitted = graph.emit(Parameters::Inputs).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimised.onnx");
    let written = path.clone();
    alone("loading a program", move |runtime| {
        let options = SessionOptions { optimized_model_path: Some(written), ..options(true) };
        Session::load(runtime, &emitted, &Weights::Inside, &options).map(|_| ()).unwrap();
    });
    let model = ModelProto::parse_from_bytes(&std::fs::read(path).unwrap()).unwrap();
    let mut counts = BTreeMap::new();
    for node in &model.graph.node {
        let op = NativeName::parse(&node.op_type).map_or(&*node.op_type, |name| name.op);
        *counts.entry(op.to_owned()).or_default() += 1;
    }
    counts
}

#[test]
fn no_transposes_are_left_and_every_linear_layer_is_a_native_product() {
    let cfg = DitConfig::preset("DiT-S/8").unwrap();
    for kind in ProgramKind::ALL {
        let counts = executed(&cfg, kind);
        let count = |op: &str| counts.get(op).copied().unwrap_or(0);
        println!("{kind}: {} nodes, {counts:?}", counts.values().sum::<usize>());
        for op in ["Transpose", "Gemm", "FusedMatMul", "Softmax", "Gelu", "LayerNormalization", "Erf"] {
            assert_eq!(count(op), 0, "{kind}: {op}");
        }
        // Four linear layers and an adaLN a block, five more around them; half of a block's end in a gate.
        let layers = 5 * cfg.depth + 5;
        assert_eq!(count("Linear") + count("LinearGateResidual"), layers, "{kind}");
        assert_eq!(count("Attention"), cfg.depth, "{kind}");
        if kind == ProgramKind::TrainStep {
            assert_eq!(count("LinearGradWeight"), layers);
            // The image and the sinusoids need no gradient.
            assert_eq!(count("LinearGradInput"), layers - 2);
            assert_eq!(count("AttentionGrad"), cfg.depth);
            // The label table's gradient alone: a product with a one-hot matrix.
            assert_eq!(count("MatMul"), 1);
        } else {
            assert_eq!(count("MatMul"), 0, "{kind}");
        }
    }
}
