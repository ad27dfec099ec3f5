//! The proofs that need an NVIDIA GPU: mudit's kernels, whole programs, sampling, training and serving there, against the
//! CPU. Without a GPU each says that it was skipped; with `MUDIT_NEEDS_GPU` set it fails. `tests/gpu/run.sh` runs them.
#![allow(clippy::unwrap_used, reason = "a proof fails by panicking")]

mod commands;
mod engines;
#[path = "../kernels/mod.rs"]
mod kernels;
mod runs;
mod training;

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use graph_builder::Weights;
use models::inception::{SIDE, Taps, features};
use mudit_tests::Feeds;
use mudit_tests::difference::relative_l2;
use mudit_tests::draws::Draws;
use mudit_tests::execution::{execute, options};
use runtime::cuda::Gpu;
use runtime::{CudaOptions, Provider, Runtime, RuntimeOptions};

/// The provider, when a GPU can run programs.
fn on_gpu(what: &str) -> Option<Provider> {
    let provider = Provider::Cuda(CudaOptions::default());
    match provider.check() {
        Ok(()) => Some(provider),
        Err(reason) if std::env::var_os("MUDIT_NEEDS_GPU").is_none() => {
            let reason = reason.to_string();
            // Past the harness, which keeps what a test that passes prints.
            let line = format!("SKIPPED: {what}: {}\n", reason.split(';').next().unwrap_or_default());
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            None
        }
        Err(reason) => panic!("{what}: {reason}"),
    }
}

/// The process's ONNX Runtime with the GPU's providers.
#[allow(clippy::print_stderr, reason = "nothing is fetched silently")]
fn runtime() -> Arc<Runtime> {
    static STARTED: OnceLock<Arc<Runtime>> = OnceLock::new();
    let start = || {
        let options = RuntimeOptions { gpu: true, offline: false, progress: &|line| eprintln!("{line}") };
        Runtime::start(&options).unwrap_or_else(|e| panic!("{e}"))
    };
    STARTED.get_or_init(start).clone()
}

fn fixture() -> PathBuf {
    let tests = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(tests).join("fixtures/dit-d48-h4-p2")
}

#[test]
fn every_fused_op_computes_what_the_interpreter_computes() {
    if on_gpu("fused ops").is_none() {
        return;
    }
    // Blocks run in any order there.
    let gpu = Gpu::open(0).unwrap();
    kernels::ops::every_fused_op(&gpu, &|_| ());
    kernels::ops::of_published_shapes(&gpu, graph_builder::DType::Bf16, true);
    kernels::ops::large_heads_are_refused(&gpu);
    kernels::memory::scratch_stays_where_it_is(&gpu);
}

#[test]
fn fused_ops_are_nodes_of_the_provider() {
    if on_gpu("nodes of fused ops").is_none() {
        return;
    }
    kernels::sessions::every_fused_op(&runtime());
    kernels::sessions::tokens_of_other_types(&runtime());
}

#[test]
fn runs_recorded_as_cuda_graphs_give_the_bits_of_plain_ones() {
    if on_gpu("recorded runs").is_none() {
        return;
    }
    kernels::sessions::recorded_runs(&runtime());
}

#[test]
fn noise_and_update_are_the_hosts() {
    if on_gpu("noise and update").is_none() {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    kernels::random::noise_is_the_hosts(&gpu);
    kernels::update::update_is_the_hosts(&gpu, &|_| ());
}

#[test]
fn feature_networks_answer_as_on_the_cpu() {
    if on_gpu("feature networks").is_none() {
        return;
    }
    let taps = Taps { spatial: true, logits: true };
    let program = features(2, SIDE, taps).unwrap().optimised().unwrap().emit(Weights::Inputs).unwrap();
    let mut draws = Draws::new(5);
    // Small and positive: variances are parameters, too.
    let feeds: Feeds = program
        .inputs
        .iter()
        .map(|spec| (spec.name.clone(), draws.uniform(spec.shape.dims(), 0.001, 0.05)))
        .collect();
    let run = |options| execute(&runtime(), &program, &runtime::Weights::Inside, &feeds, &options).outputs;
    let (cpu, gpu) = (run(options(true)), run(kernels::sessions::on_cuda(true)));
    for (name, got) in &gpu {
        let error = relative_l2(got, &cpu[name]);
        println!("{name}: {error:.1e} from the CPU's");
        assert!(error <= 1e-4, "{name}: {error:e}");
    }
}
