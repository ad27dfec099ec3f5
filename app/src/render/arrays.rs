//! Samples as NumPy reads them: one `.npz` with `arr_0`, the images, and `arr_1`, their labels.

use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use npyz::WriterBuilder;
use runtime::file::AtomicFile;
use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

/// Entries at least so large need the 64-bit sizes of zip.
const LARGE: usize = u32::MAX as usize - (1 << 20);

/// An `.npz` of images and labels that is written image by image, so that 50,000 large ones need no memory.
///
/// `arr_0` is `u8` `(N, H, W, C)`, `arr_1` is `i64` `(N)`; both are stored, not compressed, as NumPy's `savez` does.
/// The file appears at its place only with [`SampleArchive::finish`].
///
/// # Source
/// The convention of the ADM evaluation suite's sample files.
pub struct SampleArchive {
    zip: ZipWriter<Target>,
    path: PathBuf,
    images: usize,
    image_bytes: usize,
    written: usize,
}

impl SampleArchive {
    /// Begins an archive of `images` images of `[H, W, C]`.
    ///
    /// # Errors
    /// The folder of `path` cannot be made or written.
    pub fn create(path: &Path, images: usize, [height, width, channels]: [usize; 3]) -> anyhow::Result<Self> {
        let image_bytes = height * width * channels;
        let mut zip = ZipWriter::new(Target { file: AtomicFile::create(path)?, failed: false });
        let shape = [images, height, width, channels].map(|d| d as u64);
        let begun = || format!("cannot write {}", path.display());
        zip.start_file("arr_0.npy", options(images.saturating_mul(image_bytes))).with_context(begun)?;
        zip.write_all(&header::<u8>(&shape)?).with_context(begun)?;
        Ok(Self { zip, path: path.to_owned(), images, image_bytes, written: 0 })
    }

    /// Appends one or more whole images, channels last; see [`super::pixels::channels_last`].
    ///
    /// # Errors
    /// `bytes` is not a whole number of images, there are more of them than were announced, or the disk is full.
    pub fn push(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        ensure!(
            self.image_bytes > 0 && bytes.len().is_multiple_of(self.image_bytes),
            "{}: an image has {} bytes, got {}",
            self.path.display(),
            self.image_bytes,
            bytes.len()
        );
        self.written += bytes.len() / self.image_bytes;
        ensure!(
            self.written <= self.images,
            "{}: {} images were announced, got {}",
            self.path.display(),
            self.images,
            self.written
        );
        self.zip.write_all(bytes).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Adds the labels and puts the file at its place.
    ///
    /// # Errors
    /// Images are missing, `labels` are not one an image, or the disk is full; nothing is then left behind.
    pub fn finish(mut self, labels: &[i64]) -> anyhow::Result<()> {
        let path = self.path;
        ensure!(
            self.written == self.images && labels.len() == self.images,
            "{}: {} images were announced, got {} images and {} labels",
            path.display(),
            self.images,
            self.written,
            labels.len()
        );
        let failed = || format!("cannot write {}", path.display());
        self.zip.start_file("arr_1.npy", options(labels.len() * 8)).with_context(failed)?;
        self.zip.write_all(&header::<i64>(&[labels.len() as u64])?).with_context(failed)?;
        let bytes: Vec<u8> = labels.iter().flat_map(|l| l.to_le_bytes()).collect();
        self.zip.write_all(&bytes).with_context(failed)?;
        Ok(self.zip.finish().with_context(failed)?.file.commit()?)
    }
}

/// The archive's file. After a failure it takes everything and keeps nothing: a `ZipWriter` that is dropped writes its
/// directory, and would tell on its own of a failure that was reported already.
struct Target {
    file: AtomicFile,
    failed: bool,
}

impl Target {
    fn unless_failed<T>(
        &mut self,
        otherwise: T,
        act: impl FnOnce(&mut AtomicFile) -> io::Result<T>,
    ) -> io::Result<T> {
        if self.failed {
            return Ok(otherwise);
        }
        act(&mut self.file).inspect_err(|_| self.failed = true)
    }
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.unless_failed(bytes.len(), |file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.unless_failed((), AtomicFile::flush)
    }
}

impl Seek for Target {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.unless_failed(0, |file| file.seek(to))
    }
}

fn options(bytes: usize) -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(bytes >= LARGE)
}

/// The bytes before the data of a little-endian, C-ordered `.npy`.
fn header<T: npyz::AutoSerialize>(shape: &[u64]) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    npyz::WriteOptions::<T>::new()
        .default_dtype()
        .shape(shape)
        .writer(&mut bytes)
        .begin_nd()
        .context("internal: npy header")?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn entry(path: &Path, name: &str) -> Vec<u8> {
        let mut archive = zip::ZipArchive::new(std::fs::File::open(path).unwrap()).unwrap();
        let mut bytes = Vec::new();
        archive.by_name(name).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn images_and_labels_read_back_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.npz");
        let images: Vec<u8> = (0..4 * 3 * 2 * 3).map(|i| (i * 5 % 256) as u8).collect();
        let labels = [3, -1, i64::MAX, 0];
        let mut archive = SampleArchive::create(&path, 4, [3, 2, 3]).unwrap();
        archive.push(&images[..18]).unwrap();
        assert!(!path.exists(), "half a file is in view");
        archive.push(&images[18..]).unwrap();
        archive.finish(&labels).unwrap();

        let (first, second) = (entry(&path, "arr_0.npy"), entry(&path, "arr_1.npy"));
        let read = npyz::NpyFile::new(&first[..]).unwrap();
        assert_eq!((read.shape(), read.order()), (&[4, 3, 2, 3][..], npyz::Order::C));
        assert_eq!(read.into_vec::<u8>().unwrap(), images);
        let read = npyz::NpyFile::new(&second[..]).unwrap();
        assert_eq!(read.shape(), [4]);
        assert_eq!(read.into_vec::<i64>().unwrap(), labels);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn wrong_counts_are_refused_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.npz");
        let words = |r: anyhow::Result<()>| r.unwrap_err().to_string();
        let mut archive = SampleArchive::create(&path, 2, [2, 2, 1]).unwrap();
        assert!(words(archive.push(&[0; 5])).contains("an image has 4 bytes, got 5"));
        assert!(words(archive.push(&[0; 12])).contains("2 images were announced, got 3"));
        drop(archive);
        let mut archive = SampleArchive::create(&path, 2, [2, 2, 1]).unwrap();
        archive.push(&[0; 4]).unwrap();
        assert!(words(archive.finish(&[1, 2])).contains("got 1 images and 2 labels"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
