//! Images and their labels: what a data set is, and the kinds there are.
//!
//! A data set is read one sample at a time and holds no random state: whether an image is mirrored and which posterior
//! draw a latent gets come from the caller, so any order of reads gives the same batches.

mod center_crop;
mod classes;
mod deb;
pub mod fashion_mnist;
mod folder;
mod gaussian;
mod identity;
mod idx;
mod latents;
mod loader;
mod plan;

use std::path::Path;
use std::sync::Arc;

pub use folder::ImageFolder;
pub use gaussian::GaussianImages;
pub use identity::{DataIdentity, Stored};
pub use idx::IdxImages;
pub use latents::Latents;
pub use loader::{Batch, Loader};
pub use plan::{BatchPlan, Position};

use crate::config::{DataKind, DataSection};
use crate::error::{Result, TrainError};
use crate::random::Stream;

/// Labelled images of one size.
#[expect(clippy::len_without_is_empty, reason = "an empty data set is refused when it is opened")]
pub trait Dataset: Send + Sync {
    /// Number of images, at least 1.
    fn len(&self) -> usize;
    /// Channels of an image.
    fn channels(&self) -> usize;
    /// Rows of an image.
    fn height(&self) -> usize;
    /// Columns of an image.
    fn width(&self) -> usize;
    /// Number of classes; labels are below it.
    fn num_classes(&self) -> usize;
    /// Names of the classes, as many as there are.
    fn class_names(&self) -> &[String];

    /// What reading the images so far has shown that a user should know.
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }

    /// Where sample `index` lies, in words for an error.
    fn place(&self, index: usize) -> String {
        format!("image {index}")
    }

    /// The class of image `index`.
    fn label(&self, index: usize) -> i64;

    /// Adds what tells the set's files and images from others to its [`DataIdentity`]; nothing where all of it is made up.
    ///
    /// # Errors
    /// What reading the files gives.
    fn stored(&self, _into: &mut Stored) -> Result<()> {
        Ok(())
    }

    /// Whether mirrored images can be read.
    fn can_flip(&self) -> bool {
        true
    }

    /// Values of one image.
    fn image_len(&self) -> usize {
        self.channels() * self.height() * self.width()
    }

    /// Reads image `index` into `out` and gives its label.
    ///
    /// `flip` mirrors it left to right; `draw` serves data sets that are distributions (latents with a `std`).
    ///
    /// # Shapes
    /// - `out`: `(C, H, W)` flat; pixels in [-1, 1], latents as scaled by their file
    /// # Errors
    /// [`TrainError::BadRead`] for an index or buffer that does not fit; else what reading the file gives.
    fn read(&self, index: usize, flip: bool, draw: &mut Stream, out: &mut [f32]) -> Result<i64>;
}

/// Opens the data set a configuration names.
///
/// `offline` forbids fetching; `progress` gets one line for whatever is fetched or left out.
///
/// # Errors
/// Whatever the kind's own opening gives; [`TrainError::BadDataset`] when it does not fit `image_size` or `flip`.
pub fn open(data: &DataSection, offline: bool, progress: &dyn Fn(&str)) -> Result<Arc<dyn Dataset>> {
    let unset = || TrainError::BadValue {
        key: "data.path",
        value: "unset".into(),
        allowed: "the file or directory of the images".into(),
    };
    let path = data.path.as_deref();
    let set: Arc<dyn Dataset> = match data.kind {
        DataKind::FashionMnist => {
            let files = fashion_mnist::locate(path, offline, progress)?;
            Arc::new(
                IdxImages::open(&files.train_images, &files.train_labels)?
                    .with_class_names(fashion_mnist::CLASS_NAMES.map(str::to_owned).to_vec())?,
            )
        }
        DataKind::Idx => {
            let (images, labels) = idx::find_pair(path.ok_or_else(unset)?, data.labels.as_deref())?;
            Arc::new(IdxImages::open(&images, &labels)?)
        }
        DataKind::Folder => {
            let size = data.image_size.ok_or_else(|| TrainError::BadValue {
                key: "data.image_size",
                value: "unset".into(),
                allowed: "the side in pixels that images are cropped to".into(),
            })?;
            Arc::new(ImageFolder::open(path.ok_or_else(unset)?, size, data.orient, progress)?)
        }
        DataKind::Latents => Arc::new(Latents::open(path.ok_or_else(unset)?)?),
    };
    fits(data, set.as_ref())?;
    Ok(set)
}

fn fits(data: &DataSection, set: &dyn Dataset) -> Result<()> {
    let refuse = |reason: String| {
        let path = data.path.clone().unwrap_or_else(|| "fashion-mnist".into());
        Err(TrainError::BadDataset { path, reason })
    };
    if let Some(size) = data.image_size
        && (set.height(), set.width()) != (size, size)
    {
        let (height, width) = (set.height(), set.width());
        return refuse(format!(
            "its images are {height} by {width}, `data.image_size` is {size}: leave the key out"
        ));
    }
    if data.flip && !set.can_flip() {
        return refuse(
            "it holds no mirrored latents: set `data.flip = false`, or add the tensor `latents_flipped`"
                .into(),
        );
    }
    Ok(())
}

/// The check every [`Dataset::read`] starts with.
fn check_read(set: &dyn Dataset, index: usize, out: &[f32]) -> Result<()> {
    let (len, size) = (set.len(), set.image_len());
    if index < len && out.len() == size {
        return Ok(());
    }
    Err(TrainError::BadRead { len, size, index, got: out.len() })
}

/// Reads a sample and looks at its values, before a loss or a gradient can be blamed for one that is not finite.
///
/// # Errors
/// [`TrainError::BadSample`]; as [`Dataset::read`].
pub fn read_finite(
    set: &dyn Dataset,
    index: usize,
    flip: bool,
    draw: &mut Stream,
    out: &mut [f32],
) -> Result<i64> {
    let label = set.read(index, flip, draw, out)?;
    match out.iter().position(|value| !value.is_finite()) {
        None => Ok(label),
        Some(at) => Err(TrainError::BadSample { place: set.place(index), value: out[at], at }),
    }
}

/// The value of a byte pixel: 0 … 255 to -1 … 1.
fn pixel(byte: u8) -> f32 {
    f32::from(byte) / 127.5 - 1.0
}

/// An error for a directory that is none or cannot be listed, else its entries, sorted by name.
fn sorted_entries(path: &Path) -> Result<Vec<std::path::PathBuf>> {
    let entries = std::fs::read_dir(path).map_err(TrainError::io("list", path))?;
    let mut paths = entries
        .map(|entry| Ok(entry.map_err(TrainError::io("list", path))?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}
