//! Each kernel inside ONNX Runtime: against the function body that the same model carries.

use onnx_protobuf::{FunctionProto, NodeProto};

use super::*;
use crate::binding::Binding;
use crate::session::{Session, SessionOptions, Weights};
use crate::test_models::{
    constant, float, from_caller, function, in_time, ints, node, program, runtime, spec,
};

const EPSILON: f32 = 1e-6;
/// Inputs of the test models: 3 samples of 70 rows of 389 values, so that samples are cut unevenly.
const DIMS: [usize; 3] = [3, 70, 389];
const SHARED: [usize; 3] = [3, 1, 389];

fn mean(input: &str, output: &str) -> NodeProto {
    // ONNX's mean over the last axis; opset 21 takes the axes as a second input.
    node("", "ReduceMean", &[input, "last"], output)
}

/// The nodes that make `hat` and `r` of layer norm from `x`.
fn normalise() -> Vec<NodeProto> {
    let last = NodeProto { attribute: vec![ints("value_ints", &[-1])], ..node("", "Constant", &[], "last") };
    let epsilon = NodeProto {
        attribute: vec![from_caller("value_float", "epsilon")],
        ..node("", "Constant", &[], "eps")
    };
    vec![
        last,
        epsilon,
        mean("x", "mu"),
        node("", "Sub", &["x", "mu"], "centred"),
        node("", "Mul", &["centred", "centred"], "squares"),
        mean("squares", "var"),
        node("", "Add", &["var", "eps"], "var_eps"),
        node("", "Sqrt", &["var_eps"], "std"),
        node("", "Reciprocal", &["std"], "r"),
        node("", "Mul", &["centred", "r"], "hat"),
    ]
}

/// The op as a function over plain ONNX.
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
        Op::SoftmaxGrad => function(
            "SoftmaxGrad",
            &["y", "ct"],
            "dx",
            &[],
            vec![
                NodeProto { attribute: vec![ints("value_ints", &[-1])], ..node("", "Constant", &[], "last") },
                node("", "Mul", &["y", "ct"], "product"),
                node("", "ReduceSum", &["product", "last"], "dot"),
                node("", "Sub", &["ct", "dot"], "difference"),
                node("", "Mul", &["y", "difference"], "dx"),
            ],
        ),
        Op::LayerNormGrad => {
            let mut nodes = normalise();
            nodes.extend([
                mean("ct", "ct_mean"),
                node("", "Mul", &["ct", "hat"], "ct_hat"),
                mean("ct_hat", "projection"),
                node("", "Mul", &["hat", "projection"], "along"),
                node("", "Sub", &["ct", "ct_mean"], "ct_centred"),
                node("", "Sub", &["ct_centred", "along"], "rest"),
                node("", "Mul", &["rest", "r"], "dx"),
            ]);
            function("LayerNormGrad", &["x", "ct"], "dx", &["epsilon"], nodes)
        }
        Op::LayerNormModulate => {
            let mut nodes = normalise();
            nodes.extend([
                constant("one", 1.0),
                node("", "Add", &["scale", "one"], "factor"),
                node("", "Mul", &["hat", "factor"], "scaled"),
                node("", "Add", &["scaled", "shift"], "y"),
            ]);
            function("LayerNormModulate", &["x", "shift", "scale"], "y", &["epsilon"], nodes)
        }
        Op::GateResidual => function(
            "GateResidual",
            &["x", "gate", "y"],
            "out",
            &[],
            vec![node("", "Mul", &["gate", "y"], "gated"), node("", "Add", &["x", "gated"], "out")],
        ),
    }
}

/// Shapes of the op's inputs.
fn shapes(op: Op) -> Vec<[usize; 3]> {
    match op {
        Op::GeluGrad | Op::SoftmaxGrad | Op::LayerNormGrad => vec![DIMS, DIMS],
        Op::LayerNormModulate => vec![DIMS, SHARED, SHARED],
        Op::GateResidual => vec![DIMS, SHARED, DIMS],
    }
}

/// Runs a model with one node of the op on fixed inputs.
fn run(op: Op, native_kernels: bool, threads: usize) -> Vec<f32> {
    let function = body(op);
    let names: Vec<String> = function.input.clone();
    let inputs: Vec<_> = names.iter().zip(shapes(op)).map(|(n, dims)| spec(n, &dims)).collect();
    let mut call = node(DOMAIN, op.name(), &names.iter().map(String::as_str).collect::<Vec<_>>(), "answer");
    if op.has_epsilon() {
        call.attribute.push(float("epsilon", EPSILON));
    }
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

/// How often a kernel runs is counted per process, so one test goes through all ops, one after the other.
#[test]
fn kernels_run_instead_of_bodies_and_agree_with_them_on_any_number_of_threads() {
    in_time(|| {
        for op in Op::ALL {
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
