//! `mudit fid`: how far samples are from real images, and what such numbers may be compared with.

mod calc;
mod compare;
mod merge;
mod network;
pub(super) mod quick;
mod reference;
pub(super) mod set;
mod verify;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Machine;
use crate::console;
use crate::fid::extractor::weights;

/// Arguments of `mudit fid`.
#[derive(Debug, Args)]
pub struct FidArgs {
    #[command(subcommand)]
    command: FidCommand,
}

#[derive(Debug, Subcommand)]
enum FidCommand {
    /// Make the statistics file of a reference set.
    Ref(reference::RefArgs),
    /// Compute the metrics of samples: files, or straight from a checkpoint.
    Calc(calc::CalcArgs),
    /// Put shards together.
    Merge(merge::MergeArgs),
    /// Set results side by side, if they may be compared.
    Compare(compare::CompareArgs),
    /// Run a result again from its file and check the numbers.
    Verify(verify::VerifyArgs),
    /// Fetch the Inception network's weights and check them.
    FetchWeights(FetchArgs),
}

/// Arguments of `mudit fid fetch-weights`.
#[derive(Debug, Args)]
struct FetchArgs {
    /// Print where the file is as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

impl FidArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.command {
            FidCommand::Ref(args) => args.run(),
            FidCommand::Calc(args) => args.run(),
            FidCommand::Merge(args) => args.run(),
            FidCommand::Compare(args) => args.run(),
            FidCommand::Verify(args) => args.run(),
            FidCommand::FetchWeights(args) => args.run(),
        }
    }
}

impl FetchArgs {
    fn run(self) -> anyhow::Result<()> {
        let path: PathBuf = weights::fetch(self.machine.offline, &console::note)?;
        if self.json {
            return console::json(&serde_json::json!({ "weights": path }));
        }
        console::out(&path.display().to_string())
    }
}
