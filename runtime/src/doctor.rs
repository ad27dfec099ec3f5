//! What this machine has: a list of checks, each with its state and, where something is missing, a remedy.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use serde::Serialize;

use crate::compiled::compiled_providers;
use crate::cuda::Gpu;
use crate::cuda::kernels::{Architecture, Compiler, RANDOM};
use crate::cuda::libraries::{self, CUFFT, CudaLibrary, DRIVER, Lookup, NCCL, NVRTC, TENSORRT_PLUGINS};
use crate::library::{self, Runtime, RuntimeOptions, cache_directory};
use crate::provider::{self, CudaOptions, Provider, TensorRtOptions};
use crate::wheel::Python;

/// Outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// There and usable.
    Ok,
    /// Not there.
    Missing,
    /// There, but not usable.
    Error,
}

/// One thing that was looked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked for.
    pub name: String,
    /// Whether it can be used.
    pub status: Status,
    /// What was found: version, path, number, or the reason why not.
    pub detail: String,
    /// What to do about it, where something is to be done.
    pub remedy: Option<String>,
    /// Whether training and sampling on the CPU need it.
    pub required: bool,
}

/// Looks for everything that programs can use. Fetches nothing and never panics.
pub fn report() -> Vec<Check> {
    let mut checks = runtime();
    checks.push(telemetry());
    checks.push(cache());
    checks.push(cpu());
    checks.push(cpu_features());
    checks.push(python_version());
    checks.push(pip());
    checks.extend(gpus());
    checks.extend(libraries::ALL.iter().map(|l| cuda_library(l)));
    checks.push(kernel_compiler());
    checks.push(f32_products());
    checks.extend(gpu_providers());
    checks
}

/// Whether TensorRT computes f32 in f32.
fn f32_products() -> Check {
    let (name, variable) = ("f32 products", provider::TF32);
    match std::env::var_os(variable) {
        Some(value) if value != "0" => {
            let remedy = format!("unset {variable}, or set it to 0");
            let detail = format!("{variable} lets TensorRT round them to 10 bits, so that it is refused");
            check(name, Status::Error, detail, Some(&remedy), false)
        }
        _ => check(name, Status::Ok, format!("f32, with TensorRT too ({variable}=0 there)"), None, false),
    }
}

fn check(
    name: &str,
    status: Status,
    detail: impl Into<String>,
    remedy: Option<&str>,
    required: bool,
) -> Check {
    Check {
        name: name.to_owned(),
        status,
        detail: detail.into(),
        remedy: remedy.map(str::to_owned),
        required,
    }
}

fn runtime() -> Vec<Check> {
    const NAME: &str = "ONNX Runtime";
    // A build for GPUs runs programs on the CPU as well: it is the one to tell of where it is there.
    let offline = RuntimeOptions { offline: true, ..RuntimeOptions::default() };
    let gpu = library::locate(&RuntimeOptions { gpu: true, ..offline }).is_ok();
    match Runtime::start(&RuntimeOptions { gpu, ..offline }) {
        Ok(runtime) => {
            let library = runtime.library();
            let detail = format!("{} ({}: {})", library.version, library.source, library.path.display());
            let providers = match compiled_providers(&runtime) {
                Ok(names) => check("ONNX Runtime providers", Status::Ok, names.join(", "), None, true),
                Err(e) => check("ONNX Runtime providers", Status::Error, e.to_string(), None, true),
            };
            vec![check(NAME, Status::Ok, detail, None, true), providers]
        }
        Err(crate::RuntimeError::Offline { what, from, .. }) => {
            let remedy = format!("the first command that runs a program fetches {what} from {from}");
            vec![check(NAME, Status::Missing, "not fetched yet", Some(&remedy), true)]
        }
        Err(e) => vec![check(NAME, Status::Error, e.to_string(), Some(crate::library::SET_PATH), true)],
    }
}

/// Whether ONNX Runtime sends anything. What it could send is what its builds for Linux have held since 1.31.
fn telemetry() -> Check {
    let detail = format!(
        "off ({}=1 is set before ONNX Runtime is loaded); without it, its builds since 1.31 would keep a device identifier \
         below ~/.cache/Microsoft and send it with versions, hardware and the models' ops to Microsoft",
        library::NO_TELEMETRY
    );
    match std::env::var_os(library::NO_TELEMETRY) {
        Some(value) if value == "1" => check("telemetry", Status::Ok, detail, None, false),
        _ => check("telemetry", Status::Error, "not forbidden", Some("report this: mudit forbids it"), false),
    }
}

fn cache() -> Check {
    const NAME: &str = "cache directory";
    let Some(path) = cache_directory() else {
        return check(NAME, Status::Missing, "none is known", Some("set MUDIT_CACHE"), false);
    };
    let detail = path.display().to_string();
    match try_to_write(&path) {
        Ok(()) => check(NAME, Status::Ok, detail, None, false),
        Err(error) => {
            let remedy = "set MUDIT_CACHE to a directory you may write to";
            check(NAME, Status::Error, format!("cannot write to {detail}: {error}"), Some(remedy), false)
        }
    }
}

/// Writes a file into a directory and leaves everything as it was.
fn try_to_write(directory: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = directory.ancestors().take_while(|path| !path.exists()).collect();
    let written = fs::create_dir_all(directory)
        .and_then(|()| tempfile::tempfile_in(directory))
        .and_then(|mut file| file.write_all(b"mudit").and_then(|()| file.flush()));
    for path in missing {
        // One that something else has been put into meanwhile stays.
        let _ = fs::remove_dir(path);
    }
    written
}

fn cpu() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    let model = model.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    check("CPU", Status::Ok, format!("{model}, {cores} hardware threads"), None, true)
}

fn cpu_features() -> Check {
    #[cfg(target_arch = "x86_64")]
    {
        let known = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ];
        let found: Vec<_> = known.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
        if found.is_empty() {
            return check("CPU features", Status::Missing, "no AVX2: programs run slowly", None, false);
        }
        check("CPU features", Status::Ok, found.join(", "), None, false)
    }
    #[cfg(not(target_arch = "x86_64"))]
    check("CPU features", Status::Ok, std::env::consts::ARCH, None, false)
}

fn python_version() -> Check {
    const REMEDY: &str = "only needed to fetch ONNX Runtime: install Python 3, or set ORT_DYLIB_PATH";
    match Python::of_the_system().run(&["--version"]) {
        Ok(output) if output.status.success() => {
            let version = String::from_utf8_lossy(&output.stdout);
            check("Python", Status::Ok, version.trim().trim_start_matches("Python "), None, false)
        }
        Ok(output) => check("Python", Status::Error, output.status.to_string(), Some(REMEDY), false),
        Err(_) => check("Python", Status::Missing, "no python3 on the path", Some(REMEDY), false),
    }
}

fn pip() -> Check {
    const REMEDY: &str = "only needed to fetch ONNX Runtime: Debian has it as python3-pip";
    let words = |output: &[u8]| {
        String::from_utf8_lossy(output).split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    match Python::of_the_system().run(&["-m", "pip", "--version"]) {
        Ok(output) if output.status.success() => check("pip", Status::Ok, words(&output.stdout), None, false),
        _ => check("pip", Status::Missing, "python3 -m pip does not work", Some(REMEDY), false),
    }
}

fn gpus() -> Vec<Check> {
    match Gpu::list() {
        Ok(list) if list.is_empty() => {
            vec![check("GPU", Status::Missing, "the driver sees none", Some("check `nvidia-smi`"), false)]
        }
        Ok(list) => {
            let name = |i: usize| if i == 0 { "GPU".to_owned() } else { format!("GPU {i}") };
            let found = list.iter().enumerate();
            found.map(|(i, gpu)| check(&name(i), Status::Ok, gpu.to_string(), None, false)).collect()
        }
        Err(_) if DRIVER.opened().is_none() => {
            vec![check("GPU", Status::Missing, "no CUDA driver", None, false)]
        }
        Err(e) => vec![check("GPU", Status::Error, e.to_string(), Some("check `nvidia-smi`"), false)],
    }
}

fn cuda_library(library: &CudaLibrary) -> Check {
    let needed = if std::ptr::eq(library, &raw const NCCL) {
        "only for training on several GPUs"
    } else if std::ptr::eq(library, &raw const CUFFT) {
        "not used by any program of mudit"
    } else if std::ptr::eq(library, &raw const TENSORRT_PLUGINS) || library.title.starts_with("TensorRT") {
        "only for provider `tensorrt`"
    } else {
        "only for NVIDIA GPUs"
    };
    match library.look() {
        Lookup::Found(opened) => {
            let version = library.version().map(|v| format!("{v} ")).unwrap_or_default();
            check(library.title, Status::Ok, format!("{version}({})", opened.path.display()), None, false)
        }
        Lookup::Broken { path, reason } => {
            let detail = format!("{} cannot be opened: {reason}", path.display());
            check(library.title, Status::Error, detail, Some(library.install), false)
        }
        Lookup::Missing => {
            let detail = format!("looked for {}", library.names.join(", "));
            let remedy = format!("{needed}: {}", library.install);
            check(library.title, Status::Missing, detail, Some(&remedy), false)
        }
    }
}

/// Whether the CUDA kernels can be compiled: one is.
fn kernel_compiler() -> Check {
    const NAME: &str = "CUDA kernel compiler";
    if NVRTC.opened().is_none() {
        return check(NAME, Status::Missing, "no NVRTC", Some("only for NVIDIA GPUs"), false);
    }
    let gpus = Gpu::list().unwrap_or_default();
    let found = gpus.first().and_then(|gpu| gpu.architecture().parse().ok());
    let architecture = found.unwrap_or(Architecture::SM_90);
    match Compiler::open(None).and_then(|compiler| compiler.compile(&RANDOM, architecture)) {
        Ok(_) => check(NAME, Status::Ok, format!("compiles for {architecture}"), None, false),
        Err(e) => check(NAME, Status::Error, e.to_string(), Some(NVRTC.install), false),
    }
}

/// Whether a session could be made with each GPU provider: libraries, GPU, a build that has it, and the provider's own
/// library, loaded by ONNX Runtime.
fn gpu_providers() -> Vec<Check> {
    let cuda = Provider::Cuda(CudaOptions::default());
    let tensorrt = Provider::TensorRt(TensorRtOptions::default());
    [cuda, tensorrt]
        .iter()
        .map(|provider| {
            let name = format!("provider {provider}");
            if let Err(e) = provider.check() {
                return check(&name, Status::Missing, e.to_string(), Some("see the lines above"), false);
            }
            let offline = RuntimeOptions { offline: true, gpu: true, ..RuntimeOptions::default() };
            let tried = Runtime::start(&offline).and_then(|runtime| provider::try_out(&runtime, provider));
            match tried {
                Ok(()) => check(&name, Status::Ok, "loads", None, false),
                Err(crate::RuntimeError::Offline { what, from, .. }) => {
                    let remedy =
                        format!("the first command with --provider {provider} fetches {what} from {from}");
                    check(&name, Status::Missing, "not fetched yet", Some(&remedy), false)
                }
                Err(e) => check(&name, Status::Error, e.to_string(), Some("see the lines above"), false),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_cannot_be_written_is_found_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        try_to_write(&dir.path().join("a/b/c")).unwrap();
        assert!(!dir.path().join("a").exists(), "what was made for the trial is gone");
        try_to_write(&dir.path().join("file/b")).unwrap_err();
        try_to_write(Path::new("/proc/mudit")).unwrap_err();
    }

    #[test]
    fn every_gap_has_a_detail_and_the_report_is_json() {
        let checks = report();
        let mut names: Vec<_> = checks.iter().map(|c| c.name.as_str()).collect();
        assert!(
            ["ONNX Runtime", "CPU", "Python", "pip", "cuDNN", "TensorRT", "GPU", "provider cuda"]
                .iter()
                .all(|n| names.contains(n))
        );
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), checks.len(), "each check has a name of its own");
        assert!(checks.iter().all(|c| !c.detail.is_empty()));
        let json = serde_json::to_value(&checks).unwrap();
        assert!(json[0]["status"].is_string());
    }
}
