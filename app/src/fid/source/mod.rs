//! Where images come from: one after the other, by their number in the whole set.
//!
//! | module | reads |
//! |---|---|
//! | [`mod@array`] | `.npz` with `arr_0`, and `.npy`, streamed |
//! | [`scale`] | what the values of arrays mean |
//! | [`folder`] | a directory of picture files |
//! | [`archive`] | picture files in a zip or a tar |
//! | [`table`] | encoded pictures in a column of a Parquet file |
//! | [`labelled`] | a training data set |
//! | [`noise`] | noise |
//! | [`sampled`] | a model's samples, made when they are asked for |
//! | [`subset`] | some of another source's images |
//!
//! [`fingerprint`] is what images are known by without decoding them.
//!
//! Every source knows its length before the first image is read, keeps one image (of files of their own one a thread, of
//! samples one batch) in memory, and names the file and the image in each error.

pub mod archive;
pub mod array;
pub mod fingerprint;
pub mod folder;
pub mod labelled;
pub mod noise;
pub(crate) mod npy;
pub mod picture;
pub mod sampled;
pub mod scale;
pub mod subset;
pub mod table;

use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rayon::iter::{IntoParallelIterator as _, ParallelIterator as _};
use train_engine::picture::LeftOut;

pub use picture::{Picture, Values};

use self::fingerprint::Fingerprint;
use self::scale::Scale;
use crate::Usage;

/// Images of a known number, in a fixed order.
pub trait Source {
    /// Number of images, at least 1.
    fn count(&self) -> u64;

    /// The images of `range`, in order; `range` is within `0..count()`.
    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_>;

    /// The images of ascending numbers. Sources that can only be read from the front go on from one to the next.
    fn picked<'a>(&'a mut self, numbers: Numbers<'a>) -> Pictures<'a> {
        Box::new(numbers.map(move |number| {
            let found = self.pictures(number..number + 1).next();
            found.unwrap_or_else(|| bail!("internal: image {number} is missing"))
        }))
    }

    /// Notes what the images of `range` are known by.
    ///
    /// # Errors
    /// Files that cannot be read.
    fn fingerprint(&mut self, _range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        fingerprint.unknown();
        Ok(())
    }

    /// The folder or the file that an image is in, by which sets of classes are sorted; none where images have none.
    fn group(&self, _number: u64) -> Option<String> {
        None
    }

    /// What a user should know of the images beside the numbers.
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Images one after the other; an error names the file and the image.
pub type Pictures<'a> = Box<dyn Iterator<Item = anyhow::Result<Picture>> + 'a>;

/// Numbers of images, ascending.
pub type Numbers<'a> = Box<dyn Iterator<Item = u64> + 'a>;

/// What Parquet columns are read, when it is not the only candidate.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Name of the column of encoded images.
    pub column: Option<String>,
    /// Range of the pixels of arrays; without one they must be of 0 … 255.
    pub scale: Option<Scale>,
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
    if options.scale.is_some() && !inputs.iter().any(|i| is_array(&ending(Path::new(i)))) {
        return Err(Usage("--scale is of arrays, and no input is one (.npz, .npy)".into()).into());
    }
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
    let ending = ending(&path);
    Ok(match ending.as_str() {
        _ if is_array(&ending) => Box::new(array::Array::open(&path, options.scale)?),
        "zip" => Box::new(archive::Zip::open(&path, progress)?),
        "tar" => Box::new(archive::Tar::open(&path, progress)?),
        "parquet" => Box::new(table::Table::open(&path, options.column.as_deref())?),
        "pkl" | "pickle" | "pt" | "pth" => {
            return Err(Usage(format!(
                "`{input}` is a pickle, which only Python can open: load it there and save its images by \
                 numpy.savez(\"images.npz\", images)"
            ))
            .into());
        }
        _ => {
            return Err(Usage(format!(
                "`{input}`: its ending says no kind of images: .npz, .npy, .zip, .tar, .parquet, a directory, or \
                 {}test",
                labelled::FASHION
            ))
            .into());
        }
    })
}

fn ending(path: &Path) -> String {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
}

fn is_array(ending: &str) -> bool {
    ending == "npz" || ending == "npy"
}

/// Several sources as one.
struct Chain {
    parts: Vec<Box<dyn Source>>,
}

impl Chain {
    /// The parts, each with the numbers of its images in the whole.
    fn placed(&mut self) -> impl Iterator<Item = (Range<u64>, &mut Box<dyn Source>)> {
        let mut first = 0;
        self.parts.iter_mut().map(move |part| {
            let own = first..first + part.count();
            first = own.end;
            (own, part)
        })
    }
}

impl Source for Chain {
    fn count(&self) -> u64 {
        self.parts.iter().map(|p| p.count()).sum()
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        Box::new(self.placed().flat_map(move |(own, part)| {
            let (start, end) = (range.start.max(own.start), range.end.min(own.end));
            if start < end {
                part.pictures(start - own.start..end - own.start)
            } else {
                Box::new(std::iter::empty())
            }
        }))
    }

    fn picked<'a>(&'a mut self, numbers: Numbers<'a>) -> Pictures<'a> {
        let mut numbers = numbers.peekable();
        Box::new(self.placed().flat_map(move |(own, part)| {
            let mut here = Vec::new();
            while let Some(number) = numbers.next_if(|n| own.contains(n)) {
                here.push(number - own.start);
            }
            part.picked(Box::new(here.into_iter()))
        }))
    }

    fn fingerprint(&mut self, range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        for (own, part) in self.placed() {
            let (start, end) = (range.start.max(own.start), range.end.min(own.end));
            if start < end {
                part.fingerprint(start - own.start..end - own.start, fingerprint)?;
            }
        }
        Ok(())
    }

    fn group(&self, mut number: u64) -> Option<String> {
        for (index, part) in self.parts.iter().enumerate() {
            if number < part.count() {
                return Some(format!("{index}/{}", part.group(number).unwrap_or_default()));
            }
            number -= part.count();
        }
        None
    }

    fn remarks(&self) -> Vec<String> {
        self.parts.iter().flat_map(|p| p.remarks()).collect()
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
        let picked: Vec<Values> =
            chain.picked(Box::new([1, 2, 3, 8].into_iter())).map(|p| p.unwrap().values).collect();
        assert_eq!(picked, [1, 2, 3, 8].map(|i| Values::U8(vec![i])));
        assert_eq!(
            (chain.group(2), chain.group(3), chain.group(8)),
            (Some("0/".into()), Some("1/".into()), Some("2/".into()))
        );
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
