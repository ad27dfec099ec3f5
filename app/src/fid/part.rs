//! A part of a set's features on disk: summed, kept, and safe from crashes.
//!
//! A directory holds `plan.json`; `pool.f32` and `logits.f32`, to which rows are only ever appended; and `state.bin` with the sums
//! and how far they reach, written beside and renamed. What lies in the first two beyond the state is cut off when the work goes
//! on, so a run that is killed at any moment and started again ends with the same bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use runtime::file::{sha256_bytes, write_atomically};
use runtime::lock::{Lock, Tried};
use serde::{Deserialize, Serialize};

use super::metrics::Rows;
use super::metrics::moments::{Moments, WIDEST};
use super::plan::Plan;

const PLAN: &str = "plan.json";
const STATE: &str = "state.bin";
const POOL: &str = "pool.f32";
const LOGITS: &str = "logits.f32";
/// First bytes of a state.
const MAGIC: &[u8; 16] = b"mudit fid part 1";
/// Longest description inside a state, in bytes; some 64 a block.
const MAX_TOLD: u64 = 1 << 28;
/// Between two states; a crash costs so much and one block.
const SAVE_EVERY: Duration = Duration::from_secs(20);

/// What a part is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Label {
    plan: Plan,
    range: Range<u64>,
    /// Identity of the whole set, as it was when the part was last begun or gone on with, if it is one of several.
    #[serde(default)]
    identity: Option<String>,
}

/// What is asked of a part that has features already. Its images are still to be compared.
#[derive(Debug)]
pub struct Asked {
    label: Label,
    /// Whether the images are chosen from the same files in the same way, so that stamps of them tell.
    pub same_choice: bool,
    /// Whether the features are of whole blocks of it, and of as many kept ones.
    pub fits: bool,
    /// What is different beside the images themselves, if it is worth keeping.
    pub other: Option<String>,
}

impl Asked {
    /// Numbers of the images in the whole set.
    pub fn range(&self) -> Range<u64> {
        self.label.range.clone()
    }
}

/// What was seen of the images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Images done.
    pub images: u64,
    /// Height and width of the first image.
    pub size: Option<[usize; 2]>,
    /// Images of another size than the first.
    pub other_sizes: u64,
    /// Grey images that were given to a network of colours.
    pub grey: u64,
    /// SHA-256 of each block's sizes and pixels.
    pub blocks: Vec<String>,
    /// Stamps of the files of each block; empty where there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stamps: Vec<String>,
}

/// The features of one block, row after row.
#[derive(Clone, Debug, Default)]
pub struct Block {
    /// `(N, pool)`.
    pub pool: Vec<f32>,
    /// `(N, spatial)`, if the network has them.
    pub spatial: Vec<f32>,
    /// `(N, classes)`, if the network has them.
    pub logits: Vec<f32>,
}

/// A part of a set's features.
#[derive(Debug)]
pub struct Part {
    directory: PathBuf,
    label: Label,
    asked: Option<Asked>,
    /// What was seen so far.
    pub seen: Seen,
    /// Sums of the pooled features.
    pub pool: Moments,
    /// Sums of the spatial features.
    pub spatial: Option<Moments>,
    pool_file: File,
    logits_file: File,
    lock: Lock,
    saved: Instant,
}

impl Part {
    /// Begins a part in `directory`, or opens the one that is there. If that has features already, its images are
    /// [`asked`](Self::asked) for and [`resuming::settle`](super::resuming::settle) compares them.
    ///
    /// # Errors
    /// A directory that holds another part or is in use, damaged files, a full disk.
    pub fn open(directory: &Path, plan: &Plan, range: Range<u64>) -> anyhow::Result<Self> {
        let label = Label { plan: plan.clone(), range, identity: None };
        // Before anything is made.
        label.check_width(directory)?;
        if !directory.join(STATE).is_file() {
            // Nothing is done, whatever was begun.
            fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
            let part = Self::load(directory, label)?;
            part.write_label()?;
            return Ok(part);
        }
        let found = read_label(directory)?;
        let something_else = |what: &str| {
            format!(
                "`{}` holds features of something else ({what}, here against there); remove it, or name another \
                 directory by --work",
                directory.display()
            )
        };
        if let Some(what) = label.plan.differs_beside_place(&found.plan)? {
            bail!(something_else(&what));
        }
        ensure!(
            found.range == label.range || found.plan.count != label.plan.count,
            "`{}` holds images {:?}, asked for are {:?}; remove it, or name another directory by --work",
            directory.display(),
            found.range,
            label.range
        );
        let mut part = Self::load(directory, found)?;
        if part.seen.images == 0 {
            part.label = label;
            part.write_label()?;
            return Ok(part);
        }
        let (ours, theirs) = (&label.plan, &part.label.plan);
        let end = part.label.range.start + part.seen.images;
        let fits = label.range == part.label.range
            || label.range.start == part.label.range.start
                && end <= label.range.end
                && part.seen.images.is_multiple_of(ours.block);
        let as_many_kept = end.min(ours.kept) == end.min(theirs.kept);
        if ours.count == theirs.count && !as_many_kept {
            bail!(something_else(&format!("kept: {} against {}", ours.kept, theirs.kept)));
        }
        let in_place = ours.images.is_in_place_of(&theirs.images);
        let other = if in_place { None } else { ours.differs_from(theirs)? };
        let same_choice =
            ours.images == theirs.images || matches!(ours.images, super::plan::Images::Checkpoint(_));
        part.asked = Some(Asked { label, same_choice, fits: fits && as_many_kept, other });
        Ok(part)
    }

    /// What is asked for, as long as the images were not compared.
    pub fn asked(&self) -> Option<&Asked> {
        self.asked.as_ref()
    }

    /// Goes on as the part that is asked for, whose images are the same; `identity` is their whole set's.
    ///
    /// # Errors
    /// A full disk.
    pub(super) fn settle(&mut self, identity: Option<String>) -> anyhow::Result<()> {
        if let Some(asked) = self.asked.take() {
            self.label = asked.label;
        }
        self.label.identity = identity;
        self.write_label()
    }

    /// Throws the features away and begins what is asked for; `identity` is its whole set's.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub(super) fn restart(&mut self, identity: Option<String>) -> anyhow::Result<()> {
        // Without the state nothing is done, wherever this stops.
        let state = self.directory.join(STATE);
        fs::remove_file(&state).with_context(|| format!("cannot remove {}", state.display()))?;
        self.seen = Seen::default();
        self.pool = Moments::new(self.pool.width());
        self.spatial = self.spatial.as_ref().map(|s| Moments::new(s.width()));
        for file in [&self.pool_file, &self.logits_file] {
            file.set_len(0).with_context(|| format!("cannot write in {}", self.directory.display()))?;
        }
        self.settle(identity)
    }

    fn write_label(&self) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(&self.label)?;
        Ok(write_atomically(self.directory.join(PLAN), |w| w.write_all(&text))?)
    }

    /// Identity of the whole set that the images are of, if it is known.
    pub fn identity(&self) -> Option<&str> {
        self.label.identity.as_deref()
    }

    /// Opens a finished part.
    ///
    /// # Errors
    /// A directory that holds none, a part that is not finished.
    pub fn finished(directory: &Path) -> anyhow::Result<Self> {
        ensure!(
            directory.join(PLAN).is_file(),
            "`{}` is no part of `mudit fid`: it has no {PLAN}",
            directory.display()
        );
        let part = Self::load(directory, read_label(directory)?)?;
        ensure!(
            part.is_finished(),
            "`{}` is not finished: it has {} of {} images; run its command again",
            directory.display(),
            part.seen.images,
            part.label.range.end - part.label.range.start
        );
        Ok(part)
    }

    fn load(directory: &Path, label: Label) -> anyhow::Result<Self> {
        let open = |name: &str| {
            let path = directory.join(name);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.open(&path).with_context(|| format!("cannot open {}", path.display()))
        };
        let (pool_file, logits_file) = (open(POOL)?, open(LOGITS)?);
        let lock = match Lock::take(&directory.join(POOL))? {
            Tried::Ours(lock) => lock,
            Tried::Held(holder) => bail!("`{}` is in use by {holder}", directory.display()),
        };
        label.check_width(directory)?;
        let network = &label.plan.network;
        let mut part = Self {
            directory: directory.to_path_buf(),
            seen: Seen::default(),
            pool: Moments::new(network.pool),
            spatial: network.spatial.map(Moments::new),
            pool_file,
            logits_file,
            lock,
            saved: Instant::now(),
            asked: None,
            label,
        };
        if directory.join(STATE).is_file() {
            part.restore().with_context(|| {
                format!(
                    "`{}` is damaged: remove the directory and run again",
                    directory.join(STATE).display()
                )
            })?;
        }
        let (pool, logits) = (part.pool_bytes(), part.logits_bytes());
        for (file, name, bytes) in [(&part.pool_file, POOL, pool), (&part.logits_file, LOGITS, logits)] {
            let path = directory.join(name);
            let length = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
            ensure!(
                length >= bytes,
                "`{}` is cut short: {length} bytes, expected {bytes}; remove the directory and run again",
                path.display()
            );
            if length > bytes {
                file.set_len(bytes).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        Ok(part)
    }

    /// What it is a part of.
    pub fn plan(&self) -> &Plan {
        &self.label.plan
    }

    /// Numbers of its images in the whole set.
    pub fn range(&self) -> Range<u64> {
        self.label.range.clone()
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The images that are still to be done, in the whole set's numbers.
    pub fn missing(&self) -> Range<u64> {
        self.label.range.start + self.seen.images..self.label.range.end
    }

    /// Whether no image is missing.
    pub fn is_finished(&self) -> bool {
        self.missing().is_empty()
    }

    /// Images of the part that keep their features.
    pub fn kept(&self) -> u64 {
        let end = self.missing().start.min(self.label.plan.kept);
        end.saturating_sub(self.label.range.start)
    }

    fn pool_bytes(&self) -> u64 {
        self.kept() * self.label.plan.network.pool as u64 * 4
    }

    fn logits_bytes(&self) -> u64 {
        self.seen.images * self.label.plan.network.logits.unwrap_or(0) as u64 * 4
    }

    /// Adds the next block; `seen` is what was seen up to its end.
    ///
    /// # Errors
    /// Features that cannot be summed, a full disk.
    pub fn add(&mut self, block: &Block, seen: Seen) -> anyhow::Result<()> {
        let network = &self.label.plan.network;
        let (width, before) = (network.pool, self.kept());
        self.pool.add_block(Rows::new(&block.pool, width)?)?;
        if let Some(spatial) = &mut self.spatial {
            spatial.add_block(Rows::new(&block.spatial, spatial.width())?)?;
        }
        let (pool_at, logits_at) = (self.pool_bytes(), self.logits_bytes());
        self.seen = seen;
        let kept = (self.kept() - before) as usize;
        append(&mut self.pool_file, pool_at, &block.pool[..kept * width])
            .and_then(|()| append(&mut self.logits_file, logits_at, &block.logits))
            .with_context(|| format!("cannot write in {}", self.directory.display()))?;
        if self.is_finished() || self.saved.elapsed() >= SAVE_EVERY {
            self.save()?;
        }
        Ok(())
    }

    /// Makes all that was added survive a crash.
    ///
    /// # Errors
    /// A full disk.
    pub fn save(&mut self) -> anyhow::Result<()> {
        for file in [&self.pool_file, &self.logits_file] {
            file.sync_data().with_context(|| format!("cannot write in {}", self.directory.display()))?;
        }
        let told = serde_json::to_vec(&self.seen)?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend((told.len() as u64).to_le_bytes());
        bytes.extend(told);
        self.pool.write(&mut bytes)?;
        if let Some(spatial) = &self.spatial {
            spatial.write(&mut bytes)?;
        }
        let hash = sha256_bytes(&bytes);
        write_atomically(self.directory.join(STATE), |w| {
            w.write_all(&bytes)?;
            w.write_all(hash.as_bytes())
        })?;
        self.saved = Instant::now();
        Ok(())
    }

    fn restore(&mut self) -> anyhow::Result<()> {
        let path = self.directory.join(STATE);
        // Nothing of it grows with the number of images but the list of blocks.
        let bytes = fs::read(&path)?;
        let (body, hash) = bytes.split_last_chunk::<64>().context("it is cut short")?;
        ensure!(sha256_bytes(body).as_bytes() == hash, "its checksum does not fit");
        let mut reader = body.strip_prefix(MAGIC).context("it was written by another version")?;
        let mut length = [0; 8];
        reader.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= MAX_TOLD, "its description has {length} bytes");
        let mut told = Vec::new();
        (&mut reader).take(length).read_to_end(&mut told)?;
        self.seen = serde_json::from_slice(&told)?;
        self.pool = Moments::read(&mut reader, self.pool.width())?;
        if let Some(spatial) = &mut self.spatial {
            *spatial = Moments::read(&mut reader, spatial.width())?;
        }
        ensure!(
            self.seen.images <= self.label.range.end - self.label.range.start
                && self.pool.count() == self.seen.images,
            "its counts contradict each other"
        );
        Ok(())
    }

    /// Appends the kept features of the part to `to`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn kept_features(&self, to: &mut Vec<f32>) -> anyhow::Result<()> {
        let values = (self.pool_bytes() / 4) as usize;
        to.reserve_exact(values);
        read_rows(&self.pool_file, values, values.clamp(1, 1 << 20), |chunk| {
            to.extend_from_slice(chunk);
            Ok(())
        })
        .with_context(|| format!("{}", self.directory.join(POOL).display()))
    }

    /// Gives the class scores of each image, in order.
    ///
    /// # Errors
    /// A file that cannot be read; what `each` says.
    pub fn each_logits(&self, mut each: impl FnMut(&[f32]) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let Some(classes) = self.label.plan.network.logits else { return Ok(()) };
        let values = (self.logits_bytes() / 4) as usize;
        read_rows(&self.logits_file, values, classes, &mut each)
            .with_context(|| format!("{}", self.directory.join(LOGITS).display()))
    }

    /// Removes the directory's own files, and the directory if nothing else is in it.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn remove(self) -> anyhow::Result<()> {
        drop(self.lock);
        for name in [STATE, POOL, LOGITS, PLAN] {
            let path = self.directory.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        // Somebody else's files are kept, with the directory.
        let _ = fs::remove_dir(&self.directory);
        Ok(())
    }
}

impl Label {
    fn check_width(&self, directory: &Path) -> anyhow::Result<()> {
        let network = &self.plan.network;
        let widest = network.pool.max(network.spatial.unwrap_or(0));
        ensure!(
            (1..=WIDEST).contains(&widest),
            "`{}` says {widest} features; up to {WIDEST} are summed",
            directory.display()
        );
        Ok(())
    }
}

fn read_label(directory: &Path) -> anyhow::Result<Label> {
    let path = directory.join(PLAN);
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| {
        format!("`{}` is damaged or of another version: remove the directory", path.display())
    })
}

fn append(file: &mut File, at: u64, values: &[f32]) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(at))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    for value in values {
        writer.write_all(&value.to_le_bytes())?;
    }
    writer.flush()
}

/// Reads `values` numbers from the start, `row` at a time.
fn read_rows(
    mut file: &File,
    values: usize,
    row: usize,
    mut each: impl FnMut(&[f32]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut reader = std::io::BufReader::with_capacity(1 << 20, file);
    let (mut bytes, mut chunk) = (vec![0; row * 4], vec![0.0; row]);
    let mut left = values;
    while left > 0 {
        let now = left.min(row);
        reader.read_exact(&mut bytes[..now * 4])?;
        for (x, b) in chunk.iter_mut().zip(bytes.as_chunks().0) {
            *x = f32::from_le_bytes(*b);
        }
        each(&chunk[..now])?;
        left -= now;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
