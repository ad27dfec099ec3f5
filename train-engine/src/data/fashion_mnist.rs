//! Fashion-MNIST: where its four files are, or where they come from.
//!
//! In this order: the given directory; Debian's `dataset-fashion-mnist`, if installed; the user's cache; the same package
//! fetched with `apt-get download` and unpacked here (no root); the data set's public address. Whatever is fetched is
//! checked by size and SHA-256 before it gets its place in the cache, and announced in one line.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use flate2::read::GzDecoder;
use runtime::file::{sha256_bytes, write_atomically};

use super::{deb, idx};
use crate::error::{Result, TrainError};

/// The classes, in the order of their labels.
pub const CLASS_NAMES: [&str; 10] =
    ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"];

/// The data set's four idx files, gzipped or plain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FashionMnistFiles {
    /// 60,000 training images.
    pub train_images: PathBuf,
    /// Their labels.
    pub train_labels: PathBuf,
    /// 10,000 test images.
    pub test_images: PathBuf,
    /// Their labels.
    pub test_labels: PathBuf,
}

/// A file as everybody has it once it is unzipped (the gzip wrappings differ between sources).
struct Known {
    name: &'static str,
    /// Bytes, unzipped.
    size: u64,
    /// SHA-256 in hex, unzipped.
    sha256: &'static str,
}

const FILES: [Known; 4] = [
    Known {
        name: "train-images-idx3-ubyte",
        size: 47_040_016,
        sha256: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    },
    Known {
        name: "train-labels-idx1-ubyte",
        size: 60_008,
        sha256: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    },
    Known {
        name: "t10k-images-idx3-ubyte",
        size: 7_840_016,
        sha256: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    },
    Known {
        name: "t10k-labels-idx1-ubyte",
        size: 10_008,
        sha256: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
];

/// What the temporary directories of fetches in progress start with.
const PLACE_PREFIX: &str = ".fetch-";
const PACKAGE: &str = "dataset-fashion-mnist";
const PACKAGE_DIRECTORY: &str = "/usr/share/datasets/fashion-mnist";
const ADDRESS: &str = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com";
/// No gzipped file of the set is larger, in bytes.
const MAX_DOWNLOAD: u64 = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const DOWNLOAD_TIMEOUT: Duration = Duration::from_mins(10);

/// Finds the data set's files, fetching them where they are nowhere on this machine.
///
/// `progress` gets one line for each fetch, with what and from where.
///
/// # Errors
/// [`TrainError::BadDataset`] when `given` lacks a file; [`TrainError::Offline`] when they had to be fetched and
/// `offline` is set; [`TrainError::Fetch`] with an account for each source when none works; [`TrainError::Io`] when the
/// cache cannot be written.
pub fn locate(given: Option<&Path>, offline: bool, progress: &dyn Fn(&str)) -> Result<FashionMnistFiles> {
    if let Some(directory) = given {
        return in_directory(directory);
    }
    let cache = cache_directory()?;
    for directory in [Path::new(PACKAGE_DIRECTORY), &cache] {
        if let Ok(files) = in_directory(directory) {
            return Ok(files);
        }
    }
    if offline {
        return Err(TrainError::Offline { what: "Fashion-MNIST", remedy: by_hand() });
    }
    fetch(&cache, &[&from_package, &from_address], progress)?;
    in_directory(&cache)
}

/// Where fetched files are kept.
fn cache_directory() -> Result<PathBuf> {
    let root = runtime::library::cache_directory().ok_or_else(|| TrainError::Fetch {
        what: "Fashion-MNIST",
        attempts: vec!["there is no home directory to keep it in".into()],
        remedy: "set MUDIT_CACHE to a directory".into(),
    })?;
    Ok(root.join("fashion-mnist"))
}

fn by_hand() -> String {
    format!(
        "install Debian's `{PACKAGE}`, or put its four files into a directory and name that as `data.path`"
    )
}

fn in_directory(directory: &Path) -> Result<FashionMnistFiles> {
    let [a, b, c, d] = FILES.map(|file| idx::find(directory, file.name));
    Ok(FashionMnistFiles { train_images: a?, train_labels: b?, test_images: c?, test_labels: d? })
}

/// A way to fill a directory with the gzipped files.
type Source<'a> = &'a dyn Fn(&Path, &dyn Fn(&str)) -> Result<()>;

/// Fills `cache` from the first source that works: all four files, checked, each moved to its place whole.
fn fetch(cache: &Path, sources: &[Source], progress: &dyn Fn(&str)) -> Result<()> {
    create(cache)?;
    remove_abandoned(cache)?;
    let mut attempts = Vec::new();
    for source in sources {
        // A place of our own, in the cache's file system: others may fetch at the same time.
        let place = tempfile::Builder::new().prefix(PLACE_PREFIX).tempdir_in(cache);
        let place = place.map_err(TrainError::io("write to", cache))?;
        match source(place.path(), progress).and_then(|()| check(place.path())) {
            Ok(()) => return settle(place.path(), cache),
            Err(error @ TrainError::Io { .. }) if is_full(&error) => return Err(error),
            Err(TrainError::Fetch { attempts: failed, .. }) => attempts.extend(failed),
            Err(error) => attempts.push(error.to_string()),
        }
    }
    Err(TrainError::Fetch { what: "Fashion-MNIST", attempts, remedy: by_hand() })
}

/// Removes what a killed fetch left behind; younger places may be another process's.
fn remove_abandoned(cache: &Path) -> Result<()> {
    for entry in super::sorted_entries(cache)? {
        let ours = entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PLACE_PREFIX));
        let age = || fs::metadata(&entry).ok()?.modified().ok()?.elapsed().ok();
        if ours && age().is_some_and(|age| age > 2 * DOWNLOAD_TIMEOUT) {
            fs::remove_dir_all(&entry).map_err(TrainError::io("remove", &entry))?;
        }
    }
    Ok(())
}

fn is_full(error: &TrainError) -> bool {
    matches!(error, TrainError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
}

fn create(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).map_err(TrainError::io("create", directory))
}

fn gzipped(name: &str) -> String {
    format!("{name}.gz")
}

/// Checks that a directory holds all files with the right content.
fn check(directory: &Path) -> Result<()> {
    for Known { name, size, sha256 } in &FILES {
        let path = directory.join(gzipped(name));
        let file = fs::File::open(&path).map_err(TrainError::io("open", &path))?;
        let mut content = Vec::new();
        let mut unzipped = GzDecoder::new(io::BufReader::new(file)).take(size + 1);
        let got = unzipped.read_to_end(&mut content).map_err(TrainError::io("unzip", &path))? as u64;
        if got != *size {
            return Err(TrainError::bad_file(&path, "unzipped length", size, format!("{got} bytes")));
        }
        let got = sha256_bytes(&content);
        if got != *sha256 {
            return Err(TrainError::bad_file(&path, "SHA-256", sha256, got));
        }
    }
    Ok(())
}

/// Moves checked files to their place.
fn settle(from: &Path, to: &Path) -> Result<()> {
    for Known { name, .. } in &FILES {
        let (source, target) = (from.join(gzipped(name)), to.join(gzipped(name)));
        fs::File::open(&source).and_then(|file| file.sync_all()).map_err(TrainError::io("sync", &source))?;
        fs::rename(&source, &target).map_err(TrainError::io("write", &target))?;
    }
    Ok(())
}

/// `apt-get download`, with the machine's package lists or, where it has none, lists of our own.
fn from_package(directory: &Path, progress: &dyn Fn(&str)) -> Result<()> {
    progress(&format!("fetching Fashion-MNIST (31 MB): Debian package `{PACKAGE}`, by `apt-get download`"));
    let failed = |reason: String| TrainError::Fetch {
        what: "the Debian package",
        attempts: vec![reason],
        remedy: by_hand(),
    };
    let absent = |error: io::Error| failed(format!("apt-get does not start: {error}"));
    if let Err(first) = apt(directory, &[], &["download", PACKAGE]).map_err(absent)? {
        progress("fetching Debian's package lists into the cache, by `apt-get update`");
        let (lists, archives) = (directory.join("lists"), directory.join("cache"));
        create(&lists.join("partial"))?;
        create(&archives.join("archives/partial"))?;
        let lists = format!("Dir::State::lists={}/", lists.display());
        let archives = format!("Dir::Cache={}/", archives.display());
        let own = ["-o", &lists, "-o", &archives];
        for command in [&["update"][..], &["download", PACKAGE]] {
            apt(directory, &own, command)
                .map_err(absent)?
                .map_err(|second| failed(format!("{first}; with lists of our own, {second}")))?;
        }
    }
    let package = super::sorted_entries(directory)?
        .into_iter()
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| failed("apt-get left no .deb file".into()))?;
    let names = FILES.map(|file| gzipped(file.name));
    deb::extract(&package, &names.each_ref().map(String::as_str), |name, mut content| {
        Ok(write_atomically(directory.join(name), |out| io::copy(&mut content, out).map(drop))?)
    })
}

/// Runs apt-get in a directory; where it starts and fails, the inner error is its last words.
fn apt(directory: &Path, options: &[&str], command: &[&str]) -> io::Result<Result<(), String>> {
    let output = Command::new("apt-get")
        .args(["-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"])
        .args(options)
        .args(command)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let last =
        text.lines().rfind(|line| line.starts_with("E:")).or(text.lines().last()).unwrap_or("no message");
    Ok(Err(format!("`apt-get {}`: {last}", command.join(" "))))
}

/// The four files from the address the data set's authors name.
fn from_address(directory: &Path, progress: &dyn Fn(&str)) -> Result<()> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_global(Some(DOWNLOAD_TIMEOUT))
        .build()
        .into();
    progress(&format!("fetching Fashion-MNIST (31 MB): {ADDRESS}"));
    for Known { name, .. } in &FILES {
        let address = format!("{ADDRESS}/{}", gzipped(name));
        let response = agent.get(&address).call().map_err(|error| TrainError::Fetch {
            what: "a file",
            attempts: vec![format!("{address}: {error}")],
            remedy: by_hand(),
        })?;
        let mut body = response.into_body().into_with_config().limit(MAX_DOWNLOAD).reader();
        write_atomically(directory.join(gzipped(name)), |out| io::copy(&mut body, out).map(drop))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::data::idx::tests::gzip;

    fn fill(directory: &Path) {
        for file in &FILES {
            fs::write(directory.join(file.name), b"x").unwrap();
        }
    }

    #[test]
    fn a_given_directory_is_taken_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let missing = locate(Some(dir.path()), true, &|_| ()).unwrap_err().to_string();
        assert!(missing.contains("neither `train-images-idx3-ubyte` nor"), "{missing}");
        fill(dir.path());
        let files = locate(Some(dir.path()), true, &|_| panic!("nothing is fetched")).unwrap();
        assert!(files.test_labels.ends_with("t10k-labels-idx1-ubyte"));
    }

    #[test]
    fn wrong_content_is_refused_and_the_cache_stays_empty() {
        let cache = tempfile::tempdir().unwrap();
        let wrong: Source = &|directory, progress| {
            progress("wrong");
            for file in &FILES {
                fs::write(directory.join(gzipped(file.name)), gzip(b"not it")).unwrap();
            }
            Ok(())
        };
        let broken: Source = &|_, _| {
            let attempts = vec!["second source".to_owned()];
            Err(TrainError::Fetch { what: "a part", attempts, remedy: "inner remedy".to_owned() })
        };
        let told = RefCell::new(Vec::new());
        let error = fetch(cache.path(), &[wrong, broken], &|line| told.borrow_mut().push(line.to_owned()));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("unzipped length: expected 47040016, got 6 bytes"), "{error}");
        assert!(!error.contains("inner remedy"), "{error}");
        assert!(error.contains("second source") && error.contains("dataset-fashion-mnist"), "{error}");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
        assert_eq!(*told.borrow(), ["wrong"]);
    }

    #[test]
    fn a_full_disk_is_said_at_once() {
        let cache = tempfile::tempdir().unwrap();
        let full: Source =
            &|directory, _| Err(TrainError::io("write", directory)(io::ErrorKind::StorageFull.into()));
        let never: Source = &|_, _| panic!("no second source is tried");
        let error = fetch(cache.path(), &[full, never], &|_| ()).unwrap_err();
        assert!(matches!(error, TrainError::Io { .. }));
    }

    #[test]
    fn only_old_places_are_removed() {
        let cache = tempfile::tempdir().unwrap();
        for name in [".fetch-old", ".fetch-new", "old"] {
            fs::create_dir(cache.path().join(name)).unwrap();
        }
        let old = std::time::SystemTime::now() - 3 * DOWNLOAD_TIMEOUT;
        for name in [".fetch-old", "old"] {
            fs::File::open(cache.path().join(name)).unwrap().set_modified(old).unwrap();
        }
        remove_abandoned(cache.path()).unwrap();
        let left = super::super::sorted_entries(cache.path()).unwrap();
        assert_eq!(left, [cache.path().join(".fetch-new"), cache.path().join("old")]);
    }

    #[test]
    fn one_damaged_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = &FILES[0];
        fs::write(dir.path().join(gzipped(file.name)), gzip(&vec![0; file.size as usize])).unwrap();
        let error = check(dir.path()).unwrap_err().to_string();
        assert!(error.contains("SHA-256: expected c59f468a"), "{error}");
    }
}
