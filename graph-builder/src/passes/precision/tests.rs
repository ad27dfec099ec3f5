use std::collections::BTreeMap;

use super::*;
use crate::eval::Array;
use crate::{Builder, Dim, Init, Value};

/// A graph of an image `x` (2, 3, 4, 4) and a time `t` (2), and what it gives.
fn graph(build: impl for<'g> FnOnce(&'g Builder, [Value<'g>; 2])) -> Graph {
    let b = Builder::new("mixed");
    let inputs = [b.input("x", Type::f32([2, 3, 4, 4])), b.input("t", Type::f32([2]))];
    build(&b, inputs);
    b.finish().unwrap()
}

fn bf16(graph: &Graph) -> Graph {
    graph.in_precision(Precision::Bf16).unwrap()
}

fn casts(graph: &Graph) -> usize {
    graph.nodes().iter().filter(|n| matches!(n.op, Op::Cast(_))).count()
}

fn weight<'g>(b: &'g Builder, name: &str, n: usize, k: usize) -> [Value<'g>; 2] {
    let s = b.root().at(name);
    let weight = s.param("weight", &[Dim::Width(n), Dim::Width(k)], Init::XavierUniform);
    [weight, s.param("bias", &[Dim::Width(n)], Init::Zeros)]
}

#[test]
fn inputs_and_outputs_keep_their_types_and_parameters_take_the_one_they_are_used_in() {
    let graph = graph(|b, [x, t]| {
        let [w, bias] = weight(b, "layer", 5, 4);
        let [last, last_bias] = weight(b, "last", 5, 5);
        let scaled = last * t.slice(0, 0, 1); // an f32 factor
        b.output("y", x.linear(w, bias).linear(scaled, last_bias));
        b.output("grad.layer.weight", w + 1.0);
        b.output("grad.last.weight", last * 2.0);
    });
    let low = bf16(&graph);
    let dtypes: Vec<String> = low.parameters().iter().map(|p| format!("{} {}", p.name, p.dtype)).collect();
    assert_eq!(
        dtypes,
        ["layer.weight bf16", "layer.bias bf16", "last.weight f32", "last.bias bf16"],
        "{}",
        low.text()
    );
    assert!(low.inputs().all(|(_, ty)| ty.dtype == DType::F32));
    let outputs: Vec<DType> = low.outputs().iter().map(|(_, id)| low.node(*id).ty.dtype).collect();
    assert_eq!(outputs, [DType::F32, DType::Bf16, DType::F32]);
    // x and the scaled weight down, y up.
    assert_eq!(casts(&low), 3, "{}", low.text());
}

#[test]
fn a_value_is_converted_once_and_not_back_and_forth() {
    let graph = graph(|b, [x, _]| {
        let layers: Vec<_> = (0..3).map(|i| weight(b, &i.to_string(), 4, 4)).collect();
        let sum = layers.iter().map(|[w, bias]| x.linear(*w, *bias)).reduce(|a, b| a + b).unwrap();
        b.output("sum", sum.exp().log());
        b.output("square", sum.mean(&[1]) * sum.mean(&[2]));
        b.output("same", x.reshape([2, 48]).transpose(&[1, 0]));
    });
    let low = bf16(&graph);
    assert_eq!(casts(&low), 2, "x once down, the sum once up:\n{}", low.text());
}

#[test]
fn numbers_adapt_and_tables_do_not() {
    let graph = graph(|b, [x, t]| {
        let [w, bias] = weight(b, "layer", 4, 4);
        let y = x.linear(w, bias) * 0.5 + 1.0;
        let table = b.constant(DType::F32, [4], vec![0.1, 0.2, 0.3, 0.4]);
        b.output("table", (y * table).linear(w, bias));
        b.output("number", y.linear(w, bias));
        b.output("t", t * 0.1);
    });
    let low = bf16(&graph);
    let kinds: Vec<String> =
        low.nodes().iter().filter(|n| matches!(n.op, Op::Mul(_))).map(|n| n.ty.to_string()).collect();
    assert_eq!(kinds, ["bf16(2, 3, 4, 4)", "f32(2, 3, 4, 4)", "f32(2)"], "{}", low.text());
}

#[test]
fn truth_values_and_integers_stay_as_they_are() {
    let graph = graph(|b, [x, t]| {
        let index = t.cast(DType::I64);
        let [w, bias] = weight(b, "layer", 4, 4);
        let hot = index.reshape([2, 1]).equal(index.reshape([1, 2])).cast(DType::F32);
        b.output("hot", hot.matmul(x.reshape([2, 48])));
        b.output("row", x.gather(index).linear(w, bias));
        b.output("index", index);
        b.output("where", b.scalar(0.5).less(t));
    });
    let low = bf16(&graph);
    let dtype = |name: &str| low.node(low.outputs().iter().find(|(n, _)| n == name).unwrap().1).ty.dtype;
    assert_eq!(
        ["hot", "row", "index", "where"].map(dtype),
        [DType::F32, DType::F32, DType::I64, DType::Bool]
    );
    // The truth value becomes a number of the compute type at once.
    let from_bool =
        low.nodes().iter().filter(|n| n.args.len() == 1 && low.type_of(n.args[0]).dtype == DType::Bool);
    assert_eq!(from_bool.map(|n| n.ty.dtype).collect::<Vec<_>>(), [DType::Bf16], "{}", low.text());
}

#[test]
fn conversions_change_no_exact_value_and_f32_changes_nothing() {
    let graph = graph(|b, [x, t]| {
        let [w, bias] = weight(b, "layer", 4, 4);
        let y = x.reshape([2, 12, 4]).linear(w, bias).gelu();
        let loss =
            ((y * 3.0).layer_norm(1e-6).exp() + t.reshape([2, 1, 1]).sin()).mean(&[0, 1, 2]).reshape([]);
        b.output("loss", loss);
        let parameters = b.trainable();
        let values: Vec<_> = parameters.iter().map(|(_, v)| *v).collect();
        for ((name, _), grad) in parameters.iter().zip(b.gradients(loss, &values).unwrap()) {
            b.output(&format!("grad.{name}"), grad);
        }
    })
    .optimised()
    .unwrap();
    assert_eq!(graph.in_precision(Precision::F32).unwrap().text(), graph.text());
    let ramp = |shape: &[usize]| {
        let n = shape.iter().product::<usize>();
        Array::from_shape_vec(shape, (0..n).map(|i| (i as f64 * 0.7).sin()).collect()).unwrap()
    };
    let leaves = graph.inputs().map(|(n, ty)| (n.to_owned(), ty.shape.clone()));
    let leaves = leaves.chain(graph.parameters().iter().map(|p| (p.name.clone(), p.shape())));
    let feeds: BTreeMap<String, Array> = leaves.map(|(name, shape)| (name, ramp(shape.dims()))).collect();
    let want = graph.eval(&feeds).unwrap();
    for precision in [Precision::Bf16, Precision::F16] {
        assert_eq!(graph.in_precision(precision).unwrap().eval(&feeds).unwrap(), want);
    }
}

#[test]
fn a_narrower_graph_is_refused() {
    let low = graph(|b, [x, _]| b.output("y", x.cast(DType::F16)));
    let refusal = low.in_precision(Precision::Bf16).unwrap_err().to_string();
    assert!(refusal.starts_with("in_precision: Cast in the top scope"), "{refusal}");
    assert!(
        refusal.ends_with("is f16(2, 3, 4, 4) already; bring an f32 graph to a precision, and once"),
        "{refusal}"
    );
}
