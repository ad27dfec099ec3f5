//! Flat arenas: all parameters (or gradients, moments, averages) in one allocation, a named view for each.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, RwLock};

use graph_builder::Shape;
use indexmap::IndexMap;

use crate::error::{Result, RuntimeError, nearest};
use crate::kernels::product::Frozen;
use crate::safetensors_file::{SafetensorsReader, TensorRecord, write_records};
use crate::storage::{ALIGNMENT, Storage};

/// Place and shape of one arena entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaEntry {
    /// Index of the first element.
    pub offset: usize,
    /// Axis sizes.
    pub shape: Shape,
}

impl ArenaEntry {
    /// Where the entry's elements lie in the arena.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.shape.numel()
    }
}

/// Names, shapes and places of an arena's entries, in the order of their declaration.
///
/// Every entry starts at a multiple of 64 bytes; the gap before the next one stays zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArenaLayout {
    entries: IndexMap<String, ArenaEntry>,
    len: usize,
}

impl ArenaLayout {
    /// Lays out f32 entries one after the other.
    ///
    /// # Errors
    /// [`RuntimeError::DuplicateName`]; [`RuntimeError::OutOfMemory`] when the sizes overflow.
    pub fn new(entries: impl IntoIterator<Item = (String, Shape)>) -> Result<Self> {
        let step = ALIGNMENT / size_of::<f32>();
        let mut layout = Self::default();
        for (name, shape) in entries {
            let end = shape
                .dims()
                .iter()
                .try_fold(1_usize, |n, &d| n.checked_mul(d))
                .and_then(|n| n.checked_next_multiple_of(step)?.checked_add(layout.len))
                .ok_or_else(|| RuntimeError::OutOfMemory {
                    bytes: usize::MAX,
                    what: format!("`{name}` {shape}"),
                })?;
            let entry = ArenaEntry { offset: layout.len, shape };
            if layout.entries.contains_key(&name) {
                return Err(RuntimeError::DuplicateName { name });
            }
            layout.entries.insert(name, entry);
            layout.len = end;
        }
        Ok(layout)
    }

    /// Number of elements of an arena of this layout, gaps included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of elements of all entries together, gaps not counted.
    pub fn numel(&self) -> usize {
        self.entries.values().map(|e| e.shape.numel()).sum()
    }

    /// The entries in order.
    pub fn entries(&self) -> &IndexMap<String, ArenaEntry> {
        &self.entries
    }

    /// Checks that a safetensors file holds every entry with its shape, and nothing else unless `allow_extra`.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongShape`], [`RuntimeError::UnexpectedTensor`].
    pub fn expect(&self, file: &SafetensorsReader, allow_extra: bool) -> Result<()> {
        for (name, entry) in &self.entries {
            file.expect_shape(name, &entry.shape)?;
        }
        match file.names().find(|n| !allow_extra && !self.entries.contains_key(*n)) {
            None => Ok(()),
            Some(name) => Err(RuntimeError::UnexpectedTensor {
                place: file.path().display().to_string(),
                name: name.to_owned(),
                nearest: nearest(name, self.entries.keys().map(String::as_str)),
            }),
        }
    }

    /// The entry of a name.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`] with the most similar name.
    pub fn entry(&self, name: &str) -> Result<&ArenaEntry> {
        self.entries.get(name).ok_or_else(|| RuntimeError::UnknownName {
            kind: "entry",
            place: "the arena".to_owned(),
            name: name.to_owned(),
            nearest: nearest(name, self.entries.keys().map(String::as_str)),
        })
    }
}

/// One block of f32 host memory, divided by an [`ArenaLayout`]. It is never moved or resized.
pub struct Arena {
    layout: Arc<ArenaLayout>,
    // Dropped before the memory that it speaks of.
    frozen: Option<Frozen>,
    /// Changes with every chance to change a value.
    version: u64,
    data: Storage<f32>,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena").field("entries", &self.layout.entries().len()).finish_non_exhaustive()
    }
}

/// An arena that bound programs and host code take turns with.
///
/// A run locks it (for reading where it feeds inputs, for writing where it takes outputs): do not hold a guard of
/// it while running a program that is bound to it on the same thread.
pub type SharedArena = Arc<RwLock<Arena>>;

impl Arena {
    /// An arena of zeros.
    ///
    /// # Errors
    /// [`RuntimeError::OutOfMemory`].
    pub fn zeros(layout: Arc<ArenaLayout>) -> Result<Self> {
        let data = Storage::zeros(layout.len(), "an arena")?;
        Ok(Self { layout, frozen: None, version: 0, data })
    }

    /// A second arena with the same layout and contents.
    ///
    /// # Errors
    /// [`RuntimeError::OutOfMemory`].
    pub fn duplicate(&self) -> Result<Self> {
        let mut copy = Self::zeros(self.layout.clone())?;
        copy.data_mut().copy_from_slice(self.data.as_slice());
        Ok(copy)
    }

    /// Wraps the arena for sharing with bindings.
    pub fn into_shared(self) -> SharedArena {
        Arc::new(RwLock::new(self))
    }

    /// Declares that the values will be read many times before they change, as weights are in sampling: kernels may
    /// keep them in a form of their own (as much memory again). Any change of a value takes the declaration back.
    pub fn freeze(&mut self) {
        if self.frozen.is_none() {
            self.frozen = Some(Frozen::new(self.data.as_slice()));
        }
    }

    /// Takes [`Self::freeze`] back: values may change now.
    pub(crate) fn thaw(&mut self) {
        self.frozen = None;
        self.version += 1;
    }

    /// A number that is another one after every change of a value.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    fn data_mut(&mut self) -> &mut [f32] {
        self.thaw();
        self.data.as_mut_slice()
    }

    /// Names, shapes and places.
    pub fn layout(&self) -> &Arc<ArenaLayout> {
        &self.layout
    }

    /// The values of one entry.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`].
    pub fn view(&self, name: &str) -> Result<&[f32]> {
        Ok(&self.data.as_slice()[self.layout.entry(name)?.range()])
    }

    /// The values of one entry, writable.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`].
    pub fn view_mut(&mut self, name: &str) -> Result<&mut [f32]> {
        let range = self.layout.entry(name)?.range();
        self.thaw();
        Ok(&mut self.data.as_mut_slice()[range])
    }

    /// All entries in order, each with its name and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &ArenaEntry, &[f32])> {
        let data = self.data.as_slice();
        self.layout.entries().iter().map(|(name, entry)| (name.as_str(), entry, &data[entry.range()]))
    }

    /// The values of all entries in order, writable at the same time.
    pub fn views_mut(&mut self) -> Vec<&mut [f32]> {
        self.thaw();
        let mut rest = self.data.as_mut_slice();
        let mut start = 0;
        let mut views = Vec::with_capacity(self.layout.entries().len());
        for entry in self.layout.entries().values() {
            let (_, tail) = rest.split_at_mut(entry.offset - start);
            let (view, tail) = tail.split_at_mut(entry.shape.numel());
            start = entry.range().end;
            views.push(view);
            rest = tail;
        }
        views
    }

    /// Takes over the values of an arena of the same layout.
    ///
    /// # Errors
    /// [`RuntimeError::LayoutMismatch`].
    pub fn copy_from(&mut self, other: &Self) -> Result<()> {
        self.same_layout(other, "copy an arena")?;
        self.data_mut().copy_from_slice(other.data.as_slice());
        Ok(())
    }

    /// Adds `scale` times the values of an arena of the same layout: gradient accumulation.
    ///
    /// # Errors
    /// [`RuntimeError::LayoutMismatch`].
    pub fn add_scaled(&mut self, other: &Self, scale: f32) -> Result<()> {
        self.same_layout(other, "add arenas")?;
        for (sum, x) in self.data_mut().iter_mut().zip(other.data.as_slice()) {
            *sum += scale * x;
        }
        Ok(())
    }

    /// Sets every value of every entry.
    pub fn fill(&mut self, value: f32) {
        for view in self.views_mut() {
            view.fill(value);
        }
    }

    /// Writes all entries as an f32 safetensors file, in layout order: the same values give the same bytes.
    ///
    /// # Errors
    /// [`RuntimeError::Io`]; the file at `path` is then untouched.
    pub fn write_safetensors(
        &self,
        path: impl AsRef<Path>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        Self::write_all_safetensors(&[("", self)], path, metadata)
    }

    /// Writes several arenas into one file, each entry named with its arena's prefix.
    ///
    /// # Errors
    /// [`RuntimeError::Io`]; the file at `path` is then untouched.
    pub fn write_all_safetensors(
        arenas: &[(&str, &Self)],
        path: impl AsRef<Path>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let named: Vec<_> = arenas
            .iter()
            .flat_map(|(prefix, arena)| {
                arena.iter().map(move |(name, e, v)| (format!("{prefix}{name}"), e, v))
            })
            .collect();
        let records: Vec<_> = named
            .iter()
            .map(|(name, entry, values)| TensorRecord {
                name,
                dtype: safetensors::Dtype::F32,
                shape: &entry.shape,
                bytes: bytemuck::cast_slice(values),
            })
            .collect();
        write_records(path.as_ref(), &records, metadata)
    }

    /// Reads one of the arenas of [`Arena::write_all_safetensors`].
    ///
    /// # Errors
    /// As [`Arena::read_safetensors`].
    pub fn read_prefixed_safetensors(
        layout: &Arc<ArenaLayout>,
        prefix: &str,
        path: impl AsRef<Path>,
    ) -> Result<Self> {
        let mut file = SafetensorsReader::open(path)?;
        let mut arena = Self::zeros(layout.clone())?;
        for (name, entry) in layout.entries() {
            let saved = format!("{prefix}{name}");
            file.expect_shape(&saved, &entry.shape)?;
            file.read_f32_into(&saved, arena.view_mut(name)?)?;
        }
        Ok(arena)
    }

    /// Reads an arena from a safetensors file of f32, f16 or bf16 tensors.
    ///
    /// Every entry of `layout` must be there with its shape; a tensor that the layout does not know is refused
    /// unless `allow_extra`.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::UnexpectedTensor`], [`RuntimeError::WrongShape`],
    /// [`RuntimeError::WrongType`], [`RuntimeError::Safetensors`] (truncated or malformed), [`RuntimeError::Io`].
    pub fn read_safetensors(
        layout: &Arc<ArenaLayout>,
        path: impl AsRef<Path>,
        allow_extra: bool,
    ) -> Result<Self> {
        let mut file = SafetensorsReader::open(path)?;
        layout.expect(&file, allow_extra)?;
        let names: Vec<_> = file.names().map(str::to_owned).collect();
        let mut arena = Self::zeros(layout.clone())?;
        for name in names {
            if layout.entries().contains_key(&name) {
                file.read_f32_into(&name, arena.view_mut(&name)?)?;
            }
        }
        Ok(arena)
    }

    /// Every element, gaps included.
    pub(crate) fn as_slice(&self) -> &[f32] {
        self.data.as_slice()
    }

    /// Every element, gaps included, writable.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        self.data_mut()
    }

    /// Address of the first element, for bindings: it stays the same as long as the arena lives.
    pub(crate) fn start(&self) -> NonNull<f32> {
        self.data.start()
    }

    fn same_layout(&self, other: &Self, action: &'static str) -> Result<()> {
        if Arc::ptr_eq(&self.layout, &other.layout) || self.layout == other.layout {
            return Ok(());
        }
        let (left, right) = (self.layout.entries().len(), other.layout.entries().len());
        Err(RuntimeError::LayoutMismatch { action, left, right })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(entries: &[(&str, &[usize])]) -> Arc<ArenaLayout> {
        let entries = entries.iter().map(|(n, s)| ((*n).to_owned(), Shape::from(*s)));
        Arc::new(ArenaLayout::new(entries).unwrap())
    }

    fn filled(layout: &Arc<ArenaLayout>) -> Arena {
        let mut arena = Arena::zeros(layout.clone()).unwrap();
        for (i, view) in arena.views_mut().into_iter().enumerate() {
            for (j, x) in view.iter_mut().enumerate() {
                *x = (i * 100 + j) as f32;
            }
        }
        arena
    }

    #[test]
    fn entries_are_aligned_and_do_not_touch() {
        let l = layout(&[("a", &[3]), ("b", &[]), ("c", &[4, 5])]);
        assert_eq!(l.len(), 16 + 16 + 32);
        assert_eq!(l.numel(), 24);
        let arena = filled(&l);
        assert_eq!(arena.view("a").unwrap(), [0.0, 1.0, 2.0]);
        assert_eq!(arena.view("b").unwrap(), [100.0]);
        assert_eq!(arena.view("c").unwrap()[19], 219.0);
        assert!(arena.iter().all(|(_, _, view)| (view.as_ptr() as usize).is_multiple_of(64)));
    }

    #[test]
    fn an_unknown_name_names_the_nearest() {
        let arena = filled(&layout(&[("blocks.0.attn.qkv.weight", &[2])]));
        let text = arena.view("blocks.0.attn.qkv.wieght").unwrap_err().to_string();
        assert!(text.contains("did you mean `blocks.0.attn.qkv.weight`"), "{text}");
        let twice = ArenaLayout::new([("a".to_owned(), [1].into()), ("a".to_owned(), [1].into())]);
        assert!(matches!(twice, Err(RuntimeError::DuplicateName { .. })));
    }

    #[test]
    fn safetensors_round_trip_is_exact_and_deterministic() {
        let dir = tempfile::tempdir().unwrap();
        let l = layout(&[("w", &[3, 2]), ("empty", &[0, 4]), ("b", &[])]);
        let arena = filled(&l);
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let (one, two) = (dir.path().join("1"), dir.path().join("2"));
        arena.write_safetensors(&one, &metadata).unwrap();
        arena.write_safetensors(&two, &metadata).unwrap();
        let bytes = std::fs::read(&one).unwrap();
        assert_eq!(bytes, std::fs::read(&two).unwrap());
        // The published reader agrees with ours.
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(parsed.tensor("w").unwrap().shape(), [3, 2]);
        let back = Arena::read_safetensors(&l, &one, false).unwrap();
        assert!(back.iter().zip(arena.iter()).all(|(x, y)| x == y));
    }

    #[test]
    fn a_file_that_does_not_fit_is_refused_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        filled(&layout(&[("w", &[3, 2]), ("b", &[3])]))
            .write_safetensors(&path, &BTreeMap::default())
            .unwrap();
        let text = |entries: &[(&str, &[usize])], extra| {
            Arena::read_safetensors(&layout(entries), &path, extra).err().map(|e| e.to_string())
        };
        let missing = text(&[("w", &[3, 2]), ("b", &[3]), ("c", &[1])], false).unwrap();
        assert!(missing.contains("no tensor named `c`"), "{missing}");
        let extra = text(&[("w", &[3, 2])], false).unwrap();
        assert!(extra.contains("unexpected tensor `b`"), "{extra}");
        assert_eq!(text(&[("w", &[3, 2])], true), None);
        let shape = text(&[("w", &[2, 3]), ("b", &[3])], false).unwrap();
        assert!(shape.contains("(3, 2)") && shape.contains("expected (2, 3)"), "{shape}");

        let whole = std::fs::read(&path).unwrap();
        for cut in [3, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let error = text(&[("w", &[3, 2]), ("b", &[3])], false).unwrap();
            assert!(error.contains("model.safetensors") && error.contains("not a complete"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(text(&[("w", &[3, 2])], false).unwrap().contains("cannot read"));
    }

    #[test]
    fn arithmetic_needs_one_layout() {
        let l = layout(&[("a", &[2])]);
        let mut sum = filled(&l);
        sum.add_scaled(&filled(&l), 0.5).unwrap();
        assert_eq!(sum.view("a").unwrap(), [0.0, 1.5]);
        let other = filled(&layout(&[("b", &[2])]));
        assert!(matches!(sum.copy_from(&other), Err(RuntimeError::LayoutMismatch { .. })));
        assert!(matches!(sum.add_scaled(&other, 1.0), Err(RuntimeError::LayoutMismatch { .. })));
    }
}
