//! The user's own ONNX file as an extractor.

use std::path::Path;
use std::sync::Arc;

use anyhow::{bail, ensure};
use graph_builder::DType;
use ndarray::Array2;
use rayon::prelude::*;
use runtime::{ForeignModel, Port, Runtime};

use super::external_data::sha256_of_model;
use super::resize::{Filter, Plan};
use super::{Description, Features, ImageBatch, Options};
use crate::fid::metrics::moments::WIDEST;

/// Where channels stand among the axes of the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// (N, C, H, W)
    ChannelsFirst,
    /// (N, H, W, C)
    ChannelsLast,
}

/// A loaded model.
pub(super) struct ForeignNetwork {
    model: ForeignModel,
    input: String,
    output: String,
    layout: Layout,
    channels: usize,
    /// Rows and columns where the model fixes them.
    size: [Option<usize>; 2],
    batch: usize,
    mean: [f32; 3],
    std: [f32; 3],
    width: usize,
    plan: Option<Plan>,
}

/// Side of the images that tell how long the features of a model are which takes any size.
const PROBE: usize = 224;

impl ForeignNetwork {
    pub(super) fn open(
        runtime: &Arc<Runtime>,
        path: &Path,
        (input, output): (Option<&str>, Option<&str>),
        (mean, std): ([f32; 3], [f32; 3]),
        options: &Options,
    ) -> anyhow::Result<(Self, Description)> {
        ensure!(
            !options.taps.spatial && !options.taps.logits,
            "a model of your own has feature vectors alone: no spatial features (sFID), no class scores (IS)"
        );
        ensure!(
            mean.iter().chain(&std).all(|v| v.is_finite()) && std.iter().all(|v| *v != 0.0),
            "mean {mean:?} and std {std:?} must be finite, and std not 0"
        );
        let model = ForeignModel::load(runtime, path, &options.execution.session_options())?;
        let images = |p: &Port| p.dtype == Some(DType::F32) && p.dims.len() == 4;
        let vectors = |p: &Port| p.dtype == Some(DType::F32) && p.dims.len() >= 2;
        let from = choose(path, "input", model.inputs(), input, "f32 images of rank 4", images)?;
        let to = choose(path, "output", model.outputs(), output, "f32 features of rank 2 or more", vectors)?;
        ensure!(
            model.inputs().len() == 1,
            "{} has {} inputs, an extractor has one: {}",
            path.display(),
            model.inputs().len(),
            listed(model.inputs())
        );
        let (layout, channels, size) = match from.dims[..] {
            [_, Some(c @ (1 | 3)), h, w] => (Layout::ChannelsFirst, c, [h, w]),
            [_, h, w, Some(c @ (1 | 3))] => (Layout::ChannelsLast, c, [h, w]),
            _ => bail!("input {from} of {} has no axis of 1 or 3 channels, second or last", path.display()),
        };
        ensure!(size.iter().all(|d| *d != Some(0)), "input {from} of {} holds no pixel", path.display());
        let batch = from.dims[0].unwrap_or(options.batch).max(1);
        let words = preprocessing(size, channels, mean, std);
        let network = format!("ONNX model from {from} to {to}");
        let (input, output) = (from.name.clone(), to.name.clone());
        let mut this =
            Self { model, input, output, layout, channels, size, batch, mean, std, width: 0, plan: None };
        let [h, w] = size.map(|d| d.unwrap_or(PROBE));
        this.width = this.run(vec![0.0; batch * channels * h * w], [h, w])?.len() / batch;
        ensure!(
            (1..=WIDEST).contains(&this.width),
            "output `{}` of {} holds {} values an image; 1 to {WIDEST} can be summed: name an output of fewer by \
             --onnx-output, or pool it in the network",
            this.output,
            path.display(),
            this.width
        );
        let description = Description {
            preset: "onnx".to_owned(),
            network,
            weights: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            weights_sha256: sha256_of_model(path)?,
            preprocessing: words,
            precision: "f32".to_owned(),
            runtime: super::runtime_in_words(runtime, &options.execution)?,
            pool: this.width,
            spatial: None,
            logits: None,
        };
        Ok((this, description))
    }

    pub(super) fn channels(&self) -> usize {
        self.channels
    }

    pub(super) fn features(&mut self, images: &ImageBatch<'_>) -> anyhow::Result<Features> {
        let n = images.count();
        let from = [images.height, images.width];
        let to = [0, 1].map(|a| self.size[a].unwrap_or(from[a]));
        let plan = match self.plan.take() {
            Some(plan) if plan.fits(from) => plan,
            _ => Plan::new(Filter::PillowBicubic, from, to),
        };
        let image = self.channels * to[0] * to[1];
        let (mean, std, channels) = (self.mean, self.std, self.channels);
        let mut pool = Vec::with_capacity(n * self.width);
        for first in (0..n).step_by(self.batch) {
            let rows = self.batch.min(n - first);
            let mut input = vec![0.0; self.batch * image];
            input[..rows * image].par_chunks_mut(image).enumerate().for_each(|(i, out)| {
                let scale = |c: usize, v: f32| (v / 255.0 - mean[c]) / std[c];
                plan.run(images.pixels, first + i, channels, scale, out);
            });
            let values = self.run(input, to)?;
            ensure!(
                values.len() == self.batch * self.width,
                "the model gave {} values for {} images, expected {} each",
                values.len(),
                self.batch,
                self.width
            );
            pool.extend_from_slice(&values[..rows * self.width]);
        }
        self.plan = Some(plan);
        Ok(Features { pool: Array2::from_shape_vec((n, self.width), pool)?, spatial: None, logits: None })
    }

    /// Runs a full batch of planes (N, C, H, W).
    fn run(&mut self, planes: Vec<f32>, [h, w]: [usize; 2]) -> anyhow::Result<Vec<f32>> {
        let (n, c) = (self.batch, self.channels);
        let (shape, values) = match self.layout {
            Layout::ChannelsFirst => ([n, c, h, w], planes),
            Layout::ChannelsLast => {
                let mut last = vec![0.0; planes.len()];
                for (from, to) in planes.chunks(c * h * w).zip(last.chunks_mut(c * h * w)) {
                    for (i, v) in from.iter().enumerate() {
                        to[i % (h * w) * c + i / (h * w)] = *v;
                    }
                }
                ([n, h, w, c], last)
            }
        };
        let (found, values) = self.model.run(&self.input, &shape, values, &self.output)?;
        ensure!(
            found.dims().first() == Some(&n),
            "output `{}` has shape {found} for {n} images: its first axis must be theirs",
            self.output
        );
        Ok(values)
    }
}

fn preprocessing([h, w]: [Option<usize>; 2], channels: usize, mean: [f32; 3], std: [f32; 3]) -> String {
    let size = match (h, w) {
        (None, None) => "own size".to_owned(),
        (h, w) => {
            let side = |d: Option<usize>| d.map_or_else(|| "own".to_owned(), |d| d.to_string());
            format!(
                "Pillow bicubic of float channels to {}x{}, antialiased, clipped to 0..255",
                side(h),
                side(w)
            )
        }
    };
    format!("{size}; (x/255 - {:?}) / {:?}", &mean[..channels], &std[..channels])
}

fn listed(ports: &[Port]) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The port of a name, or the only one that fits.
fn choose(
    path: &Path,
    side: &str,
    ports: &[Port],
    name: Option<&str>,
    wanted: &str,
    fits: impl Fn(&Port) -> bool,
) -> anyhow::Result<Port> {
    let (file, all) = (path.display(), listed(ports));
    if let Some(name) = name {
        let found = ports.iter().find(|p| p.name == name);
        let Some(found) = found else { bail!("{file} has no {side} `{name}`; it has {all}") };
        ensure!(fits(found), "{side} {found} of {file} is not {wanted}");
        return Ok(found.clone());
    }
    let fitting: Vec<&Port> = ports.iter().filter(|p| fits(p)).collect();
    match fitting[..] {
        [one] => Ok(one.clone()),
        [] => bail!("{file} has no {side} of {wanted}; it has {all}"),
        _ => bail!("{file} has several {side}s of {wanted}: name one of {all}"),
    }
}
