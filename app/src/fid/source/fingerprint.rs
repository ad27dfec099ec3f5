//! What images are known by without decoding them: enough to see that a set has changed.

use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom};

use runtime::file::hexadecimal;
use sha2::{Digest, Sha256};

/// Collects what a source knows of some of its images.
///
/// Two hashes come of it. The stamp has all that a file system tells of the files, down to the time at which they were last
/// touched: equal stamps are equal images, different ones may be copies. The identity is of what stays with a copy: sizes,
/// checksums, some of the contents; different identities are different images.
#[derive(Debug, Default)]
pub struct Fingerprint {
    stamp: Sha256,
    identity: Sha256,
    unknown: bool,
    contents: bool,
}

/// Bytes of each image that identities have, if there is no checksum of it.
pub(super) const TAIL: usize = 64;

impl Fingerprint {
    /// For an identity, too, which needs a look into each file.
    pub fn with_contents() -> Self {
        Self { contents: true, ..Self::default() }
    }

    /// Whether some of the contents are wanted, as sizes alone may agree by chance.
    pub fn wants_contents(&self) -> bool {
        self.contents
    }

    /// The last bytes of an image that ends at `end` in a file: a checksum of all of it in a PNG, and the last of the
    /// pixels elsewhere.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub(super) fn tail(&mut self, file: &mut File, end: u64, length: u64) -> std::io::Result<()> {
        let mut bytes = [0; TAIL];
        let tail = &mut bytes[..length.min(TAIL as u64) as usize];
        file.seek(SeekFrom::Start(end - tail.len() as u64))?;
        file.read_exact(tail)?;
        self.content(tail);
        Ok(())
    }

    /// Something that stays with a copy.
    pub fn content(&mut self, bytes: &[u8]) {
        for hash in [&mut self.stamp, &mut self.identity] {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
    }

    /// A file that holds one image: its size and times.
    pub fn picture(&mut self, file: &Metadata) {
        self.content(&file.len().to_le_bytes());
        self.times(file);
    }

    /// A file that holds many images: its times; what stays with a copy is told by [`content`](Self::content).
    pub fn times(&mut self, file: &Metadata) {
        self.stamp.update(file.len().to_le_bytes());
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt as _;
            // A time of modification can be set; the one of the last change of the file's entry cannot.
            for number in [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()] {
                self.stamp.update(number.to_le_bytes());
            }
            self.stamp.update(file.ino().to_le_bytes());
        }
        #[cfg(not(unix))]
        match file.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok()) {
            Some(time) => self.stamp.update(time.as_nanos().to_le_bytes()),
            None => self.unknown = true,
        }
    }

    /// Only the pixels themselves tell.
    pub fn unknown(&mut self) {
        self.unknown = true;
    }

    /// The stamp, if there is one.
    pub fn stamp(self) -> Option<String> {
        (!self.unknown).then(|| hexadecimal(&self.stamp.finalize()))
    }

    /// The identity.
    pub fn identity(self) -> String {
        hexadecimal(&self.identity.finalize())
    }
}
