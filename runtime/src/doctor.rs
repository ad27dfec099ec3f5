//! What this machine has: a list of checks, each with its state and, where something is missing, a remedy.

use std::panic::catch_unwind;

use serde::Serialize;

use crate::dylib::{self, SharedLibrary};
use crate::library::{Runtime, RuntimeOptions, cache_directory};
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
    checks.push(cache());
    checks.push(cpu());
    checks.push(cpu_features());
    checks.push(python_version());
    checks.push(pip());
    checks.extend(
        [&dylib::CUDA_DRIVER, &dylib::CUBLAS, &dylib::CUDNN, &dylib::NVRTC, &dylib::NCCL, &dylib::TENSORRT]
            .map(shared_library),
    );
    checks.push(gpus());
    checks
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
    let offline = RuntimeOptions { offline: true, ..RuntimeOptions::default() };
    match Runtime::start(&offline) {
        Ok(runtime) => {
            let library = runtime.library();
            let detail = format!("{} ({}: {})", library.version, library.source, library.path.display());
            let providers = match dylib::compiled_providers(&runtime) {
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

fn cache() -> Check {
    match cache_directory() {
        Some(path) => check("cache directory", Status::Ok, path.display().to_string(), None, false),
        None => check("cache directory", Status::Missing, "none is known", Some("set MUDIT_CACHE"), false),
    }
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

fn shared_library(library: &SharedLibrary) -> Check {
    if let Some(name) = library.find() {
        return check(library.title, Status::Ok, name, None, false);
    }
    let looked_for = format!("looked for {}", library.names.join(", "));
    check(library.title, Status::Missing, looked_for, Some("only needed for NVIDIA GPUs"), false)
}

fn gpus() -> Check {
    const NAME: &str = "GPU";
    if dylib::CUDA_DRIVER.find().is_none() {
        return check(NAME, Status::Missing, "no CUDA driver", None, false);
    }
    // The bindings panic when the driver is too old to have a symbol.
    let names = catch_unwind(|| {
        use cudarc::driver::result::{device, init};
        init()?;
        (0..device::get_count()?).map(|i| device::get_name(device::get(i)?)).collect::<Result<Vec<_>, _>>()
    });
    match names {
        Ok(Ok(names)) if names.is_empty() => {
            check(NAME, Status::Missing, "the driver sees none", None, false)
        }
        Ok(Ok(names)) => check(NAME, Status::Ok, names.join(", "), None, false),
        Ok(Err(e)) => check(NAME, Status::Error, format!("{e:?}"), Some("check the driver"), false),
        Err(_) => check(NAME, Status::Error, "the driver lacks a function", Some("update the driver"), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gap_has_a_detail_and_the_report_is_json() {
        let checks = report();
        let mut names: Vec<_> = checks.iter().map(|c| c.name.as_str()).collect();
        assert!(
            ["ONNX Runtime", "CPU", "Python", "pip", "TensorRT", "GPU"].iter().all(|n| names.contains(n))
        );
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), checks.len(), "each check has a name of its own");
        assert!(checks.iter().all(|c| !c.detail.is_empty()));
        let json = serde_json::to_value(&checks).unwrap();
        assert!(json[0]["status"].is_string());
    }
}
