//! Engines that carry the kernels of another machine's compiler.

use graph_builder::{OnnxProgram, Weights};
use models::{Guidance, Model, ProgramKind, ProgramSpec};
use runtime::cuda::kernels::{Architecture, SOURCES};
use runtime::engine::{EngineDraft, EngineNotes};
use runtime::{Binding, CudaOptions, Engine, Provider, Recording, Runtime, RuntimeOptions, SessionOptions};

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn no_compiler() {
    let model = Model::resolve("DiT-S/4@8x8x4:10").unwrap();
    let graph = model.compiled(&ProgramSpec::new(ProgramKind::TrainStep, 1)).unwrap();
    let emitted = graph.emit(Weights::Inputs).unwrap();
    assert!(!emitted.native_ops.is_empty());
    let options = RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() };
    let runtime = Runtime::start(&options).unwrap();
    let provider = Provider::Cuda(CudaOptions::default());
    let options = SessionOptions { provider, ..SessionOptions::default() };
    let folder = tempfile::tempdir().unwrap();
    let build = |name: &str, architecture: Option<Architecture>| {
        let place = folder.path().join(name);
        let mut draft = EngineDraft::new(&place, &[(1, &emitted)], None, EngineNotes::default()).unwrap();
        for source in SOURCES.iter().filter(|_| architecture.is_some()) {
            // What the stand-in compiler would have given.
            let code = format!("stand-in {}\0", source.name);
            draft.add_kernels(source, architecture.unwrap(), code.as_bytes()).unwrap();
        }
        draft.publish().unwrap();
        Engine::open(place).unwrap().session(&runtime, "train-step", 1, &options)
    };
    for refused in [build("none", None), build("for another", Some(Architecture::SM_90))] {
        let refusal = refused.unwrap_err().to_string();
        assert!(refusal.contains("NVRTC") && refusal.contains("nvidia-cuda-nvrtc"), "{refusal}");
    }
    build("for this one", Some(Architecture::SM_80)).unwrap();
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn recorded() {
    let model = Model::resolve("DiT-S/4@8x8x4:10").unwrap();
    let emitted = |batch, guidance| {
        let graph = model.compiled(&ProgramSpec::new(ProgramKind::StepRows, batch).guided(guidance)).unwrap();
        graph.emit(Weights::Inputs).unwrap()
    };
    let options = RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() };
    let runtime = Runtime::start(&options).unwrap();
    let provider = Provider::Cuda(CudaOptions { cuda_graph: true, ..CudaOptions::default() });
    let options = SessionOptions { provider, ..SessionOptions::default() };
    let folder = tempfile::tempdir().unwrap();
    let safe = emitted(2, Guidance::All);
    assert!(safe.unrepeatable.is_empty(), "{:?}", safe.unrepeatable);
    let unsafe_ = OnnxProgram { unrepeatable: vec!["the node in question".to_owned()], ..safe.clone() };
    for (name, program, refused) in [("safe", &safe, false), ("unsafe", &unsafe_, true)] {
        let place = folder.path().join(name);
        EngineDraft::new(&place, &[(2, program)], None, EngineNotes::default()).unwrap().publish().unwrap();
        let session = Engine::open(place).unwrap().session(&runtime, "step-rows", 2, &options).unwrap();
        match session.recording() {
            Recording::On => assert!(!refused),
            Recording::Refused(reason) => {
                assert!(refused && reason.contains("the node in question"), "{reason}");
            }
            Recording::Off => panic!("it was asked for"),
        }
        let mut binding = Binding::owned(&session).unwrap();
        for _ in 0..3 {
            binding.run().unwrap();
        }
    }
}
