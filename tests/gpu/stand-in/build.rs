//! Builds the stand-in libraries with the system's compilers of C and C++: of NVIDIA's libraries exactly the functions
//! that the provider and mudit ask for, and mudit's kernels for the host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use runtime::cuda::kernels::{COMMON, SOURCES, Source};

const DRIVER: &str = include_str!("driver.c");
const RUNTIME: &str = include_str!("runtime.c");
const PRODUCTS: &str = include_str!("products.c");
const COMPILER: &str = include_str!("compiler.c");
/// Sources of the machine that runs PTX.
const PTX: [(&str, &str); 7] = [
    ("machine.h", include_str!("ptx/machine.h")),
    ("collective.h", include_str!("ptx/collective.h")),
    ("traffic.h", include_str!("ptx/traffic.h")),
    ("memory.cpp", include_str!("ptx/memory.cpp")),
    ("module.cpp", include_str!("ptx/module.cpp")),
    ("instructions.cpp", include_str!("ptx/instructions.cpp")),
    ("launch.cpp", include_str!("ptx/launch.cpp")),
];
/// Sources of what stands in for TensorRT.
const TENSORRT: [(&str, &str); 2] =
    [("onnx.h", include_str!("tensorrt/onnx.h")), ("tensorrt.cpp", include_str!("tensorrt/tensorrt.cpp"))];
const EMULATOR: [&str; 2] = [include_str!("emulator/device.h"), include_str!("emulator/emulator.cpp")];

/// Builds everything into `folder`; `cuda` and `tensorrt` are ONNX Runtime's `libonnxruntime_providers_….so`.
pub(super) fn build(cuda: &Path, tensorrt: &Path, folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|e| e.to_string())?;
    let library = |name: &str| folder.join(name);
    link(&library("libcuda.so.1"), DRIVER, None, &[])?;
    link(&library("libnvrtc.so.13"), COMPILER, None, &[])?;
    std::thread::scope(|scope| {
        let machine = scope.spawn(|| written_for_host(folder, "ptx", &PTX, &library("ptx.so"), &[]));
        let engines = scope.spawn(|| {
            let [name, driver] = ["libnvinfer.so.10", "libcuda.so.1"].map(&library);
            let options = ["-Wl,-soname,libnvinfer.so.10", driver.to_str().unwrap_or_default()];
            written_for_host(folder, "tensorrt", &TENSORRT, &name, &options)
        });
        let kernels = SOURCES.map(|source| scope.spawn(move || emulated(folder, source)));
        kernels
            .into_iter()
            .chain([machine, engines])
            .try_for_each(|k| k.join().map_err(|_| "a compiler's thread panicked")?)
    })?;
    for (name, source) in [
        ("libnvonnxparser.so.10", "int getNvOnnxParserVersion() { return 101601; }"),
        (
            "libnvinfer_plugin.so.10",
            "_Bool initLibNvInferPlugins(void *logger, const char *space) { return 1; }",
        ),
    ] {
        link(&library(name), source, None, &[library("libnvinfer.so.10")])?;
    }
    for (name, symbols) in wanted(&[cuda, tensorrt])? {
        let known = match name.split_once(".so") {
            Some(("libcudart", _)) => RUNTIME,
            Some(("libcublasLt", _)) => PRODUCTS,
            _ => "",
        };
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
    link(&library("libcudnn.so.9"), &cudnn(cuda)?, Some("libcudnn.so.9"), &[])
}

/// cuDNN's functions, which the provider asks for by their names when it needs them.
fn cudnn(provider: &Path) -> Result<String, String> {
    const PREFIX: &[u8] = b"cudnn";
    let bytes = fs::read(provider).map_err(|e| e.to_string())?;
    let texts = bytes.split(|b| *b == 0).filter(|text| {
        text.len() < 64
            && text.strip_prefix(PREFIX).and_then(<[u8]>::first).is_some_and(u8::is_ascii_uppercase)
            && text.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_')
    });
    let mut names: Vec<String> = texts.map(|t| String::from_utf8_lossy(t).into_owned()).collect();
    names.sort_unstable();
    names.dedup();
    let mut source = "#include <stddef.h>\nsize_t cudnnGetVersion(void) { return 91300; }\n".to_owned();
    for name in names.iter().filter(|name| *name != "cudnnGetVersion") {
        let body = if name.starts_with("cudnnCreate") {
            "(void **handle) { *handle = (void *)handle; return 0; }"
        } else {
            "() { return 0; }"
        };
        source.extend(["int ", name.as_str(), body, "\n"]);
    }
    Ok(source)
}

/// A folder of the same libraries without NVRTC's.
pub(super) fn without_compiler(folder: &Path, to: &Path) -> Result<(), String> {
    drop(fs::remove_dir_all(to));
    fs::create_dir_all(to).map_err(|e| e.to_string())?;
    for file in fs::read_dir(folder).map_err(|e| e.to_string())?.flatten() {
        let name = file.file_name();
        let text = name.to_string_lossy();
        if (text.contains(".so.") || text.ends_with(".cu.so")) && name != "libnvrtc.so.13" {
            fs::copy(file.path(), to.join(name)).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

/// Compiles a source of kernels for the host, unless that was done before.
fn emulated(folder: &Path, source: &Source) -> Result<(), String> {
    let whole = emulation(source);
    let (text, library) =
        (folder.join(format!("{}.cpp", source.name)), folder.join(format!("{}.so", source.name)));
    if library.is_file() && fs::read_to_string(&text).is_ok_and(|before| before == whole) {
        return Ok(());
    }
    // Gone, so that a failure does not leave an older library with a newer text.
    drop(fs::remove_file(&library));
    fs::write(&text, whole).map_err(|e| e.to_string())?;
    compile_for_host(&library, &[text], &[])
}

/// Writes sources into a folder of their own and compiles them into a library, unless that was done before.
fn written_for_host(
    folder: &Path,
    kind: &str,
    sources: &[(&str, &str)],
    library: &Path,
    options: &[&str],
) -> Result<(), String> {
    let place = |name: &str| folder.join(kind).join(name);
    if library.is_file()
        && sources.iter().all(|(name, text)| fs::read_to_string(place(name)).is_ok_and(|t| t == *text))
    {
        return Ok(());
    }
    drop(fs::remove_file(library));
    fs::create_dir_all(folder.join(kind)).map_err(|e| e.to_string())?;
    for (name, text) in sources {
        fs::write(place(name), text).map_err(|e| e.to_string())?;
    }
    let units = sources.iter().map(|(name, _)| place(name));
    let units: Vec<PathBuf> = units.filter(|file| file.extension().is_some_and(|e| e == "cpp")).collect();
    compile_for_host(library, &units, options)
}

/// The optimiser makes the proofs fast; sums must not be contracted, as on the host.
fn compile_for_host(library: &Path, units: &[PathBuf], more: &[&str]) -> Result<(), String> {
    let options = ["-O2", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-o"];
    run(Command::new("c++").args(options).arg(library).args(units).args(more)).map(drop)
}

/// The stand-in for `device.cuh`, the source, and a way to its kernels by name.
fn emulation(source: &Source) -> String {
    let [device, emulator] = EMULATOR;
    let (types, name, text) = (COMMON[1].1, source.name, source.text);
    let cases = |body: &dyn Fn(&str) -> String| {
        source.kernels.iter().fold(String::new(), |all, kernel| {
            all + "    if (!strcmp(name, \"" + kernel + "\")) return " + &body(kernel) + ";\n"
        })
    };
    let launches =
        cases(&|k| format!("launch(name, {k}, grid, threads, shared_bytes, backwards, arguments)"));
    let copies = cases(&|k| format!("keep({k}, arguments)"));
    let names = cases(&|_| "true".to_owned());
    format!(
        "{device}\n{emulator}\n#line 1 \"types.cuh\"\n{types}\n#line 1 \"{name}\"\n{text}\nextern \"C\" const char \
         *mudit_launch(const char *name, const u32 *grid, u32 threads, u32 shared_bytes, bool backwards, void \
         **arguments) {{\n{launches}    return \"no such kernel\";\n}}\nextern \"C\" void **mudit_keep(const char *name, void **arguments) {{\n{copies}    return nullptr;\n}}\nextern \"C\" bool mudit_has(const char \
         *name) {{\n{names}    return false;\n}}\n"
    )
}

/// Functions that the providers take from each of NVIDIA's CUDA libraries.
fn wanted(providers: &[&Path]) -> Result<BTreeMap<String, BTreeSet<String>>, String> {
    let mut wanted: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for provider in providers {
        let listing = run(Command::new("nm").args(["-D", "--undefined-only"]).arg(provider))?;
        for symbol in listing.lines().filter_map(|l| l.split_whitespace().last()) {
            if let Some((name, library)) = symbol.split_once('@').filter(|(_, l)| l.contains("libcu")) {
                wanted.entry(library.trim_start_matches('@').to_owned()).or_default().insert(name.to_owned());
            }
        }
    }
    if wanted.is_empty() {
        return Err(format!("{providers:?} ask for no function of CUDA"));
    }
    // The TensorRT provider marks its wish for cuDNN's functions; all of them are made below.
    wanted.retain(|library, _| !library.starts_with("libcudnn"));
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
    if needs.is_empty() {
        compiler.args(["-ldl", "-lpthread"]);
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
