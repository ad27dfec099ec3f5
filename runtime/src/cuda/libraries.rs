//! NVIDIA's libraries: where they are, opened in the order of their dependencies, and what is missing.
//!
//! Each is looked for in the folders that `MUDIT_CUDA_LIBRARIES` names (separated by colons), by the system's loader,
//! in Python's packages (`nvidia/*/lib`, `tensorrt_libs`), and in the folder of what mudit itself fetched. What was
//! opened stays open, so that ONNX Runtime's providers and the CUDA bindings find it by its name.
#![allow(unsafe_code, reason = "asks the dynamic loader, and the libraries for their versions")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{Result, RuntimeError};
use crate::library::{RuntimeOptions, cache_directory};
use crate::wheel::{self, Python};

/// Names the folders that are searched first.
pub const FOLDERS_VARIABLE: &str = "MUDIT_CUDA_LIBRARIES";

/// What installs everything that the CUDA provider needs beside the driver.
pub const INSTALL_CUDA: &str = "python3 -m pip install nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 \
    nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35 nvidia-cufft==12.0.0.61 \
    nvidia-cudnn-cu13==9.13.0.50";
/// What installs TensorRT.
pub const INSTALL_TENSORRT: &str = "python3 -m pip install tensorrt-cu13==10.16.1.11";

/// How a library tells its version.
type Version = fn(&Opened) -> Option<String>;

/// One of NVIDIA's libraries.
pub struct CudaLibrary {
    /// What it is called in words.
    pub title: &'static str,
    /// File names, preferred first.
    pub names: &'static [&'static str],
    /// Parts that are opened before it where they are beside it.
    parts: &'static [&'static str],
    /// What installs it.
    pub install: &'static str,
    version: Version,
    lookup: OnceLock<Lookup>,
}

/// What became of looking for a library.
#[derive(Debug)]
pub enum Lookup {
    /// It is open.
    Found(Opened),
    /// A file of the name exists and cannot be opened.
    Broken {
        /// The file.
        path: PathBuf,
        /// The loader's words.
        reason: String,
    },
    /// Nowhere.
    Missing,
}

/// A library that is open and stays so.
#[derive(Debug)]
pub struct Opened {
    /// Which of the names.
    pub name: &'static str,
    /// The file that the loader took.
    pub path: PathBuf,
    handle: Handle,
}

#[derive(Debug)]
struct Handle(*mut c_void);

// SAFETY: a handle of the loader has no ties to a thread, and it is never closed.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

macro_rules! libraries {
    ($($(#[$doc:meta])* $id:ident: $title:literal, $names:expr, $parts:expr, $install:expr, $version:expr;)*) => {
        $($(#[$doc])* pub static $id: CudaLibrary = CudaLibrary {
            title: $title, names: &$names, parts: &$parts, install: $install, version: $version,
            lookup: OnceLock::new(),
        };)*
        /// All of them, each after those it needs.
        pub static ALL: &[&CudaLibrary] = &[$(&$id),*];
    };
}

libraries! {
    /// The driver's library; comes with the driver alone.
    DRIVER: "CUDA driver", ["libcuda.so.1"], [],
        "install NVIDIA's driver (580 or newer for CUDA 13)", |l| thousands(l, c"cuDriverGetVersion");
    /// The runtime that ONNX Runtime is built with.
    RUNTIME: "CUDA runtime", ["libcudart.so.13"], [], INSTALL_CUDA, |l| thousands(l, c"cudaRuntimeGetVersion");
    /// Products with epilogues.
    CUBLAS_LT: "cuBLASLt", ["libcublasLt.so.13"], [], INSTALL_CUDA, |l| property(l, c"cublasLtGetProperty");
    /// Products.
    CUBLAS: "cuBLAS", ["libcublas.so.13"], [], INSTALL_CUDA, |l| property(l, c"cublasGetProperty");
    /// Random numbers; the provider is linked with it.
    CURAND: "cuRAND", ["libcurand.so.10"], [], INSTALL_CUDA, |l| property(l, c"curandGetProperty");
    /// Fourier transforms; not used by mudit's programs.
    CUFFT: "cuFFT", ["libcufft.so.12"], [], INSTALL_CUDA, |l| property(l, c"cufftGetProperty");
    /// The compiler of mudit's CUDA kernels.
    NVRTC: "NVRTC", ["libnvrtc.so.13"],
        ["libnvrtc-builtins.so.13.0", "libnvrtc-builtins.so.13.1", "libnvrtc-builtins.so.13.2", "libnvrtc-builtins.so.13.3",
         "libnvrtc-builtins.so.13.4", "libnvrtc-builtins.so.13.5", "libnvrtc-builtins.so.13.6"],
        INSTALL_CUDA, nvrtc_version;
    /// Convolutions and attention.
    CUDNN: "cuDNN", ["libcudnn.so.9"],
        ["libcudnn_graph.so.9", "libcudnn_ops.so.9", "libcudnn_heuristic.so.9", "libcudnn_engines_precompiled.so.9",
         "libcudnn_engines_runtime_compiled.so.9", "libcudnn_cnn.so.9", "libcudnn_adv.so.9"],
        INSTALL_CUDA, cudnn_version;
    /// Sums over several GPUs.
    NCCL: "NCCL", ["libnccl.so.2"], [], "python3 -m pip install nvidia-nccl-cu13==2.28.9", nccl_version;
    /// TensorRT's builder and engines.
    TENSORRT: "TensorRT", ["libnvinfer.so.10"], [], INSTALL_TENSORRT, |l| infer_version(l, c"getInferLibVersion");
    /// TensorRT's plugins, which its parser needs.
    TENSORRT_PLUGINS: "TensorRT plugins", ["libnvinfer_plugin.so.10"], [], INSTALL_TENSORRT, |_| None;
    /// What reads ONNX for TensorRT.
    TENSORRT_PARSER: "TensorRT ONNX parser", ["libnvonnxparser.so.10"], [], INSTALL_TENSORRT,
        |l| infer_version(l, c"getNvOnnxParserVersion");
}

/// What the CUDA provider cannot do without.
pub static FOR_CUDA: &[&CudaLibrary] = &[&DRIVER, &RUNTIME, &CUBLAS_LT, &CUBLAS, &CURAND, &CUDNN];
/// What the TensorRT provider cannot do without.
pub static FOR_TENSORRT: &[&CudaLibrary] = &[
    &DRIVER,
    &RUNTIME,
    &CUBLAS_LT,
    &CUBLAS,
    &CURAND,
    &CUDNN,
    &TENSORRT,
    &TENSORRT_PLUGINS,
    &TENSORRT_PARSER,
];

impl fmt::Display for CudaLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.title, self.names.join(" or "))
    }
}

impl fmt::Debug for CudaLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CudaLibrary").field(&self.title).finish()
    }
}

impl CudaLibrary {
    /// Looks for the library and opens it, once per process.
    pub fn look(&self) -> &Lookup {
        self.lookup.get_or_init(|| look(self.names, self.parts, &places()))
    }

    /// The open library.
    pub fn opened(&self) -> Option<&Opened> {
        match self.look() {
            Lookup::Found(opened) => Some(opened),
            Lookup::Broken { .. } | Lookup::Missing => None,
        }
    }

    /// The version that the open library tells.
    pub fn version(&self) -> Option<String> {
        self.opened().and_then(|o| (self.version)(o))
    }

    /// Refuses another library of that kind than the one found here: the bindings open theirs by names of their own, and
    /// `version` is what the one they opened says.
    pub(crate) fn same_as(&self, version: &str) -> Result<()> {
        let found = self.version().unwrap_or_default();
        if found == version {
            return Ok(());
        }
        let path = self.opened().map(|o| o.path.display().to_string()).unwrap_or_default();
        Err(RuntimeError::ProviderUnavailable {
            provider: "cuda".to_owned(),
            reason: format!("{} {version} hides version {found} at {path}", self.title),
            remedy:
                "take the folder of the other one out of LD_LIBRARY_PATH and of the loader's configuration"
                    .to_owned(),
        })
    }

    /// Why it cannot be used, if so.
    pub fn complaint(&self) -> Option<String> {
        match self.look() {
            Lookup::Found(_) => None,
            Lookup::Broken { path, reason } => {
                Some(format!("{} at {} cannot be opened: {reason}", self.title, path.display()))
            }
            Lookup::Missing => Some(format!("no {self}")),
        }
    }
}

impl Opened {
    /// The address of a function.
    fn function(&self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: an open handle and a C string.
        let address = unsafe { libc::dlsym(self.handle.0, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    }
}

/// Makes sure that NVRTC is there: fetches the pinned one (91 MB, no GPU needed) where none is installed.
///
/// # Errors
/// [`RuntimeError::ProviderUnavailable`] when it is there and cannot be opened; [`RuntimeError::Offline`]; as fetching
/// ONNX Runtime.
pub fn find_or_fetch_compiler(options: &RuntimeOptions<'_>) -> Result<()> {
    let installed = places().iter().any(|place| place.join(NVRTC.names[0]).is_file());
    if !installed && open(NVRTC.names[0]).is_err() {
        // The wheel names the folder in it itself.
        let cache = cache_directory().ok_or_else(|| RuntimeError::LibraryNotFound {
            reason: "no cache directory for NVRTC: neither MUDIT_CACHE nor HOME is set".to_owned(),
            remedy: INSTALL_CUDA.to_owned(),
        })?;
        if options.offline {
            return Err(RuntimeError::Offline {
                what: "NVRTC 13.0".to_owned(),
                from: "PyPI".to_owned(),
                remedy: format!("run once without it, or {INSTALL_CUDA}"),
            });
        }
        wheel::fetch_compiler(&cache, &Python::of_the_system(), options.progress)?;
    }
    NVRTC.complaint().map_or(Ok(()), |reason| {
        Err(RuntimeError::ProviderUnavailable {
            provider: "cuda".to_owned(),
            reason,
            remedy: NVRTC.install.to_owned(),
        })
    })
}

/// Where mudit keeps the compiler that it fetched.
fn fetched_folder() -> Option<PathBuf> {
    cache_directory().map(|cache| cache.join("cuda-13.0"))
}

/// Folders to search, first the ones that the user names. The system's loader comes between those and the others.
fn places() -> Vec<PathBuf> {
    static PYTHON: OnceLock<Vec<PathBuf>> = OnceLock::new();
    let packages = PYTHON.get_or_init(|| package_folders(&Python::of_the_system()));
    let fetched = fetched_folder().map(|f| f.join("lib"));
    named_folders().into_iter().chain(packages.iter().cloned()).chain(fetched).collect()
}

fn named_folders() -> Vec<PathBuf> {
    let named = std::env::var_os(FOLDERS_VARIABLE).unwrap_or_default();
    std::env::split_paths(&named).filter(|p| !p.as_os_str().is_empty()).collect()
}

/// The folders with libraries in the installed Python's packages.
fn package_folders(python: &Python) -> Vec<PathBuf> {
    let Ok(output) = python.run(&["-c", "import sys; print(*sys.path, sep='\\n')"]) else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut folders = Vec::new();
    for site in text.lines().filter(|l| !l.trim().is_empty()).map(Path::new) {
        let mut packages: Vec<_> = std::fs::read_dir(site.join("nvidia"))
            .map(|d| d.flatten().map(|e| e.path().join("lib")).collect())
            .unwrap_or_default();
        packages.sort();
        folders.extend(packages.into_iter().chain([site.join("tensorrt_libs")]).filter(|p| p.is_dir()));
    }
    folders
}

/// Looks in the named folders, then asks the system's loader, then looks in the other places.
fn look(names: &'static [&'static str], parts: &[&str], places: &[PathBuf]) -> Lookup {
    // Opening is not atomic over a library and its parts.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let named = named_folders().len();
    let mut broken = Lookup::Missing;
    for name in names {
        let (first, rest) = places.split_at(named.min(places.len()));
        let candidates = first.iter().map(|p| (Some(p), p.join(name)));
        let system = std::iter::once((None, PathBuf::from(name)));
        for (folder, file) in candidates.chain(system).chain(rest.iter().map(|p| (Some(p), p.join(name)))) {
            if let Some(folder) = folder {
                if !file.is_file() {
                    continue;
                }
                for part in parts.iter().map(|p| folder.join(p)).filter(|p| p.is_file()) {
                    // A part that cannot be opened shows in the library that needs it.
                    drop(open(&part.to_string_lossy()));
                }
            }
            match open(&file.to_string_lossy()) {
                Ok(handle) => {
                    let path = path_of(&handle).unwrap_or(file);
                    return Lookup::Found(Opened { name, path, handle });
                }
                Err(reason) if folder.is_some() => broken = Lookup::Broken { path: file, reason },
                // The loader has it, but not what it needs; a plain absence says so by the name asked for.
                Err(reason) if !reason.starts_with(name) => broken = Lookup::Broken { path: file, reason },
                Err(_) => {}
            }
        }
    }
    broken
}

/// Opens a library for good: unloading GPU libraries at run time is not reliable.
fn open(name: &str) -> Result<Handle, String> {
    let name = CString::new(name).map_err(|e| e.to_string())?;
    // SAFETY: a C string; opening runs the library's constructors, which are the vendor's own.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(Handle(handle));
    }
    // SAFETY: after a failed call the loader gives a C string or null.
    let reason = unsafe { libc::dlerror() };
    if reason.is_null() {
        return Err("no reason given".to_owned());
    }
    // SAFETY: as above.
    Err(unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned())
}

/// The file behind an open library.
fn path_of(handle: &Handle) -> Option<PathBuf> {
    #[cfg(target_os = "linux")]
    {
        /// The start of the loader's own record.
        #[repr(C)]
        struct LinkMap {
            address: usize,
            name: *const c_char,
        }
        let mut map: *const LinkMap = std::ptr::null();
        // SAFETY: an open handle and a place for the answer, which lives as long as the library.
        let name = unsafe {
            if libc::dlinfo(handle.0, libc::RTLD_DI_LINKMAP, (&raw mut map).cast()) != 0 || map.is_null() {
                return None;
            }
            CStr::from_ptr((*map).name).to_string_lossy().into_owned()
        };
        (!name.is_empty()).then(|| PathBuf::from(name))
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// 13000 is 13.0.
fn thousands(library: &Opened, name: &CStr) -> Option<String> {
    let v = out_int(library, name)?;
    Some(format!("{}.{}", v / 1000, v % 1000 / 10))
}

fn out_int(library: &Opened, name: &CStr) -> Option<c_int> {
    let function = library.function(name)?;
    let mut value = 0;
    // SAFETY: these functions of NVIDIA's interfaces take one place for an `int` and give a status, 0 for success.
    let status = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int) -> c_int>(function)(
            &raw mut value,
        )
    };
    (status == 0).then_some(value)
}

fn property(library: &Opened, name: &CStr) -> Option<String> {
    let function = library.function(name)?;
    let mut parts = [0; 3];
    for (kind, value) in parts.iter_mut().enumerate() {
        // SAFETY: `…GetProperty(libraryPropertyType, int *)`, where the kinds are major, minor, patch.
        let status = unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int, *mut c_int) -> c_int>(function)(
                kind as c_int,
                value,
            )
        };
        if status != 0 {
            return None;
        }
    }
    Some(parts.map(|p| p.to_string()).join("."))
}

fn nvrtc_version(library: &Opened) -> Option<String> {
    let function = library.function(c"nvrtcVersion")?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: `nvrtcVersion(int *, int *)`.
    let status = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(function)(
            &raw mut major,
            &raw mut minor,
        )
    };
    (status == 0).then(|| format!("{major}.{minor}"))
}

/// 91300 is 9.13.0.
fn cudnn_version(library: &Opened) -> Option<String> {
    let function = library.function(c"cudnnGetVersion")?;
    // SAFETY: `size_t cudnnGetVersion(void)`.
    let v = unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> usize>(function)() };
    Some(format!("{}.{}.{}", v / 10_000, v % 10_000 / 100, v % 100))
}

/// 22809 is 2.28.9.
fn nccl_version(library: &Opened) -> Option<String> {
    let v = out_int(library, c"ncclGetVersion")?;
    Some(format!("{}.{}.{}", v / 10_000, v % 10_000 / 100, v % 100))
}

/// 101601 is 10.16.1.
fn infer_version(library: &Opened, name: &CStr) -> Option<String> {
    let function = library.function(name)?;
    // SAFETY: these functions take nothing and give an `int32_t`.
    let v = unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> i32>(function)() };
    Some(format!("{}.{}.{}", v / 10_000, v % 10_000 / 100, v % 100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_opened_and_says_where_it_is() {
        // The C library stands for one that every system has.
        let Lookup::Found(c) = look(&["libc.so.6"], &[], &[]) else { panic!("no C library") };
        assert!(c.path.is_file() && c.function(c"malloc").is_some(), "{c:?}");
        assert!(matches!(look(&["libnone.so.77"], &[], &[]), Lookup::Missing));
    }

    #[test]
    fn a_file_that_is_no_library_is_named_with_the_loaders_reason() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("libbroken.so.1"), "not a library").unwrap();
        match look(&["libbroken.so.1"], &[], &[dir.path().to_path_buf()]) {
            Lookup::Broken { path, reason } => {
                assert!(path.starts_with(dir.path()) && reason.contains("libbroken"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_library_says_what_installs_it() {
        for library in ALL {
            assert!(library.install.contains("install"), "{library}");
            assert_eq!(library.complaint().is_none(), library.opened().is_some(), "{library}");
        }
    }
}
