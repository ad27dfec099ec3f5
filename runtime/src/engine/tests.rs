use graph_builder::{Builder, OnnxProgram, OpenProgram, Type};

use super::*;
use crate::binding::Binding;
use crate::cuda::kernels::{Architecture, RANDOM};
use crate::file::Placement;
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

fn weights_file(file: &Path, source: FileStamp) -> WeightsFile<'_> {
    WeightsFile { file, source, placement: Placement::Copy }
}

fn write_engine(
    directory: &Path,
    programs: &[(usize, &OnnxProgram)],
    weights: Option<&Path>,
    notes: EngineNotes,
) -> Result<EngineManifest> {
    let weights = weights.map(|path| Ok(weights_file(path, FileStamp::of(path, None)?))).transpose()?;
    EngineDraft::new(directory, programs, weights, notes)?.publish()
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
    fs::write(engine.join(MANIFEST), manifest.replace("\"format\": 2", "\"format\": 99")).unwrap();
    assert!(open().unwrap_err().contains("format 99, this program reads 2"));
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

#[test]
fn a_draft_can_be_run_and_is_seen_by_nobody_until_it_is_published() {
    in_time(|| {
        let dir = tempfile::tempdir().unwrap();
        let (weights, engine) = (dir.path().join("any.bin"), dir.path().join("engine"));
        let program = program_with_weights(&weights);
        let stamp = FileStamp::of(&weights, None).unwrap();
        let draft = |notes| {
            EngineDraft::new(&engine, &[(1, &program)], Some(weights_file(&weights, stamp.clone())), notes)
        };
        drop(draft(notes()).unwrap());
        assert_eq!(files(dir.path()), ["any.bin"], "a build that was given up leaves nothing");
        let mut draft = draft(notes()).unwrap();
        assert!(!engine.exists());
        draft.engine().unwrap().session(&runtime(), "test", 1, &SessionOptions::default()).unwrap();
        assert!(draft.add_compiled("test", &[1], "test-b1-compiled.onnx").is_err(), "nothing was compiled");
        for (name, text) in [("test-b1-compiled.onnx", "model"), ("test-b1-compiled_1.engine", "engine")] {
            fs::write(draft.directory().join(name), text).unwrap();
        }
        draft.add_compiled("test", &[1], "test-b1-compiled.onnx").unwrap();
        let manifest = draft.publish().unwrap();
        assert_eq!(files(dir.path()), ["any.bin", "engine"]);
        assert_eq!(manifest.programs[0].compiled.as_ref().unwrap().files.len(), 2);
        let opened = Engine::open(&engine).unwrap();
        opened.verify().unwrap();
        // Altered at the same size, which nothing but its hash can tell.
        fs::write(engine.join("test-b1-compiled_1.engine"), "Engine").unwrap();
        let altered = Engine::open(&engine).unwrap().verify().unwrap_err().to_string();
        assert!(altered.contains("test-b1-compiled_1.engine has sha256"), "{altered}");
        fs::write(engine.join("test-b1-compiled_1.engine"), "engine").unwrap();

        // Machine code goes with it.
        let place = dir.path().join("next");
        let mut next =
            EngineDraft::new(&place, &[(1, &program)], Some(weights_file(&weights, stamp)), notes()).unwrap();
        next.add_kernels(&RANDOM, Architecture::SM_90, b"code").unwrap();
        let manifest = next.publish().unwrap();
        assert_eq!(manifest.kernels[0].file, "random-sm_90.cubin");
        let next = Engine::open(&place).unwrap();
        next.verify().unwrap();
        fs::write(next.directory().join("random-sm_90.cubin"), "edoc").unwrap();
        assert!(next.verify().unwrap_err().to_string().contains("random-sm_90.cubin"));

        fs::remove_file(engine.join("test-b1-compiled_1.engine")).unwrap();
        assert!(Engine::open(&engine).unwrap_err().to_string().contains("compiled_1.engine"));
    });
}

#[test]
fn drafts_of_killed_builds_are_removed_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let (weights, engine) = (dir.path().join("any.bin"), dir.path().join("engine"));
    let program = program_with_weights(&weights);
    let stamp = FileStamp::of(&weights, None).unwrap();
    let alive =
        EngineDraft::new(&engine, &[(1, &program)], Some(weights_file(&weights, stamp.clone())), notes())
            .unwrap();
    // A process that is killed holds no lock any more, whenever that was.
    let killed = dir.path().join(".engine-killed");
    fs::create_dir(&killed).unwrap();
    fs::write(killed.join("step-b1.onnx"), "half").unwrap();
    let begun = dir.path().join(".engine-begun");
    fs::create_dir(&begun).unwrap();
    let second = dir.path().join("second");
    EngineDraft::new(&second, &[(1, &program)], Some(weights_file(&weights, stamp)), notes())
        .unwrap()
        .publish()
        .unwrap();
    assert!(!killed.exists() && !begun.exists() && alive.directory().exists());
    assert_eq!(files(&second), ["engine.json", "test-b1.onnx", "w.bin"]);
    alive.publish().unwrap();
    assert_eq!(files(&engine), files(&second));
}

#[test]
fn batch_sizes_share_what_was_compiled_of_the_open_program() {
    in_time(|| {
        let emitted = |n| {
            let b = Builder::new("double");
            let x = b.input("x", Type::f32([n, 2]));
            b.output("y", (x * 2.0).reshape([2 * n]));
            b.finish().unwrap().emit(graph_builder::Weights::Inputs).unwrap()
        };
        let (one, four) = (emitted(1), emitted(4));
        let open = OpenProgram::of((5, &emitted(5)), (7, &emitted(7))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("engine");
        let mut draft = EngineDraft::new(&place, &[(1, &one), (4, &four)], None, notes()).unwrap();
        draft.add_open(&open).unwrap();
        let engine = draft.engine().unwrap();
        let loaded = engine.open_session(&runtime(), "double", &SessionOptions::default()).unwrap();
        for p in &engine.manifest().programs {
            let mut binding = Binding::owned(&loaded.at(&p.inputs, &p.outputs).unwrap()).unwrap();
            binding.input_f32("x").unwrap().fill(p.batch as f32);
            binding.run().unwrap();
            assert_eq!(binding.output_f32("y").unwrap(), vec![2.0 * p.batch as f32; 2 * p.batch]);
        }
        let error = engine.open_session(&runtime(), "single", &SessionOptions::default()).unwrap_err();
        assert!(error.to_string().contains("no program single whose batch size is open"), "{error}");
        for (name, text) in [("double.tensorrt.onnx", "model"), ("double.tensorrt_1.engine", "engine")] {
            fs::write(draft.directory().join(name), text).unwrap();
        }
        draft.add_compiled("double", &[1, 4], "double.tensorrt.onnx").unwrap();
        let manifest = draft.publish().unwrap();
        assert_eq!(manifest.programs[0].compiled, manifest.programs[1].compiled);
        let opened = Engine::open(&place).unwrap();
        opened.verify().unwrap();
        let compiled = ["double.tensorrt.onnx", "double.tensorrt_1.engine"];
        let programs = ["double-b1.onnx", "double-b4.onnx", "double.onnx"];
        assert_eq!(files(&place), [&programs[..], &compiled, &["engine.json"]].concat());
        // On the CPU the fixed programs run.
        let opened = Engine::open(&place).unwrap();
        let sessions = opened.sessions(&runtime(), "double", &[4, 1], &SessionOptions::default()).unwrap();
        assert_eq!(sessions.iter().map(|s| s.inputs()[0].shape.dims()[0]).collect::<Vec<_>>(), [4, 1]);
        fs::write(place.join("double.onnx"), "other").unwrap();
        assert!(Engine::open(&place).unwrap_err().to_string().contains("double.onnx has 5 bytes"));
        // Without them nothing is left of what was compiled.
        fs::write(place.join("double.onnx"), &open.bytes).unwrap();
        write_engine(&place, &[(1, &one)], None, notes()).unwrap();
        assert_eq!(files(&place), ["double-b1.onnx", "engine.json"]);
    });
}

#[test]
fn a_stamp_reads_a_file_again_only_when_it_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w");
    fs::write(&path, "one").unwrap();
    let first = FileStamp::of(&path, None).unwrap();
    let believed = FileStamp { sha256: "believed".to_owned(), ..first.clone() };
    assert_eq!(
        FileStamp::of(&path, Some(&believed)).unwrap(),
        believed,
        "size and time are those of the stamp"
    );
    fs::write(&path, "three").unwrap();
    let second = FileStamp::of(&path, Some(&believed)).unwrap();
    assert!(second.sha256 != first.sha256 && second.sha256 != believed.sha256);
}
