//! Passes keep the meaning: on random graphs, on whole models, and pattern by pattern.

use graph_builder::graph::Node;
use graph_builder::{Builder, Graph, Type, Value, Weights as Parameters};
use models::ProgramKind;
use mudit_tests::difference::relative_l2;
use mudit_tests::draws::Draws;
use mudit_tests::execution::run;
use mudit_tests::tolerance::{MODEL_REACHED, REWRITE};
use mudit_tests::{Array, Feeds};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};
use runtime::Weights;

use crate::random_graph::{random_feeds, random_graph};
use crate::tiny;

/// Number of nodes with this ONNX name.
fn count(graph: &Graph, op: &str) -> usize {
    graph.nodes().iter().filter(|n| n.op.name() == op).count()
}

/// Fails when an output of `after` is not that of `before`.
fn same_values(before: &Graph, after: &Graph, feeds: &Feeds, stage: &str) -> Result<(), TestCaseError> {
    let (want, got) = (before.eval(feeds).unwrap(), after.eval(feeds).unwrap());
    prop_assert_eq!(want.len(), got.len());
    for ((name, _), (want, got)) in before.outputs().iter().zip(want.iter().zip(&got)) {
        // Where a gradient vanishes both are rounding noise.
        let noise = Array::from_elem(want.raw_dim(), 1e-15);
        let error = relative_l2(&(got + &noise), &(want + &noise));
        prop_assert!(
            error <= REWRITE,
            "{} after {}: relative error {:e}\n{}",
            name,
            stage,
            error,
            before.text()
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(Config {
        cases: 96,
        rng_seed: RngSeed::Fixed(7),
        failure_persistence: None,
        max_shrink_iters: 400,
        ..Config::default()
    })]

    #[test]
    fn passes_keep_the_values_of_random_graphs(
        genes in proptest::collection::vec(any::<u32>(), 1..24),
        seed in any::<u64>(),
    ) {
        let (graph, feeds) = (random_graph(&genes).unwrap(), random_feeds(seed));
        let simple = graph.optimised_until("simplify").unwrap();
        let fused = graph.optimised().unwrap();
        same_values(&graph, &simple, &feeds, "simplify")?;
        same_values(&graph, &fused, &feeds, "fuse")?;
        prop_assert!(simple.nodes().len() <= graph.nodes().len(), "simplify added nodes");
        prop_assert!(fused.nodes().len() <= simple.nodes().len(), "fuse added nodes");
        prop_assert_eq!(simple.optimised_until("simplify").unwrap().text(), simple.text(), "simplify again");
        prop_assert_eq!(fused.optimised().unwrap().text(), fused.text(), "all again");
        let again = random_graph(&genes).unwrap().optimised().unwrap();
        prop_assert_eq!(again.text(), fused.text(), "the same genes gave another graph");
    }
}

#[test]
fn random_graphs_run_alike_on_onnx_runtime() {
    let mut worst = 0.0_f64;
    for seed in 0..12 {
        let mut draws = Draws::new(seed);
        let genes: Vec<u32> = (0..16).map(|_| draws.bits() as u32).collect();
        let (graph, feeds) = (random_graph(&genes).unwrap(), random_feeds(seed));
        let program = graph.optimised().unwrap().emit(Parameters::Inputs).unwrap();
        let answer = run(&program, &Weights::Inside, &feeds, true);
        for ((name, _), want) in graph.outputs().iter().zip(graph.eval(&feeds).unwrap()) {
            let noise = Array::from_elem(want.raw_dim(), 1e-6);
            let error = relative_l2(&(&answer.outputs[name] + &noise), &(want + &noise));
            assert!(
                error <= MODEL_REACHED,
                "graph {seed}: {name}: relative error {error:e}\n{}",
                graph.text()
            );
            worst = worst.max(error);
        }
    }
    println!("worst random graph on ONNX Runtime: {worst:.1e}");
}

#[test]
fn passes_keep_the_values_of_whole_models() {
    for variant in tiny::VARIANTS {
        for kind in ProgramKind::ALL {
            let graph = tiny::graph(variant, kind);
            let feeds = tiny::feeds(&graph, variant);
            same_values(&graph, &graph.optimised().unwrap(), &feeds, "all passes").unwrap();
        }
    }
}

/// A graph of two inputs `x`, `y` (2, 3, 4), rows `a`, `b` (2, 1, 4) and a matrix `m` (3, 4), built, checked and
/// passed.
fn passed(build: impl for<'g> Fn(&'g Builder, [Value<'g>; 5]) -> Vec<Value<'g>>) -> Graph {
    let b = Builder::new("case");
    let input = |name: &str, shape: &[usize]| b.input(name, Type::f32(shape));
    let (x, y) = (input("x", &[2, 3, 4]), input("y", &[2, 3, 4]));
    let rows = (input("a", &[2, 1, 4]), input("b", &[2, 1, 4]));
    let m = input("m", &[3, 4]);
    for (i, value) in build(&b, [x, y, rows.0, rows.1, m]).into_iter().enumerate() {
        b.output(&format!("out{i}"), value);
    }
    let graph = b.finish().unwrap();
    let mut draws = Draws::new(1);
    let feeds =
        graph.inputs().map(|(n, t)| (n.to_owned(), draws.uniform(t.shape.dims(), -1.0, 1.0))).collect();
    let after = graph.optimised().unwrap();
    same_values(&graph, &after, &feeds, "all passes").unwrap();
    after
}

/// Nodes that compute, i.e. all but inputs.
fn work(graph: &Graph) -> Vec<&'static str> {
    graph.nodes().iter().map(|n| n.op.name()).filter(|n| *n != "Input").collect()
}

/// A square weight and its bias.
fn layer(b: &Builder) -> (Value<'_>, Value<'_>) {
    let weight = (0..16).map(|i| f64::from(i % 5) * 0.25 - 0.4).collect::<Vec<_>>();
    let f32 = graph_builder::DType::F32;
    (b.constant(f32, [4, 4], weight), b.constant(f32, [4], vec![0.1, -0.2, 0.3, 0.4]))
}

#[test]
fn gelu_moves_into_the_layers_that_use_it() {
    let graph = passed(|b, [x, y, ..]| {
        let (weight, bias) = layer(b);
        let h = x.linear(weight, bias);
        let loss = (h.gelu().linear(weight, bias) * y).sum(&[0, 1, 2]).reshape([]);
        let grads = b.gradients(loss, &[weight]).unwrap();
        vec![loss, grads[0]]
    });
    assert_eq!((count(&graph, "Gelu"), count(&graph, "GeluGrad")), (0, 0), "{}", graph.text());
    let gelu = graph.nodes().iter().filter(|n| format!("{:?}", n.op).contains("activation: Gelu"));
    let fused: Vec<&str> = gelu.map(|n| n.op.name()).collect();
    assert_eq!(fused, ["Linear", "LinearGradWeight", "LinearGradInput"]);
}

#[test]
fn gelu_that_something_else_needs_stays() {
    for which in 0..2 {
        let graph = passed(move |b, [x, ..]| {
            let (weight, bias) = layer(b);
            let bent = x.gelu();
            vec![bent.linear(weight, bias), if which == 0 { bent } else { bent.exp() }]
        });
        assert_eq!(count(&graph, "Gelu"), 1, "use {which}");
    }
    let shared = passed(|b, [x, y, ..]| {
        let product = y.linear_grad_input(layer(b).0, None);
        vec![x.gelu_grad(product), product]
    });
    assert_eq!((count(&shared, "GeluGrad"), count(&shared, "LinearGradInput")), (1, 1));
}

#[test]
fn a_gated_residual_takes_the_layer_that_only_it_uses() {
    for (shared, bent) in [(false, false), (false, true), (true, false)] {
        let graph = passed(move |b, [x, y, gate, ..]| {
            let (weight, bias) = layer(b);
            let branch = if bent { y.gelu().linear(weight, bias) } else { y.linear(weight, bias) };
            let answer = x.gate_residual(gate, branch);
            if shared { vec![answer, branch] } else { vec![answer] }
        });
        let kinds = ["LinearGateResidual", "GateResidual", "Gelu"].map(|op| count(&graph, op));
        assert_eq!(kinds, if shared { [0, 1, 0] } else { [1, 0, 0] }, "shared {shared}, gelu {bent}");
    }
}

#[test]
fn a_modulated_layer_norm_adds_the_cotangent_of_the_residual() {
    // What stands beside the sum, and whether the gradient may add it.
    for (case, fuses) in
        [("before", true), ("swapped", true), ("late", false), ("shared", false), ("row", false)]
    {
        let graph = passed(move |_, [x, y, shift, scale, _]| {
            let early = y.sin();
            let grads = x.layer_norm_modulate_grad(scale, y, None, 1e-6).results();
            let (dx, late) = (grads[0], y.cos());
            let sum = match case {
                "before" => early + dx,
                "swapped" => dx + early,
                "late" => dx + late,
                "shared" => early + dx + dx.exp(),
                _ => shift + dx,
            };
            vec![sum, grads[1], grads[2]]
        });
        let grads = graph.nodes().iter().filter(|n| n.op.name() == "LayerNormModulateGrad");
        let operands: Vec<usize> = grads.map(|n| n.args.len()).collect();
        assert_eq!(operands, [if fuses { 4 } else { 3 }], "{case}\n{}", graph.text());
    }
}

#[test]
fn gradients_of_neighbouring_slices_become_one_concatenation() {
    let graph = passed(|b, [x, ..]| {
        let [p, q, r, s]: [Value<'_>; 4] = x.chunk(2);
        let loss = (p * p + q.exp() * r + s.sin()).sum(&[0, 1, 2]).reshape([]);
        b.gradients(loss, &[x]).unwrap()
    });
    assert_eq!(work(&graph).iter().filter(|op| ["Pad", "Concat", "Slice"].contains(op)).count(), 1);
    for swapped in [false, true] {
        // Two slices of the last axis, declared in either order.
        let two = |first: usize, second: usize| {
            let starts = if swapped { [second, first] } else { [first, second] };
            passed(move |b, [x, ..]| {
                let [p, q] = starts.map(|start| x.slice(2, start, start + 1));
                b.gradients((p * q).sum(&[0, 1, 2]).reshape([]), &[x]).unwrap()
            })
        };
        let (gap, edge) = (two(0, 3), two(0, 1));
        assert_eq!((count(&gap, "Pad"), count(&gap, "Concat")), (2, 0), "slices with a gap stay apart");
        assert_eq!((count(&edge, "Pad"), count(&edge, "Concat")), (1, 1), "what is left is padded once");
    }
}

#[test]
fn a_transposed_product_is_the_product_of_the_transposed() {
    let graph = passed(|_, [x, _, _, _, m]| {
        let tokens = x.reshape([6, 4]);
        vec![
            m.transpose(&[1, 0]).matmul(m).transpose(&[1, 0]),
            tokens.matmul(m.transpose(&[1, 0])).transpose(&[1, 0]),
        ]
    });
    let named = |n: &Node, op| n.op.name() == op;
    let late = graph.nodes().iter().any(|n| named(n, "Transpose") && named(graph.node(n.args[0]), "MatMul"));
    assert!(!late, "an answer is still transposed:\n{}", graph.text());
}

#[test]
fn transposes_and_reshapes_cancel_and_compose() {
    let graph = passed(|_, [x, ..]| {
        vec![
            x.transpose(&[2, 0, 1]).transpose(&[1, 2, 0]).exp(),
            x.transpose(&[1, 0, 2]).transpose(&[0, 2, 1]),
            x.reshape([6, 4]).reshape([24]),
            x.reshape([24]).reshape([2, 3, 4]).sin(),
            x.transpose(&[0, 1, 2]).cos(),
        ]
    });
    assert_eq!(work(&graph), ["Exp", "Transpose", "Reshape", "Sin", "Cos"]);
}

#[test]
fn what_is_constant_is_computed_once_and_identities_vanish() {
    let graph = passed(|b, [x, y, ..]| {
        let four = (b.scalar(1.0) + 1.0).exp().log() * 2.0;
        vec![
            x * four,
            ((x + 0.0) * 1.0 - 0.0) / 1.0 + y,
            x.stop_gradient().pad(0, 0, 0).slice(2, 0, 4).broadcast([2, 3, 4]).exp(),
            (x * 2.0) * 3.0,
        ]
    });
    assert_eq!((count(&graph, "Exp"), count(&graph, "Log")), (1, 0));
    assert_eq!((count(&graph, "Add"), count(&graph, "Sub"), count(&graph, "Div")), (1, 0, 0));
    assert_eq!((count(&graph, "Mul"), count(&graph, "Constant")), (2, 2));
}

#[test]
fn signs_and_numbers_move_into_their_neighbours() {
    let graph = passed(|b, [x, y, ..]| {
        let filled = b.constant(graph_builder::DType::F32, [2, 3, 4], vec![0.25]);
        vec![x + -y, -x + y, x - -y, -(x - y), filled * (x.sin() + x.sin())]
    });
    let kinds = ["Neg", "Sub", "Add", "Mul"].map(|op| count(&graph, op));
    assert_eq!(kinds, [0, 2, 1, 1], "{}", graph.text());
    let scale = graph.nodes().iter().find(|n| n.op.name() == "Constant").unwrap();
    assert_eq!(format!("{:?} {}", scale.op, scale.ty), "Constant { [0.5] } f32()");
}

#[test]
fn slices_of_a_concatenation_are_its_operands() {
    let graph = passed(|_, [x, y, ..]| {
        let joined = x.concat(&[y, x.exp()], 1);
        vec![joined.slice(1, 3, 6).sin(), joined.slice(1, 3, 9), joined.slice(1, 2, 5), joined.slice(2, 0, 1)]
    });
    assert_eq!((count(&graph, "Concat"), count(&graph, "Slice")), (2, 2), "{}", graph.text());
}

#[test]
fn no_program_of_a_transformer_moves_axes_or_keeps_an_activation_beside_its_layer() {
    for variant in tiny::VARIANTS {
        for kind in ProgramKind::ALL {
            let graph = tiny::graph(variant, kind).optimised().unwrap();
            for op in ["Transpose", "Gelu", "GeluGrad", "LayerNormalization", "Softmax", "Pad"] {
                assert_eq!(count(&graph, op), 0, "{variant} {kind}: {op}");
            }
            // Of all matrix products only the gradient of the label table is a plain one.
            let plain = usize::from(kind == ProgramKind::TrainStep);
            assert_eq!(count(&graph, "MatMul"), plain, "{variant} {kind}");
        }
    }
}

#[test]
fn a_training_step_computes_what_its_losses_and_gradients_need_and_that_once() {
    let graph = tiny::graph("flow", ProgramKind::TrainStep).optimised().unwrap();
    let blocks = tiny::config("flow").network.depth();
    // A layer a linear map, and no gradient for the image or for the sinusoids of the time.
    let linear = 3 + 5 * blocks + 2;
    let kinds = ["Linear", "LinearGradWeight", "LinearGradInput"].map(|op| count(&graph, op));
    assert_eq!(kinds, [linear, linear, linear - 2]);
    let kinds = ["Attention", "AttentionGrad", "GateResidualGrad", "Split"].map(|op| count(&graph, op));
    assert_eq!(kinds, [blocks, blocks, 2 * blocks, blocks + 1]);
    // SiLU of the condition and of the time's first layer.
    assert_eq!(count(&graph, "Sigmoid"), 2);
    let added = graph.nodes().iter().filter(|n| n.op.name() == "LayerNormModulateGrad" && n.args.len() == 4);
    assert_eq!(added.count(), 2 * blocks, "residual cotangents are added by the gradient itself");
}

#[test]
fn guidance_is_one_run_of_two_rows_a_sample() {
    for kind in [ProgramKind::DenoiseCfg, ProgramKind::Step] {
        let graph = tiny::graph("ddpm", kind).optimised().unwrap();
        let twice = 2 * tiny::BATCH;
        let rows = |scope: &str| {
            let inside = graph.nodes().iter().filter(|n| n.op.name() == "Linear" && n.place.scope == scope);
            inside.map(|n| n.ty.shape.dims()[0]).collect::<Vec<_>>()
        };
        assert_eq!(rows("x_embedder.proj"), [twice], "{kind}");
        assert_eq!(rows("blocks.0.adaLN_modulation.1"), [twice], "{kind}: a row a sample, not a token");
    }
}

#[test]
fn an_identity_that_changes_the_type_stays() {
    // x · 1 with a larger constant broadcasts, 0 + x with a larger zero does too.
    let graph = passed(|b, [_, _, a, _, _]| {
        let (ones, zeros) = (vec![1.0], vec![0.0]);
        let f32 = graph_builder::DType::F32;
        vec![a * b.constant(f32, [2, 3, 4], ones), b.constant(f32, [2, 3, 4], zeros) + a]
    });
    assert_eq!((count(&graph, "Mul"), count(&graph, "Add")), (1, 1));
}

#[test]
fn equal_expressions_are_one() {
    let graph = passed(|_, [x, y, ..]| {
        vec![x.exp() * y.sin(), x.exp() * y.sin(), (x.exp() * y.sin()).softmax(), x.sum(&[0]), x.sum(&[1])]
    });
    assert_eq!(work(&graph), ["Exp", "Sin", "Mul", "Softmax", "ReduceSum", "ReduceSum"]);
}

#[test]
fn what_no_output_needs_is_dropped_but_the_signature_stays() {
    let graph = passed(|_, [x, y, ..]| {
        let _ = (x * y).matmul(y.transpose(&[0, 2, 1]));
        vec![x.exp()]
    });
    assert_eq!(work(&graph), ["Exp"]);
    assert_eq!(graph.inputs().map(|(n, _)| n).collect::<Vec<_>>(), ["x", "y", "a", "b", "m"]);
}

#[test]
fn the_same_model_gives_the_same_bytes() {
    for variant in ["ddpm", "flow"] {
        for kind in ProgramKind::ALL {
            let bytes =
                || tiny::graph(variant, kind).optimised().unwrap().emit(Parameters::Inputs).unwrap().bytes;
            assert!(bytes() == bytes(), "{variant} {kind}");
        }
    }
}
