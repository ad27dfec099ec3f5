//! Feature extractors: images in, feature vectors out, with everything that is needed to get the same ones again.

mod external_data;
mod foreign;
mod inception;
mod resize;
mod small;
pub mod weights;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::ensure;
use ndarray::Array2;
use runtime::cuda::Gpu;
use runtime::{Device, Runtime};
use serde::{Deserialize, Serialize};

use crate::execution::Execution;

use self::foreign::ForeignNetwork;
use self::inception::InceptionNetwork;
use self::small::SmallNetwork;

/// A known way from images to features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// As ADM's evaluator (and torch-fidelity): TensorFlow 1 bilinear.
    Adm,
    /// As pytorch-fid: PyTorch's bilinear.
    PytorchFid,
    /// As clean-fid: Pillow's bicubic, antialiased.
    Clean,
    /// A small classifier of 28x28 grey images, trained here on Fashion-MNIST.
    Fashion,
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Adm => "adm",
            Self::PytorchFid => "pytorch-fid",
            Self::Clean => "clean",
            Self::Fashion => "fashion",
        })
    }
}

/// Which network, and where it is.
#[derive(Clone, Debug)]
pub enum Network {
    /// The FID Inception-v3.
    Inception {
        /// How images are brought to it: any preset but `fashion`.
        preset: Preset,
        /// Its weights, `.pth`, `.pt` or `.safetensors`.
        weights: PathBuf,
    },
    /// The classifier of small images.
    Fashion {
        /// Its weights; without them the ones in the user's cache, which are trained if they are not there.
        weights: Option<PathBuf>,
        /// Seed of the training.
        seed: u64,
        /// Refuse to fetch the training images.
        offline: bool,
    },
    /// Any model from images to vectors.
    Onnx {
        /// The model's file.
        path: PathBuf,
        /// Its input of images; needed when it has several inputs.
        input: Option<String>,
        /// Its output of features; needed when it has several outputs.
        output: Option<String>,
        /// Subtracted from pixels on 0..1, by channel.
        mean: [f32; 3],
        /// Divides pixels after that, by channel.
        std: [f32; 3],
    },
}

/// What is asked for beside the feature vectors; the rest is not computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taps {
    /// Spatial features.
    pub spatial: bool,
    /// Class scores.
    pub logits: bool,
}

/// How a network is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who runs it, in f32: features of other types are not comparable.
    pub execution: Execution,
    /// Images of one run of the network, at least 1.
    pub batch: usize,
    /// What is asked for.
    pub taps: Taps,
}

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
    /// SHA-256 of the weights' file, and of all files that it reads beside it: the identity of the network.
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

enum Loaded {
    Inception(InceptionNetwork),
    Fashion(SmallNetwork),
    Onnx(ForeignNetwork),
}

/// A network that is loaded, and everything that has to happen to an image before it.
///
/// The features of an image do not depend on the images around it.
pub struct Extractor {
    network: Loaded,
    description: Description,
}

impl fmt::Debug for Extractor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extractor").field("description", &self.description).finish_non_exhaustive()
    }
}

impl Extractor {
    /// Loads a network; `progress` gets a line for whatever takes long.
    ///
    /// # Errors
    /// The weights are missing, damaged or those of another network; a model without images or vectors; a batch of 0.
    pub fn open(
        runtime: &Arc<Runtime>,
        network: &Network,
        options: &Options,
        progress: &dyn Fn(&str),
    ) -> anyhow::Result<Self> {
        ensure!(options.batch > 0, "a network runs on batches of 1 image or more, not of 0");
        let (network, description) = match network {
            Network::Inception { preset, weights } => {
                let (network, description) = InceptionNetwork::open(runtime, *preset, weights, options)?;
                (Loaded::Inception(network), description)
            }
            Network::Fashion { weights, seed, offline } => {
                let (network, description) =
                    SmallNetwork::open(runtime, weights.as_deref(), *seed, *offline, options, progress)?;
                (Loaded::Fashion(network), description)
            }
            Network::Onnx { path, input, output, mean, std } => {
                let names = (input.as_deref(), output.as_deref());
                let (network, description) =
                    ForeignNetwork::open(runtime, path, names, (*mean, *std), options)?;
                (Loaded::Onnx(network), description)
            }
        };
        Ok(Self { network, description })
    }

    /// Channels of the images that the network takes: 3, or 1 for grey ones.
    pub fn channels(&self) -> usize {
        match &self.network {
            Loaded::Inception(_) => 3,
            Loaded::Fashion(_) => 1,
            Loaded::Onnx(network) => network.channels(),
        }
    }

    /// What the network is and what happens before it.
    pub fn describe(&self) -> &Description {
        &self.description
    }

    /// Features of any number of images.
    ///
    /// # Errors
    /// Images without pixels, of the wrong number of channels, of a size that the network does not take, with values
    /// that are not finite; a session that fails.
    pub fn features(&mut self, images: &ImageBatch<'_>) -> anyhow::Result<Features> {
        let (len, image) = (images.pixels.len(), images.image_len());
        ensure!(
            image > 0 && len.is_multiple_of(image),
            "{len} pixel values are no whole number of images of {}x{}x{}",
            images.height,
            images.width,
            images.channels
        );
        let channels = self.channels();
        ensure!(
            images.channels == channels,
            "images have {} channels, the network takes {channels}",
            images.channels
        );
        if let Pixels::F32(values) = images.pixels
            && let Some(at) = values.iter().position(|v| !v.is_finite())
        {
            anyhow::bail!("image {} of the batch holds the pixel value {}", at / image, values[at]);
        }
        match &mut self.network {
            Loaded::Inception(network) => network.features(images),
            Loaded::Fashion(network) => network.features(images),
            Loaded::Onnx(network) => network.features(images),
        }
    }
}

/// Library, version and device in words.
fn runtime_in_words(runtime: &Runtime, execution: &Execution) -> anyhow::Result<String> {
    let device = match execution.provider.device() {
        Device::Cuda { ordinal } => {
            format!("{} on {}", execution.provider.name(), Gpu::open(ordinal)?.info().name)
        }
        _ => "CPU".to_owned(),
    };
    Ok(format!("ONNX Runtime {}, {device}", runtime.library().version))
}
