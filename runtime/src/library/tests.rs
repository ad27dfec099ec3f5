use std::cell::RefCell;
use std::fs;

use super::*;

/// Surroundings with nothing in them but a cache directory and a `python3` that is this shell script.
#[cfg(unix)]
fn with_python(directory: &Path, script: &str) -> Surroundings {
    use std::os::unix::fs::PermissionsExt;
    let python = directory.join("python3");
    fs::write(&python, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    Surroundings { path: None, cache: Some(directory.join("cache")), python: Python(python) }
}

/// The part of a fake interpreter that says that no package is installed.
const NO_PACKAGE: &str = r#"if [ "$1" = -c ]; then echo; exit 0; fi"#;

fn error(surroundings: Surroundings) -> String {
    surroundings.locate(&RuntimeOptions::default()).unwrap_err().to_string()
}

#[test]
fn a_named_path_wins_and_must_be_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let named = |path: PathBuf| Surroundings {
        path: Some(path),
        cache: None,
        python: Python(dir.path().join("no python here")),
    };
    let library = dir.path().join("libonnxruntime.so.1.31.7");
    fs::write(&library, "").unwrap();
    let found = named(library.clone()).locate(&RuntimeOptions::default()).unwrap();
    assert_eq!((found.path, found.source, &*found.version), (library, LibrarySource::Path, "1.31.7"));
    for wrong in [dir.path().join("absent.so"), dir.path().to_path_buf()] {
        let text = error(named(wrong));
        assert!(text.contains("ORT_DYLIB_PATH") && text.contains("unset it"), "{text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn without_python_or_pip_the_error_names_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let text = error(Surroundings {
        path: None,
        cache: Some(dir.path().join("cache")),
        python: Python(dir.path().join("absent")),
    });
    assert!(text.contains("python3 is not installed") && text.contains("set ORT_DYLIB_PATH"), "{text}");
    let no_pip = format!("{NO_PACKAGE}\necho '/usr/bin/python3: No module named pip' >&2; exit 1");
    let text = error(with_python(dir.path(), &no_pip));
    assert!(text.contains("has no pip") && text.contains("python3-pip"), "{text}");
    let no_network = format!("{NO_PACKAGE}\necho 'ERROR: no matching distribution' >&2; exit 1");
    let text = error(with_python(dir.path(), &no_network));
    assert!(text.contains("no matching distribution") && text.contains("check the network"), "{text}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_wheel_with_another_hash_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // `--dest DIR` comes second to last; the script writes a wheel of its own there.
    let script = format!(
        "{NO_PACKAGE}\nwhile [ $# -gt 2 ]; do shift; if [ \"$1\" = --dest ]; then echo x > \"$2/a.whl\"; fi; done"
    );
    let said = RefCell::new(Vec::new());
    let progress = |line: &str| said.borrow_mut().push(line.to_owned());
    let options = RuntimeOptions { progress: &progress, ..RuntimeOptions::default() };
    let result = with_python(dir.path(), &script).locate(&options);
    assert!(matches!(result, Err(RuntimeError::WrongHash { .. })), "{result:?}");
    let said = said.into_inner();
    assert!(said.len() == 1 && said[0].contains("from PyPI"), "{said:?}");
    let cache = fs::read_dir(dir.path().join("cache")).unwrap().next().unwrap().unwrap();
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn offline_refuses_to_fetch_and_a_corrupt_cache() {
    let dir = tempfile::tempdir().unwrap();
    let offline = RuntimeOptions { offline: true, ..RuntimeOptions::default() };
    let result = with_python(dir.path(), NO_PACKAGE).locate(&offline);
    assert!(matches!(result, Err(RuntimeError::Offline { .. })), "{result:?}");
    assert!(!dir.path().join("cache").exists());

    let platform = format!("onnxruntime-{PINNED_VERSION}-linux-{}", env::consts::ARCH);
    let place = dir.path().join("cache").join(platform);
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join(format!("libonnxruntime.so.{PINNED_VERSION}")), "cut short").unwrap();
    let text = with_python(dir.path(), NO_PACKAGE).locate(&offline).unwrap_err().to_string();
    assert!(text.contains("9 bytes instead of") && text.contains("delete it"), "{text}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_cache_that_cannot_be_made_is_an_error_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let surroundings = with_python(dir.path(), NO_PACKAGE);
    fs::write(dir.path().join("cache"), "a file is in the way").unwrap();
    let text = error(surroundings);
    assert!(text.contains("cannot create") && text.contains("cache"), "{text}");
}

#[cfg(unix)]
#[test]
fn an_installed_package_of_the_supported_series_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let capi = dir.path().join("capi");
    fs::create_dir(&capi).unwrap();
    let script = format!("echo {}", dir.path().display());
    fs::write(capi.join("libonnxruntime.so.1.30.0"), "").unwrap();
    assert_eq!(installed_library(&with_python(dir.path(), &script).python), None);
    fs::write(capi.join("libonnxruntime.so.1.31.0"), "").unwrap();
    let found = with_python(dir.path(), &script).locate(&RuntimeOptions::default()).unwrap();
    assert_eq!((found.source, &*found.version), (LibrarySource::Python, "1.31.0"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_gpu_provider_needs_a_build_that_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join("libonnxruntime.so.1.31.7");
    fs::write(&library, "").unwrap();
    let gpu = RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() };
    let named = || Surroundings {
        path: Some(library.clone()),
        cache: None,
        python: Python(dir.path().join("no python here")),
    };
    let text = named().locate(&gpu).unwrap_err().to_string();
    assert!(text.contains("for the CPU alone") && text.contains("onnxruntime-gpu 1.31.1"), "{text}");
    fs::write(dir.path().join("libonnxruntime_providers_cuda.so"), "").unwrap();
    assert_eq!(named().locate(&gpu).unwrap().provider_file("cuda").unwrap().parent(), Some(dir.path()));

    // An installed package for the CPU alone is passed by, and nothing is fetched behind the user's back.
    let capi = dir.path().join("package/capi");
    fs::create_dir_all(&capi).unwrap();
    fs::write(capi.join("libonnxruntime.so.1.31.0"), "").unwrap();
    let script = format!("echo {}", dir.path().join("package").display());
    let result = with_python(dir.path(), &script).locate(&gpu);
    assert!(matches!(result, Err(RuntimeError::Offline { .. })), "{result:?}");
    fs::write(capi.join("libonnxruntime_providers_cuda.so"), "").unwrap();
    assert_eq!(with_python(dir.path(), &script).locate(&gpu).unwrap().source, LibrarySource::Python);
}
