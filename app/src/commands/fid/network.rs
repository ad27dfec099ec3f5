//! Which feature network is run.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use runtime::Runtime;

use crate::Usage;
use crate::console;
use crate::execution::Execution;
use crate::fid::extractor::{Extractor, Network, Options, Preset, Taps, weights};
use crate::fid::report::NetworkChoice;

/// The network and its files.
#[derive(Clone, Debug, Args)]
pub(super) struct NetworkArgs {
    /// Network, resizing and scaling: as ADM's evaluator, pytorch-fid or clean-fid; or the small classifier for 28 × 28
    /// images.
    #[arg(long, value_enum, default_value = "adm")]
    preset: Preset,
    /// The network's weights (.pth, .pt, .safetensors; default the published file, fetched once), or a network of your
    /// own (.onnx).
    #[arg(long, value_name = "FILE")]
    network: Option<PathBuf>,
    /// Name of the image input of an .onnx network, if it has several.
    #[arg(long)]
    onnx_input: Option<String>,
    /// Name of the feature output of an .onnx network, if it has several.
    #[arg(long)]
    onnx_output: Option<String>,
    /// Subtracted, by channel, from the pixels of an .onnx network, which are 0 to 1.
    #[arg(long, value_name = "R,G,B", value_parser = by_channel, default_value = "0.5,0.5,0.5")]
    onnx_mean: [f32; 3],
    /// Divides them after that.
    #[arg(long, value_name = "R,G,B", value_parser = by_channel, default_value = "0.5,0.5,0.5")]
    onnx_std: [f32; 3],
    /// Images that the network is given at once.
    #[arg(id = "batch_of_network", long = "batch", default_value_t = NetworkChoice::BATCH, value_parser = batch)]
    batch: usize,
}

fn by_channel(text: &str) -> Result<[f32; 3], String> {
    let numbers: Option<Vec<f32>> = text.split(',').map(|x| x.trim().parse().ok()).collect();
    numbers.and_then(|n| n.try_into().ok()).ok_or("expected three numbers: R,G,B".into())
}

/// Largest batch: far beyond what a network gains from.
const MOST_AT_ONCE: usize = 4096;

/// A number of images that are worked on at once.
pub(super) fn batch(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| (1..=MOST_AT_ONCE).contains(n));
    number.ok_or_else(|| format!("expected a whole number from 1 to {MOST_AT_ONCE}"))
}

impl NetworkArgs {
    /// The choice as it is written into results.
    pub(super) fn choice(&self) -> NetworkChoice {
        let onnx = self.network.as_ref().is_some_and(|p| p.extension().is_some_and(|e| e == "onnx"));
        NetworkChoice {
            preset: (!onnx).then_some(self.preset),
            file: self.network.clone(),
            onnx_input: self.onnx_input.clone(),
            onnx_output: self.onnx_output.clone(),
            onnx_mean: self.onnx_mean,
            onnx_std: self.onnx_std,
            batch: self.batch,
        }
    }
}

/// Loads the network of a choice.
pub(super) fn open(
    choice: &NetworkChoice,
    runtime: &Arc<Runtime>,
    execution: &Execution,
    offline: bool,
) -> anyhow::Result<Extractor> {
    let (network, taps) = match (choice.preset, &choice.file) {
        (Some(Preset::Fashion), file) => (
            Network::Fashion { weights: file.clone(), seed: 0, offline },
            Taps { spatial: false, logits: true },
        ),
        (Some(preset), file) => {
            let weights = match file {
                Some(file) => file.clone(),
                None => weights::fetch(offline, &console::note)?,
            };
            (Network::Inception { preset, weights }, Taps { spatial: true, logits: true })
        }
        (None, Some(path)) => {
            let network = Network::Onnx {
                path: path.clone(),
                input: choice.onnx_input.clone(),
                output: choice.onnx_output.clone(),
                mean: choice.onnx_mean,
                std: choice.onnx_std,
            };
            (network, Taps::default())
        }
        (None, None) => return Err(Usage("the result names neither a preset nor a network".into()).into()),
    };
    Extractor::open(
        runtime,
        &network,
        &Options { execution: execution.in_f32(), batch: choice.batch, taps },
        &console::note,
    )
}
