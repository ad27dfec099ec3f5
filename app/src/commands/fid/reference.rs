//! `mudit fid ref`: the statistics file of a reference set.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use clap::Args;
use runtime::Provider;
use runtime::file::{check_writable, sha256_file};
use serde_json::json;

use super::super::Machine;
use super::network::{self, NetworkArgs};
use super::set::{self, SetArgs};
use crate::Usage;
use crate::console;
use crate::execution::Execution;
use crate::fid::evaluation::{Features, KEPT_REFERENCE};
use crate::fid::plan::{Plan, Shard, Side};
use crate::fid::statistics::{MAX_FEATURES, MomentsOf, Statistics};

/// Arguments of `mudit fid ref`.
#[derive(Debug, Args)]
pub(super) struct RefArgs {
    #[command(flatten)]
    set: SetArgs,
    /// The file to write (.npz; NumPy, ADM's evaluator and pytorch-fid read it, too).
    #[arg(long, default_value = "reference.npz")]
    out: PathBuf,
    /// Images, from the first on, that keep their features for precision, recall and KID.
    #[arg(long, default_value_t = KEPT_REFERENCE)]
    keep: u64,
    /// Take mean and covariance from this file (an ADM batch: they are of the whole set, its images only a part).
    #[arg(long, value_name = "NPZ", conflicts_with = "shard")]
    statistics: Option<PathBuf>,
    #[command(flatten)]
    network: NetworkArgs,
    /// Print a JSON report.
    #[arg(long)]
    json: bool,
    /// Who runs the network, always in f32: cpu, cuda, tensorrt; cuda:1 is the GPU of that number.
    #[arg(long, default_value = "cpu", env = "MUDIT_PROVIDER")]
    provider: Provider,
    #[command(flatten)]
    machine: Machine,
}

impl RefArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let choice = self.network.choice();
        let execution = Execution { provider: self.provider.clone(), ..Execution::cpu(self.machine.threads) };
        execution.check()?;
        check_writable(&self.out)?;
        let runtime = self.machine.runtime_for(&execution.provider)?;
        let images = self.set.images();
        let mut source = set::open(&images, &runtime, self.machine.offline)?;
        let mut warnings = set::check(Side::Reference, source.as_ref(), &self.set, self.keep)?;
        let mut network = network::open(&choice, &runtime, &execution, self.machine.offline)?;
        let kept = self.keep.min(source.count());
        let most = MAX_FEATURES / network.describe().pool as u64;
        if kept > most {
            return Err(Usage(format!("--keep {kept}: features of up to {most} images are kept")).into());
        }
        let plan = Plan::new(
            Side::Reference,
            images,
            source.count(),
            network.describe().clone(),
            self.keep,
            self.set.mixed_sizes,
        );
        let shard = self.set.shard.unwrap_or(Shard::WHOLE);
        let work = self.set.work(&self.out);
        let part = set::run(&plan, shard, &work, source.as_mut(), &mut network)?;
        if self.set.shard.is_some() {
            return set::tell_shard(&part, self.json);
        }
        let features = set::alone(part)?;
        let mut statistics = features.statistics(env!("CARGO_PKG_VERSION"))?;
        if let Some(path) = &self.statistics {
            replace(&mut statistics, path)?;
            // The moments are of another set.
            warnings.clear();
        }
        write(&features, &statistics, &self.out, warnings, self.json)?;
        if self.set.keep_work { Ok(()) } else { features.remove() }
    }
}

/// Takes the moments of another file.
fn replace(statistics: &mut Statistics, path: &Path) -> anyhow::Result<()> {
    let given = Statistics::read(path)?;
    ensure!(
        given.pool.mean.len() == statistics.pool.mean.len(),
        "{} has statistics of {} features, the network gives {}",
        path.display(),
        given.pool.mean.len(),
        statistics.pool.mean.len()
    );
    statistics.pool = given.pool;
    statistics.spatial = given.spatial;
    if let Some(about) = &mut statistics.about {
        let sha256 = sha256_file(path)?;
        about.pixels_sha256.clone_from(&sha256);
        about.moments_of = Some(MomentsOf { path: path.to_path_buf(), sha256 });
    }
    Ok(())
}

/// Writes a reference file and tells of it.
pub(super) fn write(
    features: &Features,
    statistics: &Statistics,
    out: &Path,
    mut warnings: Vec<String>,
    json: bool,
) -> anyhow::Result<()> {
    if statistics.pool.is_nearly_constant(None) {
        warnings.push("all reference images are (nearly) equal".to_owned());
    }
    statistics.write(out)?;
    let (plan, kept) = (features.plan(), statistics.features.len() / statistics.pool.mean.len());
    if json {
        return console::json(&json!({
            "reference": out, "images": plan.count, "kept": kept, "preset": plan.network.preset,
            "pixels_sha256": features.pixels_sha256(), "sha256": sha256_file(out)?,
            "warning": (!warnings.is_empty()).then(|| warnings.join("; ")),
        }));
    }
    console::out(&format!(
        "{}: statistics of {} images ({}), features of {kept}",
        out.display(),
        plan.count,
        plan.network.preset
    ))?;
    warnings.iter().try_for_each(|w| console::out(&format!("warning: {w}")))
}
