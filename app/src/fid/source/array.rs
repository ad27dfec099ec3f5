//! `.npz` files with the images in `arr_0` `(N, H, W, C)`, as ADM's sample and reference batches are.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use zip::ZipArchive;

use super::npy::{self, Element, Header};
use super::{Picture, Pictures, Source, Values, inside};

/// Name of the array of images.
pub(crate) const IMAGES: &str = "arr_0";
/// Bytes that are thrown away at once.
const SKIP: u64 = 1 << 20;

/// An array of images on disk; one image at a time is read.
#[derive(Debug)]
pub struct Array {
    archive: ZipArchive<File>,
    path: PathBuf,
    entry: usize,
    /// Where the entry begins in the file, if it is not compressed.
    stored_at: Option<u64>,
    header: Header,
}

impl Array {
    /// Opens `path` and checks its header; the pixels are not read yet.
    ///
    /// # Errors
    /// No zip, no `arr_0`, another shape or type than images have, fewer bytes than the shape says.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let mut archive = npy::open_npz(path)?;
        let at = || inside(path, IMAGES);
        let entry = archive.index_for_name(&format!("{IMAGES}.npy")).with_context(|| {
            let mut names: Vec<_> = archive
                .file_names()
                .filter_map(|n| n.ok().map(std::borrow::Cow::into_owned))
                .take(9)
                .collect();
            names.sort();
            format!("{} holds no array `{IMAGES}`; it has {}", path.display(), names.join(", "))
        })?;
        let (header, stored_at, size) = {
            let mut file = archive.by_index(entry).with_context(at)?;
            let header = npy::header(&mut file).with_context(at)?;
            let stored = file.compression() == zip::CompressionMethod::Stored;
            (header, file.data_start().filter(|_| stored), file.size())
        };
        let [n, h, w, c] = header.shape[..] else {
            anyhow::bail!("{}: shape {:?}, expected (N, H, W, C)", at(), header.shape)
        };
        ensure!(n > 0 && h > 0 && w > 0, "{}: shape {:?} holds no images", at(), header.shape);
        ensure!(c == 1 || c == 3, "{}: {c} channels (the last axis), expected 3, or 1 for grey", at());
        let expected = header.data_bytes().with_context(at)?.saturating_add(header.bytes);
        ensure!(
            expected == size,
            "{}: {n} images of {h} by {w} by {c} need {expected} bytes, the array has {size}: the file is cut short",
            at()
        );
        Ok(Self { archive, path: path.to_owned(), entry, stored_at, header })
    }

    fn image_len(&self) -> usize {
        self.header.shape[1..].iter().product()
    }
}

impl Source for Array {
    fn count(&self) -> u64 {
        self.header.shape[0] as u64
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        let bytes = (self.image_len() * self.header.element.size()) as u64;
        let (header, path) = (self.header.clone(), self.path.clone());
        let skip = header.bytes + range.start * bytes;
        let opened: anyhow::Result<Box<dyn Read + '_>> = match self.stored_at {
            // A plain entry is read at its place.
            Some(start) => super::open_file(&path).and_then(|mut file| {
                file.seek(SeekFrom::Start(start + skip))?;
                Ok(Box::new(std::io::BufReader::with_capacity(SKIP as usize, file)) as Box<dyn Read>)
            }),
            None => self.archive.by_index(self.entry).map_err(anyhow::Error::from).and_then(|mut entry| {
                std::io::copy(&mut (&mut entry).take(skip), &mut std::io::sink())?;
                Ok(Box::new(entry) as Box<dyn Read>)
            }),
        };
        let mut reader = match opened.with_context(|| inside(&path, IMAGES)) {
            Ok(reader) => reader,
            Err(error) => return Box::new(std::iter::once(Err(error))),
        };
        super::one_by_one(range, move |index| {
            let name = inside(&path, format_args!("image {index}"));
            let mut data = vec![0; bytes as usize];
            reader
                .read_exact(&mut data)
                .with_context(|| format!("{name}: the file is cut short or damaged"))?;
            let values = match header.element {
                Element::U8 => Values::U8(data),
                Element::F32 => {
                    Values::F32(data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
                }
                Element::F64 => {
                    Values::F32(data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect())
                }
            };
            let [_, height, width, channels] = header.shape[..] else {
                anyhow::bail!("internal: {name} lost its shape")
            };
            let picture = Picture { name, height, width, channels, values };
            picture.check()?;
            Ok(picture)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use zip::CompressionMethod;
    use zip::write::SimpleFileOptions;

    use super::*;
    use crate::render::arrays::SampleArchive;

    fn deflated(path: &Path, npy: &[u8]) {
        let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        zip.start_file("arr_0.npy", options).unwrap();
        zip.write_all(npy).unwrap();
        zip.finish().unwrap();
    }

    fn npy(kind: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let text = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}");
        let pad = 64 - (10 + text.len() + 1) % 64;
        let text = format!("{text}{}\n", " ".repeat(pad));
        [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], text.as_bytes(), data].concat()
    }

    #[test]
    fn stored_and_compressed_images_read_alike_from_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let [stored, packed] = ["a.npz", "b.npz"].map(|n| dir.path().join(n));
        let pixels: Vec<u8> = (0..5 * 2 * 3 * 3).map(|i| (i * 7 % 256) as u8).collect();
        let mut archive = SampleArchive::create(&stored, 5, [2, 3, 3]).unwrap();
        archive.push(&pixels).unwrap();
        archive.finish(&[0; 5]).unwrap();
        deflated(&packed, &npy("|u1", "(5, 2, 3, 3)", &pixels));
        for path in [stored, packed] {
            let mut array = Array::open(&path).unwrap();
            assert_eq!((array.count(), array.stored_at.is_some()), (5, path.ends_with("a.npz")));
            for (start, end) in [(0, 5), (3, 5), (1, 2)] {
                let found: Vec<Picture> = array.pictures(start..end).map(|p| p.unwrap()).collect();
                assert_eq!(found.len() as u64, end - start);
                for (picture, image) in found.iter().zip(pixels.chunks(18).skip(start as usize)) {
                    assert_eq!((picture.height, picture.width, picture.channels), (2, 3, 3));
                    assert_eq!(picture.values, Values::U8(image.to_vec()));
                }
            }
        }
    }

    #[test]
    fn arrays_that_are_no_images_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npz");
        let nan: Vec<u8> = [1f32, f32::NAN, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        for (bytes, part) in [
            (npy("|u1", "(2, 3)", &[0; 6]), "expected (N, H, W, C)"),
            (npy("|u1", "(1, 1, 1, 2)", &[0; 2]), "2 channels"),
            (npy("|u1", "(0, 1, 1, 3)", &[]), "no images"),
            (npy("|u1", "(9, 1, 1, 3)", &[0; 12]), "cut short"),
            (npy("|u1", "(99999999999, 99999999999, 99999999999, 3)", &[0; 12]), "no file"),
            (npy("<i8", "(1, 1, 1, 3)", &[0; 24]), "expected bytes"),
            (npy(">f4", "(1, 1, 1, 3)", &[0; 12]), "little-endian"),
            (b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), "at most"),
            (b"text that is long enough".to_vec(), "no NumPy array"),
        ] {
            deflated(&path, &bytes);
            let error = format!("{:#}", Array::open(&path).unwrap_err());
            assert!(error.contains(part) && error.contains("x.npz"), "{error}");
        }
        deflated(&path, &npy("<f4", "(1, 1, 1, 3)", &nan));
        let mut array = Array::open(&path).unwrap();
        let error = array.pictures(0..1).next().unwrap().unwrap_err().to_string();
        assert!(error.contains("image 0") && error.contains("NaN"), "{error}");
        std::fs::write(&path, "text").unwrap();
        assert!(Array::open(&path).unwrap_err().to_string().contains("no usable .npz"));
    }
}
