//! Files that are either whole or absent: written beside, synced and renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Result, RuntimeError};

/// Buffer between a writer and the file, in bytes.
const WRITE_BUFFER: usize = 1 << 20;

/// A file that appears at its place whole, or not at all.
///
/// The contents go to a temporary file in the same directory (made if it is not there); [`AtomicFile::commit`] syncs
/// it, renames it over the path and syncs the directory. Dropped before that, it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    writer: BufWriter<tempfile::NamedTempFile>,
    path: PathBuf,
}

impl AtomicFile {
    /// Opens a temporary file beside `path`.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] with `path` and the operating system's reason.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let directory = parent(path);
        let temporary = fs::create_dir_all(&directory).and_then(|()| temporary_for(path, &directory));
        let temporary = temporary.map_err(|e| RuntimeError::io("write", path, e))?;
        Ok(Self { writer: BufWriter::with_capacity(WRITE_BUFFER, temporary), path: path.to_path_buf() })
    }

    /// Puts the file at its place; a reader, or a crash at any moment, sees the old contents or the new ones.
    ///
    /// # Errors
    /// [`RuntimeError::Io`]; the path is then as it was. A directory that cannot be synced is no error: the file is there,
    /// and only a power cut at this very moment could take it back.
    pub fn commit(self) -> Result<()> {
        let path = self.path;
        let failed = |e| RuntimeError::io("write", &path, e);
        let temporary = self.writer.into_inner().map_err(|e| failed(e.into_error()))?;
        sync_file(temporary.as_file()).map_err(failed)?;
        temporary.persist(&path).map_err(|e| failed(e.error))?;
        drop(sync_directory(parent(&path)));
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.writer.seek(to)
    }
}

/// Writes an [`AtomicFile`] in one go; when `write` fails, `path` is as it was.
///
/// # Errors
/// [`RuntimeError::Io`] with `path` and the operating system's reason (no space left, permission denied, …).
pub fn write_atomically(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    let written = write(&mut file).and_then(|()| file.flush());
    written.map_err(|e| RuntimeError::io("write", &file.path, e))?;
    file.commit()
}

/// Finds out before any work whether an [`AtomicFile`] can be written at `path`; leaves nothing behind.
///
/// # Errors
/// [`RuntimeError::Io`] with `path` and the operating system's reason.
pub fn check_writable(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let directory = parent(path);
    let there = directory.ancestors().find(|d| d.symlink_metadata().is_ok()).unwrap_or(Path::new("."));
    temporary_for(path, there).map(drop).map_err(|e| RuntimeError::io("write", path, e))
}

/// Makes a file's contents survive a power cut, where its file system has an operation for that.
///
/// # Errors
/// The operating system's reason: the contents may not have been stored.
pub fn sync_file(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(e) if is_lacking(&e) => Ok(()),
        synced => synced,
    }
}

/// Makes earlier renames inside a directory survive a power cut, where its file system has an operation for that and
/// the directory may be opened.
///
/// # Errors
/// [`RuntimeError::Io`]: the renames are done, and may be lost in a power cut.
pub fn sync_directory(directory: impl AsRef<Path>) -> Result<()> {
    let directory = directory.as_ref();
    match File::open(directory).and_then(|d| sync_file(&d)) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        synced => synced.map_err(|e| RuntimeError::io("sync", directory, e)),
    }
}

/// Whether a file system says that it has no such operation.
fn is_lacking(error: &io::Error) -> bool {
    /// What Linux's network file systems answer inside the kernel, and some let out.
    const ENOTSUPP: i32 = 524;
    matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput)
        || error.raw_os_error() == Some(ENOTSUPP)
}

/// How a large file gets to a second place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// A file of its own: blocks are shared until one of the two is written to, where the file system can do that, else
    /// copied.
    #[default]
    Copy,
    /// A second name of the same file, which is made read-only: whoever writes to one writes to both.
    HardLink,
}

/// Puts a file at a second place, with its time of change.
///
/// # Errors
/// [`RuntimeError::Io`] when `from` cannot be read or `to` cannot be made or already exists; for a hard link also when the
/// two places are on different file systems.
pub fn place_file(from: impl AsRef<Path>, to: impl AsRef<Path>, how: Placement) -> Result<()> {
    let (from, to) = (from.as_ref(), to.as_ref());
    let unreadable = |e| RuntimeError::io("read", from, e);
    let source = fs::canonicalize(from).map_err(unreadable)?;
    let metadata = fs::metadata(&source).map_err(unreadable)?;
    let failed = |e| RuntimeError::io("write", to, e);
    if to.symlink_metadata().is_ok() {
        return Err(failed(io::ErrorKind::AlreadyExists.into()));
    }
    if how == Placement::HardLink {
        fs::hard_link(&source, to).map_err(|e| RuntimeError::io("hard-link", to, e))?;
        let mut permissions = metadata.permissions();
        permissions.set_readonly(true);
        return fs::set_permissions(to, permissions).map_err(failed);
    }
    let copied = reflink_copy::reflink_or_copy(&source, to).and_then(|_| {
        let file = File::open(to)?;
        file.set_modified(metadata.modified()?)?;
        sync_file(&file)
    });
    copied.map_err(|e| {
        // The half-written copy is of no use to anyone; failing to remove it changes nothing in the report.
        let _ = fs::remove_file(to);
        failed(e)
    })
}

/// SHA-256 of a file's contents, hexadecimal.
///
/// # Errors
/// [`RuntimeError::Io`] when the file cannot be read.
pub fn sha256_file(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let failed = |e| RuntimeError::io("read", path, e);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; WRITE_BUFFER];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hexadecimal(&hasher.finalize())),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
}

/// SHA-256 of bytes, hexadecimal.
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// Bytes as hexadecimal digits, two each.
pub fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The directory that holds `path`; `.` for a bare file name.
fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// A temporary file in `directory` for the contents of `path`.
fn temporary_for(path: &Path, directory: &Path) -> io::Result<tempfile::NamedTempFile> {
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::IsADirectory, "no file name"))?;
    match fs::metadata(path) {
        Ok(there) if there.is_dir() => {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"));
        }
        // A rename would put a file in the place of the machine's /dev/null.
        Ok(there) if !there.is_file() => {
            let reason = "it is a device or a pipe, and results go to files that appear whole";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        _ => {}
    }
    let prefix = format!(".{}.", name.to_string_lossy());
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    {
        // Like any other file: what the process's umask allows, not the private mode of temporary files.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666)).tempfile_in(directory)
    }
    #[cfg(not(unix))]
    builder.tempfile_in(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_writer_leaves_the_old_contents_and_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write_atomically(&path, |w| w.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |w| {
            w.write_all(b"new, but only ha")?;
            Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on device"))
        })
        .unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let text = error.to_string();
        assert!(text.contains("state.json") && text.contains("no space left"), "{text}");
    }

    #[test]
    fn a_missing_directory_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/deep/file");
        write_atomically(&path, |w| w.write_all(b"x")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn an_abandoned_file_disappears() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = AtomicFile::create(dir.path().join("x")).unwrap();
        file.write_all(&[1; 100]).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(file);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_as_directory_and_a_directory_as_target_are_errors_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("taken"), b"").unwrap();
        for target in [dir.path().join("taken/file"), dir.path().to_path_buf()] {
            let text = write_atomically(&target, |_| Ok(())).unwrap_err().to_string();
            assert!(text.contains(&target.display().to_string()), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_found_out_before_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("taken"), b"").unwrap();
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        let long = "x".repeat(250);
        for good in ["new", "taken", "new/deep/file"] {
            check_writable(at(good)).unwrap();
        }
        for bad in ["", "taken/file", "taken/deep/file", "dangling/file", &long] {
            let text = check_writable(at(bad)).unwrap_err().to_string();
            assert!(text.starts_with(&format!("cannot write {}", at(bad).display())), "{text}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(write_atomically("/dev/null", |_| Ok(())).unwrap_err().to_string().contains("a device"));
    }

    #[test]
    fn a_file_system_without_an_operation_is_told_from_a_failing_one() {
        let lacking = |code: &i32| is_lacking(&io::Error::from_raw_os_error(*code));
        assert!([libc::ENOSYS, libc::EINVAL, libc::EOPNOTSUPP, 524].iter().all(lacking));
        assert!(![libc::EIO, libc::ENOSPC, libc::EDQUOT].iter().any(lacking));
    }

    #[test]
    fn a_placed_file_follows_symlinks_keeps_its_time_and_overwrites_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("a"), "x").unwrap();
        std::os::unix::fs::symlink(at("a"), at("link")).unwrap();
        let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
        for how in [Placement::Copy, Placement::HardLink] {
            let to = at(&format!("{how:?}"));
            place_file(at("link"), &to, how).unwrap();
            assert_eq!((fs::read(&to).unwrap(), modified(&to)), (b"x".to_vec(), modified(&at("a"))));
            assert!(place_file(at("a"), &to, how).is_err());
            assert!(place_file(at("nothing"), at("new"), how).is_err() && !at("new").exists());
        }
        fs::remove_file(at("HardLink")).unwrap();
    }

    #[test]
    fn whoever_writes_to_a_copy_leaves_the_first_file_alone_and_a_link_is_read_only() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("a"), "x").unwrap();
        place_file(at("a"), at("copy"), Placement::Copy).unwrap();
        fs::OpenOptions::new().append(true).open(at("copy")).unwrap().write_all(b"more").unwrap();
        assert_eq!(fs::read(at("a")).unwrap(), b"x");
        assert_eq!(fs::metadata(at("copy")).unwrap().nlink(), 1);
        place_file(at("a"), at("link"), Placement::HardLink).unwrap();
        let link = fs::metadata(at("link")).unwrap();
        assert!(link.nlink() == 2 && link.permissions().readonly());
    }

    #[test]
    fn sha256_of_file_and_bytes_agree_with_the_standard_vector() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        fs::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_file(&path).unwrap(), expected);
        assert_eq!(sha256_bytes(b"abc"), expected);
    }
}
