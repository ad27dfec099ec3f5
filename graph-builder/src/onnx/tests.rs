use onnx_protobuf::{ModelProto, NodeProto};
use protobuf::Message;

use super::Weights;
use crate::{Activation, Builder, Type, Value};

/// The nodes of the program that `build` gives for rows `x` (4, 3), a weight `w` (2, 3) and a cotangent `ct` (4, 2).
fn emitted(build: impl for<'g> FnOnce(&'g Builder, [Value<'g>; 3])) -> (Vec<NodeProto>, ModelProto) {
    let b = Builder::new("emitted");
    let shapes = [("x", [4, 3]), ("w", [2, 3]), ("ct", [4, 2])];
    build(&b, shapes.map(|(name, shape)| b.input(name, Type::f32(shape))));
    let program = b.finish().unwrap().emit(Weights::Inputs).unwrap();
    let model = ModelProto::parse_from_bytes(&program.bytes).unwrap();
    (model.graph.node.clone(), model)
}

fn outputs(node: &NodeProto) -> Vec<&str> {
    node.output.iter().map(String::as_str).collect()
}

#[test]
fn several_results_are_the_outputs_of_one_node() {
    let (nodes, _) = emitted(|b, [x, _, ct]| {
        let grads = ct.linear_grad_weight(Activation::None, x);
        let results = grads.results();
        b.output("weight", results[0]);
        b.output("sum", results[1].exp());
    });
    assert_eq!(nodes.len(), 2);
    assert_eq!((outputs(&nodes[0]).len(), outputs(&nodes[0])[0]), (2, "weight"));
    assert_eq!(nodes[1].input, [outputs(&nodes[0])[1]], "the second result by its name");
}

#[test]
fn a_result_that_nobody_takes_has_a_name_and_equal_parts_are_one_value() {
    let (nodes, _) = emitted(|b, [x, _, ct]| {
        let grads = ct.linear_grad_weight(Activation::Gelu, x);
        b.output("bias", grads.results()[1]);
        b.output("again", grads.results()[1]);
    });
    let grad = nodes.iter().find(|n| n.op_type.starts_with("LinearGradWeight")).unwrap();
    assert!(outputs(grad)[1] == "bias" && !outputs(grad)[0].is_empty(), "{:?}", outputs(grad));
    let copy = nodes.iter().find(|n| n.op_type == "Identity").unwrap();
    assert_eq!((copy.input.as_slice(), outputs(copy)), (["bias".to_owned()].as_slice(), vec!["again"]));
}

#[test]
fn a_body_for_each_way_an_op_is_used() {
    let (nodes, model) = emitted(|b, [x, w, ct]| {
        b.output("plain", ct.linear_grad_input(w, None));
        b.output("bent", ct.linear_grad_input(w, Some(x)));
    });
    let bodies: Vec<(&str, usize)> =
        model.functions.iter().map(|f| (f.name.as_str(), f.input.len())).collect();
    assert_eq!(bodies, [("LinearGradInput", 2), ("LinearGradInputGelu", 3)]);
    for node in nodes {
        let name = if node.input.len() == 3 { "LinearGradInputGelu" } else { "LinearGradInput" };
        assert_eq!(node.op_type, name);
    }
    // Readers of the format that know no overloads take the first body of a name for all.
    assert!(model.functions.iter().all(|f| f.overload.is_empty()));
    let inside: Vec<&NodeProto> = model.functions.iter().flat_map(|f| &f.node).collect();
    assert!(inside.iter().all(|n| !n.name.is_empty()), "nodes of bodies have names");
}

#[test]
fn what_nothing_uses_comes_last_and_backwards() {
    let (nodes, _) = emitted(|b, [x, _, ct]| {
        for (i, name) in ["first", "second", "third"].into_iter().enumerate() {
            let used = (ct * (i as f64 + 2.0)).exp();
            let [weight, bias] = crate::ops::modulation::pair(used.linear_grad_weight(Activation::None, x));
            b.output(&format!("{name}.weight"), weight);
            b.output(&format!("{name}.bias"), bias);
        }
    });
    let kinds: Vec<&str> = nodes.iter().map(|n| n.op_type.as_str()).collect();
    let used = ["Mul", "Exp"].repeat(3);
    assert_eq!(kinds, [used, vec!["LinearGradWeight"; 3]].concat());
    let names: Vec<&str> = nodes[6..].iter().map(|n| outputs(n)[0]).collect();
    assert_eq!(names, ["third.weight", "second.weight", "first.weight"]);
}

#[test]
fn an_inlined_program_is_of_standard_nodes_alone() {
    let b = Builder::new("emitted");
    let [x, w, bias] = [("x", vec![4, 3]), ("w", vec![2, 3]), ("bias", vec![2])]
        .map(|(name, shape)| b.input(name, Type::f32(shape)));
    for (i, name) in ["first", "second"].into_iter().enumerate() {
        b.output(name, (x * (i as f64 + 2.0)).activated_linear(Activation::Gelu, w, bias));
    }
    let program = b.finish().unwrap().emit(Weights::Inputs).unwrap();
    assert_eq!(program.native_ops, ["Linear"]);
    let inlined = program.inlined().unwrap();
    assert!(inlined.native_ops.is_empty() && inlined.native_operands.is_empty());
    let model = ModelProto::parse_from_bytes(&inlined.bytes).unwrap();
    assert!(model.functions.is_empty());
    assert_eq!(model.opset_import.len(), 1);
    let mut made = std::collections::BTreeSet::from(["x", "w", "bias"].map(str::to_owned));
    made.extend(model.graph.initializer.iter().map(|t| t.name.clone()));
    for node in &model.graph.node {
        assert!(node.domain.is_empty() && node.attribute.iter().all(|a| a.ref_attr_name.is_empty()));
        assert!(node.input.iter().all(|name| made.contains(name)), "{node:?}");
        for name in &node.output {
            assert!(made.insert(name.clone()), "`{name}` is made twice");
        }
    }
    assert!(made.contains("first") && made.contains("second"));
}

#[test]
fn attention_is_one_op_where_heads_are_of_a_size_that_tensorrt_takes() {
    for (features, one_op) in [(72, true), (12, false), (36, false), (264, false), (16, true)] {
        let b = Builder::new("emitted");
        let qkv = b.input("qkv", Type::new(crate::DType::Bf16, [1, 5, 3 * 2 * features]));
        b.output("out", qkv.attention(2, 0.5));
        let program = b.finish().unwrap().emit(Weights::Inputs).unwrap().inlined().unwrap();
        let model = ModelProto::parse_from_bytes(&program.bytes).unwrap();
        let count = |op: &str| model.graph.node.iter().filter(|n| n.op_type == op).count();
        assert_eq!([count("Attention"), count("Softmax")], [usize::from(one_op), usize::from(!one_op)]);
    }
}
