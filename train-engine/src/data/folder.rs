//! A directory with one sub-directory of PNG or JPEG files a class.

use std::path::{Path, PathBuf};

use image::ImageReader;
use models::class_names::{composed, misleading_number};

use super::center_crop::center_crop;
use super::{Dataset, check_read, pixel, sorted_entries};
use crate::error::{Result, TrainError};
use crate::random::Stream;

const CHANNELS: usize = 3;
const EXTENSIONS: [&str; 3] = ["png", "jpg", "jpeg"];

/// RGB images, decoded and cropped when they are read.
#[derive(Debug)]
pub struct ImageFolder {
    files: Vec<(PathBuf, usize)>,
    class_names: Vec<String>,
    size: usize,
}

impl ImageFolder {
    /// Lists the classes (sub-directories, sorted by name) and their images (files directly in them, sorted by name).
    ///
    /// Images become `size` by `size` by the crop of the DiT paper. Hidden entries are skipped; `progress` says how many
    /// other files were left out because they are neither PNG nor JPEG, and whether classes are called by other classes' numbers.
    ///
    /// # Errors
    /// [`TrainError::Io`]; [`TrainError::BadDataset`] when there is no class, a class has no image, or two have one name.
    pub fn open(path: &Path, size: usize, progress: &dyn Fn(&str)) -> Result<Self> {
        let mut set = Self { files: Vec::new(), class_names: Vec::new(), size };
        let mut left_out = 0;
        for directory in sorted_entries(path)?.into_iter().filter(|entry| entry.is_dir() && !is_hidden(entry))
        {
            let class = set.class_names.len();
            let before = set.files.len();
            for file in sorted_entries(&directory)?.into_iter().filter(|file| !is_hidden(file)) {
                if is_image(&file) {
                    set.files.push((file, class));
                } else {
                    left_out += 1;
                }
            }
            if set.files.len() == before {
                let reason =
                    "this class holds no PNG or JPEG file: add images or remove the directory".into();
                return Err(TrainError::BadDataset { path: directory, reason });
            }
            let name = composed(&directory.file_name().unwrap_or_default().to_string_lossy());
            if set.class_names.contains(&name) {
                let reason = format!(
                    "two sub-directories are called `{name}`, one of them in decomposed Unicode as a Mac writes it: \
                     put their images into one"
                );
                return Err(TrainError::BadDataset { path: path.to_path_buf(), reason });
            }
            set.class_names.push(name);
        }
        if set.files.is_empty() || size == 0 {
            let reason = "it holds no sub-directory: put the images of each class into one of its own".into();
            return Err(TrainError::BadDataset { path: path.to_path_buf(), reason });
        }
        if left_out > 0 {
            progress(&format!(
                "left out {left_out} entries of `{}` that are neither PNG nor JPEG",
                path.display()
            ));
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

    fn read(&self, index: usize, flip: bool, _: &mut Stream, out: &mut [f32]) -> Result<i64> {
        check_read(self, index, out)?;
        let (path, class) = &self.files[index];
        let reader = ImageReader::open(path).map_err(TrainError::io("open", path))?;
        let image = reader.with_guessed_format().map_err(TrainError::io("read", path))?.decode();
        let bad = |reason: String| TrainError::BadImage { path: path.clone(), reason };
        let image = image.map_err(|error| bad(error.to_string()))?.into_rgb8();
        if image.is_empty() {
            return Err(bad("it has no pixels".into()));
        }
        let cropped = center_crop(image, self.size); // (H, W, C)
        for (at, bytes) in cropped.chunks_exact(CHANNELS).enumerate() {
            let (y, x) = (at / self.size, at % self.size);
            let x = if flip { self.size - 1 - x } else { x };
            for (channel, &byte) in bytes.iter().enumerate() {
                out[(channel * self.size + y) * self.size + x] = pixel(byte);
            }
        }
        Ok(*class as i64)
    }
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str())) && !path.is_dir()
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
        let set = ImageFolder::open(dir.path(), 4, &|line| told.borrow_mut().push(line.to_owned())).unwrap();
        assert_eq!((set.len(), set.class_names()), (3, &["a cats".to_owned(), "b dogs".to_owned()][..]));
        assert_eq!(told.borrow().len(), 1);
        assert!(told.borrow()[0].starts_with("left out 1 entries"), "{told:?}");
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
        let set = ImageFolder::open(dir.path(), 4, &|_| ()).unwrap();
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
            let set = ImageFolder::open(dir.path(), 4, &|line| told.borrow_mut().push(line.to_owned()));
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
        let set = ImageFolder::open(dir.path(), 4, &|_| ()).unwrap();
        let error = read(&set, 0, false).unwrap_err().to_string();
        assert!(error.starts_with("cannot decode the image") && error.contains("a cats/w.png"), "{error}");
        fs::create_dir(dir.path().join("c")).unwrap();
        let error = ImageFolder::open(dir.path(), 4, &|_| ()).unwrap_err().to_string();
        assert!(error.contains("/c` cannot be used: this class holds no PNG"), "{error}");
        let empty = tempfile::tempdir().unwrap();
        assert!(
            ImageFolder::open(empty.path(), 4, &|_| ()).unwrap_err().to_string().contains("no sub-directory")
        );
        let missing = empty.path().join("missing");
        assert!(ImageFolder::open(&missing, 4, &|_| ()).unwrap_err().to_string().contains("check the path"));
    }
}
