//! Picture files inside a zip (in the order of their names) or a tar (in the order they are stored).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use train_engine::picture::{self, LeftOut, MAX_ENCODED};
use zip::ZipArchive;

use super::fingerprint::Fingerprint;
use super::{Picture, Pictures, Source, inside, open_file};

/// A zip file; its directory is read, its pictures one at a time.
#[derive(Debug)]
pub struct Zip {
    archive: ZipArchive<File>,
    path: PathBuf,
    /// Names and numbers of the pictures.
    entries: Vec<(String, usize)>,
}

impl Zip {
    /// Reads the directory of `path`.
    ///
    /// # Errors
    /// No zip, no pictures in it, pictures of a format that cannot be read.
    pub fn open(path: &Path, progress: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let unusable = || format!("{} is no usable zip file", path.display());
        let archive = ZipArchive::new(open_file(path)?).with_context(unusable)?;
        let (mut entries, mut left_out) = (Vec::new(), LeftOut::default());
        for (index, name) in archive.file_names().enumerate() {
            let name = name.with_context(unusable)?.into_owned();
            // Directories end with a slash.
            if !name.ends_with('/') && left_out.sort(picture::kind(&name), &name) {
                entries.push((name, index));
            }
        }
        super::tell_left_out(&left_out, path, progress)?;
        ensure!(!entries.is_empty(), "{} has no PNG or JPEG file", path.display());
        entries.sort();
        Ok(Self { archive, path: path.to_owned(), entries })
    }
}

impl Source for Zip {
    fn count(&self) -> u64 {
        self.entries.len() as u64
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        let Self { archive, path, entries } = self;
        super::one_by_one(range, move |index| {
            let (name, entry) = &entries[index as usize];
            let name = inside(path, name);
            let entry = archive.by_index(*entry).with_context(|| format!("cannot read `{name}`"))?;
            Picture::decode(&name, &whole(entry, &name)?)
        })
    }

    fn fingerprint(&mut self, range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        let failed = || format!("cannot read {}", self.path.display());
        fingerprint.times(&std::fs::metadata(&self.path).with_context(failed)?);
        for index in range {
            let entry = self.archive.by_index_data(self.entries[index as usize].1).with_context(failed)?;
            fingerprint.content(&entry.crc32().to_le_bytes());
            fingerprint.content(&entry.size().to_le_bytes());
        }
        Ok(())
    }

    fn group(&self, number: u64) -> Option<String> {
        Some(folder_of(&self.entries[number as usize].0))
    }
}

/// An uncompressed tar file; its headers are read, its pictures one at a time.
#[derive(Debug)]
pub struct Tar {
    file: File,
    path: PathBuf,
    /// Names, places and sizes of the pictures.
    entries: Vec<(String, u64, u64)>,
}

impl Tar {
    /// Reads the headers of `path`.
    ///
    /// # Errors
    /// No tar, a damaged header, an entry beyond the file's end, no pictures in it.
    pub fn open(path: &Path, progress: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let unusable = || format!("{} is no usable tar file", path.display());
        let file = open_file(path)?;
        let length = file.metadata().with_context(unusable)?.len();
        let mut archive = tar::Archive::new(file);
        let (mut entries, mut left_out) = (Vec::new(), LeftOut::default());
        for entry in archive.entries_with_seek().with_context(unusable)? {
            let entry = entry.with_context(unusable)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let (start, size) = (entry.raw_file_position(), entry.size());
            ensure!(
                start.checked_add(size).is_some_and(|end| end <= length),
                "{}: `{name}` ends behind the file's {length} bytes: the file is cut short",
                path.display()
            );
            let regular = entry.header().entry_type().is_file();
            if regular && left_out.sort(picture::kind(&name), &name) {
                entries.push((name, start, size));
            }
        }
        super::tell_left_out(&left_out, path, progress)?;
        ensure!(!entries.is_empty(), "{} has no PNG or JPEG file", path.display());
        Ok(Self { file: archive.into_inner(), path: path.to_owned(), entries })
    }
}

impl Source for Tar {
    fn count(&self) -> u64 {
        self.entries.len() as u64
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        let Self { file, path, entries } = self;
        super::one_by_one(range, move |index| {
            let (name, start, size) = &entries[index as usize];
            let name = inside(path, name);
            file.seek(SeekFrom::Start(*start)).with_context(|| format!("cannot read `{name}`"))?;
            Picture::decode(&name, &whole(file.by_ref().take(*size), &name)?)
        })
    }

    fn fingerprint(&mut self, range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        let failed = || format!("cannot read {}", self.path.display());
        fingerprint.times(&self.file.metadata().with_context(failed)?);
        for index in range {
            let (_, start, size) = &self.entries[index as usize];
            fingerprint.content(&size.to_le_bytes());
            if fingerprint.wants_contents() {
                fingerprint.tail(&mut self.file, start + size, *size).with_context(failed)?;
            }
        }
        Ok(())
    }

    fn group(&self, number: u64) -> Option<String> {
        Some(folder_of(&self.entries[number as usize].0))
    }
}

fn folder_of(name: &str) -> String {
    name.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned()
}

/// All bytes of an entry, however many its header promises.
fn whole(entry: impl Read, name: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    entry.take(MAX_ENCODED).read_to_end(&mut bytes).with_context(|| format!("cannot read `{name}`"))?;
    ensure!((bytes.len() as u64) < MAX_ENCODED, "`{name}`: more than {MAX_ENCODED} bytes are no picture");
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use super::super::Values;
    use super::*;

    fn png(value: u8) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        let image = image::GrayImage::from_pixel(1, 1, image::Luma([value]));
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    fn found(source: &mut dyn Source) -> Vec<Values> {
        source.pictures(0..source.count()).map(|p| p.unwrap().values).collect()
    }

    #[test]
    fn pictures_of_both_archives_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let (zip, tar) = (dir.path().join("a.zip"), dir.path().join("a.tar"));
        let mut writer = zip::ZipWriter::new(File::create(&zip).unwrap());
        let mut builder = tar::Builder::new(File::create(&tar).unwrap());
        for (name, value) in [("b.png", 2), ("a/a.png", 1), ("c.cls", 0), ("c.png", 3)] {
            writer.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
            writer.write_all(&png(value)).unwrap();
            let mut header = tar::Header::new_gnu();
            header.set_size(png(value).len() as u64);
            builder.append_data(&mut header, name, &png(value)[..]).unwrap();
        }
        writer.finish().unwrap();
        builder.into_inner().unwrap();
        assert_eq!(found(&mut Zip::open(&zip, &|_| ()).unwrap()), [1, 2, 3].map(|i| Values::U8(vec![i])));
        assert_eq!(found(&mut Tar::open(&tar, &|_| ()).unwrap()), [2, 1, 3].map(|i| Values::U8(vec![i])));
        let last = Tar::open(&tar, &|_| ()).unwrap().pictures(2..3).next().unwrap().unwrap();
        assert!(last.name.ends_with("a.tar: c.png"), "{}", last.name);

        // Cut in the middle of the last picture.
        let bytes = std::fs::read(&tar).unwrap();
        std::fs::write(&tar, &bytes[..bytes.len() - 1024 - 500]).unwrap();
        let error = format!("{:#}", Tar::open(&tar, &|_| ()).err().unwrap());
        assert!(error.contains("a.tar") && error.contains("cut short"), "{error}");
        for (path, text) in [(&zip, "zip"), (&tar, "tar")] {
            std::fs::write(path, [b'x'; 2000]).unwrap();
            let inputs = [path.display().to_string()];
            let error = super::super::open(&inputs, &super::super::OpenOptions::default(), &|_| {});
            let error = format!("{:#}", error.err().unwrap());
            assert!(error.contains(&format!("no usable {text} file")), "{error}");
        }
    }
}
