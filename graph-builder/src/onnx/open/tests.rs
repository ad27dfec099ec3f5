use onnx_protobuf::tensor_shape_proto::dimension::Value as Dim;
use onnx_protobuf::{FunctionProto, TensorProto, ValueInfoProto};

use super::*;
use crate::{Builder, Value, Weights};

/// The program that `build` gives for a batch of `n` rows `x` (N, 4, 6) and labels `y` (N).
fn emitted(n: usize, build: &dyn for<'g> Fn(&'g Builder, usize, [Value<'g>; 2])) -> OnnxProgram {
    let b = Builder::new("test");
    let x = b.input("x", Type::f32([n, 4, 6]));
    let y = b.input("y", Type::new(DType::I64, [n]));
    build(&b, n, [x, y]);
    b.finish().unwrap().emit(Weights::Inputs).unwrap()
}

fn open(build: &dyn for<'g> Fn(&'g Builder, usize, [Value<'g>; 2])) -> Result<OpenProgram> {
    OpenProgram::of((7, &emitted(7, build)), (11, &emitted(11, build)))
}

fn model(program: &OpenProgram) -> ModelProto {
    ModelProto::parse_from_bytes(&program.bytes).unwrap()
}

fn constants(model: &ModelProto) -> Vec<Vec<i64>> {
    model.graph.initializer.iter().filter_map(int_list).collect()
}

fn axes(info: &ValueInfoProto) -> Vec<String> {
    let dims = &info.type_.tensor_type().shape.dim;
    let words = dims.iter().map(|dim| match &dim.value {
        Some(Dim::DimValue(size)) => size.to_string(),
        Some(Dim::DimParam(name)) => name.clone(),
        _ => "?".to_owned(),
    });
    words.collect()
}

#[test]
fn reshapes_infer_the_batch_and_the_signature_names_it() {
    let open = open(&|b, n, [x, _]| {
        let rows = x.reshape([n * 4, 6]).exp();
        b.output("rows", rows);
        b.output("back", rows.reshape([n, 2, 12]).concat(&[x.reshape([n, 2, 12])], 0));
    })
    .unwrap();
    let model = model(&open);
    let mut lists = constants(&model);
    lists.sort();
    assert_eq!(lists, [vec![-1, 2, 12], vec![-1, 6]], "and nothing of the batch sizes is left");
    assert_eq!(model.graph.input.iter().map(axes).collect::<Vec<_>>(), [vec!["N", "4", "6"], vec!["N"]]);
    assert_eq!(
        model.graph.output.iter().map(axes).collect::<Vec<_>>(),
        [vec!["?", "6"], vec!["?", "2", "12"]]
    );
    let shapes: Vec<Shape> = open.outputs_at(3).into_iter().map(|spec| spec.shape).collect();
    assert_eq!(shapes, [Shape::from([12, 6]), Shape::from([6, 2, 12])]);
    assert_eq!(open.inputs_at(1), emitted(1, &|b, _, [x, _]| b.output("x2", x)).inputs);
}

#[test]
fn copies_ask_an_input_for_the_batch() {
    let open = open(&|b, n, [x, _]| {
        let row = b.constant(DType::F32, [1, 6], vec![0.5; 6]);
        b.output("wide", row.broadcast([n, 6]));
        b.output("twice", row.broadcast([2 * n, 6]) + row.broadcast([2 * n, 6]).exp());
        b.output("x2", x.exp());
    })
    .unwrap();
    let model = model(&open);
    let count = |op: &str| model.graph.node.iter().filter(|n| n.op_type == op).count();
    assert_eq!((count("Shape"), count("Mul"), count("Concat"), count("Expand")), (1, 1, 2, 3));
    let shape = &model.graph.node[0];
    assert_eq!((shape.op_type.as_str(), shape.input[0].as_str()), ("Shape", "x"), "before all that use it");
    let known: Vec<&str> = model.graph.input.iter().map(|i| i.name.as_str()).collect();
    let mut known: BTreeSet<&str> = known.into_iter().collect();
    known.extend(model.graph.initializer.iter().map(|t| t.name.as_str()));
    for node in &model.graph.node {
        assert!(node.input.iter().all(|i| known.contains(i.as_str())), "{}", node.name);
        known.extend(node.output.iter().map(String::as_str));
    }
}

#[test]
fn what_no_recorded_run_may_do_is_known_of_either_emission() {
    let uneven = open(&|b, _, [x, _]| b.output("o", x.concat(&[x.slice(1, 0, 1)], 1))).unwrap();
    assert_eq!(uneven.unrepeatable.len(), 1, "{:?}", uneven.unrepeatable);
    let even = |n| emitted(n, &|b, _, [x, _]| b.output("o", x.concat(&[x], 0)));
    let known = |names: [&[&str]; 2]| {
        let named = |n, names: &[&str]| {
            let unrepeatable = names.iter().map(ToString::to_string).collect();
            OnnxProgram { unrepeatable, ..even(n) }
        };
        OpenProgram::of((7, &named(7, names[0])), (11, &named(11, names[1]))).unwrap().unrepeatable
    };
    assert!(known([&[], &[]]).is_empty());
    assert_eq!(known([&["a"], &["a", "b"]]), ["a", "b"]);
}

#[test]
fn what_an_open_program_cannot_say_is_refused_by_node() {
    let refusal =
        |build: &dyn for<'g> Fn(&'g Builder, usize, [Value<'g>; 2])| open(build).unwrap_err().to_string();
    for (text, part) in [
        (
            refusal(&|b, n, [x, _]| b.output("o", x * b.constant(DType::F32, [n, 1, 1], vec![2.0; n]))),
            "its constant is [7, 1, 1] at one and [11, 1, 1] at the other",
        ),
        (refusal(&|b, n, [x, _]| b.output("o", x.slice(0, 0, n - 1))), "its operand 2 is `ints[6]`"),
        (refusal(&|b, n, [x, _]| b.output("o", x * (n as f64))), "with other values"),
        (refusal(&|b, n, [x, _]| b.output("o", x.pad(0, n, 1))), "its operand 1"),
        (
            refusal(&|b, n, [x, _]| {
                let row = b.scalar(1.0).reshape([1]).broadcast([n + 1]);
                b.output("o", x * row.sum(&[0]));
            }),
            "its shape is [8] at one and [12] at the other",
        ),
        (refusal(&|b, n, [x, _]| b.output("o", if n > 7 { x.exp() } else { x })), "it is another node"),
    ] {
        assert!(
            text.contains("`test` cannot leave its batch size open") && text.contains(part),
            "{part}: {text}"
        );
    }
    let mut other = emitted(11, &|b, _, [x, _]| b.output("o", x));
    other.inputs[1].name = "z".into();
    let first = emitted(7, &|b, _, [x, _]| b.output("o", x));
    let error = OpenProgram::of((7, &first), (11, &other)).unwrap_err().to_string();
    assert!(error.contains("are x, y at one and x, z at the other"), "{error}");
    let same = emitted(7, &|b, _, [x, _]| b.output("o", x));
    let error = OpenProgram::of((7, &same), (7, &same)).unwrap_err().to_string();
    assert!(error.contains("not 7 and 7"), "{error}");
}

#[test]
fn weights_stay_where_they_are_and_bodies_must_agree() {
    let build: &dyn for<'g> Fn(&'g Builder, usize, [Value<'g>; 2]) =
        &|b, n, [x, _]| b.output("o", x.layer_norm(1e-6).reshape([n, 24]));
    let (first, second) = (emitted(7, build), emitted(11, build));
    let altered = |program: &OnnxProgram, change: &dyn Fn(&mut ModelProto)| {
        let mut model = ModelProto::parse_from_bytes(&program.bytes).unwrap();
        change(&mut model);
        OnnxProgram { bytes: model.write_to_bytes().unwrap(), ..program.clone() }
    };
    let weight = |offset: &'static str| {
        move |model: &mut ModelProto| {
            let mut tensor = TensorProto { name: "w".into(), dims: vec![3], ..TensorProto::default() };
            tensor.doc_string = offset.into();
            let graph = model.graph.mut_or_insert_default();
            graph.initializer.push(tensor);
            graph.node[0].input.push("w".into());
        }
    };
    let of = |a: &OnnxProgram, b: &OnnxProgram| OpenProgram::of((7, a), (11, b));
    let open = of(&altered(&first, &weight("here")), &altered(&second, &weight("here"))).unwrap();
    assert!(model(&open).graph.initializer.iter().any(|t| t.name == "w" && t.doc_string == "here"));
    let error = of(&altered(&first, &weight("here")), &altered(&second, &weight("there"))).unwrap_err();
    assert!(error.to_string().contains("with other values"), "{error}");
    let longer = altered(&second, &|model| {
        let node = NodeProto { name: "blocks.0/Exp.9".into(), ..NodeProto::default() };
        model.graph.mut_or_insert_default().node.push(node);
    });
    let error = of(&first, &longer).unwrap_err().to_string();
    assert!(error.contains("`blocks.0/Exp.9`: the node is in one of them only"), "{error}");
    let body = |name: &'static str| {
        move |model: &mut ModelProto| {
            model.functions.push(FunctionProto {
                name: "Op".into(),
                doc_string: name.into(),
                ..FunctionProto::default()
            });
        }
    };
    let error = of(&altered(&first, &body("one")), &altered(&second, &body("two"))).unwrap_err();
    assert!(error.to_string().contains("`Op`: its function body depends"), "{error}");
}
