//! Whole files or none.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context;

/// A file being written beside its final place; dropped before [`Pending::commit`], it leaves nothing.
pub(super) struct Pending {
    writer: BufWriter<File>,
    place: tempfile::TempPath,
}

impl Pending {
    /// Opens a hidden file in the folder of `path`, which is made if it is not there.
    pub(super) fn beside(path: &Path) -> anyhow::Result<Self> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".unfinished-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As `File::create` has it; the umask applies. A temporary file's own default is for its owner only.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file =
            builder.tempfile_in(folder).with_context(|| format!("cannot write in {}", folder.display()))?;
        let (file, place) = file.into_parts();
        Ok(Self { writer: BufWriter::new(file), place })
    }

    /// Flushes to the disk and renames to `path`.
    pub(super) fn commit(self, path: &Path) -> anyhow::Result<()> {
        let written = || format!("cannot write {}", path.display());
        let file =
            self.writer.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(written)?;
        file.sync_all().with_context(written)?;
        self.place.persist(path).map_err(|e| e.error).with_context(written)
    }
}

impl Write for Pending {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.writer.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.writer.flush()
    }
}

impl std::io::Seek for Pending {
    fn seek(&mut self, pos: std::io::SeekFrom) -> std::io::Result<u64> {
        self.writer.seek(pos)
    }
}

/// Replaces the file at `path` by `bytes`: written beside it, flushed to the disk, renamed.
///
/// # Errors
/// The folder cannot be made or written, or the disk is full; the file at `path` is then as it was.
pub fn replace(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut file = Pending::beside(path)?;
    file.write_all(bytes).with_context(|| format!("cannot write {}", path.display()))?;
    file.commit(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_the_whole_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/deep/file.txt");
        replace(&path, b"a long first text").unwrap();
        replace(&path, b"short").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn an_abandoned_file_disappears() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = Pending::beside(&dir.path().join("x.bin")).unwrap();
        file.write_all(&[1; 100]).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(file);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_is_a_file_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("taken"), b"").unwrap();
        let error = replace(&dir.path().join("taken/x.png"), b"1").unwrap_err();
        assert!(format!("{error:#}").contains("taken"), "{error:#}");
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_it_as_far_as_the_umask_allows() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        replace(&ours, b"1").unwrap();
        std::fs::write(&plain, b"1").unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
