//! Images and labels in the idx format of MNIST, plain or gzipped.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use super::{Dataset, Stored, check_read, pixel};
use crate::error::{Result, TrainError};
use crate::random::Stream;

/// `idx3-ubyte`: bytes, three axes (image, row, column).
const IMAGES_MAGIC: u32 = 0x0000_0803;
/// `idx1-ubyte`: bytes, one axis.
const LABELS_MAGIC: u32 = 0x0000_0801;
/// No idx file of bytes is larger than this in bytes; a header that claims more is damaged.
const MAX_BYTES: usize = 1 << 36;

/// Grey images held in memory as bytes.
#[derive(Debug)]
pub struct IdxImages {
    pixels: Vec<u8>,
    labels: Vec<u8>,
    height: usize,
    width: usize,
    class_names: Vec<String>,
    labels_path: PathBuf,
}

impl IdxImages {
    /// Reads an images file (idx3-ubyte) and its labels file (idx1-ubyte); a gzipped file is known by its first bytes.
    ///
    /// # Errors
    /// [`TrainError::Io`]; [`TrainError::BadFile`] for a wrong magic number or length, counts that disagree, or a
    /// damaged gzip stream.
    pub fn open(images: &Path, labels: &Path) -> Result<Self> {
        let ([count, height, width], pixels) = read_idx(images, IMAGES_MAGIC)?;
        let ([label_count], label_bytes) = read_idx(labels, LABELS_MAGIC)?;
        if label_count != count {
            let expected = format!("{count}, as many as `{}` has images", images.display());
            return Err(TrainError::bad_file(labels, "number of labels", expected, label_count));
        }
        if pixels.is_empty() {
            let got = format!("{count} images of {height} by {width}");
            return Err(TrainError::bad_file(images, "sizes", "at least one image of one pixel", got));
        }
        let classes = label_bytes.iter().copied().max().map_or(0, |last| usize::from(last) + 1);
        Ok(Self {
            pixels,
            labels: label_bytes,
            height,
            width,
            class_names: (0..classes).map(|class| class.to_string()).collect(),
            labels_path: labels.to_path_buf(),
        })
    }

    /// The same images with names for their classes.
    ///
    /// # Errors
    /// [`TrainError::BadFile`] when a label has no name.
    pub fn with_class_names(mut self, names: Vec<String>) -> Result<Self> {
        if names.len() < self.class_names.len() {
            let (expected, got) = (format!("below {}", names.len()), self.class_names.len() - 1);
            return Err(TrainError::bad_file(&self.labels_path, "labels", expected, got));
        }
        self.class_names = names;
        Ok(self)
    }
}

impl Dataset for IdxImages {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn channels(&self) -> usize {
        1
    }

    fn height(&self) -> usize {
        self.height
    }

    fn width(&self) -> usize {
        self.width
    }

    fn num_classes(&self) -> usize {
        self.class_names.len()
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn label(&self, index: usize) -> i64 {
        i64::from(self.labels[index])
    }

    fn stored(&self, into: &mut Stored) -> Result<()> {
        into.content(&self.pixels);
        Ok(())
    }

    fn read(&self, index: usize, flip: bool, _: &mut Stream, out: &mut [f32]) -> Result<i64> {
        check_read(self, index, out)?;
        let size = self.image_len();
        let image = &self.pixels[index * size..][..size];
        for (row, target) in image.chunks_exact(self.width).zip(out.chunks_exact_mut(self.width)) {
            for (x, value) in target.iter_mut().enumerate() {
                *value = pixel(row[if flip { self.width - 1 - x } else { x }]);
            }
        }
        Ok(self.label(index))
    }
}

/// The images' and labels' files meant by `data.path` and `data.labels`: two files, or a directory with MNIST's names.
pub(super) fn find_pair(path: &Path, labels: Option<&Path>) -> Result<(PathBuf, PathBuf)> {
    if let Some(labels) = labels {
        return Ok((path.to_path_buf(), labels.to_path_buf()));
    }
    let found = path.metadata().map_err(TrainError::io("read", path))?;
    if found.is_dir() {
        return Ok((find(path, "train-images-idx3-ubyte")?, find(path, "train-labels-idx1-ubyte")?));
    }
    Err(TrainError::BadValue {
        key: "data.labels",
        value: "unset".into(),
        allowed: format!("the file with the labels of `{}`, which is no directory", path.display()),
    })
}

/// `name` or `name.gz` in a directory.
pub(super) fn find(directory: &Path, name: &str) -> Result<PathBuf> {
    let candidates = [directory.join(name), directory.join(format!("{name}.gz"))];
    candidates.into_iter().find(|path| path.is_file()).ok_or_else(|| TrainError::BadDataset {
        path: directory.to_path_buf(),
        reason: format!("it holds neither `{name}` nor `{name}.gz`"),
    })
}

/// The sizes and bytes of an idx file of unsigned bytes with `AXES` axes.
fn read_idx<const AXES: usize>(path: &Path, magic: u32) -> Result<([usize; AXES], Vec<u8>)> {
    let mut reader = Source { path, inner: open(path)? };
    let found = reader.word("magic number")?;
    if found != magic {
        return Err(TrainError::bad_file(
            path,
            "magic number",
            format!("{magic:#010x}"),
            match runtime::file_kind::told(path) {
                Some(kind) => format!("{found:#010x}: {kind}"),
                None => format!("{found:#010x}"),
            },
        ));
    }
    let mut sizes = [0; AXES];
    for size in &mut sizes {
        *size = reader.word("header")? as usize;
    }
    let total = sizes.iter().try_fold(1usize, |total, &size| total.checked_mul(size));
    let Some(total) = total.filter(|&total| total <= MAX_BYTES) else {
        return Err(TrainError::bad_file(
            path,
            "sizes",
            format!("at most {MAX_BYTES} bytes"),
            format!("{sizes:?}"),
        ));
    };
    let bytes = reader.body(total)?;
    Ok((sizes, bytes))
}

fn open(path: &Path) -> Result<Box<dyn Read>> {
    let io = || TrainError::io("read", path);
    let mut file = File::open(path).map_err(TrainError::io("open", path))?;
    let mut start = Vec::new();
    file.by_ref().take(2).read_to_end(&mut start).map_err(io())?;
    let whole = BufReader::new(io::Cursor::new(start.clone()).chain(file));
    Ok(if start == [0x1f, 0x8b] { Box::new(GzDecoder::new(whole)) } else { Box::new(whole) })
}

struct Source<'a> {
    path: &'a Path,
    inner: Box<dyn Read>,
}

impl Source<'_> {
    fn word(&mut self, what: &str) -> Result<u32> {
        let mut bytes = [0; 4];
        match self.inner.read_exact(&mut bytes) {
            Ok(()) => Ok(u32::from_be_bytes(bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(TrainError::bad_file(self.path, what, "4 bytes", "the end of the file"))
            }
            Err(error) => Err(self.damaged(error)),
        }
    }

    /// Exactly `total` bytes and then the end.
    fn body(&mut self, total: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let got = self.inner.by_ref().take(total as u64 + 1).read_to_end(&mut bytes);
        let got = got.map_err(|error| self.damaged(error))?;
        if got == total {
            return Ok(bytes);
        }
        let got = if got > total { "more".to_owned() } else { format!("{got} bytes: the file is cut short") };
        Err(TrainError::bad_file(self.path, "length after the header", format!("{total} bytes"), got))
    }

    fn damaged(&self, error: io::Error) -> TrainError {
        match error.kind() {
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                TrainError::bad_file(self.path, "gzip stream", "an undamaged one", error)
            }
            _ => TrainError::io("read", self.path)(error),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;
    use crate::random::Purpose;

    pub(in crate::data) fn images(count: u32, height: u32, width: u32) -> Vec<u8> {
        let mut bytes = IMAGES_MAGIC.to_be_bytes().to_vec();
        for size in [count, height, width] {
            bytes.extend(size.to_be_bytes());
        }
        bytes.extend((0..count * height * width).map(|i| (i % 256) as u8));
        bytes
    }

    pub(in crate::data) fn labels(labels: &[u8]) -> Vec<u8> {
        let mut bytes = LABELS_MAGIC.to_be_bytes().to_vec();
        bytes.extend((labels.len() as u32).to_be_bytes());
        bytes.extend(labels);
        bytes
    }

    pub(in crate::data) fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn open(images: &[u8], labels: &[u8]) -> Result<IdxImages> {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("images"), dir.path().join("labels"));
        std::fs::write(&a, images).unwrap();
        std::fs::write(&b, labels).unwrap();
        IdxImages::open(&a, &b)
    }

    fn draw() -> Stream {
        Stream::new(0, Purpose::VaeDraw, 0, 0)
    }

    #[test]
    fn plain_and_gzipped_read_the_same() {
        let (pixels, classes) = (images(3, 2, 3), labels(&[0, 2, 1]));
        for (a, b) in [(pixels.clone(), classes.clone()), (gzip(&pixels), gzip(&classes))] {
            let set = open(&a, &b).unwrap();
            assert_eq!((set.len(), set.height(), set.width(), set.num_classes()), (3, 2, 3, 3));
            let mut out = [0.0; 6];
            assert_eq!(set.read(1, false, &mut draw(), &mut out).unwrap(), 2);
            let expected: Vec<f32> = (6..12).map(|i| i as f32 / 127.5 - 1.0).collect();
            assert_eq!(out.to_vec(), expected);
            set.read(1, true, &mut draw(), &mut out).unwrap();
            let mirrored: Vec<f32> = [8, 7, 6, 11, 10, 9].map(|i| i as f32 / 127.5 - 1.0).to_vec();
            assert_eq!(out.to_vec(), mirrored);
        }
    }

    #[test]
    fn pixels_span_minus_one_to_one() {
        assert_eq!((pixel(0), pixel(255)), (-1.0, 1.0));
    }

    #[test]
    fn damage_is_named_with_file_expected_and_got() {
        let (pixels, classes) = (images(3, 2, 3), labels(&[0, 2, 1]));
        let message = |a: &[u8], b: &[u8]| open(a, b).unwrap_err().to_string();
        let swapped = message(&classes, &pixels);
        assert!(
            swapped.contains("images` cannot be used: magic number: expected 0x00000803, got 0x00000801"),
            "{swapped}"
        );
        let short = message(&pixels[..pixels.len() - 1], &classes);
        assert!(short.contains("expected 18 bytes, got 17 bytes: the file is cut short"), "{short}");
        let mut long = pixels.clone();
        long.push(0);
        assert!(message(&long, &classes).contains("expected 18 bytes, got more"));
        let fewer = message(&pixels, &labels(&[0, 2]));
        assert!(
            fewer.contains("labels` cannot be used: number of labels: expected 3, as many as"),
            "{fewer}"
        );
        assert!(message(&pixels[..10], &classes).contains("got the end of the file"));
        assert!(message(&[], &classes).contains("magic number"));
        assert!(message(&images(0, 2, 3), &labels(&[])).contains("at least one image"));
        let mut huge = pixels.clone();
        huge[4..16].fill(0xFF);
        assert!(message(&huge, &classes).contains("sizes"));
        let packed = gzip(&pixels);
        assert!(message(&packed[..packed.len() - 9], &classes).contains("gzip stream"));
        let mut flipped = packed;
        let at = flipped.len() - 6;
        flipped[at] ^= 1;
        assert!(message(&flipped, &classes).contains("gzip stream"));
    }

    #[test]
    fn reads_outside_the_set_are_errors() {
        let set = open(&images(1, 2, 2), &labels(&[0])).unwrap();
        assert!(matches!(set.read(1, false, &mut draw(), &mut [0.0; 4]), Err(TrainError::BadRead { .. })));
        assert!(matches!(set.read(0, false, &mut draw(), &mut [0.0; 5]), Err(TrainError::BadRead { .. })));
    }

    #[test]
    fn names_must_cover_the_labels() {
        let set = open(&images(1, 2, 2), &labels(&[4])).unwrap();
        let error = set.with_class_names(vec!["a".into()]).unwrap_err().to_string();
        assert!(error.contains("labels: expected below 1, got 4"), "{error}");
    }

    #[test]
    fn a_directory_is_searched_for_the_usual_names() {
        let dir = tempfile::tempdir().unwrap();
        assert!(find_pair(dir.path(), None).unwrap_err().to_string().contains("train-images-idx3-ubyte.gz"));
        std::fs::write(dir.path().join("train-images-idx3-ubyte.gz"), []).unwrap();
        std::fs::write(dir.path().join("train-labels-idx1-ubyte"), []).unwrap();
        let (images, labels) = find_pair(dir.path(), None).unwrap();
        assert!(
            images.ends_with("train-images-idx3-ubyte.gz") && labels.ends_with("train-labels-idx1-ubyte")
        );
        assert!(find_pair(&images, None).unwrap_err().to_string().contains("`data.labels = unset`"));
    }
}
