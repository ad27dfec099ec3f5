use std::collections::BTreeMap;

use graph_builder::{Builder, DType, OpenProgram, Shape, Type};

use super::*;
use crate::arena::{Arena, ArenaLayout};
use crate::binding::Binding;
use crate::safetensors_file::SafetensorsReader;
use crate::test_models::{external, in_time, node, program, runtime, spec};

fn options() -> SessionOptions {
    SessionOptions { threads: 1, ..SessionOptions::default() }
}

/// `y = x + w` with `w` in the middle of a safetensors file in a directory.
fn with_weights_file(directory: &Path) -> OnnxProgram {
    let entries = [("v", [5].into()), ("w", Shape::from([2, 3]))].map(|(n, s): (_, Shape)| (n.to_owned(), s));
    let mut arena = Arena::zeros(Arc::new(ArenaLayout::new(entries).unwrap())).unwrap();
    arena.view_mut("w").unwrap().copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let path = directory.join("model.safetensors");
    arena.write_safetensors(&path, &BTreeMap::new()).unwrap();
    let offset = SafetensorsReader::open(&path).unwrap().byte_range("w").unwrap().start;
    let mut program = program(
        &[spec("x", &[2, 3])],
        &[spec("y", &[2, 3])],
        vec![node("", "Add", &["x", "w"], "y")],
        vec![],
        vec![external("w", &[2, 3], "model.safetensors", offset)],
    );
    program.weights_file = Some("model.safetensors".to_owned());
    program
}

fn run(session: &Arc<Session>) -> Vec<f32> {
    let mut binding = Binding::owned(session).unwrap();
    binding.input_f32("x").unwrap().fill(0.5);
    binding.run().unwrap();
    binding.output_f32("y").unwrap().to_vec()
}

#[test]
fn weights_are_found_in_a_directory_in_memory_and_beside_a_model_file() {
    in_time(|| {
        let dir = tempfile::tempdir().unwrap();
        let program = with_weights_file(dir.path());
        let expected = [1.5, 2.5, 3.5, 4.5, 5.5, 6.5];
        let runtime = runtime();
        let load = |weights: Weights| Session::load(&runtime, &program, &weights, &options());
        assert_eq!(run(&load(Weights::Directory(dir.path().to_path_buf())).unwrap()), expected);
        let bytes: Arc<[u8]> = std::fs::read(dir.path().join("model.safetensors")).unwrap().into();
        assert_eq!(run(&load(Weights::Memory(bytes)).unwrap()), expected);
        let model = dir.path().join("test.onnx");
        std::fs::write(&model, &program.bytes).unwrap();
        let signature = Some((&*program.inputs, &*program.outputs));
        assert_eq!(run(&Session::load_file(&runtime, &model, signature, &options()).unwrap()), expected);

        let error = load(Weights::Inside).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
        let error = load(Weights::Directory(dir.path().join("absent"))).unwrap_err();
        assert!(matches!(error, RuntimeError::Io { .. }), "{error}");
    });
}

#[test]
fn a_model_that_is_not_its_program_is_refused() {
    in_time(|| {
        let good = program(
            &[spec("x", &[2, 3])],
            &[spec("y", &[2, 3])],
            vec![node("", "Neg", &["x"], "y")],
            vec![],
            vec![],
        );
        let load = |change: &dyn Fn(&mut OnnxProgram)| {
            let mut altered = good.clone();
            change(&mut altered);
            Session::load(&runtime(), &altered, &Weights::Inside, &options())
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        load(&|_| {}).unwrap();
        let error = load(&|p| p.inputs[0].shape = [3, 2].into()).unwrap_err();
        assert!(error.contains("input `x` is f32(2, 3) in the model, expected f32(3, 2)"), "{error}");
        let error = load(&|p| p.outputs[0].dtype = DType::I64).unwrap_err();
        assert!(error.contains("output `y`"), "{error}");
        let error = load(&|p| p.outputs.push(spec("z", &[1]))).unwrap_err();
        assert!(error.contains("no output named `z`"), "{error}");
        let error = load(&|p| p.inputs.clear()).unwrap_err();
        assert!(error.contains("input `x` is present in the model, expected absent"), "{error}");
        let error = load(&|p| p.bytes.truncate(20)).unwrap_err();
        assert!(error.contains("cannot load program `test`"), "{error}");
    });
}

/// `y = 2 x` and `both`, which is `y` and `x` one after the other, for rows `x` (N, 3).
fn open_program() -> OpenProgram {
    let emitted = |n| {
        let b = Builder::new("test");
        let x = b.input("x", Type::f32([n, 3]));
        let y = x * 2.0;
        b.output("y", y);
        b.output("both", y.concat(&[x], 0));
        b.finish().unwrap().emit(graph_builder::Weights::Inputs).unwrap()
    };
    OpenProgram::of((5, &emitted(5)), (7, &emitted(7))).unwrap()
}

#[test]
fn views_of_one_open_session_run_at_their_own_batch_sizes() {
    in_time(|| {
        let open = open_program();
        let session = OpenSession::load(&runtime(), &open, &Weights::Inside, &options()).unwrap();
        let view = |n| session.at(&open.inputs_at(n), &open.outputs_at(n)).unwrap();
        let mut bindings = [1, 4].map(|n| Binding::owned(&view(n)).unwrap());
        drop(session);
        for round in 0..3 {
            for (binding, n) in bindings.iter_mut().zip([1, 4]) {
                let value = (round * 10 + n) as f32;
                binding.input_f32("x").unwrap().fill(value);
                binding.run().unwrap();
                assert_eq!(binding.output_f32("y").unwrap(), vec![2.0 * value; 3 * n]);
                let both = [vec![2.0 * value; 3 * n], vec![value; 3 * n]].concat();
                assert_eq!(binding.output_f32("both").unwrap(), both);
            }
        }
    });
}

#[test]
fn an_open_model_is_no_session_and_a_view_must_fit_it() {
    in_time(|| {
        let (open, runtime) = (open_program(), runtime());
        let fixed = OnnxProgram {
            name: open.name.clone(),
            bytes: open.bytes.clone(),
            inputs: open.inputs_at(2),
            outputs: open.outputs_at(2),
            weights_file: None,
            native_ops: vec![],
            native_operands: BTreeMap::new(),
            unrepeatable: vec![],
        };
        let error = Session::load(&runtime, &fixed, &Weights::Inside, &options()).unwrap_err().to_string();
        assert!(
            error.contains("input `x` is f32(N, 3) in the model") && error.contains("OpenSession"),
            "{error}"
        );
        let session = OpenSession::load(&runtime, &open, &Weights::Inside, &options()).unwrap();
        let refused = |inputs: &[TensorSpec], outputs: &[TensorSpec]| {
            session.at(inputs, outputs).map(|_| ()).unwrap_err().to_string()
        };
        let error = refused(&open.inputs_at(2), &open.outputs_at(3));
        assert!(
            error.contains("output `y` is f32(N, 3) where N is 2 in the model, expected f32(3, 3)"),
            "{error}"
        );
        let error = refused(&[spec("x", &[2, 4])], &open.outputs_at(2));
        assert!(error.contains("expected f32(2, 4)"), "{error}");
        assert!(refused(&open.inputs_at(2), &[]).contains("output `y` is present"), "an output is missing");
        assert!(refused(&[spec("z", &[2, 3])], &[]).contains("no input named `z`"));
    });
}

#[test]
fn the_rewritten_graph_and_a_profile_are_written_on_request() {
    in_time(|| {
        let dir = tempfile::tempdir().unwrap();
        let program = with_weights_file(dir.path());
        let optimized = dir.path().join("optimized.onnx");
        let options = SessionOptions {
            profile: Some(dir.path().join("profile")),
            optimized_model_path: Some(optimized.clone()),
            optimization: Optimization::Basic,
            ..options()
        };
        let weights = Weights::Directory(dir.path().to_path_buf());
        let session = Session::load(&runtime(), &program, &weights, &options).unwrap();
        run(&session);
        assert!(optimized.is_file());
        let profile = session.finish_profile().unwrap();
        assert!(profile.starts_with(dir.path()) && profile.is_file(), "{}", profile.display());
    });
}

#[test]
fn a_gpu_provider_is_refused_before_anything_is_loaded() {
    let program = program(&[], &[], vec![], vec![], vec![]);
    let options =
        SessionOptions { provider: Provider::Cuda(crate::provider::CudaOptions::default()), ..options() };
    let error = Session::load(&runtime(), &program, &Weights::Inside, &options).unwrap_err();
    assert!(matches!(error, RuntimeError::ProviderUnavailable { .. }), "{error}");
}

#[test]
fn many_threads_may_load_at_once() {
    in_time(|| {
        let dir = tempfile::tempdir().unwrap();
        let program = &with_weights_file(dir.path());
        let weights = &Weights::Directory(dir.path().to_path_buf());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..4 {
                        Session::load(&runtime(), program, weights, &options()).unwrap();
                    }
                });
            }
        });
    });
}
