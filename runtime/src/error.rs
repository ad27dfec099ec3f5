//! The one error type of the crate.

use std::io;
use std::path::{Path, PathBuf};

use graph_builder::Shape;

use crate::hint::hint;

/// What can go wrong between a program and the machine that runs it.
///
/// Every message says what was wrong, where, what was expected and what was found, and ends with the remedy
/// where one is known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// ONNX Runtime is nowhere to be found and could not be fetched.
    #[error("cannot find ONNX Runtime: {reason}; {remedy}")]
    LibraryNotFound {
        /// What was tried and how it failed.
        reason: String,
        /// What the user can do.
        remedy: String,
    },
    /// A library file exists but cannot be used.
    #[error("cannot use the ONNX Runtime library {}: {reason}; {remedy}", path.display())]
    LibraryUnusable {
        /// The library file.
        path: PathBuf,
        /// Why not.
        reason: String,
        /// What the user can do.
        remedy: String,
    },
    /// Something has to be fetched and fetching is switched off.
    #[error("{what} is needed and would be fetched from {from}, but --offline is set; {remedy}")]
    Offline {
        /// The missing thing.
        what: String,
        /// Where it would come from.
        from: String,
        /// What the user can do.
        remedy: String,
    },
    /// A fetched or stored file has other contents than the pinned ones.
    #[error("{} has sha256 {got}, expected {expected}; {remedy}", path.display())]
    WrongHash {
        /// The file.
        path: PathBuf,
        /// The pinned hash, hexadecimal.
        expected: String,
        /// The hash found.
        got: String,
        /// What the user can do.
        remedy: String,
    },
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}{}", path.display(), hint(action, path, source))]
    Io {
        /// The verb: `read`, `write`, `rename` …
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A safetensors file is truncated or malformed.
    #[error("{} is not a complete safetensors file: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What does not add up.
        reason: String,
    },
    /// A named tensor, entry, input or output does not exist.
    #[error("{place} has no {kind} named `{name}`{}", did_you_mean(nearest.as_deref()))]
    UnknownName {
        /// `tensor`, `entry`, `input` or `output`.
        kind: &'static str,
        /// Where it was looked for.
        place: String,
        /// The name asked for.
        name: String,
        /// The most similar name that exists.
        nearest: Option<String>,
    },
    /// A file holds a tensor that nobody asked for.
    #[error("{place} holds an unexpected tensor `{name}`{}", did_you_mean(nearest.as_deref()))]
    UnexpectedTensor {
        /// Where it was found.
        place: String,
        /// The tensor.
        name: String,
        /// The most similar expected name.
        nearest: Option<String>,
    },
    /// A tensor has another shape than required.
    #[error("`{name}` in {place} has shape {got}, expected {expected}")]
    WrongShape {
        /// Where it was found.
        place: String,
        /// The tensor.
        name: String,
        /// The required shape.
        expected: Shape,
        /// The shape found.
        got: Shape,
    },
    /// A tensor has another element type than required.
    #[error("`{name}` in {place} has element type {got}, expected {expected}")]
    WrongType {
        /// Where it was found.
        place: String,
        /// The tensor.
        name: String,
        /// The required element type.
        expected: String,
        /// The element type found.
        got: String,
    },
    /// A slice of values has another length than the tensor it is for.
    #[error("{what} got {got} values, expected {expected}")]
    WrongLength {
        /// What the values are for.
        what: String,
        /// The required number of values.
        expected: usize,
        /// The number given.
        got: usize,
    },
    /// Two entries of a layout have the same name.
    #[error("the name `{name}` is declared twice in one arena layout")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// Two arenas that must have one layout do not.
    #[error("cannot {action}: the two arenas have different layouts ({left} and {right} entries)")]
    LayoutMismatch {
        /// What was tried.
        action: &'static str,
        /// Entries of the first.
        left: usize,
        /// Entries of the second.
        right: usize,
    },
    /// Host memory cannot be had.
    #[error("cannot allocate {bytes} bytes for {what}; close other programs or use a smaller model or batch")]
    OutOfMemory {
        /// Size of the request in bytes.
        bytes: usize,
        /// What the memory was for.
        what: String,
    },
    /// A GPU's memory is used up.
    #[error(
        "GPU {ordinal} cannot give {bytes} bytes for {what}: {free} of its {total} bytes are free; {advice}"
    )]
    GpuOutOfMemory {
        /// The CUDA driver's number of the GPU.
        ordinal: usize,
        /// Size of the request in bytes.
        bytes: usize,
        /// What the memory was for.
        what: String,
        /// Bytes that are free.
        free: usize,
        /// Bytes that the GPU has.
        total: usize,
        /// What would fit.
        advice: String,
    },
    /// The CUDA driver refused something.
    #[error("CUDA: cannot {action}: {reason}")]
    Cuda {
        /// What was tried.
        action: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// ONNX Runtime refuses a program.
    #[error("ONNX Runtime cannot load program `{program}`: {reason}")]
    Load {
        /// The program's name or file.
        program: String,
        /// ONNX Runtime's own words.
        reason: String,
    },
    /// A loaded model is not the program that it claims to be.
    #[error("program `{program}`: {side} `{name}` is {got} in the model, expected {expected}")]
    Signature {
        /// The program's name or file.
        program: String,
        /// `input` or `output`.
        side: &'static str,
        /// The input or output.
        name: String,
        /// What the signature says.
        expected: String,
        /// What the model says.
        got: String,
    },
    /// A program's run failed.
    #[error("program `{program}` failed: {reason}")]
    Run {
        /// The program's name.
        program: String,
        /// ONNX Runtime's own words.
        reason: String,
    },
    /// A binding would read and write, or write twice, the same memory.
    #[error("program `{program}`: {what}; use two arenas")]
    Aliased {
        /// The program's name.
        program: String,
        /// Which two bindings collide.
        what: String,
    },
    /// An arena behind a binding was exchanged for another one, or a thread panicked while writing to it.
    #[error("program `{program}`: {reason}; bind the program again")]
    StaleArena {
        /// The program's name.
        program: String,
        /// What happened to the arena.
        reason: String,
    },
    /// A buffer was asked for that lives in an arena.
    #[error("{side} `{name}` of program `{program}` is bound to an arena; use the arena's view")]
    BoundToArena {
        /// The program's name.
        program: String,
        /// `input` or `output`.
        side: &'static str,
        /// The input or output.
        name: String,
    },
    /// The asked provider or device cannot be had here.
    #[error("provider `{provider}` is not available: {reason}; {remedy}")]
    ProviderUnavailable {
        /// The provider asked for.
        provider: String,
        /// What is missing.
        reason: String,
        /// What the user can do.
        remedy: String,
    },
    /// A setting has a value outside its range.
    #[error("{what} is {got}, expected {expected}")]
    InvalidValue {
        /// The setting.
        what: String,
        /// Its range.
        expected: String,
        /// The value given.
        got: String,
    },
    /// An engine directory is incomplete or was altered.
    #[error("{} is not a usable engine: {reason}; build it again", path.display())]
    Engine {
        /// The engine directory.
        path: PathBuf,
        /// What does not add up.
        reason: String,
    },
    /// The CUDA kernels cannot be compiled.
    #[error("cannot compile the CUDA kernels in {source_file}: {reason}")]
    Kernel {
        /// The source file.
        source_file: String,
        /// The compiler's own words.
        reason: String,
    },
    /// A call into ONNX Runtime outside loading and running failed.
    #[error("ONNX Runtime: cannot {action}: {reason}")]
    Ort {
        /// What was tried.
        action: &'static str,
        /// ONNX Runtime's own words.
        reason: String,
    },
}

/// The crate's result.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

impl RuntimeError {
    /// Wraps an operating-system error with the verb and the path it belongs to.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }

    pub(crate) fn cuda(action: &'static str, error: cudarc::driver::DriverError) -> Self {
        Self::Cuda { action, reason: format!("{error:?}") }
    }

    pub(crate) fn ort(action: &'static str, error: &dyn std::fmt::Display) -> Self {
        Self::Ort { action, reason: error.to_string() }
    }
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|n| format!("; did you mean `{n}`?")).unwrap_or_default()
}

/// The candidate most similar to `name`, if any is similar enough to be meant.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    candidates
        .into_iter()
        .map(|c| (strsim::jaro_winkler(name, c), c))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c.to_owned())
}
