//! Every labelled constraint of every op refuses what breaks it, and says the op, the label and the author's line.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use graph_builder::error::Place;
use graph_builder::{Activation, Builder, DType, Dim, GraphError, Init, Op, PatchOrder, Type, Value, Window};
use mudit_tests::op_rows::rows;
use mudit_tests::op_table::variant;

/// A call that an op refuses.
struct Refused {
    op: &'static str,
    label: &'static str,
    build: fn(&Builder),
}

const fn refused(op: &'static str, label: &'static str, build: fn(&Builder)) -> Refused {
    Refused { op, label, build }
}

/// A float operand.
fn x<const R: usize>(b: &Builder, shape: [usize; R]) -> Value<'_> {
    b.constant(DType::F32, shape, vec![0.5])
}

/// An integer operand.
fn whole<const R: usize>(b: &Builder, shape: [usize; R]) -> Value<'_> {
    b.constant(DType::I64, shape, vec![1.0])
}

/// Tokens (N, T, D) = (2, 3, 4).
fn tokens(b: &Builder) -> Value<'_> {
    x(b, [2, 3, 4])
}

/// A row a sample (N, 1, D).
fn gate(b: &Builder) -> Value<'_> {
    x(b, [2, 1, 4])
}

/// A weight (5, D).
fn weight(b: &Builder) -> Value<'_> {
    x(b, [5, 4])
}

/// Operand, weight and bias of a layer.
fn layer(b: &Builder) -> [Value<'_>; 3] {
    [tokens(b), weight(b), x(b, [5])]
}

const NONE: Activation = Activation::None;

macro_rules! unary {
    ($($op:literal $method:ident),+) => {
        vec![$(refused($op, "C1", |b| { let _ = whole(b, [2]).$method(); })),+]
    };
}

macro_rules! binary {
    ($($op:literal $apply:expr),+) => {
        vec![$(
            refused($op, "C1", |b| {
                let apply: for<'g> fn(Value<'g>, Value<'g>) -> Value<'g> = $apply;
                let _ = apply(x(b, [2]), whole(b, [2]));
            }),
            refused($op, "C2", |b| {
                let apply: for<'g> fn(Value<'g>, Value<'g>) -> Value<'g> = $apply;
                let _ = apply(x(b, [2, 3]), x(b, [2]));
            })
        ),+]
    };
}

macro_rules! more {
    ($($op:literal $label:literal |$b:ident| $value:expr;)+) => {
        vec![$(refused($op, $label, |$b| { let _ = $value; })),+]
    };
}

fn refusals() -> Vec<Refused> {
    let unary = unary!(
        "Exp" exp, "Log" log, "Sqrt" sqrt, "Sin" sin, "Cos" cos, "Tanh" tanh, "Sigmoid" sigmoid, "Gelu" gelu,
        "Relu" relu, "StopGradient" stop_gradient, "Sigmoid" silu
    );
    let binary = binary!(
        "Add" | a,
        b | a + b,
        "Sub" | a,
        b | a - b,
        "Mul" | a,
        b | a * b,
        "Div" | a,
        b | a / b,
        "Maximum" | a,
        b | a.maximum(b),
        "Less" | a,
        b | a.less(b),
        "Equal" | a,
        b | a.equal(b)
    );
    let others = more! {
        "Neg" "C1" |b| -whole(b, [2]);
        "Constant" "C1" |b| b.constant(DType::F32, [3], vec![1.0, 2.0]);
        "Select" "C1" |b| x(b, [2]).select(x(b, [2]), x(b, [2, 2]));
        "Select" "C2" |b| x(b, [2]).less(b.scalar(0.0)).select(x(b, [2]), whole(b, [2]));
        "Select" "C3" |b| x(b, [2]).less(b.scalar(0.0)).select(x(b, [3]), b.scalar(1.0));
        "Sum" "C1" |b| whole(b, [2]).sum(&[0]);
        "Sum" "C2" |b| x(b, [2, 3]).sum(&[1, 0]);
        "Mean" "C1" |b| whole(b, [2]).mean(&[0]);
        "Mean" "C2" |b| x(b, [2, 3]).mean(&[2]);
        "Reshape" "C1" |b| x(b, [2, 3]).reshape([4]);
        "Transpose" "C1" |b| x(b, [2, 3]).transpose(&[0, 0]);
        "Transpose" "C1" |b| x(b, [2, 3]).transpose(&[0]);
        "Broadcast" "C1" |b| x(b, [2, 3]).broadcast([2, 1]);
        "Slice" "C1" |b| x(b, [2, 3]).slice(2, 0, 1);
        "Slice" "C2" |b| x(b, [2, 3]).slice(1, 1, 4);
        "Slice" "C2" |b| x(b, [2, 3]).slice(1, 2, 2);
        "Split" "C1" |b| x(b, [2, 6]).split(2, 3);
        "Split" "C2" |b| x(b, [2, 7]).chunk::<3>(1)[0];
        "Split" "C2" |b| x(b, [2, 7]).split(1, 0);
        "Concat" "C1" |b| x(b, [2]).concat(&[whole(b, [2])], 0);
        "Concat" "C2" |b| x(b, [2]).concat(&[x(b, [3])], 1);
        "Concat" "C3" |b| x(b, [2, 3]).concat(&[x(b, [3, 2])], 0);
        "Pad" "C1" |b| whole(b, [2]).pad(0, 1, 1);
        "Pad" "C2" |b| x(b, [2]).pad(1, 1, 1);
        "MatMul" "C1" |b| x(b, [2, 3]).matmul(whole(b, [3, 2]));
        "MatMul" "C2" |b| x(b, [2, 3]).matmul(x(b, [3]));
        "MatMul" "C3" |b| x(b, [2, 3]).matmul(x(b, [2, 4]));
        "MatMul" "C4" |b| x(b, [2, 3, 4]).matmul(x(b, [3, 4, 5]));
        "Gather" "C1" |b| x(b, [4, 2]).gather(x(b, [3]));
        "Gather" "C1" |b| x(b, [4, 2]).gather(whole(b, [3, 1]));
        "Gather" "C2" |b| x(b, []).gather(whole(b, [3]));
        "Conv" "C1" |b| whole(b, [1, 1, 2, 2]).conv(x(b, [1, 1, 2, 2]), None, Window::default());
        "Conv" "C1" |b| x(b, [1, 1, 2, 2]).conv(x(b, [1, 1, 2, 2]), Some(whole(b, [1])), Window::default());
        "Conv" "C2" |b| x(b, [1, 2, 2]).conv(x(b, [1, 1, 2, 2]), None, Window::default());
        "Conv" "C2" |b| x(b, [1, 1, 2, 2]).conv(x(b, [3, 1, 2, 2]), Some(x(b, [2])), Window::default());
        "Conv" "C3" |b| x(b, [1, 2, 2, 2]).conv(x(b, [1, 3, 2, 2]), None, Window::default());
        "Conv" "C4" |b| x(b, [1, 1, 2, 2]).conv(x(b, [1, 1, 3, 3]), None, Window::padded(0, 1));
        "Conv" "C4" |b| x(b, [1, 1, 2, 2]).conv(x(b, [1, 1, 1, 1]), None, Window::strided(0));
        "ConvTranspose" "C1" |b| x(b, [1, 1, 2, 2]).conv_transpose(whole(b, [1, 1, 1, 1]), [2, 2], Window::default());
        "ConvTranspose" "C2" |b| x(b, [1, 1, 2, 2]).conv_transpose(x(b, [1, 1]), [2, 2], Window::default());
        "ConvTranspose" "C3" |b| x(b, [1, 2, 2, 2]).conv_transpose(x(b, [3, 2, 1, 1]), [2, 2], Window::default());
        "ConvTranspose" "C4" |b| x(b, [1, 1, 2, 2]).conv_transpose(x(b, [1, 1, 3, 3]), [5, 4], Window::default());
        "MaxPool" "C1" |b| whole(b, [1, 1, 2, 2]).max_pool([1, 1], Window::default());
        "MaxPool" "C1" |b| x(b, [2, 2]).max_pool([1, 1], Window::default());
        "MaxPool" "C2" |b| x(b, [1, 1, 4, 4]).max_pool([2, 2], Window { dilations: [2, 2], ..Window::default() });
        "MaxPool" "C3" |b| x(b, [1, 1, 4, 4]).max_pool([5, 1], Window::default());
        "MaxPool" "C3" |b| x(b, [1, 1, 4, 4]).max_pool([2, 2], Window::padded(2, 0));
        "AveragePool" "C1" |b| x(b, [2, 2]).average_pool([1, 1], Window::default(), true);
        "AveragePool" "C2" |b| x(b, [1, 1, 4, 4]).average_pool([2, 2], Window { dilations: [1, 2], ..Window::default() }, true);
        "AveragePool" "C3" |b| x(b, [1, 1, 4, 4]).average_pool([2, 2], Window::strided(0), false);
        "Softmax" "C1" |b| whole(b, [2]).softmax();
        "Softmax" "C2" |b| x(b, []).softmax();
        "LayerNorm" "C1" |b| whole(b, [2]).layer_norm(1e-6);
        "LayerNorm" "C2" |b| x(b, []).layer_norm(1e-6);
    };
    let fused = more! {
        "GeluGrad" "C1" |b| x(b, [2]).gelu_grad(x(b, [3]));
        "GeluGrad" "C1" |b| whole(b, [2]).gelu_grad(whole(b, [3]));
        "SoftmaxGrad" "C1" |b| x(b, [2]).softmax_grad(x(b, [2, 1]));
        "SoftmaxGrad" "C2" |b| x(b, []).softmax_grad(b.scalar(1.0));
        "LayerNormGrad" "C1" |b| x(b, [2]).layer_norm_grad(whole(b, [2]), 1e-6);
        "LayerNormGrad" "C2" |b| x(b, []).layer_norm_grad(b.scalar(1.0), 1e-6);
        "LayerNormModulate" "C1" |b| x(b, [3, 4]).layer_norm_modulate(x(b, [1, 4]), x(b, [1, 1, 4]), 1e-6);
        "LayerNormModulate" "C2" |b| tokens(b).layer_norm_modulate(gate(b), x(b, [1, 1, 4]), 1e-6);
        "LayerNormModulateGrad" "C1" |b| {
            x(b, [3, 4]).layer_norm_modulate_grad(x(b, [1, 4]), x(b, [3, 4]), None, 1e-6)
        };
        "LayerNormModulateGrad" "C2" |b| {
            tokens(b).layer_norm_modulate_grad(x(b, [1, 1, 4]), tokens(b), None, 1e-6)
        };
        "LayerNormModulateGrad" "C3" |b| tokens(b).layer_norm_modulate_grad(gate(b), gate(b), None, 1e-6);
        "LayerNormModulateGrad" "C3" |b| {
            tokens(b).layer_norm_modulate_grad(gate(b), tokens(b), Some(gate(b)), 1e-6)
        };
        "GateResidual" "C1" |b| x(b, [3, 4]).gate_residual(x(b, [1, 4]), x(b, [3, 4]));
        "GateResidual" "C2" |b| tokens(b).gate_residual(x(b, [2, 3, 1]), tokens(b));
        "GateResidual" "C3" |b| tokens(b).gate_residual(gate(b), x(b, [2, 1, 1]));
        "GateResidualGrad" "C1" |b| x(b, [1, 4]).gate_residual_grad(x(b, [3, 4]), x(b, [3, 4]));
        "GateResidualGrad" "C2" |b| x(b, [2, 3, 1]).gate_residual_grad(tokens(b), tokens(b));
        "GateResidualGrad" "C3" |b| gate(b).gate_residual_grad(tokens(b), gate(b));
        "Linear" "C1" |b| tokens(b).linear(weight(b), whole(b, [5]));
        "Linear" "C2" |b| x(b, [4]).linear(weight(b), x(b, [5]));
        "Linear" "C2" |b| tokens(b).linear(weight(b), x(b, [1, 5]));
        "Linear" "C3" |b| tokens(b).linear(x(b, [5, 3]), x(b, [5]));
        "Linear" "C3" |b| tokens(b).linear(weight(b), x(b, [4]));
        "LinearGradInput" "C1" |b| whole(b, [2, 5]).linear_grad_input(weight(b), None);
        "LinearGradInput" "C2" |b| x(b, [5]).linear_grad_input(weight(b), None);
        "LinearGradInput" "C2" |b| tokens(b).linear_grad_input(weight(b), None);
        "LinearGradInput" "C3" |b| x(b, [2, 3, 5]).linear_grad_input(weight(b), Some(x(b, [2, 3, 5])));
        "LinearGradWeight" "C1" |b| tokens(b).linear_grad_weight(Activation::None, whole(b, [2, 3, 5]));
        "LinearGradWeight" "C2" |b| tokens(b).linear_grad_weight(Activation::None, x(b, [3, 2, 5]));
        "LinearGradWeight" "C2" |b| x(b, [4]).linear_grad_weight(Activation::Gelu, x(b, [5]));
        "LinearGateResidual" "C1" |b| whole(b, [2, 3, 5]).linear_gate_residual(x(b, [2, 1, 5]), NONE, layer(b));
        "LinearGateResidual" "C2" |b| {
            let [_, weight, bias] = layer(b);
            x(b, [5]).linear_gate_residual(x(b, [5]), NONE, [x(b, [4]), weight, bias])
        };
        "LinearGateResidual" "C3" |b| {
            let [_, weight, bias] = layer(b);
            x(b, [2, 3, 5]).linear_gate_residual(x(b, [2, 1, 5]), NONE, [x(b, [2, 3, 6]), weight, bias])
        };
        "LinearGateResidual" "C4" |b| x(b, [2, 3, 4]).linear_gate_residual(x(b, [2, 1, 4]), NONE, layer(b));
        "LinearGateResidual" "C4" |b| x(b, [2, 3, 5]).linear_gate_residual(x(b, [1, 1, 5]), NONE, layer(b));
        "Attention" "C1" |b| x(b, [3, 12]).attention(2, 0.5);
        "Attention" "C2" |b| x(b, [2, 3, 15]).attention(2, 0.5);
        "Attention" "C2" |b| x(b, [2, 3, 12]).attention(0, 0.5);
        "AttentionGrad" "C1" |b| whole(b, [2, 3, 12]).attention_grad(x(b, [2, 3, 4]), 2, 0.5);
        "AttentionGrad" "C2" |b| x(b, [2, 3, 15]).attention_grad(x(b, [2, 3, 5]), 2, 0.5);
        "AttentionGrad" "C3" |b| x(b, [2, 3, 12]).attention_grad(x(b, [2, 3, 12]), 2, 0.5);
        "Patchify" "C1" |b| x(b, [1, 4, 4]).patchify(2, PatchOrder::ChannelsFirst);
        "Patchify" "C1" |b| whole(b, [1, 1, 4, 4]).patchify(2, PatchOrder::ChannelsFirst);
        "Patchify" "C2" |b| x(b, [1, 1, 4, 5]).patchify(2, PatchOrder::ChannelsLast);
        "Unpatchify" "C1" |b| x(b, [4, 4]).unpatchify(2, PatchOrder::ChannelsFirst, 4, 4);
        "Unpatchify" "C2" |b| x(b, [1, 4, 4]).unpatchify(2, PatchOrder::ChannelsFirst, 4, 3);
        "Unpatchify" "C3" |b| x(b, [1, 3, 4]).unpatchify(2, PatchOrder::ChannelsLast, 4, 4);
        "Unpatchify" "C4" |b| x(b, [1, 4, 6]).unpatchify(2, PatchOrder::ChannelsLast, 4, 4);
        "After" "C1" |b| whole(b, [2]).after(x(b, [2]));
        "After" "C1" |b| x(b, [2]).after(whole(b, [2]));
    };
    [unary, binary, others, fused].into_iter().flatten().collect()
}

/// The first error of a construction.
fn error(build: impl FnOnce(&Builder)) -> GraphError {
    let b = Builder::new("refused");
    build(&b);
    b.finish().expect_err("accepted")
}

#[test]
fn a_broken_constraint_is_refused_with_op_label_and_place() {
    // Errors name ops as ONNX does where it has them.
    let names: Vec<(String, &str)> = rows()
        .iter()
        .map(|row| {
            let graph = row.graph();
            let op = &mudit_tests::op_table::Row::node(&graph).op;
            (variant(op), op.name())
        })
        .collect();
    for (i, case) in refusals().into_iter().enumerate() {
        let what = format!("case {i}: {} {}", case.op, case.label);
        let name = names.iter().find(|(op, _)| op == case.op).map(|(_, name)| *name);
        match error(case.build) {
            GraphError::Op { op, place, expected, got } => {
                assert_eq!(Some(op), name, "{what}: {expected}");
                assert!(expected.starts_with(&format!("{}:", case.label)), "{what}: {expected}");
                assert!(place.file.ends_with("op_constraints.rs"), "{what}: {place}");
                assert!(!got.is_empty() || case.op == "Constant", "{what}: no types");
            }
            other => panic!("{what}: {other}"),
        }
    }
}

#[test]
fn an_error_points_at_the_scope_and_the_line_of_the_call() {
    let mut line = 0;
    let error = error(|b| {
        let x = b.input("x", Type::f32([2, 3]));
        b.root().within("blocks.3", |s| {
            s.within("attn", |_| {
                line = line!() + 1;
                let _ = x + x.transpose(&[1, 0]) * 2.0;
            });
        });
        let _ = x.softmax().reshape([7]); // quiet: the first error counts
    });
    let place = Place { scope: "blocks.3.attn".into(), file: file!(), line };
    let text = error.to_string();
    let expected = format!("Add in {place}: expected C2: shapes that broadcast, got f32(2, 3) and f32(3, 2)");
    assert_eq!(text, expected);
}

#[test]
fn names_are_declared_once() {
    let twice = error(|b| {
        let _ = (
            b.root().param("w", &[Dim::Fixed(2)], Init::Zeros),
            b.root().param("w", &[Dim::Fixed(3)], Init::Zeros),
        );
    });
    match twice {
        GraphError::Parameter { name, place, .. } => {
            assert_eq!((name.as_str(), place.file), ("w", file!()));
        }
        other => panic!("{other}"),
    }
    let input = error(|b| {
        let _ = (b.input("x", Type::f32([2])), b.input("x", Type::f32([2])));
    });
    assert!(matches!(input, GraphError::DuplicateName { kind: "input", .. }), "{input}");
    let output = error(|b| {
        b.output("y", b.scalar(1.0));
        b.output("y", b.scalar(2.0));
    });
    assert!(matches!(output, GraphError::DuplicateName { kind: "output", .. }), "{output}");
}

/// The labels that an op's documentation lists, by struct name, read from the sources of the ops.
fn documented() -> BTreeSet<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../graph-builder/src/ops");
    let mut found = BTreeSet::new();
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    for file in files {
        // Ops made by a macro share the macro's documentation.
        let mut shared: Vec<(String, Vec<String>)> = Vec::new();
        let (mut labels, mut invoked) = (Vec::new(), None);
        let mut name_of_macro = String::new();
        for line in fs::read_to_string(file).unwrap().lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("macro_rules! ") {
                name.trim_end_matches(" {").clone_into(&mut name_of_macro);
            } else if let Some(doc) = line.strip_prefix("/// - C") {
                let text = format!("C{doc}");
                labels.extend(text.split([' ', ':']).filter(|w| is_label(w)).map(str::to_owned));
            } else if let Some(name) = line.strip_prefix("pub struct ") {
                let name = name.split(|c: char| !c.is_alphanumeric() && c != '$').next().unwrap_or_default();
                if name == "$name" {
                    shared.push((name_of_macro.clone(), std::mem::take(&mut labels)));
                }
                found.extend(labels.drain(..).map(|label| (name.to_owned(), label)));
            } else if let Some((name, _)) = line.split_once("!(///") {
                invoked = shared.iter().find(|(n, _)| n == name).map(|(_, labels)| labels.clone());
            } else if !line.starts_with("///")
                && let Some(of_macro) = invoked.take()
            {
                let name = line.split(',').next().unwrap_or_default();
                found.extend(of_macro.into_iter().map(|label| (name.to_owned(), label)));
            }
        }
    }
    found
}

fn is_label(word: &str) -> bool {
    word.strip_prefix('C').is_some_and(|n| !n.is_empty() && n.bytes().all(|c| c.is_ascii_digit()))
}

#[test]
fn every_documented_constraint_has_a_case() {
    let documented = documented();
    let covered: BTreeSet<(String, String)> =
        refusals().iter().map(|r| (r.op.to_owned(), r.label.to_owned())).collect();
    assert_eq!(covered, documented, "cases without documentation, or documented constraints without a case");
    let free = ["Input", "Parameter", "Cast", "Part"];
    for op in Op::NAMES {
        let labelled = documented.iter().any(|(name, _)| name == op);
        assert_ne!(labelled, free.contains(op), "{op}");
    }
}
