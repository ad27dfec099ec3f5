//! Which files of a directory or an archive are pictures, and what is left out.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Result, TrainError};

/// Depth of sub-directories that are searched; a loop of links ends there.
const MAX_DEPTH: usize = 16;
/// Endings of the pictures that can be decoded.
const READ: [&str; 3] = ["png", "jpg", "jpeg"];
/// Endings of other pictures, and other endings of these, which the usual loaders do not take.
const FOREIGN: [&str; 14] =
    ["webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jxl", "jp2", "avif", "heic", "heif", "jfif", "jpe"];
/// Directories that operating systems, storage boxes and archivers leave among the user's.
const SYSTEM: [&str; 8] = [
    "lost+found",
    "@eadir",
    "@recycle",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "__macosx",
    "__pycache__",
];

/// What a file is by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A PNG or a JPEG.
    Picture,
    /// Such a file that is hidden, or in a hidden or a system's directory.
    Hidden,
    /// A picture of another format or with another ending.
    Foreign,
    /// No picture.
    Other,
}

/// What a file is by its path below the directory or inside the archive that was given.
pub fn kind(path: &str) -> Kind {
    let ending = path.rsplit_once('.').map_or("", |(_, ending)| ending).to_ascii_lowercase();
    // Archives made on Windows may have backslashes.
    let private = path.split(['/', '\\']).any(|part| is_private(OsStr::new(part)));
    match ending.as_str() {
        ending if READ.contains(&ending) => {
            if private {
                Kind::Hidden
            } else {
                Kind::Picture
            }
        }
        ending if FOREIGN.contains(&ending) && !private => Kind::Foreign,
        _ => Kind::Other,
    }
}

/// Whether a file or directory of this name is hidden or a system's own.
pub fn is_private(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    // `.` stands at the head of an archive's names.
    let hidden = name.starts_with('.') && name != "." && name != "..";
    hidden || SYSTEM.contains(&name.to_ascii_lowercase().as_str())
}

/// How many files there are of a kind, and the first in the order of names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Their number.
    pub count: usize,
    /// The first in the order of names.
    pub first: Option<String>,
}

impl Tally {
    /// Counts one more.
    pub fn add(&mut self, name: impl Into<String>) {
        self.merge(Self { count: 1, first: Some(name.into()) });
    }

    fn merge(&mut self, other: Self) {
        self.count += other.count;
        let both = self.first.take().into_iter().chain(other.first);
        self.first = both.min();
    }

    /// `3 files (the first: a)`.
    pub fn told(&self, one: &str, many: &str) -> Option<String> {
        let first = self.first.as_deref()?;
        Some(match self.count {
            1 => format!("1 {one} (`{first}`)"),
            count => format!("{count} {many} (the first: `{first}`)"),
        })
    }
}

/// Files that are no part of a set, by the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// [`Kind::Hidden`].
    pub hidden: Tally,
    /// [`Kind::Foreign`].
    pub foreign: Tally,
    /// [`Kind::Other`].
    pub other: Tally,
}

impl LeftOut {
    /// Counts a file; true for a picture, which is not left out.
    pub fn sort(&mut self, kind: Kind, name: &str) -> bool {
        match kind {
            Kind::Picture => return true,
            Kind::Hidden => self.hidden.add(name),
            Kind::Foreign => self.foreign.add(name),
            Kind::Other => self.other.add(name),
        }
        false
    }

    /// Adds what another part of the set has left out.
    pub fn merge(&mut self, other: Self) {
        self.hidden.merge(other.hidden);
        self.foreign.merge(other.foreign);
        self.other.merge(other.other);
    }

    /// A line for the user about `place`, unless nothing is left out.
    pub fn line(&self, place: &Path) -> Option<String> {
        let kinds = [
            self.hidden.told("hidden picture", "pictures that are hidden or in directories of the system"),
            self.foreign.told("picture with another ending", "pictures with other endings"),
            self.other.told("file that is no picture", "files that are no pictures"),
        ];
        let kinds: Vec<String> = kinds.into_iter().flatten().collect();
        (!kinds.is_empty()).then(|| format!("left out of `{}`: {}", place.display(), kinds.join("; ")))
    }
}

/// The pictures below a directory.
#[derive(Debug, Default)]
pub struct Listing {
    /// PNG and JPEG files, in the order of their paths' bytes.
    pub files: Vec<PathBuf>,
    /// What else there is.
    pub left_out: LeftOut,
}

/// Lists the pictures of a directory and of the directories in it, those that are [private](is_private) left out.
///
/// # Errors
/// [`TrainError::Io`] for a directory that cannot be listed; [`TrainError::BadDataset`] for one that is nested too deep.
pub fn list(directory: &Path) -> Result<Listing> {
    let mut listing = Listing::default();
    listing.search(directory, 0)?;
    listing.files.sort_by(|a, b| a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes()));
    Ok(listing)
}

impl Listing {
    fn search(&mut self, directory: &Path, depth: usize) -> Result<()> {
        if depth == MAX_DEPTH {
            let reason = "directories are nested too deep, or a link leads back to one above".into();
            return Err(TrainError::BadDataset { path: directory.to_owned(), reason });
        }
        for entry in fs::read_dir(directory).map_err(TrainError::io("list", directory))? {
            let path = entry.map_err(TrainError::io("list", directory))?.path();
            let name = path.file_name().unwrap_or_default();
            if !path.is_dir() {
                if self.left_out.sort(kind(&name.to_string_lossy()), &path.to_string_lossy()) {
                    self.files.push(path);
                }
            } else if is_private(name) {
                count_hidden(&path, depth + 1, &mut self.left_out.hidden);
            } else {
                self.search(&path, depth + 1)?;
            }
        }
        Ok(())
    }
}

/// Counts the pictures below a directory that is left out; one that cannot be listed is no error here.
pub(crate) fn count_hidden(directory: &Path, depth: usize, hidden: &mut Tally) {
    let entries = if depth < MAX_DEPTH { fs::read_dir(directory).ok() } else { None };
    for entry in entries.into_iter().flatten().flatten() {
        // Links are not followed: they may lead out of the set.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory {
            count_hidden(&entry.path(), depth + 1, hidden);
        } else if matches!(kind(&entry.file_name().to_string_lossy()), Kind::Picture | Kind::Hidden) {
            hidden.add(entry.path().to_string_lossy());
        }
    }
}
