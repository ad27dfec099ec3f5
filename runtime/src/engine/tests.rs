use super::*;
use crate::binding::Binding;
use crate::test_models::{external, in_time, node, program, runtime, spec};

/// `y = x + w`, with `w` = 1, 2, 3 at the start of a weights file.
fn program_with_weights(weights: &Path) -> OnnxProgram {
    fs::write(weights, bytemuck::cast_slice(&[1.0_f32, 2.0, 3.0])).unwrap();
    let mut program = program(
        &[spec("x", &[3])],
        &[spec("y", &[3])],
        vec![node("", "Add", &["x", "w"], "y")],
        vec![],
        vec![external("w", &[3], "w.bin", 0)],
    );
    program.weights_file = Some("w.bin".to_owned());
    program
}

fn notes() -> EngineNotes {
    EngineNotes { extra: serde_json::json!({"model": "tiny"}), ..EngineNotes::default() }
}

fn files(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn an_engine_is_written_opened_and_run() {
    in_time(|| {
        let dir = tempfile::tempdir().unwrap();
        let (weights, engine) = (dir.path().join("any.bin"), dir.path().join("engine"));
        let program = program_with_weights(&weights);
        let manifest = write_engine(&engine, &[(1, &program)], Some(&weights), notes()).unwrap();
        assert_eq!(files(&engine), ["engine.json", "test-b1.onnx", "w.bin"]);
        assert_eq!(files(dir.path()), ["any.bin", "engine"], "no litter");
        let opened = Engine::open(&engine).unwrap();
        assert_eq!(opened.manifest(), &manifest);
        opened.verify().unwrap();
        let session = opened.session(&runtime(), "test", 1, &SessionOptions::default()).unwrap();
        let mut binding = Binding::owned(&session).unwrap();
        binding.run().unwrap();
        assert_eq!(binding.output_f32("y").unwrap(), [1.0, 2.0, 3.0]);
        let error =
            opened.session(&runtime(), "test", 2, &SessionOptions::default()).unwrap_err().to_string();
        assert!(error.contains("only test at batch 1"), "{error}");
    });
}

#[test]
fn a_second_engine_replaces_the_first_and_keeps_foreign_files() {
    let dir = tempfile::tempdir().unwrap();
    let (weights, engine) = (dir.path().join("any.bin"), dir.path().join("engine"));
    let program = program_with_weights(&weights);
    write_engine(&engine, &[(1, &program), (2, &program)], Some(&weights), notes()).unwrap();
    fs::write(engine.join("notes.txt"), "mine").unwrap();
    write_engine(&engine, &[(4, &program)], Some(&engine.join("w.bin")), notes()).unwrap();
    assert_eq!(files(&engine), ["engine.json", "notes.txt", "test-b4.onnx", "w.bin"]);
    Engine::open(&engine).unwrap().verify().unwrap();
}

#[test]
fn altered_cut_and_foreign_engines_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (weights, engine) = (dir.path().join("any.bin"), dir.path().join("engine"));
    let program = program_with_weights(&weights);
    write_engine(&engine, &[(1, &program)], Some(&weights), notes()).unwrap();
    let open = || Engine::open(&engine).and_then(|e| e.verify()).map_err(|e| e.to_string());
    let model = engine.join("test-b1.onnx");
    let mut bytes = fs::read(&model).unwrap();
    bytes[10] ^= 1;
    fs::write(&model, &bytes).unwrap();
    assert!(open().unwrap_err().contains("test-b1.onnx has sha256"));
    fs::write(&model, &bytes[1..]).unwrap();
    assert!(open().unwrap_err().contains("bytes, engine.json says"));
    let manifest = fs::read_to_string(engine.join(MANIFEST)).unwrap();
    fs::write(engine.join(MANIFEST), manifest.replace("\"format\": 1", "\"format\": 99")).unwrap();
    assert!(open().unwrap_err().contains("format 99, this program reads 1"));
    fs::remove_file(engine.join(MANIFEST)).unwrap();
    assert!(open().unwrap_err().contains("engine.json"));
}

#[test]
fn a_failure_leaves_no_engine_and_no_litter() {
    let dir = tempfile::tempdir().unwrap();
    let (weights, engine) = (dir.path().join("any.bin"), dir.path().join("engine"));
    let program = program_with_weights(&weights);
    let write = |weights: Option<&Path>| write_engine(&engine, &[(1, &program)], weights, notes());
    assert!(matches!(write(None), Err(RuntimeError::Engine { .. })));
    assert!(matches!(write(Some(&dir.path().join("absent"))), Err(RuntimeError::Io { .. })));
    assert_eq!(files(dir.path()), ["any.bin"]);
}
