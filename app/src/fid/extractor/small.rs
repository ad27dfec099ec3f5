//! The classifier of small grey images as an extractor: trained here when nobody has trained it yet.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use models::classifier::{Classifier, FEATURES};
use ndarray::Array2;
use runtime::file::sha256_file;
use runtime::{Arena, Runtime};
use train_engine::classifier::{ClassifierModel, ClassifierTraining, classifier_for, train_classifier};
use train_engine::data::{IdxImages, fashion_mnist};
use train_engine::step::{parameter_layout, read_lock};

use super::{Description, Features, ImageBatch, Options, Pixels};

/// What the classifier is for.
const FASHION: Classifier = Classifier { channels: 1, height: 28, width: 28, classes: 10 };
/// Key of the test accuracy in the weights file.
const ACCURACY: &str = "test_accuracy";
/// Version of the recipe: a file of another one is not used.
const RECIPE: &str = "1";

/// A loaded classifier.
pub(super) struct SmallNetwork {
    model: ClassifierModel,
    logits: bool,
}

impl SmallNetwork {
    pub(super) fn open(
        runtime: &Arc<Runtime>,
        weights: Option<&Path>,
        seed: u64,
        offline: bool,
        options: &Options,
        progress: &dyn Fn(&str),
    ) -> anyhow::Result<(Self, Description)> {
        ensure!(
            !options.taps.spatial,
            "the fashion classifier has no spatial features: sFID needs the Inception network"
        );
        let path = match weights {
            Some(path) => path.to_path_buf(),
            None => cache_path(seed)?,
        };
        if weights.is_none() && !path.exists() {
            train(runtime, &path, seed, offline, options.execution.threads, progress)?;
        }
        let layout = parameter_layout(FASHION.features(1)?.parameters())?;
        let arena = Arena::read_safetensors(&layout, &path, false)?;
        let accuracy = runtime::safetensors_file::SafetensorsReader::open(&path)?.metadata().remove(ACCURACY);
        if let Some(accuracy) = &accuracy {
            progress(&format!("classifier: test accuracy {accuracy}, {}", path.display()));
        }
        let model = ClassifierModel::new(
            runtime,
            FASHION,
            arena.into_shared(),
            &options.execution.session_options(),
        )?;
        let accuracy = accuracy.map_or(String::new(), |a| format!(", test accuracy {a}"));
        let description = Description {
            preset: "fashion".to_owned(),
            network: format!("small classifier of Fashion-MNIST{accuracy}"),
            weights: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            weights_sha256: sha256_file(&path)?,
            preprocessing: "28x28 grey; x/127.5-1".to_owned(),
            precision: "f32".to_owned(),
            runtime: super::runtime_in_words(runtime, &options.execution)?,
            pool: FEATURES,
            spatial: None,
            logits: options.taps.logits.then_some(FASHION.classes),
        };
        Ok((Self { model, logits: options.taps.logits }, description))
    }

    pub(super) fn features(&mut self, images: &ImageBatch<'_>) -> anyhow::Result<Features> {
        ensure!(
            (images.height, images.width) == (FASHION.height, FASHION.width),
            "images are {}x{}, the fashion classifier takes {}x{}: use another preset, or a network of your own by --network",
            images.height,
            images.width,
            FASHION.height,
            FASHION.width
        );
        let (n, image) = (images.count(), images.image_len());
        let scale = |v: f32| v / 127.5 - 1.0;
        let (mut pool, mut logits) = (Vec::with_capacity(n * FEATURES), Vec::new());
        for first in (0..n).step_by(ClassifierModel::BATCH) {
            let range = first * image..(first + ClassifierModel::BATCH).min(n) * image;
            let batch: Vec<f32> = match images.pixels {
                Pixels::U8(all) => all[range].iter().map(|v| scale(f32::from(*v))).collect(),
                Pixels::F32(all) => all[range].iter().map(|v| scale(*v)).collect(),
            };
            let (features, scores) = self.model.run(&batch)?;
            pool.extend(features);
            if self.logits {
                logits.extend(scores);
            }
        }
        let logits = self.logits.then(|| Array2::from_shape_vec((n, FASHION.classes), logits)).transpose()?;
        Ok(Features { pool: Array2::from_shape_vec((n, FEATURES), pool)?, spatial: None, logits })
    }
}

fn cache_path(seed: u64) -> anyhow::Result<PathBuf> {
    let cache = runtime::library::cache_directory()
        .context("there is no home directory to keep the classifier in: set MUDIT_CACHE to a directory")?;
    Ok(cache.join("fid").join(format!("fashion-classifier-{RECIPE}-seed{seed}.safetensors")))
}

/// Trains the classifier on the training images, measures it on the test images and writes it to `path`.
fn train(
    runtime: &Arc<Runtime>,
    path: &Path,
    seed: u64,
    offline: bool,
    threads: usize,
    progress: &dyn Fn(&str),
) -> anyhow::Result<()> {
    let files = fashion_mnist::locate(None, offline, progress)?;
    let training = IdxImages::open(&files.train_images, &files.train_labels)?;
    let test = IdxImages::open(&files.test_images, &files.test_labels)?;
    for data in [&training, &test] {
        ensure!(classifier_for(data) == FASHION, "internal: Fashion-MNIST has another shape");
    }
    let settings = ClassifierTraining { seed, threads, ..ClassifierTraining::default() };
    let start = std::time::Instant::now();
    progress("training the classifier whose features are compared (once, under a minute)");
    let mut model = train_classifier(runtime, &training, &settings, &mut |done, all, loss| {
        if done % (all / 4).max(1) == 0 {
            progress(&format!("classifier: step {done} of {all}, loss {loss:.3}"));
        }
    })?;
    let accuracy = model.accuracy(&test)?;
    progress(&format!(
        "classifier: {:.2} % of {} test images right after {:.0} s",
        100.0 * accuracy,
        10_000,
        start.elapsed().as_secs_f64()
    ));
    let notes = BTreeMap::from([
        (ACCURACY.to_owned(), format!("{accuracy:.4}")),
        ("recipe".to_owned(), format!("{RECIPE}: {settings:?}")),
    ]);
    Ok(read_lock(&model.parameters)?.write_safetensors(path, &notes)?)
}
