//! `mudit fid merge`: shards of `ref` to a reference file, shards of `calc` to a result.

use std::path::PathBuf;

use clap::Args;
use runtime::file::check_writable;

use super::calc::{self, How, Other, Scoring};
use super::network::NetworkArgs;
use super::reference;
use crate::Usage;
use crate::execution::Execution;
use crate::fid::evaluation::Features;
use crate::fid::part::Part;
use crate::fid::plan::Side;
use crate::fid::report::check_count;

/// Arguments of `mudit fid merge`.
#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// The parts' directories, in any order.
    #[arg(required = true)]
    parts: Vec<PathBuf>,
    /// Statistics of the reference set, for shards of `calc`.
    #[arg(long = "ref", value_name = "NPZ")]
    reference: Option<PathBuf>,
    /// The file to write; default reference.npz or fid.json.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Allow fewer than 2048 images.
    #[arg(long)]
    few: bool,
    /// Remove the parts after the result is written.
    #[arg(long)]
    remove_parts: bool,
    #[command(flatten)]
    scoring: Scoring,
    /// The network that the shards were made with, noted in the result so that it can be run again.
    #[command(flatten)]
    network: NetworkArgs,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl MergeArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let parts = self.parts.iter().map(|p| Part::finished(p)).collect::<anyhow::Result<Vec<_>>>()?;
        let features = Features::of(parts)?;
        let side = features.plan().side;
        let name = if side == Side::Reference { "reference.npz" } else { "fid.json" };
        let out = self.out.unwrap_or_else(|| name.into());
        check_writable(&out)?;
        match side {
            Side::Reference => {
                let warnings = check_count(Side::Reference, features.plan().count, self.few)?;
                let statistics = features.statistics(env!("CARGO_PKG_VERSION"))?;
                reference::write(&features, &statistics, &out, warnings.into_iter().collect(), self.json)?;
            }
            Side::Samples => {
                let path = self
                    .reference
                    .ok_or_else(|| Usage("shards of samples need the reference: give --ref".into()))?;
                let other = Other::read(&path)?;
                other.fits(&features.plan().network)?;
                let choice = Some(self.network.choice());
                let how =
                    How { choice, few: self.few, execution: Execution::default(), warnings: Vec::new() };
                let report = calc::judge(&features, &other, self.scoring, how)?;
                calc::finish(&report, &out, self.json)?;
            }
        }
        if self.remove_parts { features.remove() } else { Ok(()) }
    }
}
