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
use models::inception::SIDE;
use mudit::execution::Execution;
use mudit::fid::extractor::{Extractor, ImageBatch, Network, Options, Pixels, Preset, Taps};
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
    let options = Options { execution: Execution::cpu(a.threads), batch: a.batch, taps };
    let network = Network::Inception { preset: a.preset, weights: a.weights };
    let mut extractor = Extractor::open(&runtime, &network, &options, &|_| ())?;
    let mut features = extractor.features(&images)?;
    let mut seconds = 0.0;
    for _ in 0..a.repeat.max(1) {
        let start = Instant::now();
        features = extractor.features(&images)?;
        seconds = start.elapsed().as_secs_f64();
    }
    let input = a.preset.network_input(&images).context("the preset is of another network")?;
    let input = HostTensor::f32([n, 3, SIDE, SIDE], input)?;
    let mut answer = IndexMap::from([("input".to_owned(), input)]);
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
