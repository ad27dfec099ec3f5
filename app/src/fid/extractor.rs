//! Feature extractors: images in, feature vectors out, with everything that is needed to get the same ones again.

use ndarray::Array2;
use serde::{Deserialize, Serialize};

/// Pixels on the scale 0..=255, row-major (N, H, W, C).
#[derive(Clone, Copy, Debug)]
pub enum Pixels<'a> {
    /// As files hold them.
    U8(&'a [u8]),
    /// Not rounded to bytes; a finite value each.
    F32(&'a [f32]),
}

impl Pixels<'_> {
    fn len(self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }
}

/// Images of one size.
#[derive(Clone, Copy, Debug)]
pub struct ImageBatch<'a> {
    /// Rows of an image.
    pub height: usize,
    /// Columns of an image.
    pub width: usize,
    /// 3 for colour, 1 for grey.
    pub channels: usize,
    /// `N · H · W · C` values.
    pub pixels: Pixels<'a>,
}

impl ImageBatch<'_> {
    /// Values of one image.
    pub fn image_len(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// Number of images.
    pub fn count(&self) -> usize {
        self.pixels.len() / self.image_len().max(1)
    }
}

/// What a network says of N images; a tap that was not asked for is `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// The feature vectors of the Fréchet distance (N, D): `pool3` (2048) of the Inception network.
    pub pool: Array2<f32>,
    /// Spatial features of sFID (N, 2023), flattened as (y, x, channel).
    pub spatial: Option<Array2<f32>>,
    /// Class scores before the softmax (N, classes), as the Inception score takes them.
    pub logits: Option<Array2<f32>>,
}

/// What was computed, for provenance: two results may be compared when nothing of it differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// `adm`, `pytorch-fid`, `clean`, `fashion` or `onnx`.
    pub preset: String,
    /// The network in words.
    pub network: String,
    /// Name of the weights' file, for people.
    pub weights: String,
    /// SHA-256 of the weights' file: the identity of the network.
    pub weights_sha256: String,
    /// Resizing and scaling in one line.
    pub preprocessing: String,
    /// Element type of the computation.
    pub precision: String,
    /// Library, version and device.
    pub runtime: String,
    /// Length of a `pool` vector.
    pub pool: usize,
    /// Length of a `spatial` vector.
    pub spatial: Option<usize>,
    /// Number of classes.
    pub logits: Option<usize>,
}

impl Description {
    /// What keeps two results from being compared, in words; the file's name, the library and the taps do not.
    pub fn differs_from(&self, other: &Self) -> Option<String> {
        let pairs = [
            ("preset", &self.preset, &other.preset),
            ("network", &self.network, &other.network),
            ("weights (sha256)", &self.weights_sha256, &other.weights_sha256),
            ("preprocessing", &self.preprocessing, &other.preprocessing),
            ("precision", &self.precision, &other.precision),
        ];
        let found = pairs.iter().find(|(_, a, b)| a != b);
        found.map(|(what, a, b)| format!("{what}: `{a}` against `{b}`"))
    }
}
