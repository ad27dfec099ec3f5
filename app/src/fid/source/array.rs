//! `.npz` files with the images in `arr_0` `(N, H, W, C)`, as ADM's sample and reference batches are, and `.npy` files of one
//! such array.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use zip::ZipArchive;

use super::fingerprint::Fingerprint;
use super::npy::{self, Element, Header};
use super::scale::{self, Scale};
use super::{Numbers, Picture, Pictures, Source, Values, inside};

/// Name of the array of images.
pub(crate) const IMAGES: &str = "arr_0";
/// Bytes that are read ahead.
const AHEAD: usize = 1 << 20;

/// An array of images on disk; one image at a time is read.
#[derive(Debug)]
pub struct Array {
    path: PathBuf,
    /// The array's name in messages.
    place: String,
    /// The zip file and the entry in it, if it is in one.
    packed: Option<(ZipArchive<File>, usize)>,
    /// Where the array begins in the file, if it is not compressed.
    stored_at: Option<u64>,
    /// Checksum and size of the array, if the file has them.
    checksum: Option<(u32, u64)>,
    header: Header,
    scale: Scale,
    remarks: Vec<String>,
}

impl Array {
    /// Opens `path` and checks its header; the pixels are not read yet, but for those that tell whether they are of 0 … 255
    /// where no scale is given.
    ///
    /// # Errors
    /// No zip, no `arr_0`, another shape or type than images have, fewer bytes than the shape says, another scale.
    pub fn open(path: &Path, scale: Option<Scale>) -> anyhow::Result<Self> {
        let single = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy"));
        let mut array = if single { Self::of_npy(path)? } else { Self::of_npz(path)? };
        if let Some(scale) = scale {
            array.scale = scale;
        } else {
            let (all, place) = (0..array.count(), array.place.clone());
            scale::judge(array.values(Box::new(all)).map(|(_, values)| values), &place)?;
        }
        Ok(array)
    }

    fn of_npy(path: &Path) -> anyhow::Result<Self> {
        let place = path.display().to_string();
        let mut file = super::open_file(path)?;
        let size = file.metadata().with_context(|| place.clone())?.len();
        let header = npy::header(&mut file).with_context(|| place.clone())?;
        images_of(&header, size).with_context(|| place.clone())?;
        let path = path.to_owned();
        let (scale, remarks) = (Scale::Bytes, Vec::new());
        Ok(Self { path, place, packed: None, stored_at: Some(0), checksum: None, header, scale, remarks })
    }

    fn of_npz(path: &Path) -> anyhow::Result<Self> {
        let mut archive = npy::open_npz(path)?;
        let place = inside(path, IMAGES);
        let at = || place.clone();
        let entry = archive.index_for_name(&format!("{IMAGES}.npy")).with_context(|| {
            format!("{} holds no array `{IMAGES}`: {}", path.display(), npy::contents(&archive))
        })?;
        let (header, stored_at, checksum) = {
            let mut file = archive.by_index(entry).with_context(at)?;
            let header = npy::header(&mut file).with_context(at)?;
            let stored = file.compression() == zip::CompressionMethod::Stored;
            (header, file.data_start().filter(|_| stored), (file.crc32(), file.size()))
        };
        images_of(&header, checksum.1).with_context(at)?;
        let remarks = others(&mut archive, entry, path);
        let (packed, checksum) = (Some((archive, entry)), Some(checksum));
        Ok(Self {
            path: path.to_owned(),
            place,
            packed,
            stored_at,
            checksum,
            header,
            scale: Scale::Bytes,
            remarks,
        })
    }

    fn image_len(&self) -> usize {
        self.header.shape[1..].iter().product()
    }

    /// Values of the images of ascending numbers as the array has them, each with its name.
    fn values<'a>(
        &'a mut self,
        numbers: Numbers<'a>,
    ) -> Box<dyn Iterator<Item = (String, anyhow::Result<Values>)> + 'a> {
        let bytes = (self.image_len() * self.header.element.size()) as u64;
        let (element, path, before) = (self.header.element, &self.path, self.header.bytes);
        let name = move |number| inside(path, format_args!("image {number}"));
        let opened = match (self.stored_at, &mut self.packed) {
            // A plain entry is read at its place.
            (Some(start), _) => super::open_file(path).and_then(|mut file| {
                file.seek(SeekFrom::Start(start))?;
                Ok(Reader::Plain(BufReader::with_capacity(AHEAD, file)))
            }),
            (None, Some((archive, entry))) => {
                archive.by_index(*entry).map_err(Into::into).map(|entry| Reader::Packed(Box::new(entry)))
            }
            (None, None) => Err(anyhow::anyhow!("internal: an array without a place")),
        };
        let mut reader = match opened.with_context(|| self.place.clone()) {
            Ok(reader) => reader,
            Err(error) => return Box::new(std::iter::once((String::new(), Err(error)))),
        };
        let mut at = 0;
        Box::new(numbers.map(move |number| {
            let name = name(number);
            let mut read = || -> std::io::Result<Vec<u8>> {
                let start = before + number * bytes;
                reader.skip(start - at)?;
                let mut data = vec![0; bytes as usize];
                reader.read_exact(&mut data)?;
                at = start + bytes;
                Ok(data)
            };
            let values = read()
                .with_context(|| format!("{name}: the file is cut short or damaged"))
                .map(|data| decoded(element, data));
            (name, values)
        }))
    }
}

/// Checks that an array of `size` bytes, header and all, holds images.
fn images_of(header: &Header, size: u64) -> anyhow::Result<()> {
    let shape = &header.shape;
    let [n, h, w, c] = shape[..] else {
        let guess =
            if shape.len() == 3 { "; grey images need a last axis of 1: save `x[..., None]`" } else { "" };
        bail!("shape {shape:?}, expected (N, H, W, C){guess}")
    };
    ensure!(n > 0 && h > 0 && w > 0, "shape {shape:?} holds no images");
    if c != 1 && c != 3 {
        let guess = match (h, c) {
            (1 | 3, 5..) => {
                "; its second axis has them, so it seems to be (N, C, H, W): save `x.transpose(0, 2, 3, 1)`"
            }
            (4, 5..) => "; it seems to be latents (N, C, H, W), which must be decoded to images",
            (_, 4) => "; an alpha channel is dropped by `x[..., :3]`, and latents must be decoded",
            _ => "",
        };
        bail!("{c} channels (the last axis of {shape:?}), expected 3, or 1 for grey{guess}");
    }
    ensure!(
        !header.by_columns,
        "it is stored column by column (Fortran order): save `numpy.ascontiguousarray(x)` instead"
    );
    let expected = header.data_bytes()?.saturating_add(header.bytes);
    ensure!(
        expected == size,
        "{n} images of {h} by {w} by {c} need {expected} bytes, the array has {size}: the file is cut short"
    );
    Ok(())
}

/// A remark on each other array that could be meant.
fn others(archive: &mut ZipArchive<File>, entry: usize, path: &Path) -> Vec<String> {
    let mut remarks = Vec::new();
    for index in (0..archive.len()).filter(|i| *i != entry) {
        // What is no array is no images.
        let Ok(mut file) = archive.by_index(index) else { continue };
        let Ok(header) = npy::header(&mut file) else { continue };
        if images_of(&header, file.size()).is_ok() {
            let name = String::from_utf8_lossy(file.name_raw()).into_owned();
            let name = name.strip_suffix(".npy").unwrap_or(&name);
            remarks.push(format!(
                "{}: only `{IMAGES}` is read; `{name}` {:?} holds images, too, which are left out",
                path.display(),
                header.shape
            ));
        }
    }
    remarks
}

/// Where an array's bytes come from.
enum Reader<'a> {
    Plain(BufReader<File>),
    Packed(Box<dyn Read + 'a>),
}

impl Reader<'_> {
    fn skip(&mut self, bytes: u64) -> std::io::Result<()> {
        match self {
            Self::Plain(file) => file.seek_relative(bytes as i64),
            Self::Packed(entry) => std::io::copy(&mut entry.take(bytes), &mut std::io::sink()).map(drop),
        }
    }

    fn read_exact(&mut self, to: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::Plain(file) => file.read_exact(to),
            Self::Packed(entry) => entry.read_exact(to),
        }
    }
}

fn decoded(element: Element, data: Vec<u8>) -> Values {
    match element {
        Element::U8 => Values::U8(data),
        Element::F32 => Values::F32(data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Element::F64 => {
            Values::F32(data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect())
        }
    }
}

impl Source for Array {
    fn count(&self) -> u64 {
        self.header.shape[0] as u64
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        self.picked(Box::new(range))
    }

    fn picked<'a>(&'a mut self, numbers: Numbers<'a>) -> Pictures<'a> {
        let ([height, width, channels], scale) = ([1, 2, 3].map(|axis| self.header.shape[axis]), self.scale);
        Box::new(self.values(numbers).map(move |(name, values)| {
            let values = scale.to_bytes(values?, &name)?;
            let picture = Picture { name, height, width, channels, values };
            picture.check()?;
            Ok(picture)
        }))
    }

    fn fingerprint(&mut self, range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        let failed = || format!("cannot read {}", self.place);
        let mut file = super::open_file(&self.path)?;
        let metadata = file.metadata().with_context(failed)?;
        fingerprint.times(&metadata);
        if let Some((crc, size)) = self.checksum {
            fingerprint.content(&crc.to_le_bytes());
            fingerprint.content(&size.to_le_bytes());
            return Ok(());
        }
        fingerprint.content(&metadata.len().to_le_bytes());
        let bytes = (self.image_len() * self.header.element.size()) as u64;
        for index in if fingerprint.wants_contents() { range } else { 0..0 } {
            // The middle of a picture is no border.
            let half = bytes.div_ceil(2);
            fingerprint
                .tail(&mut file, self.header.bytes + index * bytes + half, half)
                .with_context(failed)?;
        }
        Ok(())
    }

    fn remarks(&self) -> Vec<String> {
        self.remarks.clone()
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

    trait Replaced {
        fn replaced(self, from: &str, to: &str) -> Self;
    }

    impl Replaced for Vec<u8> {
        /// With words of the header in another one's place, as long as before.
        fn replaced(self, from: &str, to: &str) -> Self {
            let place = self.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let to = format!("{to:<0$}", from.len());
            [&self[..place], to.as_bytes(), &self[place + from.len()..]].concat()
        }
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
        let single = dir.path().join("c.npy");
        std::fs::write(&single, npy("|u1", "(5, 2, 3, 3)", &pixels)).unwrap();
        for path in [stored, packed, single] {
            let mut array = Array::open(&path, None).unwrap();
            assert_eq!((array.count(), array.stored_at.is_some()), (5, !path.ends_with("b.npz")));
            for (start, end) in [(0, 5), (3, 5), (1, 2)] {
                let found: Vec<Picture> = array.pictures(start..end).map(|p| p.unwrap()).collect();
                assert_eq!(found.len() as u64, end - start);
                for (picture, image) in found.iter().zip(pixels.chunks(18).skip(start as usize)) {
                    assert_eq!((picture.height, picture.width, picture.channels), (2, 3, 3));
                    assert_eq!(picture.values, Values::U8(image.to_vec()));
                }
            }
            let picked: Vec<Values> =
                array.picked(Box::new([0, 3, 4].into_iter())).map(|p| p.unwrap().values).collect();
            assert_eq!(picked, [0, 3, 4].map(|i| Values::U8(pixels[18 * i..][..18].to_vec())));
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
            (npy("|u1", "(4, 3, 8, 8)", &[0; 768]), "x.transpose(0, 2, 3, 1)"),
            (npy("|u1", "(1, 4, 8, 8)", &[0; 256]), "latents"),
            (npy("|u1", "(4, 2, 2)", &[0; 16]), "x[..., None]"),
            (npy("|u1", "(1, 1, 1, 4)", &[0; 4]), "x[..., :3]"),
            (npy("|u1", "(4, 2, 2, 3)", &[0; 48]).replaced("False", "True"), "numpy.ascontiguousarray"),
            (npy("|u1", "(0, 1, 1, 3)", &[]), "no images"),
            (npy("|u1", "(9, 1, 1, 3)", &[0; 12]), "cut short"),
            (npy("|u1", "(99999999999, 99999999999, 99999999999, 3)", &[0; 12]), "no file"),
            (npy("<i8", "(1, 1, 1, 3)", &[0; 24]), "expected bytes"),
            (npy(">f4", "(1, 1, 1, 3)", &[0; 12]), "little-endian"),
            (b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), "at most"),
            (b"text that is long enough".to_vec(), "no NumPy array"),
        ] {
            deflated(&path, &bytes);
            let error = format!("{:#}", Array::open(&path, None).unwrap_err());
            assert!(error.contains(part) && error.contains("x.npz"), "{error}");
        }
        deflated(&path, &npy("<f4", "(1, 1, 1, 3)", &nan));
        let mut array = Array::open(&path, None).unwrap();
        let error = array.pictures(0..1).next().unwrap().unwrap_err().to_string();
        assert!(error.contains("image 0") && error.contains("NaN"), "{error}");
        std::fs::write(&path, "text").unwrap();
        assert!(Array::open(&path, None).unwrap_err().to_string().contains("no usable .npz"));
    }
}
