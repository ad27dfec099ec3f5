//! Registration with ONNX Runtime: kernels win over the function bodies of the same name, and refuse what does not
//! fit. That every kernel computes what its body says is proven where the bodies are, over the op table.

use onnx_protobuf::FunctionProto;

use super::*;
use crate::binding::Binding;
use crate::session::{Session, SessionOptions, Weights};
use crate::test_models::{constant, function, in_time, node, program, runtime, spec};

/// Inputs of the test models: 3 samples of 70 rows of 389 values, so that samples are cut unevenly.
const DIMS: [usize; 3] = [3, 70, 389];
const SHARED: [usize; 3] = [3, 1, 389];

/// Two of the ops as functions over plain ONNX.
fn body(op: Op) -> FunctionProto {
    match op {
        Op::GeluGrad => function(
            "GeluGrad",
            &["x", "ct"],
            "dx",
            &[],
            vec![
                constant("c", 0.797_884_6),
                constant("k", 0.044_715),
                constant("k3", 3.0 * 0.044_715),
                constant("one", 1.0),
                constant("half", 0.5),
                node("", "Mul", &["x", "x"], "x2"),
                node("", "Mul", &["x2", "k"], "kx2"),
                node("", "Add", &["kx2", "one"], "poly"),
                node("", "Mul", &["x", "c"], "cx"),
                node("", "Mul", &["cx", "poly"], "u"),
                node("", "Tanh", &["u"], "t"),
                node("", "Mul", &["t", "t"], "t2"),
                node("", "Sub", &["one", "t2"], "sech2"),
                node("", "Mul", &["x2", "k3"], "k3x2"),
                node("", "Add", &["k3x2", "one"], "poly1"),
                node("", "Mul", &["cx", "poly1"], "xslope"),
                node("", "Mul", &["xslope", "sech2"], "right"),
                node("", "Add", &["t", "one"], "left"),
                node("", "Add", &["left", "right"], "twice"),
                node("", "Mul", &["twice", "half"], "slope"),
                node("", "Mul", &["slope", "ct"], "dx"),
            ],
        ),
        Op::GateResidual => function(
            "GateResidual",
            &["x", "gate", "y"],
            "out",
            &[],
            vec![node("", "Mul", &["gate", "y"], "gated"), node("", "Add", &["x", "gated"], "out")],
        ),
        _ => unreachable!("no body for {op:?}"),
    }
}

/// Shapes of the op's inputs.
fn shapes(op: Op) -> Vec<[usize; 3]> {
    if op == Op::GateResidual { vec![DIMS, SHARED, DIMS] } else { vec![DIMS, DIMS] }
}

/// Runs a model with one node of the op on fixed inputs.
fn run(op: Op, native_kernels: bool, threads: usize) -> Vec<f32> {
    let function = body(op);
    let names: Vec<String> = function.input.clone();
    let inputs: Vec<_> = names.iter().zip(shapes(op)).map(|(n, dims)| spec(n, &dims)).collect();
    let call = node(DOMAIN, op.name(), &names.iter().map(String::as_str).collect::<Vec<_>>(), "answer");
    let program = program(&inputs, &[spec("answer", &DIMS)], vec![call], vec![function], vec![]);
    let options = SessionOptions { threads, native_kernels, ..SessionOptions::default() };
    let session = Session::load(&runtime(), &program, &Weights::Inside, &options).unwrap();
    let mut binding = Binding::owned(&session).unwrap();
    for (i, name) in names.iter().enumerate() {
        for (j, value) in binding.input_f32(name).unwrap().iter_mut().enumerate() {
            *value = ((j as f32 * 0.618 + i as f32).sin() * 43.758).fract() * 3.0;
        }
    }
    binding.run().unwrap();
    binding.output_f32("answer").unwrap().to_vec()
}

/// How often a kernel runs is counted per process, so one test goes through the ops, one after the other.
#[test]
fn kernels_run_instead_of_bodies_and_agree_with_them_on_any_number_of_threads() {
    in_time(|| {
        for op in [Op::GeluGrad, Op::GateResidual] {
            let before = calls(op.name());
            let plain = run(op, false, 1);
            assert_eq!(calls(op.name()), before, "{}: the body must run", op.name());
            let native = run(op, true, 1);
            assert_eq!(calls(op.name()), before + 1, "{}: the kernel must run", op.name());
            let norm = plain.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            let difference =
                plain.iter().zip(&native).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
            assert!(difference <= 2e-6 * norm, "{}: relative difference {}", op.name(), difference / norm);
            let threaded = run(op, true, 2);
            assert!(native.iter().zip(&threaded).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", op.name());
        }
    });
}

#[test]
fn a_kernel_refuses_shapes_outside_its_contract() {
    in_time(|| {
        let inputs = [spec("x", &DIMS), spec("gate", &[3, 70, 389]), spec("y", &DIMS)];
        let call = node(DOMAIN, "GateResidual", &["x", "gate", "y"], "answer");
        let program =
            program(&inputs, &[spec("answer", &DIMS)], vec![call], vec![body(Op::GateResidual)], vec![]);
        let session =
            Session::load(&runtime(), &program, &Weights::Inside, &SessionOptions::default()).unwrap();
        let error = Binding::owned(&session).unwrap().run().unwrap_err().to_string();
        assert!(error.contains("GateResidual cannot take inputs of shapes"), "{error}");
    });
}

#[test]
fn every_op_has_a_name_of_its_own() {
    let mut names = names().to_vec();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), Op::ALL.len());
    assert_eq!(calls("Unknown"), 0);
}
