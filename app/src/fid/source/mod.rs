//! Where images come from: one after the other, by their number in the whole set.
//!
//! | module | reads |
//! |---|---|
//! | [`mod@array`] | `.npz` with `arr_0`, streamed |
//! | [`folder`] | a directory of picture files |
//! | [`archive`] | picture files in a zip or a tar |
//! | [`table`] | encoded pictures in a column of a Parquet file |
//! | [`labelled`] | a training data set |
//! | [`noise`] | noise |
//! | [`sampled`] | a model's samples, made when they are asked for |
//!
//! Every source knows its length before the first image is read, keeps one image (of files of their own one a thread, of
//! samples one batch) in memory, and names the file and the image in each error.

pub mod archive;
pub mod array;
pub mod folder;
pub mod labelled;
pub mod noise;
pub(crate) mod npy;
pub mod picture;
pub mod sampled;
pub mod table;

use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use rayon::iter::{IntoParallelIterator as _, ParallelIterator as _};
use train_engine::picture::LeftOut;

pub use picture::{Picture, Values};

use crate::Usage;

/// Images of a known number, in a fixed order.
pub trait Source {
    /// Number of images, at least 1.
    fn count(&self) -> u64;

    /// The images of `range`, in order; `range` is within `0..count()`.
    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_>;
}

/// Images one after the other; an error names the file and the image.
pub type Pictures<'a> = Box<dyn Iterator<Item = anyhow::Result<Picture>> + 'a>;

/// What Parquet columns are read, when it is not the only candidate.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Name of the column of encoded images.
    pub column: Option<String>,
    /// Forbids fetching.
    pub offline: bool,
}

/// Opens files by what they are; several are one set, in the order given.
///
/// # Errors
/// A path that is not there or is no kind of images; what its kind says.
pub fn open(
    inputs: &[String],
    options: &OpenOptions,
    progress: &dyn Fn(&str),
) -> anyhow::Result<Box<dyn Source>> {
    let mut parts = Vec::with_capacity(inputs.len());
    for input in inputs {
        parts.push(open_one(input, options, progress)?);
    }
    match parts.len() {
        0 => Err(Usage("no images: give files or folders".into()).into()),
        1 => Ok(parts.remove(0)),
        _ => Ok(Box::new(Chain { parts })),
    }
}

fn open_one(input: &str, options: &OpenOptions, progress: &dyn Fn(&str)) -> anyhow::Result<Box<dyn Source>> {
    if let Some(name) = input.strip_prefix(labelled::FASHION) {
        return Ok(Box::new(labelled::Labelled::fashion_mnist(name, options.offline, progress)?));
    }
    if let Some(text) = input.strip_prefix(noise::NOISE) {
        return Ok(Box::new(noise::Noise::parse(text)?));
    }
    let path = PathBuf::from(input);
    if path.is_dir() {
        return Ok(Box::new(folder::Folder::open(&path, progress)?));
    }
    if !path.is_file() {
        return Err(Usage(format!("`{input}` is no file and no directory")).into());
    }
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    Ok(match ending.as_str() {
        "npz" => Box::new(array::Array::open(&path)?),
        "zip" => Box::new(archive::Zip::open(&path, progress)?),
        "tar" => Box::new(archive::Tar::open(&path, progress)?),
        "parquet" => Box::new(table::Table::open(&path, options.column.as_deref())?),
        _ => {
            return Err(Usage(format!(
                "`{input}`: its ending says no kind of images: .npz, .zip, .tar, .parquet, a directory, or \
                 {}test",
                labelled::FASHION
            ))
            .into());
        }
    })
}

/// Several sources as one.
struct Chain {
    parts: Vec<Box<dyn Source>>,
}

impl Source for Chain {
    fn count(&self) -> u64 {
        self.parts.iter().map(|p| p.count()).sum()
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        let mut first = 0;
        let parts = self.parts.iter_mut().map(move |part| {
            let own = first..first + part.count();
            first = own.end;
            (own, part)
        });
        Box::new(parts.flat_map(move |(own, part)| {
            let (start, end) = (range.start.max(own.start), range.end.min(own.end));
            if start < end {
                part.pictures(start - own.start..end - own.start)
            } else {
                Box::new(std::iter::empty())
            }
        }))
    }
}

/// The first `count` images of another source.
pub struct First {
    /// The source.
    pub source: Box<dyn Source>,
    /// Number of its images that are taken.
    pub count: u64,
}

impl First {
    /// Takes the first `count` images.
    ///
    /// # Errors
    /// The source has fewer.
    pub fn of(source: Box<dyn Source>, count: u64) -> anyhow::Result<Self> {
        ensure!(
            (1..=source.count()).contains(&count),
            Usage(format!("{count} images are asked for, the input has {}", source.count()))
        );
        Ok(Self { source, count })
    }
}

impl Source for First {
    fn count(&self) -> u64 {
        self.count
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        self.source.pictures(range)
    }
}

/// Pictures that are read one by one, by number.
fn one_by_one<'a>(range: Range<u64>, read: impl FnMut(u64) -> anyhow::Result<Picture> + 'a) -> Pictures<'a> {
    Box::new(range.map(read))
}

/// Pictures of files of their own, decoded by all threads, one each at a time.
fn side_by_side<'a>(
    range: Range<u64>,
    read: impl Fn(u64) -> anyhow::Result<Picture> + Sync + 'a,
) -> Pictures<'a> {
    let (end, threads) = (range.end, rayon::current_num_threads().max(1));
    Box::new(range.step_by(threads).flat_map(move |first| {
        let group = first..(first + threads as u64).min(end);
        group.into_par_iter().map(&read).collect::<Vec<_>>()
    }))
}

/// Tells what a set leaves out; pictures of formats that cannot be read are an error, for the number would be of other images.
fn tell_left_out(left_out: &LeftOut, path: &Path, progress: &dyn Fn(&str)) -> anyhow::Result<()> {
    if let Some(told) = left_out.foreign.told("picture", "pictures") {
        bail!("{}: only .png, .jpg and .jpeg are read; convert or rename {told}", path.display());
    }
    if let Some(line) = left_out.line(path) {
        progress(&line);
    }
    Ok(())
}

/// `path: entry`, as errors and messages name a picture inside a file.
fn inside(path: &Path, entry: impl Display) -> String {
    format!("{}: {entry}", path.display())
}

fn open_file(path: &Path) -> anyhow::Result<std::fs::File> {
    std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbers(Range<u8>);

    impl Source for Numbers {
        fn count(&self) -> u64 {
            self.0.len() as u64
        }
        fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
            let first = self.0.start;
            one_by_one(range, move |i| {
                let pixels = Values::U8(vec![first + i as u8]);
                Ok(Picture { name: String::new(), height: 1, width: 1, channels: 1, values: pixels })
            })
        }
    }

    #[test]
    fn several_sources_are_one_set() {
        let parts: Vec<Box<dyn Source>> =
            vec![Box::new(Numbers(0..3)), Box::new(Numbers(3..4)), Box::new(Numbers(4..9))];
        let mut chain = Chain { parts };
        assert_eq!(chain.count(), 9);
        for (start, end) in [(0, 9), (2, 5), (3, 4), (8, 9), (5, 5)] {
            let found: Vec<Values> = chain.pictures(start..end).map(|p| p.unwrap().values).collect();
            let expected: Vec<Values> = (start..end).map(|i| Values::U8(vec![i as u8])).collect();
            assert_eq!(found, expected);
        }
        let mut first = First::of(Box::new(chain), 4).unwrap();
        assert_eq!((first.count(), first.pictures(0..4).count()), (4, 4));
        assert!(First::of(Box::new(first), 5).is_err());
    }

    #[test]
    fn what_is_no_input_is_refused() {
        let open = |inputs: &[&str]| {
            let inputs: Vec<String> = inputs.iter().map(|s| (*s).to_owned()).collect();
            open(&inputs, &OpenOptions::default(), &|_| {}).err().unwrap().to_string()
        };
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("x.txt");
        std::fs::write(&text, "x").unwrap();
        assert!(open(&[]).contains("no images"));
        assert!(open(&["/absent"]).contains("`/absent` is no file"));
        assert!(open(&[text.to_str().unwrap()]).contains(".parquet"));
    }
}
