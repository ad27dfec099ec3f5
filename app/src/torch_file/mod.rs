//! PyTorch's own files (`.pth`, `.pt`) as named tensors, read without Python and without executing anything.
//!
//! Both formats are read: the zip archive of PyTorch 1.6 and later, and the sequence of pickles before it. The file must
//! hold a state dict, a dictionary of tensors, alone or under `state_dict` or `model`.

mod heap;
mod legacy;
mod pickle;
mod tensor;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use zip::CompressionMethod;
use zip::result::ZipError;

use self::heap::{Heap, Object, Refused};
pub use self::tensor::ElementType;
use self::tensor::{StorageRef, TensorRef};

/// Where a checkpoint may keep its state dict.
const NESTED: [&str; 3] = ["state_dict", "model", "model_state_dict"];
/// Longest description of the tensors that is read, in bytes.
const MAX_PICKLE: u64 = 64 << 20;

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TorchFileError {
    /// The operating system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// It is no state dict, or it is damaged.
    #[error("{} is not a PyTorch state dict: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What does not add up.
        reason: String,
    },
    /// There is no tensor of that name.
    #[error("{} holds no tensor `{name}`", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A tensor holds no real numbers.
    #[error("tensor `{name}` of {} holds {element:?}, expected real numbers", path.display())]
    NotReal {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What it holds.
        element: ElementType,
    },
}

/// How storages are found.
#[derive(Debug)]
enum Container {
    /// Members of a zip archive, below this folder.
    Zip { archive: Box<zip::ZipArchive<BufReader<File>>>, folder: String },
    /// Ranges of the file.
    Legacy { file: BufReader<File>, first_byte: IndexMap<String, u64> },
}

/// An open file; tensors are read when they are asked for.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    length: u64,
    container: Container,
    /// Where in the file's dictionary they are, if not in itself.
    part: Option<String>,
    tensors: IndexMap<String, TensorRef>,
}

impl TorchFile {
    /// Opens a file and reads the description of its tensors.
    ///
    /// # Errors
    /// [`TorchFileError::Io`], [`TorchFileError::Malformed`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TorchFileError> {
        Self::open_part(path, &[])
    }

    /// [`open`](Self::open), where the file's dictionary has one of `parts`, of the first of them.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_part(path: impl AsRef<Path>, parts: &[&str]) -> Result<Self, TorchFileError> {
        let path = path.as_ref();
        let failed = |source| TorchFileError::Io { path: path.to_path_buf(), source };
        let mut file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut start = [0; 4];
        let known = file.read(&mut start).map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let file = BufReader::new(file);
        let opened = match &start[..known] {
            [b'P', b'K', 3, 4] => open_zip(file),
            [0x80, ..] => legacy::open(file, length),
            _ => Err(Refused("it starts neither as a zip archive nor as a pickle".into())),
        };
        let (container, heap) = opened
            .map_err(|Refused(reason)| TorchFileError::Malformed { path: path.to_path_buf(), reason })?;
        let (part, tensors) = state_dict(&heap, parts)
            .map_err(|Refused(reason)| TorchFileError::Malformed { path: path.to_path_buf(), reason })?;
        Ok(Self { path: path.to_path_buf(), length, container, part, tensors })
    }

    /// The entry of the file's dictionary that the tensors are from; none where they are in the dictionary itself.
    pub fn part(&self) -> Option<&str> {
        self.part.as_deref()
    }

    /// Names, element types and shapes of all tensors, in the file's order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, ElementType, &[usize])> {
        self.tensors.iter().map(|(name, t)| (name.as_str(), t.storage.element, t.shape.as_slice()))
    }

    /// A tensor of real numbers, row-major, converted to f32.
    ///
    /// # Errors
    /// [`TorchFileError::Missing`], [`TorchFileError::NotReal`], [`TorchFileError::Malformed`] when its numbers are not
    /// all there, [`TorchFileError::Io`].
    pub fn read_f32(&mut self, name: &str) -> Result<Vec<f32>, TorchFileError> {
        let path = || self.path.clone();
        let Some(tensor) = self.tensors.get(name) else {
            return Err(TorchFileError::Missing { path: path(), name: name.to_owned() });
        };
        let element = tensor.storage.element;
        if !matches!(element, ElementType::F32 | ElementType::F64 | ElementType::F16 | ElementType::Bf16) {
            return Err(TorchFileError::NotReal { path: path(), name: name.to_owned(), element });
        }
        let malformed = |reason: String| TorchFileError::Malformed {
            path: path(),
            reason: format!("tensor `{name}`: {reason}"),
        };
        let numel = tensor
            .numel_inside()
            .ok_or_else(|| malformed("its elements do not lie inside its storage".into()))?;
        let bytes = tensor.storage.numel.checked_mul(element.bytes() as u64).filter(|b| *b <= self.length);
        let bytes = bytes.ok_or_else(|| malformed("its storage is larger than the file".into()))?;
        let mut storage = vec![0; bytes as usize];
        self.container.read(&tensor.storage, &mut storage).map_err(|Refused(reason)| malformed(reason))?;
        tensor
            .gather(&storage, numel)
            .ok_or_else(|| malformed("its elements do not lie inside its storage".into()))
    }
}

impl Container {
    /// Reads a whole storage.
    fn read(&mut self, storage: &StorageRef, into: &mut [u8]) -> Result<(), Refused> {
        let short = |e: std::io::Error| Refused(format!("its storage cannot be read: {e}"));
        match self {
            Self::Zip { archive, folder } => {
                let mut member = stored(archive, &format!("{folder}data/{}", storage.key))?;
                if member.size() != into.len() as u64 {
                    return Err(Refused(format!(
                        "its storage has {} bytes, expected {}",
                        member.size(),
                        into.len()
                    )));
                }
                member.read_exact(into).map_err(short)
            }
            Self::Legacy { file, first_byte } => {
                let Some(start) = first_byte.get(&storage.key) else {
                    return Err(Refused(format!("there is no storage `{}`", storage.key)));
                };
                file.seek(SeekFrom::Start(*start)).map_err(short)?;
                file.read_exact(into).map_err(short)
            }
        }
    }
}

/// A member of an archive, if it is stored as it is: PyTorch compresses nothing, so nothing can swell.
fn stored<'a>(
    archive: &'a mut zip::ZipArchive<BufReader<File>>,
    name: &str,
) -> Result<zip::read::ZipFile<'a, BufReader<File>>, Refused> {
    let member = archive.by_name(name).map_err(|e| match e {
        ZipError::FileNotFound => Refused(format!("the archive has no member `{name}`")),
        e => Refused(format!("member `{name}`: {e}")),
    })?;
    if member.compression() != CompressionMethod::Stored || member.size() != member.compressed_size() {
        return Err(Refused(format!("member `{name}` is compressed, PyTorch stores members as they are")));
    }
    Ok(member)
}

fn open_zip(file: BufReader<File>) -> Result<(Container, Heap), Refused> {
    let mut archive =
        zip::ZipArchive::new(file).map_err(|e| Refused(format!("its archive is damaged: {e}")))?;
    let named = |end: &str| {
        archive.file_names().flatten().find(|n| n.ends_with(end)).map(std::borrow::Cow::into_owned)
    };
    if named("/constants.pkl").is_some() {
        return Err(Refused("it is a TorchScript program, not a state dict".into()));
    }
    let pickle = named("data.pkl").ok_or_else(|| Refused("the archive has no member `data.pkl`".into()))?;
    let folder = pickle.trim_end_matches("data.pkl").to_owned();
    if let Ok(mut order) = stored(&mut archive, &format!("{folder}byteorder")) {
        let mut text = String::new();
        let read = order.by_ref().take(16).read_to_string(&mut text);
        if read.is_err() || text.trim() != "little" {
            return Err(Refused(format!("its numbers are {} endian, expected little", text.trim())));
        }
    }
    let member = stored(&mut archive, &pickle)?;
    if member.size() > MAX_PICKLE {
        return Err(Refused(format!(
            "its description has {} bytes, at most {MAX_PICKLE} are read",
            member.size()
        )));
    }
    let heap = pickle::read(&mut BufReader::new(member))?;
    Ok((Container::Zip { archive: Box::new(archive), folder }, heap))
}

/// The tensors of the dictionary that a pickle holds, or of one inside it: of `parts` before all others.
fn state_dict(heap: &Heap, parts: &[&str]) -> Result<(Option<String>, IndexMap<String, TensorRef>), Refused> {
    let dictionary = |value| match heap.object(value) {
        Some(Object::Dict(entries)) => Some(entries),
        _ => None,
    };
    let Some(top) = dictionary(heap.root) else {
        return Err(Refused("it holds something else than a dictionary".into()));
    };
    let tensors = |entries: &[(heap::Value, heap::Value)]| -> IndexMap<String, TensorRef> {
        let found = entries.iter().filter_map(|(key, value)| match (heap.text(*key), heap.object(*value)) {
            (Some(name), Some(Object::Tensor(tensor))) => Some((name.to_owned(), tensor.clone())),
            _ => None,
        });
        found.collect()
    };
    let nested = |names: &[&str]| {
        let entry = |name: &str| top.iter().find(|(key, _)| heap.text(*key) == Some(name));
        let found = |name: &&str| Some((Some((*name).to_owned()), tensors(dictionary(entry(name)?.1)?)));
        names.iter().filter_map(found).find(|(_, tensors)| !tensors.is_empty())
    };
    let whole = || Some((None, tensors(top))).filter(|(_, tensors)| !tensors.is_empty());
    let found = nested(parts).or_else(whole).or_else(|| nested(&NESTED));
    found.ok_or_else(|| Refused("its dictionary holds no tensor".into()))
}
