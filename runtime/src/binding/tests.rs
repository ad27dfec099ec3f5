use super::*;
use crate::arena::{Arena, ArenaLayout, SharedArena};
use crate::session::{SessionOptions, Weights};
use crate::test_models::{in_time, node, program, runtime, spec};

/// `sum = x + w`, `product = x · w`, `cast = i64 → f32`.
fn session() -> Arc<Session> {
    let ids = TensorSpec { dtype: DType::I64, ..spec("ids", &[2]) };
    let cast = onnx_protobuf::NodeProto {
        attribute: vec![onnx_protobuf::AttributeProto {
            name: "to".to_owned(),
            type_: onnx_protobuf::attribute_proto::AttributeType::INT.into(),
            i: 1,
            ..Default::default()
        }],
        ..node("", "Cast", &["ids"], "cast")
    };
    let program = program(
        &[spec("x", &[2, 3]), spec("w", &[2, 3]), ids],
        &[spec("sum", &[2, 3]), spec("grad.w", &[2, 3]), spec("cast", &[2])],
        vec![node("", "Add", &["x", "w"], "sum"), node("", "Mul", &["x", "w"], "grad.w"), cast],
        vec![],
        vec![],
    );
    let options = SessionOptions { threads: 1, ..SessionOptions::default() };
    Session::load(&runtime(), &program, &Weights::Inside, &options).unwrap()
}

fn arena(entries: &[(&str, &[usize])]) -> SharedArena {
    let entries = entries.iter().map(|(n, d)| ((*n).to_owned(), (*d).into()));
    Arena::zeros(Arc::new(ArenaLayout::new(entries).unwrap())).unwrap().into_shared()
}

#[test]
fn owned_buffers_carry_values_in_and_out_run_after_run() {
    in_time(|| {
        let mut binding = Binding::owned(&session()).unwrap();
        for round in 0..3 {
            let x = [1.0, 2.0, 3.0, 4.0, 5.0, round as f32];
            binding.set_input("x", &x).unwrap();
            binding.input_f32("w").unwrap().fill(10.0);
            binding.input_i64("ids").unwrap().copy_from_slice(&[7, round]);
            binding.run().unwrap();
            assert_eq!(binding.output_f32("sum").unwrap(), x.map(|v| v + 10.0));
            assert_eq!(binding.output_f32("grad.w").unwrap(), x.map(|v| v * 10.0));
            assert_eq!(binding.output_f32("cast").unwrap(), [7.0, round as f32]);
        }
    });
}

#[test]
fn arena_entries_are_read_and_written_in_place() {
    in_time(|| {
        let parameters = arena(&[("unrelated", &[5]), ("w", &[2, 3])]);
        let gradients = arena(&[("w", &[2, 3])]);
        let mut builder = Binding::builder(&session());
        assert_eq!(builder.bind_inputs_by_name(&parameters).unwrap(), 1);
        assert_eq!(builder.bind_outputs_by_name(&gradients, "grad.").unwrap(), 1);
        let mut binding = builder.finish().unwrap();
        binding.input_f32("x").unwrap().fill(3.0);
        for w in [2.0, 5.0] {
            parameters.write().unwrap().view_mut("w").unwrap().fill(w);
            binding.run().unwrap();
            assert_eq!(gradients.read().unwrap().view("w").unwrap(), [3.0 * w; 6]);
            assert_eq!(binding.output_f32("sum").unwrap(), [3.0 + w; 6]);
        }
        assert!(parameters.read().unwrap().view("unrelated").unwrap().iter().all(|&v| v == 0.0));
        assert!(matches!(binding.input_f32("w"), Err(RuntimeError::BoundToArena { .. })));
    });
}

#[test]
fn an_arena_cannot_be_read_and_written_by_one_run() {
    let shared = arena(&[("w", &[2, 3]), ("g", &[2, 3])]);
    let session = session();
    let mut builder = Binding::builder(&session);
    builder.bind_input_arena("w", &shared, "w").unwrap();
    assert!(matches!(builder.bind_output_arena("sum", &shared, "g"), Err(RuntimeError::Aliased { .. })));
    let mut builder = Binding::builder(&session);
    builder.bind_output_arena("sum", &shared, "g").unwrap();
    let twice = builder.bind_output_arena("grad.w", &shared, "g").map(|_| ()).unwrap_err().to_string();
    assert!(twice.contains("`sum`") && twice.contains("use two arenas"), "{twice}");
}

#[test]
fn an_arena_that_was_exchanged_is_refused_before_the_run() {
    in_time(|| {
        let shared = arena(&[("w", &[2, 3])]);
        let mut builder = Binding::builder(&session());
        builder.bind_input_arena("w", &shared, "w").unwrap();
        let mut binding = builder.finish().unwrap();
        let layout = shared.read().unwrap().layout().clone();
        *shared.write().unwrap() = Arena::zeros(layout).unwrap();
        let error = binding.run().unwrap_err();
        assert!(matches!(error, RuntimeError::StaleArena { .. }), "{error}");
    });
}

#[test]
fn wrong_names_types_shapes_and_lengths_are_named() {
    let mut binding = Binding::owned(&session()).unwrap();
    let text = |e: RuntimeError| e.to_string();
    let error = text(binding.input_f32("X").unwrap_err());
    assert!(error.contains("no input named `X`"), "{error}");
    let error = text(binding.output_f32("grad.ww").unwrap_err());
    assert!(error.contains("did you mean `grad.w`"), "{error}");
    let error = text(binding.input_f32("ids").unwrap_err());
    assert!(error.contains("element type i64, expected f32"), "{error}");
    let error = text(binding.set_input("x", &[0.0_f32; 5]).unwrap_err());
    assert!(error.contains("got 5 values, expected 6"), "{error}");

    let narrow = arena(&[("w", &[3, 2]), ("ids", &[2])]);
    let mut builder = Binding::builder(&session());
    let error = text(builder.bind_input_arena("w", &narrow, "w").map(|_| ()).unwrap_err());
    assert!(error.contains("(3, 2), expected (2, 3)"), "{error}");
    let error = text(builder.bind_input_arena("ids", &narrow, "ids").map(|_| ()).unwrap_err());
    assert!(error.contains("i64") && error.contains("f32"), "{error}");
    assert!(matches!(builder.bind_input_arena("w", &narrow, "v"), Err(RuntimeError::UnknownName { .. })));
}
