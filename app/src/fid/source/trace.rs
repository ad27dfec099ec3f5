//! What images are known by without decoding them: enough to see that a set has changed.

use std::fs::Metadata;

use runtime::file::hexadecimal;
use sha2::{Digest, Sha256};

/// Collects what a source knows of some of its images.
///
/// Two hashes come of it. The stamp has all that a file system tells of the files, down to the time at which they were last
/// touched: equal stamps are equal images, different ones may be copies. The identity is of what stays with a copy: sizes,
/// checksums, some of the contents; different identities are different images.
#[derive(Debug, Default)]
pub struct Trace {
    stamp: Sha256,
    identity: Sha256,
    unknown: bool,
}

impl Trace {
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

/// Numbers of those images of a range that identities have some contents of: the first one of each block.
pub(super) fn probes(range: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
    let block = crate::fid::plan::BLOCK;
    (range.start.next_multiple_of(block)..range.end).step_by(block as usize)
}
