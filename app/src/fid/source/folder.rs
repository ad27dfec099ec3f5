//! A directory of PNG and JPEG files, with its sub-directories, in the order of their paths.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::picture::MAX_ENCODED;
use super::trace::Trace;
use super::{Picture, Pictures, Source};

/// Depth of sub-directories that are searched; a loop of links ends there.
const MAX_DEPTH: usize = 16;

/// Picture files below a directory.
#[derive(Debug)]
pub struct Folder {
    files: Vec<PathBuf>,
}

impl Folder {
    /// Lists `path`; hidden files and those of other kinds are left out.
    ///
    /// # Errors
    /// A directory that cannot be listed or has no pictures, pictures of a format that cannot be read.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let mut files = Vec::new();
        list(path, 0, &mut files)?;
        ensure!(!files.is_empty(), "`{}` has no PNG or JPEG file", path.display());
        files.sort_by(|a, b| a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes()));
        Ok(Self { files })
    }
}

fn list(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    ensure!(depth < MAX_DEPTH, "`{}`: directories are nested too deep", folder.display());
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list `{}`", folder.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list `{}`", folder.display()))?.path();
        if path.is_dir() {
            list(&path, depth + 1, files)?;
        } else if super::is_picture(&path.to_string_lossy())? {
            files.push(path);
        }
    }
    Ok(())
}

impl Source for Folder {
    fn count(&self) -> u64 {
        self.files.len() as u64
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        super::one_by_one(range, |index| {
            let path = &self.files[index as usize];
            let read = || -> std::io::Result<Vec<u8>> {
                let size = fs::metadata(path)?.len();
                if size > MAX_ENCODED {
                    return Err(std::io::Error::other(format!("{size} bytes are no picture")));
                }
                fs::read(path)
            };
            let bytes = read().with_context(|| format!("cannot read `{}`", path.display()))?;
            Picture::decode(&path.display().to_string(), &bytes)
        })
    }

    fn trace(&mut self, range: Range<u64>, trace: &mut Trace) -> anyhow::Result<()> {
        for index in range {
            let path = &self.files[index as usize];
            let failed = || format!("cannot read `{}`", path.display());
            let metadata = fs::metadata(path).with_context(failed)?;
            trace.picture(&metadata);
            if trace.wants_contents() {
                let mut file = fs::File::open(path).with_context(failed)?;
                trace.tail(&mut file, metadata.len(), metadata.len()).with_context(failed)?;
            }
        }
        Ok(())
    }

    fn group(&self, number: u64) -> Option<String> {
        Some(self.files[number as usize].parent()?.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Values;
    use super::*;

    #[test]
    fn pictures_come_in_the_order_of_their_paths() {
        let dir = tempfile::tempdir().unwrap();
        for (i, name) in ["b/2.png", "a.png", "b/10.png", "c.jpg"].iter().enumerate() {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::from_pixel(1, 1, image::Luma([i as u8])).save(path).unwrap();
        }
        fs::write(dir.path().join("notes.txt"), "x").unwrap();
        let mut folder = Folder::open(dir.path()).unwrap();
        let found: Vec<Values> = folder.pictures(0..3).map(|p| p.unwrap().values).collect();
        assert_eq!(found, [1, 2, 0].map(|i| Values::U8(vec![i])));
        assert_eq!(folder.count(), 4);
        fs::write(dir.path().join("b/2.png"), "spoiled").unwrap();
        let error = folder.pictures(2..3).next().unwrap().unwrap_err().to_string();
        assert!(error.contains("b/2.png"), "{error}");
    }

    #[test]
    fn a_folder_without_pictures_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Folder::open(dir.path()).unwrap_err().to_string().contains("no PNG or JPEG"));
        fs::write(dir.path().join("x.webp"), "x").unwrap();
        assert!(Folder::open(dir.path()).unwrap_err().to_string().contains("x.webp"));
    }
}
