//! Which directories are the classes of a folder of images, and which images are theirs.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use models::class_names::composed;

use super::sorted_entries;
use crate::error::{Result, TrainError};
use crate::picture::listing::{Tally, count_hidden};
use crate::picture::{self, Kind, LeftOut};

/// Names of directories that hold parts of a set, not a class, once digits and signs are taken from their ends.
const PARTS: [&str; 13] = [
    "train",
    "training",
    "trainset",
    "val",
    "valid",
    "validation",
    "valset",
    "test",
    "testing",
    "testset",
    "dev",
    "eval",
    "holdout",
];

/// A sub-directory and its images.
#[derive(Debug)]
pub(super) struct Class {
    /// The directory's name, composed.
    pub(super) name: String,
    /// Its images and those of directories in it, sorted.
    pub(super) files: Vec<PathBuf>,
    directory: PathBuf,
    left_out: LeftOut,
}

impl Class {
    /// Directories of the class that hold images.
    fn directories(&self) -> BTreeSet<&OsStr> {
        let below = self.files.iter().filter_map(|file| file.strip_prefix(&self.directory).ok());
        below.filter(|file| file.components().count() > 1).filter_map(|file| file.iter().next()).collect()
    }

    /// Whether all of its images lie in directories of its own.
    fn is_nested(&self) -> bool {
        !self.files.is_empty() && self.files.iter().all(|file| file.parent() != Some(&self.directory))
    }

    fn is_part(&self) -> bool {
        let name = self.name.to_lowercase();
        self.is_nested() && PARTS.contains(&name.trim_matches(|sign: char| !sign.is_alphabetic()))
    }
}

/// The classes of `path`, sorted by name; `progress` gets a line for what is left out or may be meant otherwise.
///
/// # Errors
/// [`TrainError::Io`]; [`TrainError::BadDataset`]: no class, a class without images, `train` and `val` in place of classes.
pub(super) fn classes(path: &Path, progress: &dyn Fn(&str)) -> Result<Vec<Class>> {
    let (mut classes, mut left_out, mut stray) = (Vec::new(), LeftOut::default(), Tally::default());
    for entry in sorted_entries(path)? {
        let name = entry.file_name().unwrap_or_default();
        if !entry.is_dir() {
            match picture::kind(&name.to_string_lossy()) {
                Kind::Picture => stray.add(entry.to_string_lossy()),
                kind => drop(left_out.sort(kind, &entry.to_string_lossy())),
            }
        } else if picture::is_private(name) {
            count_hidden(&entry, 0, &mut left_out.hidden);
        } else {
            let name = composed(&name.to_string_lossy());
            refuse_doubled(path, &classes, &name)?;
            let picture::Listing { files, left_out: own } = picture::list(&entry)?;
            classes.push(Class { name, files, directory: entry, left_out: own });
        }
    }
    refuse_parts(path, &classes)?;
    if let Some(empty) = classes.iter().find(|class| class.files.is_empty()) {
        let what =
            empty.left_out.line(&empty.directory).map_or_else(String::new, |line| format!(" ({line})"));
        let reason =
            format!("this class holds no PNG or JPEG file: add images or remove the directory{what}");
        return Err(TrainError::BadDataset { path: empty.directory.clone(), reason });
    }
    if classes.is_empty() {
        let reason = "it holds no sub-directory: put the images of each class into one of its own".into();
        return Err(TrainError::BadDataset { path: path.to_path_buf(), reason });
    }
    for class in &mut classes {
        left_out.merge(std::mem::take(&mut class.left_out));
    }
    if let Some(line) = left_out.line(path) {
        progress(&line);
    }
    if let Some(told) = stray.told("image", "images") {
        progress(&format!("left out of `{}`: {told} beside the classes, in none of them", path.display()));
    }
    tell_nested(&classes, progress);
    Ok(classes)
}

/// Refuses a second directory of a class's name.
fn refuse_doubled(path: &Path, classes: &[Class], name: &str) -> Result<()> {
    if classes.iter().all(|class| class.name != name) {
        return Ok(());
    }
    let reason = format!(
        "two sub-directories are called `{name}`, one of them in decomposed Unicode as a Mac writes it: put their images \
         into one"
    );
    Err(TrainError::BadDataset { path: path.to_path_buf(), reason })
}

/// Refuses a directory one level above the classes.
fn refuse_parts(path: &Path, classes: &[Class]) -> Result<()> {
    let parts: Vec<&Class> = classes.iter().filter(|class| class.is_part()).collect();
    let all = classes.iter().all(|class| class.is_part() || class.files.is_empty());
    if parts.is_empty() || !(all || parts.len() > 1) {
        return Ok(());
    }
    let meant = parts.iter().find(|class| class.name.to_lowercase().contains("train")).unwrap_or(&parts[0]);
    let reason = format!(
        "its sub-directories are no classes: they hold no images, but directories of images, as `{}` does; did you mean `{}`?",
        meant.directory.display(),
        meant.directory.display()
    );
    Err(TrainError::BadDataset { path: path.to_path_buf(), reason })
}

/// Tells of images in directories of their classes.
fn tell_nested(classes: &[Class], progress: &dyn Fn(&str)) {
    let deep = |class: &Class| class.files.iter().filter(|f| f.parent() != Some(&class.directory)).count();
    let nested: Vec<&Class> = classes.iter().filter(|class| deep(class) > 0).collect();
    let Some(first) = nested.first() else { return };
    let count: usize = nested.iter().map(|class| deep(class)).sum();
    // Each class with one directory of the same name, such as `images`, is a usual form.
    let names: BTreeSet<_> = nested.iter().flat_map(|class| class.directories()).collect();
    let above = classes.iter().all(Class::is_nested) && names.len() > 1;
    let hint = if above { format!("; did you mean `{}`?", first.directory.display()) } else { String::new() };
    progress(&format!(
        "{count} images lie in sub-directories of their classes, as in `{}`, and count for these classes{hint}",
        first.directory.display()
    ));
}
