//! Latents in arrays of NumPy: an `.npz`, or a directory of `.npy` files.

use std::fs::File;
use std::io::{self, Read, Seek as _};
use std::path::{Path, PathBuf};

use runtime::npy::{Header, Kind};
use zip::ZipArchive;

use super::rows::{Rows, open_npy};
use super::{Classes, Parts, Posterior};
use crate::data::sorted_entries;
use crate::error::{Result, TrainError};

/// The forms that are read.
pub(super) const WANTED: &str = "wanted is a `.safetensors` or `.npz` file with `latents` (M, C, H, W) and `labels` (M); or a \
    directory of `.npy` files: `latents.npy` and `labels.npy`, or one file for each image, in a sub-directory for each class or \
    in two sub-directories `features` and `labels` under the same names";
/// What the tensors may be called: own names, and those that `numpy.savez` gives to arrays without one.
const LATENTS: [&str; 3] = ["latents", "features", "arr_0"];
const LABELS: [&str; 2] = ["labels", "arr_1"];

/// Something that arrays are found in by name.
trait Arrays {
    fn has(&self, name: &str) -> bool;
    /// The file that holds the array's bytes from an offset on, with its header.
    fn open(&mut self, name: &str) -> Result<(PathBuf, File, Header, u64)>;
}

/// `latents.npy` and its companions in a directory.
struct Beside<'a>(&'a Path);

impl Arrays for Beside<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.join(format!("{name}.npy")).is_file()
    }

    fn open(&mut self, name: &str) -> Result<(PathBuf, File, Header, u64)> {
        let path = self.0.join(format!("{name}.npy"));
        let (file, header) = open_npy(&path)?;
        let start = header.before;
        Ok((path, file, header, start))
    }
}

/// The members of an `.npz`.
struct Members<'a> {
    path: &'a Path,
    archive: ZipArchive<File>,
}

impl Arrays for Members<'_> {
    fn has(&self, name: &str) -> bool {
        self.archive.index_for_name(&format!("{name}.npy")).is_some()
    }

    fn open(&mut self, name: &str) -> Result<(PathBuf, File, Header, u64)> {
        let path = self.path;
        let bad = |got: String| TrainError::bad_file(path, format!("array `{name}`"), "a whole one", got);
        let mut member =
            self.archive.by_name(&format!("{name}.npy")).map_err(|error| bad(error.to_string()))?;
        let header = Header::read(&mut member).map_err(|error| bad(error.to_string()))?;
        let data = header.data_bytes().map_err(|error| bad(error.to_string()))?;
        if data + header.before != member.size() {
            let (needed, size) = (data + header.before, member.size());
            return Err(bad(format!("{size} bytes, and shape {:?} needs {needed}", header.shape)));
        }
        // No packed byte becomes more than 1032 of them.
        if data > member.compressed_size().saturating_mul(1032).saturating_add(1024) {
            return Err(bad(format!(
                "{} packed bytes, and shape {:?} needs {data}",
                member.compressed_size(),
                header.shape
            )));
        }
        let stored = member.compression() == zip::CompressionMethod::Stored;
        if let Some(start) = member.data_start().filter(|_| stored) {
            drop(member);
            let file = File::open(path).map_err(TrainError::io("open", path))?;
            let start = start + header.before;
            return Ok((path.to_path_buf(), file, header, start));
        }
        // Packed rows cannot be read one by one: they are unpacked into a file without a name.
        let mut unpacked = tempfile::tempfile().map_err(TrainError::io("write", &std::env::temp_dir()))?;
        let copied =
            io::copy(&mut (&mut member).take(data), &mut unpacked).map_err(|error| bad(error.to_string()))?;
        if copied != data {
            return Err(bad(format!("{copied} bytes of {data}")));
        }
        unpacked.rewind().map_err(TrainError::io("read", path))?;
        Ok((path.to_path_buf(), unpacked, header, 0))
    }
}

/// Opens an `.npz`.
pub(super) fn open_archive(path: &Path) -> Result<Parts> {
    let file = File::open(path).map_err(TrainError::io("open", path))?;
    let archive = ZipArchive::new(file)
        .map_err(|error| TrainError::bad_file(path, "format", "an .npz, a zip of NumPy arrays", error))?;
    parts(path, &mut Members { path, archive })
}

/// Opens a directory in the form that it has.
pub(super) fn open_directory(path: &Path) -> Result<Parts> {
    if LATENTS.iter().any(|name| Beside(path).has(name)) {
        return parts(path, &mut Beside(path));
    }
    let directories: Vec<PathBuf> = sorted_entries(path)?
        .into_iter()
        .filter(|entry| entry.is_dir() && !name_of(entry).starts_with(['.', '_']))
        .collect();
    let ending = |ends: &[&str]| {
        directories.iter().find(|directory| ends.iter().any(|end| name_of(directory).ends_with(end)))
    };
    if let (Some(features), Some(labels)) = (ending(&["features", "latents"]), ending(&["labels"])) {
        return pairs(features, labels);
    }
    by_class(path, &directories)
}

/// Whole arrays by name.
fn parts(path: &Path, arrays: &mut dyn Arrays) -> Result<Parts> {
    let called = |arrays: &dyn Arrays, names: &[&'static str]| {
        let found = names.iter().copied().find(|name| arrays.has(name));
        found.ok_or_else(|| TrainError::BadDataset {
            path: path.to_path_buf(),
            reason: format!("it holds no array `{}`; {WANTED}", names[0]),
        })
    };
    let (latents, labels) = (called(arrays, &LATENTS)?, called(arrays, &LABELS)?);
    let (mean, count) = rows(arrays, latents)?;
    let mut optional = |name: &str| -> Result<Option<Rows>> {
        if !arrays.has(name) {
            return Ok(None);
        }
        let (rows, found) = rows(arrays, name)?;
        if (found, rows.shape()) == (count, mean.shape()) {
            return Ok(Some(rows));
        }
        let [c, h, w] = rows.shape();
        let expected = format!("that of `{latents}`");
        Err(TrainError::bad_file(
            path,
            format!("shape of `{name}`"),
            expected,
            format!("{:?}", [found, c, h, w]),
        ))
    };
    let std = optional("std")?;
    let flipped = optional("latents_flipped")?;
    let flipped_std = if flipped.is_some() { optional("std_flipped")? } else { None };
    if flipped.is_some() && flipped_std.is_some() != std.is_some() {
        let expected = "`std` and `std_flipped` together or neither";
        return Err(TrainError::bad_file(path, "arrays", expected, "one of the two"));
    }
    let (file, mut data, header, start) = arrays.open(labels)?;
    data.seek(io::SeekFrom::Start(start)).map_err(TrainError::io("read", &file))?;
    let labels = whole_numbers(&file, &header, &mut data)?;
    if labels.len() != count {
        let expected = format!("{count}, as many as `{latents}` has rows");
        return Err(TrainError::bad_file(&file, "number of labels", expected, labels.len()));
    }
    Ok(Parts {
        plain: Posterior { mean, std },
        flipped: flipped.map(|mean| Posterior { mean, std: flipped_std }),
        labels,
        scale: 1.0,
        classes: Classes::ByLabels,
    })
}

fn rows(arrays: &mut dyn Arrays, name: &str) -> Result<(Rows, usize)> {
    let (path, file, header, start) = arrays.open(name)?;
    Rows::array(name, &path, file, &header, start)
}

/// One file an image, its label under the same name in another directory.
fn pairs(features: &Path, labels: &Path) -> Result<Parts> {
    let files = arrays_in(features)?;
    if files.is_empty() {
        let reason = format!("it holds no `.npy` file; {WANTED}");
        return Err(TrainError::BadDataset { path: features.to_path_buf(), reason });
    }
    let label = |file: &PathBuf| {
        let path = labels.join(file.file_name().unwrap_or_default());
        let (mut data, header) = open_npy(&path)?;
        let found = whole_numbers(&path, &header, &mut data)?;
        match found[..] {
            [label] => Ok(label),
            _ => Err(TrainError::bad_file(&path, "label", "one number", format!("{} numbers", found.len()))),
        }
    };
    let labels = files.iter().map(label).collect::<Result<_>>()?;
    let plain = Posterior { mean: Rows::files(files)?, std: None };
    Ok(Parts { plain, flipped: None, labels, scale: 1.0, classes: Classes::ByLabels })
}

/// One sub-directory a class, one file an image.
fn by_class(path: &Path, directories: &[PathBuf]) -> Result<Parts> {
    let (mut files, mut labels, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for directory in directories {
        let found = arrays_in(directory)?;
        if found.is_empty() {
            let reason = format!("it holds no `.npy` file; {WANTED}");
            return Err(TrainError::BadDataset { path: directory.clone(), reason });
        }
        labels.extend(found.iter().map(|_| names.len() as i64));
        files.extend(found);
        names.push(name_of(directory));
    }
    if files.is_empty() {
        let reason = match arrays_in(path)?.len() {
            0 => WANTED.to_owned(),
            count => format!("its {count} `.npy` files have no labels; {WANTED}"),
        };
        return Err(TrainError::BadDataset { path: path.to_path_buf(), reason });
    }
    let plain = Posterior { mean: Rows::files(files)?, std: None };
    Ok(Parts { plain, flipped: None, labels, scale: 1.0, classes: Classes::Names(names) })
}

/// The `.npy` files of a directory: by number where all names are numbers, else by name.
fn arrays_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let is_array = |path: &PathBuf| {
        path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy")) && !name_of(path).starts_with('.')
    };
    let mut files: Vec<PathBuf> = sorted_entries(directory)?.into_iter().filter(is_array).collect();
    let number = |path: &PathBuf| path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
    if files.iter().all(|path| number(path).is_some()) {
        files.sort_by_key(number);
    }
    Ok(files)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The whole numbers of an array, of any shape; the file's length has been compared with the header's.
fn whole_numbers(path: &Path, header: &Header, data: &mut impl Read) -> Result<Vec<i64>> {
    if header.kind == Kind::Float {
        let got = format!("floats of {} bytes", header.width);
        return Err(TrainError::bad_file(path, "labels", "whole numbers (<i8, <i4 …)", got));
    }
    let bytes = header.data_bytes().map_err(|e| TrainError::bad_file(path, "labels", "a whole array", e))?;
    let mut all = Vec::new();
    data.take(bytes).read_to_end(&mut all).map_err(TrainError::io("read", path))?;
    let number = |bytes: &[u8]| {
        let negative = header.kind == Kind::Signed && bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut whole = [if negative { 0xFF } else { 0 }; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        i64::from_le_bytes(whole)
    };
    Ok(all.chunks_exact(header.width).map(number).collect())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use zip::write::SimpleFileOptions;

    use super::super::Latents;
    use super::*;
    use crate::data::{DataIdentity, Dataset as _};
    use crate::random::{Purpose, Stream};

    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], text.as_bytes(), data].concat()
    }

    fn floats(count: usize, first: f32) -> Vec<u8> {
        (0..count).flat_map(|i| (first + i as f32).to_le_bytes()).collect()
    }

    fn longs(labels: &[i64]) -> Vec<u8> {
        labels.iter().flat_map(|label| label.to_le_bytes()).collect()
    }

    fn values(set: &Latents) -> Vec<(i64, f32)> {
        let read = |index| {
            let mut out = vec![0.0; set.image_len()];
            let draw = &mut Stream::new(0, Purpose::VaeDraw, 0, 0);
            (set.read(index, false, draw, &mut out).unwrap(), out[0])
        };
        (0..set.len()).map(read).collect()
    }

    /// The same three images of two classes in every form.
    #[test]
    fn every_form_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let latents = npy("<f4", "(3, 1, 2, 2)", &floats(12, 0.0));
        let labels = npy("<i8", "(3,)", &longs(&[0, 1, 1]));
        let expected = [(0, 0.0), (1, 4.0), (1, 8.0)];
        let mut contents = Vec::new();
        for (name, method) in
            [("a.npz", zip::CompressionMethod::Stored), ("b.npz", zip::CompressionMethod::Deflated)]
        {
            let path = dir.path().join(name);
            let mut archive = zip::ZipWriter::new(File::create(&path).unwrap());
            for (member, bytes) in [("latents.npy", &latents), ("labels.npy", &labels)] {
                archive.start_file(member, SimpleFileOptions::default().compression_method(method)).unwrap();
                archive.write_all(bytes).unwrap();
            }
            archive.finish().unwrap();
            let set = Latents::open(&path).unwrap();
            assert_eq!(values(&set), expected, "{name}");
            contents.push(DataIdentity::of(&set).unwrap());
        }
        assert_eq!(contents[0], contents[1], "how it is packed is no part of what it is");

        let write = |path: &str, bytes: &[u8]| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        };
        write("whole/latents.npy", &latents);
        write("whole/labels.npy", &labels);
        for (i, label) in [(2, 0_i64), (10, 1), (100, 1)] {
            let image = npy(
                "<f4",
                "(1, 1, 2, 2)",
                &floats(4, [0.0, 4.0, 8.0][[2, 10, 100].iter().position(|n| *n == i).unwrap()]),
            );
            write(&format!("pairs/imagenet256_features/{i}.npy"), &image);
            write(&format!("pairs/imagenet256_labels/{i}.npy"), &npy("<i8", "(1,)", &longs(&[label])));
            write(&format!("classes/{}/{i}.npy", ["cat", "dog"][label as usize]), &image);
        }
        for form in ["whole", "pairs", "classes"] {
            assert_eq!(values(&Latents::open(&dir.path().join(form)).unwrap()), expected, "{form}");
        }
        assert_eq!(Latents::open(&dir.path().join("classes")).unwrap().class_names(), ["cat", "dog"]);
    }

    #[test]
    fn what_is_none_of_them_is_told_what_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, bytes: &[u8]| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        };
        let image = |shape: &str, count| npy("<f4", shape, &floats(count, 0.0));
        write("empty/readme.txt", b"");
        write("flat/0.npy", &image("(1, 2, 2)", 4));
        write("hollow/features/0.npy", &[]);
        write("hollow/labels/0.npy", &[]);
        write("unlabelled/features/0.npy", &image("(1, 2, 2)", 4));
        write("unlabelled/labels/1.npy", &[]);
        write("uneven/a/0.npy", &image("(1, 2, 2)", 4));
        write("uneven/a/1.npy", &image("(1, 2, 1)", 2));
        write("huge/a/0.npy", &image("(4000000000, 4000000000, 4)", 4));
        write("cut/a/0.npy", &image("(4, 2, 2)", 4));
        write("many/a/0.npy", &image("(2, 4, 2, 2)", 32));
        write("bytes/a/0.npy", &npy("|u1", "(1, 2, 2)", &[0; 4]));
        for (form, part) in [
            ("empty", "`features` and `labels`"),
            ("flat", "its 1 `.npy` files have no labels"),
            ("hollow", "labels/0.npy"),
            ("unlabelled", "labels/0.npy"),
            ("huge", "no file holds an array"),
            ("cut", "length for shape [4, 2, 2]"),
            ("many", "one image a file"),
            ("bytes", "floats of 4 or 2 bytes"),
        ] {
            let error = Latents::open(&dir.path().join(form)).unwrap_err().to_string();
            assert!(error.contains(part), "{form}: {error}");
        }
        let uneven = Latents::open(&dir.path().join("uneven")).unwrap();
        let mut out = [0.0; 4];
        let error = uneven.read(1, false, &mut Stream::new(0, Purpose::VaeDraw, 0, 0), &mut out).unwrap_err();
        assert!(error.to_string().contains("uneven/a/1.npy"), "{error}");
    }
}
