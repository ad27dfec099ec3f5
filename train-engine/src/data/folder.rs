//! A directory with one sub-directory of PNG or JPEG files a class.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use image::metadata::Orientation;
use models::class_names::misleading_number;
use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};

use super::center_crop::center_crop;
use super::classes::classes;
use super::identity::spread;
use super::{Dataset, Stored, check_read, pixel};
use crate::config::Orient;
use crate::error::{Result, TrainError};
use crate::picture::{self, Decoded};
use crate::random::Stream;

const CHANNELS: usize = 3;

/// Bytes of a file that tell its content, beside its size.
const HEAD: u64 = 32 << 10;

/// RGB images, decoded and cropped when they are read.
#[derive(Debug)]
pub struct ImageFolder {
    files: Vec<(PathBuf, usize)>,
    class_names: Vec<String>,
    size: usize,
    orient: Orient,
    /// Images among those read so far that their EXIF data ask to turn.
    turned: Mutex<BTreeSet<usize>>,
}

impl ImageFolder {
    /// Lists the classes (sub-directories, sorted by name) and their images (PNG and JPEG files in them and in directories of
    /// theirs, sorted by path).
    ///
    /// Images become `size` by `size` by the crop of the DiT paper. `progress` says what is left out: hidden files and
    /// directories, files that are neither PNG nor JPEG, images beside the classes; and whether classes are called by other
    /// classes' numbers.
    ///
    /// # Errors
    /// [`TrainError::Io`]; [`TrainError::BadDataset`] when there is no class, a class has no image, two have one name, or
    /// parts such as `train` and `val` stand in the classes' place.
    pub fn open(path: &Path, size: usize, orient: Orient, progress: &dyn Fn(&str)) -> Result<Self> {
        if size == 0 {
            let (value, allowed) = ("0".into(), "1 or more".into());
            return Err(TrainError::BadValue { key: "data.image_size", value, allowed });
        }
        let (files, class_names, turned) = (Vec::new(), Vec::new(), Mutex::default());
        let mut set = Self { files, class_names, size, orient, turned };
        for class in classes(path, progress)? {
            let number = set.class_names.len();
            set.files.extend(class.files.into_iter().map(|file| (file, number)));
            set.class_names.push(class.name);
        }
        if let Some(class) = misleading_number(&set.class_names) {
            progress(&format!(
                "the classes of `{}` are sorted as text, so that number {class} is the class called `{}`; \
                 `@{class}` means the number",
                path.display(),
                set.class_names[class]
            ));
        }
        Ok(set)
    }
}

impl Dataset for ImageFolder {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn channels(&self) -> usize {
        CHANNELS
    }

    fn height(&self) -> usize {
        self.size
    }

    fn width(&self) -> usize {
        self.size
    }

    fn num_classes(&self) -> usize {
        self.class_names.len()
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn label(&self, index: usize) -> i64 {
        self.files[index].1 as i64
    }

    fn stored(&self, into: &mut Stored) -> Result<()> {
        // A million of sizes is waiting for the disk, mostly.
        let sizes = self.files.par_iter().map(|(path, _)| {
            let data = path.metadata().map_err(TrainError::io("read", path))?;
            Ok(data.len())
        });
        let sizes: Vec<u64> = sizes.collect::<Result<_>>()?;
        for ((path, _), bytes) in self.files.iter().zip(sizes) {
            into.file(Path::new(path.file_name().unwrap_or_default()), bytes);
        }
        for index in spread(self.files.len()) {
            let (path, mut head) = (&self.files[index].0, Vec::new());
            let file = File::open(path).map_err(TrainError::io("open", path))?;
            file.take(HEAD).read_to_end(&mut head).map_err(TrainError::io("read", path))?;
            into.content(&head);
        }
        Ok(())
    }

    fn read(&self, index: usize, flip: bool, _: &mut Stream, out: &mut [f32]) -> Result<i64> {
        check_read(self, index, out)?;
        let path = &self.files[index].0;
        let Decoded { mut image, orientation } = picture::read(path)?;
        if orientation != Orientation::NoTransforms {
            self.turned.lock().unwrap_or_else(PoisonError::into_inner).insert(index);
            if self.orient == Orient::Apply {
                image.apply_orientation(orientation);
            }
        }
        let image = image.into_rgb8();
        let cropped = center_crop(image, self.size); // (H, W, C)
        for (at, bytes) in cropped.chunks_exact(CHANNELS).enumerate() {
            let (y, x) = (at / self.size, at % self.size);
            let x = if flip { self.size - 1 - x } else { x };
            for (channel, &byte) in bytes.iter().enumerate() {
                out[(channel * self.size + y) * self.size + x] = pixel(byte);
            }
        }
        Ok(self.label(index))
    }

    fn remarks(&self) -> Vec<String> {
        let count = self.turned.lock().unwrap_or_else(PoisonError::into_inner).len();
        let how = match self.orient {
            Orient::Off => {
                "are read as they are stored, lying or upside down; `data.orient = \"apply\"` turns them"
            }
            Orient::Apply => "are turned by it",
        };
        let line = || format!("{count} of the images have an orientation in their EXIF data: they {how}");
        (count > 0).then(line).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs;

    use image::{Rgb, RgbImage};

    use super::*;
    use crate::random::Purpose;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for class in ["b dogs", "a cats", ".cache"] {
            fs::create_dir(dir.path().join(class)).unwrap();
        }
        let picture =
            |seed: u32| RgbImage::from_fn(6, 4, |x, y| Rgb([x as u8 * 40, y as u8 * 60, seed as u8]));
        picture(1).save(dir.path().join("b dogs/2.png")).unwrap();
        picture(2).save(dir.path().join("b dogs/1.PNG")).unwrap();
        picture(3).save(dir.path().join("a cats/x.jpeg")).unwrap();
        fs::write(dir.path().join("a cats/notes.txt"), "hello").unwrap();
        fs::write(dir.path().join("a cats/.hidden.png"), "").unwrap();
        dir
    }

    fn read(set: &ImageFolder, index: usize, flip: bool) -> Result<(i64, Vec<f32>)> {
        let mut out = vec![0.0; set.image_len()];
        let label = set.read(index, flip, &mut Stream::new(0, Purpose::VaeDraw, 0, 0), &mut out)?;
        Ok((label, out))
    }

    #[test]
    fn classes_and_files_are_sorted_and_the_rest_is_told() {
        let dir = tree();
        let told = RefCell::new(Vec::new());
        let set =
            ImageFolder::open(dir.path(), 4, Orient::Off, &|line| told.borrow_mut().push(line.to_owned()))
                .unwrap();
        assert_eq!((set.len(), set.class_names()), (3, &["a cats".to_owned(), "b dogs".to_owned()][..]));
        assert_eq!(told.borrow().len(), 1);
        assert!(told.borrow()[0].contains("1 hidden picture (`"), "{told:?}");
        assert!(told.borrow()[0].contains("1 file that is no picture (`"), "{told:?}");
        let (label, image) = read(&set, 1, false).unwrap();
        assert_eq!(label, 1);
        // The short side fits already, so the middle four columns stay: x = 1 … 4 of channel 0, seed 2 in channel 2.
        let expected: Vec<f32> = [40, 80, 120, 160].map(pixel).to_vec();
        assert_eq!(image[..4], expected);
        assert_eq!(image[2 * 16], pixel(2));
        assert_eq!(image[16 + 4], pixel(60));
    }

    #[test]
    fn a_flip_mirrors_columns() {
        let dir = tree();
        let set = ImageFolder::open(dir.path(), 4, Orient::Off, &|_| ()).unwrap();
        let (_, image) = read(&set, 2, false).unwrap();
        let (_, mirrored) = read(&set, 2, true).unwrap();
        for (row, other) in image.chunks_exact(4).zip(mirrored.chunks_exact(4)) {
            assert!(row.iter().eq(other.iter().rev()));
        }
    }

    #[test]
    fn names_are_composed_and_unique() {
        let with = |names: &[&str]| {
            let dir = tempfile::tempdir().unwrap();
            for name in names {
                fs::create_dir(dir.path().join(name)).unwrap();
                RgbImage::new(4, 4).save(dir.path().join(name).join("x.png")).unwrap();
            }
            let told = RefCell::new(Vec::new());
            let set = ImageFolder::open(dir.path(), 4, Orient::Off, &|line| {
                told.borrow_mut().push(line.to_owned());
            });
            (set.map(|set| set.class_names().to_vec()).map_err(|error| error.to_string()), told.into_inner())
        };
        assert_eq!(with(&["e\u{301}te\u{301}", "hiver"]).0.unwrap(), ["\u{e9}t\u{e9}", "hiver"]);
        for pair in [["e\u{301}", "\u{e9}"], ["\u{1100}\u{1161}", "\u{ac00}"], ["\u{212b}", "\u{c5}"]] {
            let error = with(&pair).0.unwrap_err();
            assert!(error.contains("two sub-directories are called") && error.contains(pair[1]), "{error}");
        }
        assert!(with(&["0", "1", "2"]).1.is_empty());
        let told = with(&["1", "10", "2"]).1.concat();
        assert!(told.contains("number 0 is the class called `1`"), "{told}");
    }

    #[test]
    fn broken_images_and_empty_classes_are_named() {
        let dir = tree();
        fs::write(dir.path().join("a cats/w.png"), b"\x89PNG\r\n\x1a\nbroken").unwrap();
        let set = ImageFolder::open(dir.path(), 4, Orient::Off, &|_| ()).unwrap();
        let error = read(&set, 0, false).unwrap_err().to_string();
        assert!(error.starts_with("cannot decode the image") && error.contains("a cats/w.png"), "{error}");
        fs::create_dir(dir.path().join("c")).unwrap();
        let error = ImageFolder::open(dir.path(), 4, Orient::Off, &|_| ()).unwrap_err().to_string();
        assert!(error.contains("/c` cannot be used: this class holds no PNG"), "{error}");
        let empty = tempfile::tempdir().unwrap();
        assert!(
            ImageFolder::open(empty.path(), 4, Orient::Off, &|_| ())
                .unwrap_err()
                .to_string()
                .contains("no sub-directory")
        );
        let missing = empty.path().join("missing");
        assert!(
            ImageFolder::open(&missing, 4, Orient::Off, &|_| ())
                .unwrap_err()
                .to_string()
                .contains("check the path")
        );
    }
}
