//! The pinned ONNX Runtime wheel: fetched by Python's pip, checked by hash, unpacked into the cache.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::error::{Result, RuntimeError};
use crate::file::{sha256_file, write_atomically};
use crate::library::{PINNED_VERSION, SET_PATH};

/// One platform's wheel. Every wheel of a platform holds the same library; the one for Python 3.11 is pinned,
/// whatever Python runs pip.
pub(crate) struct Wheel {
    os: &'static str,
    arch: &'static str,
    /// pip's platform tag.
    tag: &'static str,
    /// SHA-256 of the wheel.
    sha256: &'static str,
    /// Size of the library inside, in bytes.
    library_bytes: u64,
    /// SHA-256 of the library inside.
    library_sha256: &'static str,
}

const WHEELS: [Wheel; 2] = [
    Wheel {
        os: "linux",
        arch: "x86_64",
        tag: "manylinux_2_28_x86_64",
        sha256: "5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f",
        library_bytes: 29_352_200,
        library_sha256: "fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3",
    },
    Wheel {
        os: "linux",
        arch: "aarch64",
        tag: "manylinux_2_28_aarch64",
        sha256: "da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3",
        library_bytes: 25_265_040,
        library_sha256: "8aa3b76b28c778a2b1dd660d34161adb1d508c9ccd04ff9dc80e26eca5df8467",
    },
];

/// The wheel for the machine this program was built for, if one is pinned.
pub(crate) fn for_this_platform() -> Option<&'static Wheel> {
    WHEELS.iter().find(|w| w.os == std::env::consts::OS && w.arch == std::env::consts::ARCH)
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
    /// The library in the cache, whole; `None` when it is not there.
    ///
    /// # Errors
    /// [`RuntimeError::WrongHash`] when the file there was altered or cut, [`RuntimeError::Io`].
    pub(crate) fn cached(&self, cache: &Path) -> Result<Option<PathBuf>> {
        let path = self.cache_path(cache);
        let Ok(metadata) = fs::metadata(&path) else { return Ok(None) };
        let got = if metadata.len() == self.library_bytes {
            sha256_file(&path)?
        } else {
            format!("unchecked ({} bytes instead of {})", metadata.len(), self.library_bytes)
        };
        if got == self.library_sha256 {
            return Ok(Some(path));
        }
        let remedy = "delete it".to_owned();
        Err(RuntimeError::WrongHash { path, expected: self.library_sha256.to_owned(), got, remedy })
    }

    /// Fetches the wheel and unpacks its library into the cache. Several processes may do so at once: each works
    /// in a directory of its own and renames the same bytes into place.
    pub(crate) fn fetch(&self, cache: &Path, python: &Python, progress: &dyn Fn(&str)) -> Result<PathBuf> {
        let target = self.cache_path(cache);
        let directory = target.parent().unwrap_or(cache);
        let unwritable =
            |source| RuntimeError::Io { action: "create", path: directory.to_path_buf(), source };
        fs::create_dir_all(directory).map_err(unwritable)?;
        let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(directory).map_err(unwritable)?;
        progress(&format!(
            "fetching ONNX Runtime {PINNED_VERSION} (about 24 MB) from PyPI with pip into {}",
            directory.display()
        ));
        self.download(work.path(), python)?;
        let wheel = only_wheel(work.path())?;
        self.unpack(&wheel, &target)?;
        progress(&format!("ONNX Runtime {PINNED_VERSION} checked and unpacked: {}", target.display()));
        Ok(target)
    }

    fn cache_path(&self, cache: &Path) -> PathBuf {
        cache
            .join(format!("onnxruntime-{PINNED_VERSION}-{}-{}", self.os, self.arch))
            .join(format!("libonnxruntime.so.{PINNED_VERSION}"))
    }

    fn download(&self, into: &Path, python: &Python) -> Result<()> {
        let failed = |reason: String, remedy: &str| RuntimeError::LibraryNotFound {
            reason,
            remedy: format!("{remedy}, or {SET_PATH}"),
        };
        let requirement = format!("onnxruntime=={PINNED_VERSION}");
        let into = into.to_string_lossy();
        let arguments = [
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation=cp",
            "--python-version=3.11",
            "--abi=cp311",
            "--platform",
            self.tag,
            "--dest",
            &into,
            &requirement,
        ];
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
        Err(failed(format!("pip could not download {requirement}: {reason}"), "check the network"))
    }

    /// Checks the wheel's hash and writes the library inside it to `target`, atomically.
    fn unpack(&self, wheel: &Path, target: &Path) -> Result<()> {
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
        let member = format!("onnxruntime/capi/libonnxruntime.so.{PINNED_VERSION}");
        let mut library = archive.by_name(&member).map_err(|e| unusable(format!("{member}: {e}")))?;
        write_atomically(target, |out| io::copy(&mut library, out).map(|_| ()))
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
