//! The real CUDA provider of ONNX Runtime, and mudit's own kernels, on a machine without a GPU: stand-ins for NVIDIA's
//! libraries let the provider load, give every node of a program its kernel and move memory. ONNX Runtime's kernels
//! compute nothing; mudit's run, compiled for the host.
//!
//! Each proof runs in a process of its own, because the libraries must be known before anything is loaded.
#![allow(clippy::unwrap_used, reason = "a proof fails by panicking")]

mod bindings;
mod build;
mod commands;
mod counts;
mod engines;
mod engines_of_tensorrt;
#[path = "../kernels/mod.rs"]
mod kernels;
mod networks;
mod proofs;
mod sampling;
mod traffic;
mod training;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use runtime::RuntimeOptions;
use runtime::cuda::libraries::{NVRTC, find_or_fetch_compiler};
use runtime::library::locate;

/// For one proof: loading DiT-XL/2's training step takes some ten seconds here.
const LIMIT: Duration = Duration::from_mins(5);

/// Folder of all stand-ins but NVRTC's.
const NO_COMPILER: &str = "stand-in-without-compiler";

/// The stand-ins and the ONNX Runtime they serve.
struct Stage {
    folder: PathBuf,
    onnx_runtime: PathBuf,
}

/// Builds the stand-ins once.
#[allow(clippy::print_stderr, reason = "nothing is fetched silently")]
fn stage() -> Result<&'static Stage, String> {
    static STAGE: OnceLock<Result<Stage, String>> = OnceLock::new();
    let prepare = || {
        let options = RuntimeOptions { gpu: true, offline: false, progress: &|line| eprintln!("{line}") };
        let library = locate(&options).map_err(|e| e.to_string())?;
        let provider = |name| library.provider_file(name).ok_or(format!("no provider {name}"));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stand-in");
        build::build(&provider("cuda")?, &provider("tensorrt")?, &folder)?;
        build::without_compiler(&folder, &folder.with_file_name(NO_COMPILER))?;
        // What the stand-in compiler gives must not lie with real machine code.
        drop(std::fs::remove_dir_all(folder.join("cache")));
        Ok(Stage { folder, onnx_runtime: library.path })
    };
    STAGE.get_or_init(prepare).as_ref().map_err(Clone::clone)
}

impl Stage {
    /// Lets a process know the stand-ins.
    fn environment<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command
            .env("MUDIT_CUDA_LIBRARIES", &self.folder)
            .env("MUDIT_CACHE", self.folder.join("cache"))
            .env("ORT_DYLIB_PATH", &self.onnx_runtime)
    }
}

/// The stage for a proof. A machine that lacks a compiler or the wheel says so aloud; with `CI` set it fails.
fn staged(name: &str) -> Option<&'static Stage> {
    match stage() {
        Ok(stage) => return Some(stage),
        Err(reason) if std::env::var_os("CI").is_none() => {
            // Past the harness, which keeps what a test that passes prints.
            std::io::stderr().write_all(format!("SKIPPED: {name}: {reason}\n").as_bytes()).unwrap();
        }
        Err(reason) => panic!("{name}: {reason}"),
    }
    None
}

/// Runs one of the proofs, by its path, in a process that knows the stand-ins.
fn proven(name: &str, variables: &[(&str, &str)]) {
    let Some(stage) = staged(name) else { return };
    let mut child = stage
        .environment(&mut Command::new(std::env::current_exe().unwrap()))
        .args(["--ignored", "--exact", name, "--nocapture"])
        .envs(variables.iter().copied())
        .spawn()
        .unwrap();
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{name}: {status}");
            return;
        }
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("{name} took longer than {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn every_node_of_step_is_placed_on_cuda() {
    proven("proofs::step_is_placed", &[]);
}

#[test]
fn every_node_of_guided_denoising_is_placed_on_cuda() {
    proven("proofs::denoise_cfg_is_placed", &[]);
}

#[test]
fn every_node_of_guided_steps_is_placed_on_cuda() {
    proven("proofs::guided_steps_are_placed", &[]);
}

#[test]
fn every_node_of_large_batches_is_placed_on_cuda() {
    proven("proofs::large_batches_are_placed", &[]);
}

#[test]
fn every_node_of_the_training_step_is_placed_on_cuda() {
    proven("proofs::train_step_is_placed", &[]);
}

#[test]
fn every_node_of_the_feature_networks_is_placed_on_cuda() {
    proven("networks::placed", &[]);
}

#[test]
fn values_go_to_the_device_and_come_back() {
    proven("proofs::memory_round_trip", &[]);
}

#[test]
fn memory_that_runs_out_is_an_error_with_numbers() {
    proven("proofs::out_of_memory", &[("MUDIT_STAND_IN_MEMORY", "1000000")]);
}

#[test]
fn arenas_on_the_device_are_used_in_place() {
    proven("bindings::arenas_on_the_device_are_used_in_place", &[]);
}

#[test]
fn arenas_of_the_host_cross_when_they_have_changed() {
    proven("bindings::arenas_of_the_host_cross_when_they_have_changed", &[]);
}

#[test]
fn the_next_runs_inputs_go_ahead_of_it() {
    // Everything at once; then with the stream for programs late, the one for transfers, and both.
    for late in ["", "1", "2", "12"] {
        proven("bindings::the_next_runs_inputs_go_ahead_of_it", &[("MUDIT_STAND_IN_LATE", late)]);
    }
}

#[test]
fn each_binding_is_recorded_for_itself() {
    proven("bindings::each_binding_is_recorded_for_itself", &[]);
}

#[test]
fn what_cannot_be_recorded_goes_without_and_says_why() {
    proven("bindings::what_cannot_be_recorded_goes_without_and_says_why", &[]);
}

#[test]
fn bindings_on_the_device_are_checked() {
    proven("bindings::bindings_on_the_device_are_checked", &[]);
}

#[test]
fn fused_ops_compute_what_the_interpreter_computes_in_every_type_and_order_of_threads() {
    proven("proofs::fused_ops", &[]);
}

#[test]
fn noise_has_the_hosts_bits() {
    proven("proofs::noise", &[]);
}

#[test]
fn the_update_has_the_hosts_bits_and_leaves_out_what_is_not_finite() {
    proven("proofs::update", &[]);
}

/// Runs proofs whose kernels are what the real NVRTC makes of them, PTX for PTX. Where there is none, says so aloud; with `CI`
/// set it is fetched.
#[allow(clippy::print_stderr, reason = "nothing is fetched silently")]
fn proven_as_ptx(name: &str, variables: &[(&str, &str)]) {
    let offline = std::env::var_os("CI").is_none();
    let options = RuntimeOptions { gpu: true, offline, progress: &|line| eprintln!("{line}") };
    match find_or_fetch_compiler(&options).map(|()| NVRTC.opened()) {
        Ok(Some(found)) => {
            let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ptx-cache");
            let path = found.path.canonicalize().unwrap();
            let ptx = [("MUDIT_STAND_IN_NVRTC", path.as_path()), ("MUDIT_CACHE", cache.as_path())];
            let ptx = ptx.map(|(name, path)| (name, path.to_str().unwrap()));
            proven(name, &[&ptx, variables].concat());
        }
        Err(reason) if offline => {
            std::io::stderr().write_all(format!("SKIPPED: {name} as PTX: {reason}\n").as_bytes()).unwrap();
        }
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn fused_ops_compute_what_the_interpreter_computes_as_ptx() {
    proven_as_ptx("proofs::fused_ops", &[]);
}

#[test]
fn fused_ops_are_nodes_of_the_cuda_provider_as_ptx() {
    proven_as_ptx("proofs::fused_nodes", &[]);
}

#[test]
fn fused_ops_compute_what_the_interpreter_computes_as_ptx_for_newer_gpus() {
    proven_as_ptx("proofs::fused_ops", &[("MUDIT_STAND_IN_CAPABILITY", "90")]);
}

#[test]
fn noise_and_update_have_the_hosts_bits_as_ptx() {
    proven_as_ptx("proofs::noise", &[]);
    proven_as_ptx("proofs::update", &[]);
}

#[test]
fn kernels_ask_of_memory_what_they_need_as_ptx() {
    let report = Path::new(env!("CARGO_TARGET_TMPDIR")).join("traffic");
    proven_as_ptx("traffic::no_more_than_needed", &[(traffic::REPORT, report.to_str().unwrap())]);
}

/// For proofs of training: no kernels but those of noise and update; every gradient is zero.
const UPDATES_ONLY: (&str, &str) = ("MUDIT_STAND_IN_UPDATES_ONLY", "1");

#[test]
fn a_checkpoint_goes_to_the_device_and_back() {
    proven("training::a_checkpoint_goes_to_the_device_and_back", &[UPDATES_ONLY]);
}

#[test]
fn steps_on_the_device_have_the_hosts_bits() {
    for late in ["", "1", "2", "12"] {
        proven(
            "training::steps_on_the_device_have_the_hosts_bits",
            &[UPDATES_ONLY, ("MUDIT_STAND_IN_LATE", late)],
        );
    }
}

#[test]
fn a_step_moves_a_batch_and_its_losses_over_the_bus_and_nothing_else() {
    proven("training::a_step_moves_a_batch_and_its_losses_over_the_bus_and_nothing_else", &[UPDATES_ONLY]);
}

#[test]
fn the_noise_of_a_step_is_drawn_on_the_device() {
    for late in ["", "1", "2", "12"] {
        proven(
            "training::the_noise_of_a_step_is_drawn_on_the_device",
            &[UPDATES_ONLY, ("MUDIT_STAND_IN_LATE", late)],
        );
    }
}

#[test]
fn inputs_are_drawn_on_the_device_or_given_by_the_host() {
    for late in ["", "1", "2", "12"] {
        proven(
            "bindings::inputs_are_drawn_on_the_device_or_given_by_the_host",
            &[("MUDIT_STAND_IN_LATE", late)],
        );
    }
}

#[test]
fn noise_of_samples_is_drawn_on_the_device() {
    proven("sampling::a_samplers_noise_is_drawn_on_the_device", &[]);
    proven("sampling::a_servers_noise_is_drawn_on_the_device", &[]);
}

#[test]
fn products_of_f32_are_rounded_only_when_asked_for() {
    proven("bindings::products_of_f32_are_rounded_only_when_asked_for", &[]);
}

#[test]
fn gradients_of_two_types_are_one_update() {
    proven("training::gradients_of_two_types_are_one_update", &[UPDATES_ONLY]);
}

#[test]
fn a_run_on_the_device_goes_on_on_the_host_and_back() {
    proven("training::a_run_on_the_device_goes_on_on_the_host_and_back", &[UPDATES_ONLY]);
}

#[test]
fn a_run_that_does_not_fit_says_what_would() {
    let memory = [UPDATES_ONLY, ("MUDIT_STAND_IN_MEMORY", "73800000")];
    proven("training::a_run_that_does_not_fit_says_what_would", &memory);
}

#[test]
fn fused_ops_are_nodes_of_the_cuda_provider_and_compute_what_their_cpu_twins_do() {
    proven("proofs::fused_nodes", &[]);
}

#[test]
fn a_session_that_asks_for_our_kernels_without_their_compiler_is_refused() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(NO_COMPILER);
    proven("proofs::no_compiler", &[("MUDIT_CUDA_LIBRARIES", folder.to_str().unwrap())]);
    proven("engines::no_compiler", &[("MUDIT_CUDA_LIBRARIES", folder.to_str().unwrap())]);
}

#[test]
fn heads_that_no_kernel_takes_are_refused_when_they_are_loaded() {
    proven("proofs::large_heads", &[]);
}

#[test]
fn engines_are_recorded_unless_their_build_found_what_forbids_it() {
    proven("engines::recorded", &[]);
}

#[test]
fn runs_recorded_as_cuda_graphs_give_the_bits_of_plain_ones() {
    proven("proofs::recorded_runs", &[]);
}

#[test]
fn scratch_memory_stays_where_it_is() {
    proven("proofs::scratch", &[]);
}
