//! A directory of PNG and JPEG files, with its sub-directories, in the order of their paths.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use train_engine::picture::{self, Listing};

use super::fingerprint::Fingerprint;
use super::{Picture, Pictures, Source};

/// Picture files below a directory.
#[derive(Debug)]
pub struct Folder {
    files: Vec<PathBuf>,
}

impl Folder {
    /// Lists `path`; `progress` gets a line for what is left out: hidden files and directories, files of other kinds.
    ///
    /// # Errors
    /// A directory that cannot be listed or has no pictures, pictures of a format that cannot be read.
    pub fn open(path: &Path, progress: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let Listing { files, left_out } = picture::list(path)?;
        super::tell_left_out(&left_out, path, progress)?;
        ensure!(!files.is_empty(), "`{}` has no PNG or JPEG file", path.display());
        Ok(Self { files })
    }
}

impl Source for Folder {
    fn count(&self) -> u64 {
        self.files.len() as u64
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        super::side_by_side(range, |index| Picture::read(&self.files[index as usize]))
    }

    fn fingerprint(&mut self, range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        for index in range {
            let path = &self.files[index as usize];
            let failed = || format!("cannot read `{}`", path.display());
            let metadata = fs::metadata(path).with_context(failed)?;
            fingerprint.picture(&metadata);
            if fingerprint.wants_contents() {
                let mut file = fs::File::open(path).with_context(failed)?;
                fingerprint.tail(&mut file, metadata.len(), metadata.len()).with_context(failed)?;
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
    use std::fs;

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
        let mut folder = Folder::open(dir.path(), &|_| ()).unwrap();
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
        assert!(Folder::open(dir.path(), &|_| ()).unwrap_err().to_string().contains("no PNG or JPEG"));
        fs::write(dir.path().join("x.webp"), "x").unwrap();
        assert!(Folder::open(dir.path(), &|_| ()).unwrap_err().to_string().contains("x.webp"));
    }
}
