//! The ONNX Runtime library: found, or fetched from the Python package index, then loaded once per process.
//!
//! Order: `ORT_DYLIB_PATH`; the user's cache; an installed Python `onnxruntime`; the pinned wheel, fetched by
//! Python's pip, checked by hash and unpacked into the cache. Nothing is fetched silently. For a GPU provider only a
//! build that has the CUDA provider beside the library counts, and the wheel is `onnxruntime-gpu`.

use std::collections::VecDeque;
use std::env;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::{Result, RuntimeError};
use crate::wheel::{self, Python};

/// The version that is fetched and that the tests run with.
pub const PINNED_VERSION: &str = "1.31.1";
/// Installed Python packages of this series are used as they are.
const SUPPORTED_SERIES: &str = "1.31.";
/// The remedy that always works.
pub(crate) const SET_PATH: &str = "set ORT_DYLIB_PATH to a libonnxruntime.so of version 1.31";

/// Where the library came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum LibrarySource {
    /// `ORT_DYLIB_PATH`, or the path given in the options.
    Path,
    /// The user's cache.
    Cache,
    /// An installed Python `onnxruntime` package.
    Python,
    /// Fetched just now.
    Fetched,
}

impl fmt::Display for LibrarySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Path => "ORT_DYLIB_PATH",
            Self::Cache => "cache",
            Self::Python => "installed Python package",
            Self::Fetched => "fetched",
        })
    }
}

/// Which library is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibraryInfo {
    /// The library file.
    pub path: PathBuf,
    /// Where it came from.
    pub source: LibrarySource,
    /// Its version: `1.31.1`, or only `1.31` for a file whose name does not tell.
    pub version: String,
}

impl LibraryInfo {
    /// The file of a provider that is a library of its own: `cuda`, `tensorrt`, `shared`.
    pub fn provider_file(&self, provider: &str) -> Option<PathBuf> {
        let real = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        [&self.path, &real].into_iter().find_map(|library| {
            let file = library.parent()?.join(format!("libonnxruntime_providers_{provider}.so"));
            file.is_file().then_some(file)
        })
    }

    /// Refuses a build for the CPU alone.
    ///
    /// # Errors
    /// [`RuntimeError::LibraryUnusable`].
    pub fn require_gpu_providers(&self) -> Result<()> {
        if self.provider_file("cuda").is_some() {
            return Ok(());
        }
        Err(RuntimeError::LibraryUnusable {
            path: self.path.clone(),
            reason: format!(
                "this build ({}) is for the CPU alone: libonnxruntime_providers_cuda.so is not beside it",
                self.source
            ),
            remedy: format!(
                "for a GPU provider let ORT_DYLIB_PATH name the library of onnxruntime-gpu {PINNED_VERSION}, or unset it"
            ),
        })
    }
}

/// How to find ONNX Runtime.
#[derive(Clone, Copy)]
pub struct RuntimeOptions<'a> {
    /// Refuse to fetch anything.
    pub offline: bool,
    /// Insist on a build with the CUDA and TensorRT providers; it runs programs on the CPU as well.
    pub gpu: bool,
    /// Receives one line for everything that is fetched: what, from where, to where.
    pub progress: &'a dyn Fn(&str),
}

impl fmt::Debug for RuntimeOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuntimeOptions")
            .field("offline", &self.offline)
            .field("gpu", &self.gpu)
            .finish_non_exhaustive()
    }
}

impl Default for RuntimeOptions<'_> {
    /// Fetches when needed and says nothing.
    fn default() -> Self {
        Self { offline: false, gpu: false, progress: &|_| {} }
    }
}

/// The process's one ONNX Runtime: its library is loaded and its environment set up.
pub struct Runtime {
    library: LibraryInfo,
    environment: ort::environment::Environment,
    loading: Mutex<()>,
    tensorrt: TensorRtWords,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("library", &self.library).finish_non_exhaustive()
    }
}

/// What TensorRT has logged as errors: ONNX Runtime's own errors tell that something of it failed, and not what.
type TensorRtWords = Arc<Mutex<VecDeque<String>>>;

/// Of those, the last before a failure: what went before may be attempts that TensorRT did without.
const MOST_WORDS: usize = 5;

static STARTED: Mutex<Option<Arc<Runtime>>> = Mutex::new(None);

impl Runtime {
    /// Finds (or fetches) and loads ONNX Runtime; a second call in the process returns the same runtime.
    ///
    /// # Errors
    /// [`RuntimeError::LibraryNotFound`], [`RuntimeError::LibraryUnusable`], [`RuntimeError::Offline`],
    /// [`RuntimeError::WrongHash`], [`RuntimeError::Io`].
    pub fn start(options: &RuntimeOptions<'_>) -> Result<Arc<Self>> {
        let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = started.as_ref() {
            if options.gpu {
                runtime.library.require_gpu_providers()?;
            }
            return Ok(runtime.clone());
        }
        let library = locate(options)?;
        let unusable = |reason: String| RuntimeError::LibraryUnusable {
            path: library.path.clone(),
            reason,
            remedy: SET_PATH.to_owned(),
        };
        let tensorrt = TensorRtWords::default();
        let words = tensorrt.clone();
        let environment = ort::init_from(&library.path)
            .map_err(|e| unusable(e.to_string()))?
            .with_name("mudit")
            .with_telemetry(false)
            .with_logger(Arc::new(move |level, _, _, place, message| {
                // A failure comes back as an error with ONNX Runtime's own text, so its log would only say it twice.
                if place.contains("tensorrt") {
                    let mut words = words.lock().unwrap_or_else(PoisonError::into_inner);
                    if words.len() == MOST_WORDS {
                        words.pop_front();
                    }
                    words.push_back(message.to_owned());
                } else if level == ort::logging::LogLevel::Fatal {
                    drop(writeln!(std::io::stderr(), "ONNX Runtime: {message}"));
                }
            }))
            .build()
            .map_err(|e| unusable(e.to_string()))?;
        environment.set_log_level(ort::logging::LogLevel::Error);
        let runtime = Arc::new(Self { library, environment, loading: Mutex::new(()), tensorrt });
        *started = Some(runtime.clone());
        Ok(runtime)
    }

    /// Which library runs.
    pub fn library(&self) -> &LibraryInfo {
        &self.library
    }

    /// The turn to load a model. ONNX Runtime notes the domains of custom ops in a table of the process, and two
    /// loads at once trip over each other's notes.
    pub(crate) fn loading(&self) -> MutexGuard<'_, ()> {
        let turn = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        self.tensorrt.lock().unwrap_or_else(PoisonError::into_inner).clear();
        turn
    }

    /// An error of ONNX Runtime, with what TensorRT has said.
    pub(crate) fn in_full(&self, error: &ort::Error) -> String {
        format!("{error}{}", self.said_by_tensorrt())
    }

    /// What TensorRT has logged as errors since the last load began or it was asked last.
    pub(crate) fn said_by_tensorrt(&self) -> String {
        let logged = std::mem::take(&mut *self.tensorrt.lock().unwrap_or_else(PoisonError::into_inner));
        let mut text = String::new();
        for line in &logged {
            // After its own time and level.
            let said = line.split_once("ERROR] ").map_or(line.as_str(), |(_, said)| said);
            text.extend(["; TensorRT: ", said.trim()]);
        }
        text
    }

    pub(crate) fn environment(&self) -> &ort::environment::Environment {
        &self.environment
    }
}

/// The variable that keeps ONNX Runtime from gathering and sending telemetry.
pub const NO_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

/// Keeps ONNX Runtime from sending anything. Its builds for Linux gather telemetry since 1.31: without the variable they
/// keep a database and an identifier of the device below the user's cache and look up the host that takes them, whatever
/// the environment that a program makes says. It is read once, when the library is loaded; [`locate`] and
/// [`Runtime::start`] call this before. A program with threads of its own calls it at its start.
#[allow(unsafe_code, reason = "the variable is ONNX Runtime's only switch that comes early enough")]
pub fn forbid_telemetry() {
    if env::var_os(NO_TELEMETRY).is_none_or(|value| value != "1") {
        // SAFETY: the binary does this before it has threads. Elsewhere the standard library's readers of the environment
        // take turns with it, and code that reads it by itself must not run beside the first start.
        unsafe { env::set_var(NO_TELEMETRY, "1") };
    }
}

/// Finds or fetches the library without loading it.
///
/// # Errors
/// As [`Runtime::start`].
pub fn locate(options: &RuntimeOptions<'_>) -> Result<LibraryInfo> {
    forbid_telemetry();
    Surroundings {
        path: env::var_os("ORT_DYLIB_PATH").filter(|p| !p.is_empty()).map(PathBuf::from),
        cache: cache_directory(),
        python: Python::of_the_system(),
    }
    .locate(options)
}

/// The directory for everything that is fetched: `$MUDIT_CACHE`, else `$XDG_CACHE_HOME/mudit`, else
/// `~/.cache/mudit`. `None` when the environment names none.
pub fn cache_directory() -> Option<PathBuf> {
    let directory = |variable| env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    directory("MUDIT_CACHE")
        .or_else(|| directory("XDG_CACHE_HOME").map(|d| d.join("mudit")))
        .or_else(|| directory("HOME").map(|d| d.join(".cache/mudit")))
}

/// Where a library may come from.
struct Surroundings {
    /// The path that the user names.
    path: Option<PathBuf>,
    cache: Option<PathBuf>,
    python: Python,
}

impl Surroundings {
    fn locate(self, options: &RuntimeOptions<'_>) -> Result<LibraryInfo> {
        let Self { path, cache, python } = self;
        if let Some(path) = path {
            let library = from_path(path)?;
            if options.gpu {
                library.require_gpu_providers()?;
            }
            return Ok(library);
        }
        let wheel = if options.gpu { wheel::with_gpu_providers() } else { wheel::for_this_platform() };
        if let (Some(wheel), Some(cache)) = (wheel, &cache) {
            match wheel.cached(cache) {
                Ok(Some(path)) => return Ok(info(path, LibrarySource::Cache)),
                Ok(None) => {}
                Err(corrupt) if options.offline => return Err(corrupt),
                Err(corrupt) => (options.progress)(&format!("{corrupt}; fetching it again")),
            }
        }
        if let Some(path) = installed_library(&python) {
            let library = info(path, LibrarySource::Python);
            if !options.gpu || library.provider_file("cuda").is_some() {
                return Ok(library);
            }
        }
        let not_found =
            |reason: String| RuntimeError::LibraryNotFound { reason, remedy: SET_PATH.to_owned() };
        let wheel = wheel.ok_or_else(|| {
            not_found(format!("no wheel is pinned for {} on {}", env::consts::OS, env::consts::ARCH))
        })?;
        let cache = cache
            .ok_or_else(|| not_found("no cache directory: neither MUDIT_CACHE nor HOME is set".into()))?;
        if options.offline {
            return Err(RuntimeError::Offline {
                what: format!("ONNX Runtime {PINNED_VERSION}{}", if options.gpu { " for GPUs" } else { "" }),
                from: "PyPI".to_owned(),
                remedy: format!("run once without it, or {SET_PATH}"),
            });
        }
        Ok(info(wheel.fetch(&cache, &python, options.progress)?, LibrarySource::Fetched))
    }
}

fn from_path(path: PathBuf) -> Result<LibraryInfo> {
    if path.is_file() {
        return Ok(info(path, LibrarySource::Path));
    }
    let reason =
        if path.exists() { "ORT_DYLIB_PATH is not a file" } else { "no such file (from ORT_DYLIB_PATH)" };
    Err(RuntimeError::LibraryUnusable {
        path,
        reason: reason.to_owned(),
        remedy: "let it name a libonnxruntime.so of version 1.31, or unset it".to_owned(),
    })
}

fn info(path: PathBuf, source: LibrarySource) -> LibraryInfo {
    let version = version_of(&path);
    LibraryInfo { path, source, version }
}

/// The version in the file's real name, else the minor version that the library itself tells.
fn version_of(path: &Path) -> String {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let name = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match name.split_once(".so.") {
        Some((_, version)) if version.split('.').count() == 3 => version.to_owned(),
        _ => ort::util::probe(&real).map_or_else(|| "unknown".to_owned(), |minor| format!("1.{minor}")),
    }
}

/// The library inside an installed Python package of the supported series.
fn installed_library(python: &Python) -> Option<PathBuf> {
    // `find_spec` of a top-level package locates it without importing it.
    const SCRIPT: &str = "import importlib.util as u; s = u.find_spec('onnxruntime'); \
        print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')";
    let output = python.run(&["-c", SCRIPT]).ok().filter(|o| o.status.success())?;
    let directory = String::from_utf8(output.stdout).ok()?;
    let directory = Path::new(directory.trim());
    let prefix = format!("libonnxruntime.so.{SUPPORTED_SERIES}");
    let files = std::fs::read_dir(directory.join("capi")).ok()?;
    files.flatten().map(|f| f.path()).find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) && path.is_file()
    })
}

#[cfg(test)]
mod tests;
