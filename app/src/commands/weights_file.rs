//! Weights as people have them: which file of a directory is meant, what it is, and a model's parameters out of it.
//!
//! What programs read is a safetensors file with the model's own names. A PyTorch file, or one whose names all have a prefix
//! that a wrapper left (`module.`, `_orig_mod.`, `ema.`), is written anew as such a file for as long as it is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use indexmap::IndexMap;
use models::{Model, ProgramKind, ProgramSpec};
use runtime::safetensors_file::SafetensorsReader;
use runtime::{HostTensor, read_safetensors_file, write_safetensors_file};
use tempfile::TempDir;
use train_engine::checkpoint::{EMA_FILE, MODEL_FILE};

use super::weights::Which;
use crate::console;
use crate::torch_file::{ElementType, TorchFile, TorchFileError};

/// Endings of files that hold weights.
const ENDINGS: [&str; 5] = ["safetensors", "pt", "pth", "bin", "ckpt"];
/// The parts of a training checkpoint of PyTorch that hold the moving average, and the model.
const AVERAGES: [&str; 3] = ["ema", "ema_state_dict", "model_ema"];
const MODELS: [&str; 3] = ["model", "state_dict", "model_state_dict"];

/// A weights file that programs can read.
#[derive(Debug)]
pub(super) struct WeightsFile {
    given: PathBuf,
    path: PathBuf,
    /// Holds the file that was written anew.
    _converted: Option<TempDir>,
}

impl WeightsFile {
    /// Opens the weights of a model: a file, or a directory that holds one.
    ///
    /// # Errors
    /// What the file is where it is none of weights, with what to do; nothing to read.
    pub(super) fn open(model: &Model, given: &Path, which: Which) -> anyhow::Result<Self> {
        let given = if given.is_dir() { in_directory(given, which)? } else { given.to_path_buf() };
        let graph = model.program(&ProgramSpec::new(ProgramKind::Denoise, 1))?;
        let expected: BTreeSet<&str> = graph.parameters().iter().map(|p| p.name.as_str()).collect();
        match beginning(&given) {
            [b'P', b'K', 3, 4] | [0x80, ..] => Self::of_torch(&given, which, &expected),
            [b'{', ..] => bail!(index(&given)),
            _ => Self::of_safetensors(given, &expected),
        }
    }

    /// The file as it was named: what it holds follows from it.
    pub(super) fn given(&self) -> &Path {
        &self.given
    }

    /// The safetensors file to read.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn of_safetensors(given: PathBuf, expected: &BTreeSet<&str>) -> anyhow::Result<Self> {
        let reader = SafetensorsReader::open(&given)?;
        let Some(prefix) = prefix(&reader.names().collect::<Vec<_>>(), expected) else {
            return Ok(Self { path: given.clone(), given, _converted: None });
        };
        let tensors = read_safetensors_file(&given)?;
        let tensors = tensors.into_iter().map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor));
        let tensors = tensors.collect();
        tell_prefix(&given, &prefix);
        Self::converted(given, &tensors, &reader.metadata())
    }

    fn of_torch(given: &Path, which: Which, expected: &BTreeSet<&str>) -> anyhow::Result<Self> {
        let parts: Vec<&str> = match which {
            Which::Ema => AVERAGES.into_iter().chain(MODELS).collect(),
            Which::Model => MODELS.to_vec(),
        };
        let mut file = TorchFile::open_part(given, &parts).map_err(with_remedy)?;
        let real = |element| {
            matches!(element, ElementType::F32 | ElementType::F64 | ElementType::F16 | ElementType::Bf16)
        };
        let names: Vec<(String, Vec<usize>)> = file
            .tensors()
            .filter(|(_, element, _)| real(*element))
            .map(|(name, _, shape)| (name.to_owned(), shape.to_vec()))
            .collect();
        let prefix = prefix(&names.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), expected);
        let part = file.part().map_or_else(String::new, |part| format!(", of which `{part}` is read"));
        console::note(&format!("`{}` is a PyTorch file{part}", given.display()));
        if let Some(prefix) = &prefix {
            tell_prefix(given, prefix);
        }
        let skipped = prefix.map_or(0, |prefix| prefix.len());
        let mut tensors = IndexMap::new();
        for (name, shape) in names {
            let values = file.read_f32(&name)?;
            tensors.insert(name[skipped..].to_owned(), HostTensor::f32(shape, values)?);
        }
        Self::converted(given.to_path_buf(), &tensors, &BTreeMap::new())
    }

    fn converted(
        given: PathBuf,
        tensors: &IndexMap<String, HostTensor>,
        metadata: &BTreeMap<String, String>,
    ) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir().context("a place for the converted weights")?;
        let path = directory.path().join(MODEL_FILE);
        write_safetensors_file(&path, tensors, metadata)?;
        Ok(Self { given, path, _converted: Some(directory) })
    }
}

/// The weights file of a checkpoint's directory; where there is none, the one that is missing.
///
/// # Errors
/// Several that could be meant.
pub(super) fn in_directory(directory: &Path, which: Which) -> anyhow::Result<PathBuf> {
    let (average, model) = (directory.join(EMA_FILE), directory.join(MODEL_FILE));
    let index = directory.join(format!("{MODEL_FILE}.index.json"));
    if which == Which::Ema && average.is_file() {
        return Ok(average);
    }
    if let Some(known) = [&model, &index].into_iter().find(|path| path.is_file()) {
        return Ok(known.clone());
    }
    let entries = directory.read_dir().with_context(|| format!("cannot list `{}`", directory.display()))?;
    let is_weights = |path: &PathBuf| {
        let ending = path.extension().and_then(|ending| ending.to_str());
        ending.is_some_and(|ending| ENDINGS.contains(&ending)) && path.is_file()
    };
    let mut others: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_weights).collect();
    others.sort();
    match &others[..] {
        [] => Ok(model),
        [one] => {
            console::note(&format!("the weights are those of `{}`", one.display()));
            Ok(one.clone())
        }
        many => {
            let names: Vec<String> = many.iter().map(|path| format!("`{}`", path.display())).collect();
            bail!("`{}` holds several weights files: name one of {}", directory.display(), names.join(", "))
        }
    }
}

/// What all names begin with, up to where they are the model's.
fn prefix(names: &[&str], expected: &BTreeSet<&str>) -> Option<String> {
    let mut length = 0;
    loop {
        let (first, rest) =
            (names.first()?.get(length..)?, || names.iter().filter_map(|name| name.get(length..)));
        if rest().any(|name| expected.contains(name)) {
            return (length > 0).then(|| names[0][..length].to_owned());
        }
        let segment = &first[..=first.find('.')?];
        if !rest().all(|name| name.starts_with(segment)) {
            return None;
        }
        length += segment.len();
    }
}

fn tell_prefix(file: &Path, prefix: &str) {
    console::note(&format!("all names of `{}` begin with `{prefix}`, which is left out", file.display()));
}

/// The first bytes of a file; none where it cannot be read, which whoever reads it will tell.
fn beginning(path: &Path) -> [u8; 4] {
    let mut start = [0; 4];
    match File::open(path).and_then(|mut file| file.read_exact(&mut start)) {
        Ok(()) => start,
        Err(_) => [0; 4],
    }
}

/// What to say of JSON in place of weights.
fn index(path: &Path) -> String {
    let place = path.display();
    let shards = std::fs::read(path).ok().and_then(|text| {
        let json: serde_json::Value = serde_json::from_slice(&text).ok()?;
        let map = json.get("weight_map")?.as_object()?;
        Some(map.values().filter_map(|file| file.as_str()).collect::<BTreeSet<_>>().len())
    });
    match shards {
        Some(shards) => format!(
            "`{place}` is the index of weights in {shards} shards, and one file is read: join them, in Python with \
             `safetensors.torch.load_file` of each and `save_file` of all"
        ),
        None => format!("`{place}` is JSON, and no weights: expected a .safetensors or PyTorch file"),
    }
}

fn with_remedy(error: TorchFileError) -> anyhow::Error {
    let remedy = "save its weights alone, in Python: torch.save(torch.load(FILE)['ema'], 'ema.pt')";
    match error {
        TorchFileError::Malformed { .. } => anyhow::anyhow!("{error}; {remedy}"),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_what_all_names_have_before_the_models() {
        let expected = BTreeSet::from(["pos_embed", "blocks.0.w"]);
        for (names, found) in [
            (&["module.pos_embed", "module.blocks.0.w"][..], Some("module.")),
            (&["module._orig_mod.pos_embed", "module._orig_mod.blocks.0.w"], Some("module._orig_mod.")),
            (&["net.x.y.blocks.0.w", "net.x.y.pos_embed"], Some("net.x.y.")),
            (&["pos_embed", "blocks.0.w"], None),
            (&["module.pos_embed", "blocks.0.w"], None),
            (&["module.pos_embed", "ema.blocks.0.w"], None),
            (&["module.other"], None),
            (&[], None),
        ] {
            assert_eq!(prefix(names, &expected).as_deref(), found, "{names:?}");
        }
    }
}
