//! Features of given images by the extractor of `mudit fid`, for `tests/peers/fid_networks.py`.
//!
//! Reads `images` (N, H, W, 3) u8 from a safetensors file, writes `input` (what the network sees), `pool`, `spatial` and
//! `logits`, and prints the speed of the last of `--repeat` runs as JSON.
#![allow(clippy::print_stdout, reason = "its answer")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Parser;
use indexmap::IndexMap;
use mudit::fid::extractor::{Extractor, Filter, ImageBatch, Network, Options, Pixels, Plan, Preset, Taps};
use ndarray::Array2;
use runtime::{HostData, HostTensor, Runtime, RuntimeOptions, read_safetensors_file, write_safetensors_file};

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    preset: Preset,
    #[arg(long)]
    weights: PathBuf,
    #[arg(long)]
    images: PathBuf,
    #[arg(long)]
    out: PathBuf,
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[arg(long, default_value_t = 1)]
    repeat: usize,
    #[arg(long)]
    no_spatial: bool,
    #[arg(long)]
    no_logits: bool,
}

fn main() -> anyhow::Result<()> {
    let a = Arguments::parse();
    let runtime = Runtime::start(&RuntimeOptions::default())?;
    let read = read_safetensors_file(&a.images)?;
    let images = read.get("images").context("no tensor `images`")?;
    let (&[n, height, width, 3], HostData::U8(pixels)) = (images.shape().dims(), images.data()) else {
        bail!("`images` must be u8 of shape (N, H, W, 3)");
    };
    let images = ImageBatch { height, width, channels: 3, pixels: Pixels::U8(pixels) };
    let taps = Taps { spatial: !a.no_spatial, logits: !a.no_logits };
    let options = Options { threads: a.threads, batch: a.batch, taps };
    let network = Network::Inception { preset: a.preset, weights: a.weights };
    let mut extractor = Extractor::open(&runtime, &network, &options, &|_| ())?;
    let mut features = extractor.features(&images)?;
    let mut seconds = 0.0;
    for _ in 0..a.repeat.max(1) {
        let start = Instant::now();
        features = extractor.features(&images)?;
        seconds = start.elapsed().as_secs_f64();
    }
    let mut answer = IndexMap::from([("input".to_owned(), input(a.preset, &images)?)]);
    let mut add = |name: &str, values: Option<Array2<f32>>| -> anyhow::Result<()> {
        if let Some(values) = values {
            let shape = [values.nrows(), values.ncols()];
            answer.insert(name.to_owned(), HostTensor::f32(shape, values.into_iter().collect())?);
        }
        Ok(())
    };
    add("pool", Some(features.pool))?;
    add("spatial", features.spatial)?;
    add("logits", features.logits)?;
    write_safetensors_file(&a.out, &answer, &BTreeMap::new())?;
    println!("{}", serde_json::json!({ "images_per_second": n as f64 / seconds }));
    Ok(())
}

/// What the network sees.
fn input(preset: Preset, images: &ImageBatch<'_>) -> anyhow::Result<HostTensor> {
    let (filter, scale): (Filter, fn(usize, f32) -> f32) = match preset {
        Preset::Adm => (Filter::TensorFlowBilinear, |_, v| (v - 128.0) / 128.0),
        Preset::PytorchFid => (Filter::TorchBilinear, |_, v| 2.0 * v - 1.0),
        Preset::Clean => (Filter::PillowBicubic, |_, v| (v - 128.0) / 128.0),
        Preset::Fashion => bail!("another network"),
    };
    let plan = Plan::new(filter, [images.height, images.width], [299, 299]);
    let mut values = vec![0.0; images.count() * 3 * 299 * 299];
    for (i, out) in values.chunks_mut(3 * 299 * 299).enumerate() {
        plan.run(images.pixels, i, 3, scale, out);
    }
    Ok(HostTensor::f32([images.count(), 3, 299, 299], values)?)
}
