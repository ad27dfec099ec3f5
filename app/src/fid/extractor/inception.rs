//! The FID Inception network as an extractor.

use std::path::Path;
use std::sync::Arc;

use graph_builder::Graph;
use models::inception::{CLASSES, POOL, SIDE, SPATIAL, features};
use ndarray::Array2;
use rayon::prelude::*;
use runtime::file::sha256_file;
use runtime::{Binding, Runtime};

use crate::execution::{Execution, Placed};

use super::resize::{Filter, Plan};
use super::{Description, Features, ImageBatch, Options, Preset, weights};

/// Values of an image before the network.
const INPUT: usize = 3 * SIDE * SIDE;

/// How a preset brings an image to the network.
struct Preprocessing {
    filter: Filter,
    words: &'static str,
    scale: fn(usize, f32) -> f32,
}

impl Preset {
    fn preprocessing(self) -> Option<Preprocessing> {
        // The network's own scale: exact in f32, and −1 … 0.9921875.
        let centred: fn(usize, f32) -> f32 = |_, v| (v - 128.0) / 128.0;
        Some(match self {
            Self::Adm => Preprocessing {
                filter: Filter::TensorFlowBilinear,
                words: "TensorFlow 1 bilinear to 299x299, no half-pixel centres, no antialias; (x-128)/128",
                scale: centred,
            },
            Self::PytorchFid => Preprocessing {
                filter: Filter::TorchBilinear,
                words: "x/255; PyTorch bilinear to 299x299, half-pixel centres, no antialias; 2x-1",
                scale: |_, v| 2.0 * v - 1.0,
            },
            Self::Clean => Preprocessing {
                filter: Filter::PillowBicubic,
                words: "Pillow bicubic of float channels to 299x299, antialiased, clipped to 0..255; (x-128)/128",
                scale: centred,
            },
            Self::Fashion => return None,
        })
    }
}

impl Preset {
    /// What the Inception network sees of images, (N, 3, 299, 299); none for a preset of another network.
    pub fn network_input(self, images: &ImageBatch<'_>) -> Option<Vec<f32>> {
        let Preprocessing { filter, scale, .. } = self.preprocessing()?;
        let plan = Plan::new(filter, [images.height, images.width], [SIDE, SIDE]);
        let mut input = vec![0.0; images.count() * INPUT];
        for (i, out) in input.chunks_mut(INPUT).enumerate() {
            plan.run(images.pixels, i, 3, scale, out);
        }
        Some(input)
    }
}

/// A loaded network.
pub(super) struct InceptionNetwork {
    binding: Binding,
    preprocessing: Preprocessing,
    batch: usize,
    taps: super::Taps,
    plan: Option<Plan>,
}

impl InceptionNetwork {
    pub(super) fn open(
        runtime: &Arc<Runtime>,
        preset: Preset,
        weights_file: &Path,
        options: &Options,
    ) -> anyhow::Result<(Self, Description)> {
        let Some(preprocessing) = preset.preprocessing() else {
            anyhow::bail!("preset `{preset}` is another network");
        };
        let taps = models::inception::Taps { spatial: options.taps.spatial, logits: options.taps.logits };
        let graph = features(options.batch, SIDE, taps)?;
        let parameters = weights::parameters(weights_file, &graph)?;
        let binding = load(runtime, &graph, &parameters, &options.execution)?;
        let description = Description {
            preset: preset.to_string(),
            network: "FID Inception-v3, 2015-12-05".to_owned(),
            weights: weights_file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            weights_sha256: sha256_file(weights_file)?,
            preprocessing: preprocessing.words.to_owned(),
            precision: "f32".to_owned(),
            runtime: super::runtime_in_words(runtime, &options.execution)?,
            pool: POOL,
            spatial: taps.spatial.then_some(SPATIAL),
            logits: taps.logits.then_some(CLASSES),
        };
        let network = Self { binding, preprocessing, batch: options.batch, taps: options.taps, plan: None };
        Ok((network, description))
    }

    pub(super) fn features(&mut self, images: &ImageBatch<'_>) -> anyhow::Result<Features> {
        let n = images.count();
        let size = [images.height, images.width];
        if !self.plan.as_ref().is_some_and(|plan| plan.fits(size)) {
            self.plan = Some(Plan::new(self.preprocessing.filter, size, [SIDE, SIDE]));
        }
        let Some(plan) = &self.plan else { anyhow::bail!("internal: no plan of resizing") };
        let mut outputs = [
            ("pool", POOL, true),
            ("spatial", SPATIAL, self.taps.spatial),
            ("logits", CLASSES, self.taps.logits),
        ]
        .map(|(name, width, wanted)| (name, width, wanted.then(|| Vec::with_capacity(n * width))));
        for first in (0..n).step_by(self.batch) {
            let rows = self.batch.min(n - first);
            let scale = self.preprocessing.scale;
            let input = self.binding.input_f32("x")?;
            let (used, unused) = input.split_at_mut(rows * INPUT);
            used.par_chunks_mut(INPUT).enumerate().for_each(|(i, out)| {
                plan.run(images.pixels, first + i, 3, scale, out);
            });
            unused.fill(0.0);
            self.binding.run()?;
            for (name, width, values) in &mut outputs {
                if let Some(values) = values {
                    values.extend_from_slice(&self.binding.output_f32(name)?[..rows * *width]);
                }
            }
        }
        let [pool, spatial, logits] = outputs.map(|(_, width, values)| {
            values.map(|values| Array2::from_shape_vec((n, width), values)).transpose()
        });
        let Some(pool) = pool? else { anyhow::bail!("internal: no features") };
        Ok(Features { pool, spatial: spatial?, logits: logits? })
    }
}

/// Loads a graph with its parameters in memory.
pub(super) fn load(
    runtime: &Arc<Runtime>,
    graph: &Graph,
    parameters: &[Vec<f32>],
    execution: &Execution,
) -> anyhow::Result<Binding> {
    let values = graph.parameters().iter().zip(parameters);
    let values = values.map(|(p, values)| Ok((p.name.as_str(), p.shape(), p.dtype, values.as_slice())));
    Placed::constants(values)?.load(runtime, graph, execution, &execution.session_options())
}
