//! Builds the stand-in libraries with the system's C compiler, for exactly the functions that the provider asks for.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const DRIVER: &str = include_str!("driver.c");
const RUNTIME: &str = include_str!("runtime.c");

/// Builds everything into `folder`; `provider` is `libonnxruntime_providers_cuda.so`.
pub(super) fn build(provider: &Path, folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|e| e.to_string())?;
    let library = |name: &str| folder.join(name);
    link(&library("libcuda.so.1"), DRIVER, None, &[])?;
    for (name, symbols) in wanted(provider)? {
        let known = if name.starts_with("libcudart") { RUNTIME } else { "" };
        let mut source = known.to_owned();
        for symbol in symbols.iter().filter(|s| !known.contains(&format!("{s}("))) {
            let body = if symbol.ends_with("Create") || symbol.ends_with("Create_v2") {
                "(void **handle) { *handle = (void *)handle; return 0; }"
            } else {
                "() { return 0; }"
            };
            source.extend(["int ", symbol.as_str(), body, "\n"]);
        }
        link(&library(&name), &source, Some(&name), &[library("libcuda.so.1")])?;
    }
    link(&library("libcurand.so.10"), "int curandGetProperty() { return 1; }", None, &[])?;
    let cudnn = "#include <stddef.h>\nsize_t cudnnGetVersion(void) { return 91300; }\n\
        int cudnnCreate(void **h) { *h = (void *)h; return 0; }\nint cudnnDestroy() { return 0; }\n\
        int cudnnSetStream() { return 0; }\n";
    link(&library("libcudnn.so.9"), cudnn, None, &[])
}

/// Functions that the provider takes from each of NVIDIA's libraries.
fn wanted(provider: &Path) -> Result<BTreeMap<String, Vec<String>>, String> {
    let listing = run(Command::new("nm").args(["-D", "--undefined-only"]).arg(provider))?;
    let mut wanted: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for symbol in listing.lines().filter_map(|l| l.split_whitespace().last()) {
        if let Some((name, library)) = symbol.split_once('@').filter(|(_, l)| l.contains("libcu")) {
            wanted.entry(library.trim_start_matches('@').to_owned()).or_default().push(name.to_owned());
        }
    }
    if wanted.is_empty() {
        return Err(format!("{} asks for no function of CUDA", provider.display()));
    }
    Ok(wanted)
}

/// Compiles one library; `version` is what its functions are marked with.
fn link(library: &Path, source: &str, version: Option<&str>, needs: &[PathBuf]) -> Result<(), String> {
    let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = library.with_file_name(format!("{name}.c"));
    fs::write(&file, source).map_err(|e| e.to_string())?;
    let mut compiler = Command::new("cc");
    compiler.args(["-w", "-shared", "-fPIC", "-O1", "-o"]).arg(library).arg(&file).args(needs);
    compiler.arg(format!("-Wl,-soname,{name}"));
    if let Some(version) = version {
        let script = library.with_file_name(format!("{name}.map"));
        fs::write(&script, format!("{version} {{ global: *; }};\n")).map_err(|e| e.to_string())?;
        compiler.arg(format!("-Wl,--version-script={}", script.display()));
    }
    run(&mut compiler).map(drop)
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)))
}
