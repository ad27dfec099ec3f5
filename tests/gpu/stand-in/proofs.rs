//! What is proven with the stand-ins; run by the tests of the parent module.

use std::collections::BTreeSet;
use std::sync::Arc;

use graph_builder::{DType, NativeKernel, NativeName, OpenProgram, Precision, Shape};
use models::{DitConfig, Guidance, ProgramKind, program};
use runtime::cuda::libraries::NVRTC;
use runtime::cuda::{DeviceArena, Gpu};
use runtime::{
    Arena, ArenaLayout, OpenSession, Recording, Runtime, RuntimeError, RuntimeOptions, Session,
    SessionOptions, Weights,
};

use crate::kernels;
use crate::kernels::sessions::on_cuda;

/// Lets the threads and blocks of kernels take turns in the opposite order, or in order again.
#[allow(unsafe_code, reason = "a proof's process has one thread that works")]
fn backwards(on: bool) {
    const VARIABLE: &str = "MUDIT_STAND_IN_BACKWARDS";
    // SAFETY: nothing else in the process reads or changes the environment meanwhile.
    unsafe { if on { std::env::set_var(VARIABLE, "1") } else { std::env::remove_var(VARIABLE) } }
}

fn runtime() -> Arc<Runtime> {
    let options = RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() };
    Runtime::start(&options).unwrap_or_else(|e| panic!("{e}"))
}

/// Loads programs of DiT-XL/2 with CPU fall-back disabled, by function bodies and by our kernels, and asserts where their
/// nodes are, and that runs by our kernels are recorded as CUDA graphs when asked for.
fn is_placed(kind: ProgramKind, guidance: Guidance, batch: usize, precisions: &[Precision]) {
    let runtime = runtime();
    for precision in precisions {
        is_placed_in(&runtime, *precision, kind, guidance, batch);
    }
}

#[allow(clippy::print_stdout, reason = "a proof tells its figures")]
fn is_placed_in(
    runtime: &Arc<Runtime>,
    precision: Precision,
    kind: ProgramKind,
    guidance: Guidance,
    batch: usize,
) {
    let model = DitConfig::resolve("DiT-XL/2").unwrap();
    let graph = program(&model, kind, batch, guidance).unwrap().optimised().unwrap();
    let emitted = graph.in_precision(precision).unwrap().emit(graph_builder::Weights::Inputs).unwrap();
    emitted.check_cuda(&|_| NativeKernel::Body).unwrap_or_else(|e| panic!("{kind} {precision}: {e}"));
    for native_kernels in [false, true] {
        let provider = if native_kernels { "cuda+graph" } else { "cuda" };
        let options = SessionOptions { provider: provider.parse().unwrap(), ..on_cuda(native_kernels) };
        let session = Session::load(runtime, &emitted, &Weights::Inside, &options)
            .unwrap_or_else(|e| panic!("{kind} {precision}: {e}"));
        let recording = if native_kernels { Recording::On } else { Recording::Off };
        assert_eq!(session.recording(), &recording, "{kind} {precision}");
        let placement = session.placement().unwrap_or_else(|e| panic!("{e}"));
        let elsewhere: Vec<_> =
            placement.elsewhere("CUDAExecutionProvider").map(ToString::to_string).collect();
        assert!(elsewhere.is_empty(), "{kind} {precision}: not on CUDA: {elsewhere:#?}");
        let ours: Vec<&str> = placement
            .nodes
            .iter()
            .filter(|n| n.domain == "mudit")
            .map(|n| NativeName::parse(&n.op).unwrap().op)
            .collect();
        let expected = if native_kernels { emitted.native_ops.as_slice() } else { &[] };
        let expected: BTreeSet<&str> = expected.iter().map(String::as_str).collect();
        assert_eq!(ours.iter().copied().collect::<BTreeSet<_>>(), expected, "{kind} {precision}");
        let (all, most) = (placement.nodes.len(), if native_kernels { 2000 } else { 20_000 });
        assert!((200..most).contains(&all), "{kind} {precision}: {all} nodes");
        println!("{kind} {precision}, {guidance:?}, batch {batch}: {all} nodes, {} of them ours", ours.len());
    }
}

const LOW: [Precision; 2] = [Precision::Bf16, Precision::F16];
/// As the published samples are guided.
const GUIDED: Guidance = Guidance::First(3);

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn step_is_placed() {
    is_placed(ProgramKind::Step, Guidance::Off, 2, &Precision::ALL);
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn guided_steps_are_placed() {
    is_placed(ProgramKind::Step, GUIDED, 2, &LOW);
    is_placed(ProgramKind::StepRows, GUIDED, 2, &LOW);
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn large_batches_are_placed() {
    for kind in [ProgramKind::Step, ProgramKind::DenoiseCfg] {
        is_placed(kind, GUIDED, 64, &LOW);
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn denoise_cfg_is_placed() {
    is_placed(ProgramKind::DenoiseCfg, GUIDED, 2, &Precision::ALL);
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn train_step_is_placed() {
    is_placed(ProgramKind::TrainStep, Guidance::Off, 2, &Precision::ALL);
}

fn layout() -> Arc<ArenaLayout> {
    let entries = [("w", Shape::from([3, 5])), ("b", Shape::from([7]))];
    Arc::new(ArenaLayout::new(entries.map(|(n, s)| (n.to_owned(), s))).unwrap())
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn memory_round_trip() {
    let gpu = Gpu::open(0).unwrap();
    assert_eq!(gpu.info().architecture(), "sm_80");
    let mut host = Arena::zeros(layout()).unwrap();
    for view in host.views_mut() {
        for (i, value) in view.iter_mut().enumerate() {
            *value = 1.0 / (i + 3) as f32;
        }
    }
    for (dtype, tolerance) in [(DType::F32, 0.0), (DType::F16, 5e-4), (DType::Bf16, 4e-3)] {
        let device = DeviceArena::zeros(&gpu, layout(), dtype, "a proof").unwrap();
        let second = DeviceArena::zeros(&gpu, layout(), dtype, "a proof").unwrap();
        device.upload(&host).unwrap();
        second.copy_from(&device).unwrap();
        let mut back = Arena::zeros(layout()).unwrap();
        second.download(&mut back).unwrap();
        for ((name, _, want), (_, _, got)) in host.iter().zip(back.iter()) {
            for (want, got) in want.iter().zip(got) {
                assert!((want - got).abs() <= tolerance * want, "{name} {dtype}: {got} instead of {want}");
            }
        }
    }
    let error = Gpu::open(1).unwrap_err().to_string();
    assert!(error.contains("no GPU number 1: the driver sees 1"), "{error}");
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn out_of_memory() {
    let gpu = Gpu::open(0).unwrap();
    let large = Arc::new(ArenaLayout::new([("w".to_owned(), Shape::from([300_000]))]).unwrap());
    let error = DeviceArena::zeros(&gpu, large, DType::F32, "the first moments").unwrap_err();
    assert!(
        matches!(error, RuntimeError::GpuOutOfMemory { bytes: 1_200_000, free: 1_000_000, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("the first moments"), "{error}");
    // What fits is had, and given back.
    for _ in 0..3 {
        DeviceArena::zeros(&gpu, layout(), DType::F32, "a proof").unwrap();
    }
    assert_eq!(gpu.memory().unwrap(), (1_000_000, 1_000_000));
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn fused_ops() {
    let gpu = Gpu::open(0).unwrap();
    kernels::ops::every_fused_op(&gpu, &backwards);
    kernels::ops::large_heads_are_refused(&gpu);
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn noise() {
    kernels::random::noise_is_the_hosts(&Gpu::open(0).unwrap());
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn update() {
    kernels::update::update_is_the_hosts(&Gpu::open(0).unwrap(), &backwards);
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn fused_nodes() {
    let runtime = runtime();
    kernels::sessions::every_fused_op(&runtime);
    kernels::sessions::tokens_of_other_types(&runtime);
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn no_compiler() {
    let model = DitConfig::resolve("DiT-S/2").unwrap();
    let graph = program(&model, ProgramKind::Step, 1, Guidance::Off).unwrap().optimised().unwrap();
    let emitted = graph.emit(graph_builder::Weights::Inputs).unwrap();
    let runtime = runtime();
    let load = |native_kernels| Session::load(&runtime, &emitted, &Weights::Inside, &on_cuda(native_kernels));
    if let Some(found) = NVRTC.opened() {
        return eprintln!("SKIPPED: no_compiler: this system has one, at {}", found.path.display());
    }
    let refusal = load(true).unwrap_err().to_string();
    assert!(refusal.contains("NVRTC") && refusal.contains("nvidia-cuda-nvrtc"), "{refusal}");
    load(false).unwrap();
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn recorded_runs() {
    kernels::sessions::recorded_runs(&runtime());
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn scratch() {
    kernels::memory::scratch_stays_where_it_is(&Gpu::open(0).unwrap());
}

/// A model whose heads are too large for the kernels is refused before ONNX Runtime sees it, with op and layer; by function
/// bodies it runs.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn large_heads() {
    let resolved = DitConfig::resolve("DiT-S/4@8x8x4:10").unwrap();
    let model = |hidden_size| DitConfig { hidden_size, num_heads: 2, depth: 1, ..resolved.clone() };
    let emitted = |hidden_size, batch| {
        let graph = program(&model(hidden_size), ProgramKind::Step, batch, Guidance::Off).unwrap();
        graph.optimised().unwrap().emit(graph_builder::Weights::Inputs).unwrap()
    };
    let open = |hidden_size| {
        OpenProgram::of((97, &emitted(hidden_size, 97)), (101, &emitted(hidden_size, 101))).unwrap()
    };
    let (runtime, inside) = (runtime(), Weights::Inside);
    let load = |native| Session::load(&runtime, &emitted(272, 3), &inside, &on_cuda(native)).map(drop);
    let load_open = |size| OpenSession::load(&runtime, &open(size), &inside, &on_cuda(true)).map(drop);
    for (way, refused) in [("a program", load(true)), ("an open one", load_open(272))] {
        let text = refused.unwrap_err().to_string();
        for part in ["Attention of `blocks.0.attn", "136 features a head; at most 128 are taken"] {
            assert!(text.contains(part), "{way}: {text}");
        }
    }
    load(false).unwrap();
    load_open(256).unwrap();
}
