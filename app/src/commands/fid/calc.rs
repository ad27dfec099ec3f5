//! `mudit fid calc`: the metrics of samples against a reference.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use runtime::file::{check_writable, sha256_file, write_atomically};
use serde_json::{Value, json};

use super::super::{Machine, Target};
use super::network::{self, NetworkArgs};
use super::set::{self, CheckpointArgs, SetArgs};
use crate::Usage;
use crate::console;
use crate::execution::Execution;
use crate::fid::evaluation::{Features, KEPT_SAMPLES, Settings};
use crate::fid::extractor::Description;
use crate::fid::metrics::frechet;
use crate::fid::metrics::inception_score::Splits;
use crate::fid::part::Seen;
use crate::fid::plan::{Images, Plan, Shard, Side};
use crate::fid::report::{self, NetworkChoice, Reference, Report, check_count};
use crate::fid::statistics::Statistics;

/// Arguments of `mudit fid calc`.
#[derive(Debug, Args)]
pub(super) struct CalcArgs {
    #[command(flatten)]
    set: SetArgs,
    #[command(flatten)]
    checkpoint: CheckpointArgs,
    /// Statistics of the reference set: of `mudit fid ref`, or an .npz of ADM or pytorch-fid. A shard needs none.
    #[arg(long = "ref", value_name = "NPZ", required_unless_present = "shard")]
    reference: Option<PathBuf>,
    /// The result, with all that is needed to repeat it.
    #[arg(long, default_value = "fid.json")]
    out: PathBuf,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    scoring: Scoring,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Of --checkpoint the samples; the features are in f32.
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    machine: Machine,
}

/// How the features are judged.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Scoring {
    /// Splits of the Inception score: consecutive 5000 images, or 10 shuffled splits.
    #[arg(long, value_enum, default_value = "adm")]
    is_splits: SplitRule,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SplitRule {
    /// Consecutive 5000 images, as ADM's evaluator.
    Adm,
    /// 10 splits shuffled with seed 2020, as torch-fidelity.
    TorchFidelity,
}

impl CalcArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if let [input] = &self.set.inputs[..]
            && Statistics::is_in(Path::new(input))
        {
            return self.of_statistics(Path::new(input));
        }
        let choice = self.network.choice();
        let execution = self.target.execution(self.machine)?;
        check_writable(&self.out)?;
        let images = self.images(&execution)?;
        let reference = self.reference.as_deref().map(Other::read).transpose()?;
        let runtime = self.machine.runtime_for(&execution.provider)?;
        let mut source = set::open(&images, &runtime, self.machine.offline)?;
        let warnings = set::check(Side::Samples, source.as_ref(), &self.set, KEPT_SAMPLES)?;
        let mut network = network::open(&choice, &runtime, &execution, self.machine.offline)?;
        if let Some(reference) = &reference {
            reference.fits(network.describe())?;
        }
        let description = network.describe().clone();
        let plan =
            Plan::new(Side::Samples, images, source.count(), description, KEPT_SAMPLES, self.set.mixed_sizes);
        let shard = self.set.shard.unwrap_or(Shard::WHOLE);
        let work = self.set.work(&self.out);
        let part = set::run(&plan, shard, &work, source.as_mut(), &mut network)?;
        let Some(reference) = reference.filter(|_| self.set.shard.is_none()) else {
            return set::tell_shard(&part, self.json);
        };
        let features = set::alone(part)?;
        let how = How { choice: Some(choice), few: self.set.few, execution, warnings };
        let report = judge(&features, &reference, self.scoring, how)?;
        finish(&report, &self.out, self.json)?;
        if self.set.keep_work { Ok(()) } else { features.remove() }
    }

    /// The distance of two statistics files: no images, so nothing else can be told.
    fn of_statistics(&self, path: &Path) -> anyhow::Result<()> {
        let reference = self
            .reference
            .as_deref()
            .filter(|_| self.set.shard.is_none())
            .ok_or_else(|| Usage("statistics have no shards: give --ref without --shard".into()))?;
        let (a, b) = (Statistics::read(path)?, Statistics::read(reference)?);
        let fid = frechet::distance(&a.pool, &b.pool)?;
        let sfid = match (&a.spatial, &b.spatial) {
            (Some(a), Some(b)) => Some(frechet::distance(a, b)?),
            _ => None,
        };
        let file = |path: &Path, s: &Statistics| -> anyhow::Result<Value> {
            Ok(json!({ "path": path, "sha256": sha256_file(path)?, "about": s.about }))
        };
        let result = json!({
            "metrics": { "fid": fid, "sfid": sfid },
            "samples": file(path, &a)?,
            "reference": file(reference, &b)?,
            "machine": report::Machine::here(&Execution::cpu(self.machine.threads)),
        });
        let text = serde_json::to_vec_pretty(&result)?;
        write_atomically(&self.out, |w| w.write_all(&text))?;
        if self.json {
            return console::json(&result);
        }
        console::out(&format!("FID        {fid:.4}  (of two statistics files)"))?;
        sfid.map_or(Ok(()), |sfid| console::out(&format!("sFID       {sfid:.4}")))?;
        console::out(&self.out.display().to_string())
    }

    fn images(&self, execution: &Execution) -> anyhow::Result<Images> {
        let Some(path) = &self.checkpoint.checkpoint else { return Ok(self.set.images()) };
        let count = self
            .set
            .count
            .ok_or_else(|| Usage("-n says how many samples are made, such as -n 50000".into()))?;
        Ok(Images::Checkpoint(Box::new(self.checkpoint.recipe(path, count, execution)?)))
    }
}

/// A reference file with its name.
pub(super) struct Other {
    path: PathBuf,
    statistics: Statistics,
}

impl Other {
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        Ok(Self { path: path.to_path_buf(), statistics: Statistics::read(path)? })
    }

    /// Refuses features of another network.
    pub(super) fn fits(&self, network: &Description) -> anyhow::Result<()> {
        let path = self.path.display();
        if let Some(about) = &self.statistics.about
            && let Some(what) = about.plan.network.differs_from(network)
        {
            anyhow::bail!("{path} was made with another network ({what}, there against here)");
        }
        let width = self.statistics.pool.mean.len();
        ensure!(
            width == network.pool,
            "{path} has statistics of {width} features, the network gives {}",
            network.pool
        );
        Ok(())
    }

    fn describe(&self) -> anyhow::Result<Reference> {
        let about = self.statistics.about.clone();
        let whole = about.as_ref().filter(|a| a.moments_of.is_none());
        Ok(Reference {
            path: self.path.display().to_string(),
            sha256: sha256_file(&self.path)?,
            identity: self.statistics.identity(&self.path)?,
            images: whole.map(|a| a.plan.count),
            kept: (self.statistics.features.len() / self.statistics.pool.mean.len()) as u64,
            about,
        })
    }
}

/// What a report says beside the features.
pub(super) struct How {
    pub(super) choice: Option<NetworkChoice>,
    pub(super) few: bool,
    pub(super) execution: Execution,
    /// What was seen of the samples before; else the check of their number.
    pub(super) warnings: Vec<String>,
}

/// All metrics of features against a reference.
pub(super) fn judge(
    features: &Features,
    reference: &Other,
    scoring: Scoring,
    how: How,
) -> anyhow::Result<Report> {
    let splits = match scoring.is_splits {
        SplitRule::Adm => Splits::ADM,
        SplitRule::TorchFidelity => Splits::TORCH_FIDELITY,
    };
    judge_with(features, reference, splits, how)
}

/// [`judge`] with given splits.
pub(super) fn judge_with(
    features: &Features,
    reference: &Other,
    splits: Splits,
    how: How,
) -> anyhow::Result<Report> {
    let plan = features.plan();
    let about = reference.describe()?;
    let few = check_count(Side::Samples, plan.count, how.few)?;
    let mut warnings = how.warnings;
    warnings.extend(few.filter(|f| !warnings.contains(f)));
    if let Some(count) = about.images {
        warnings.extend(check_count(Side::Reference, count, how.few)?);
    }
    if about.kept == 0 {
        let path = &about.path;
        warnings.push(format!(
            "{path} holds no features, so there is no precision, recall or KID: make it with `mudit fid ref`"
        ));
    }
    let seen = features.seen();
    if seen.grey > 0 {
        warnings.push(format!("{} of {} images are grey", seen.grey, seen.images));
    }
    if seen.other_sizes > 0 {
        warnings
            .push(format!("{} of {} images have another size than the first", seen.other_sizes, seen.images));
    }
    warnings.extend(features.constant(&reference.statistics)?);
    let settings = Settings::usual(splits, plan.kept.min(about.kept) as usize);
    console::note("computing the metrics");
    let metrics = features.metrics(&reference.statistics, &settings)?;
    warnings.extend(metrics.inception_score.and_then(|s| s.warning()));
    Ok(Report {
        metrics,
        warnings,
        samples: plan.clone(),
        seen: Seen { blocks: Vec::new(), stamps: Vec::new(), ..seen.clone() },
        pixels_sha256: features.pixels_sha256(),
        reference: about,
        network_choice: how.choice,
        settings,
        machine: report::Machine::here(&how.execution),
    })
}

/// Writes a result.
pub(super) fn write(report: &Report, out: &Path) -> anyhow::Result<()> {
    let text = serde_json::to_vec_pretty(report)?;
    write_atomically(out, |w| w.write_all(&text)).with_context(|| format!("writing {}", out.display()))
}

/// Writes a result and tells of it.
pub(super) fn finish(report: &Report, out: &Path, json: bool) -> anyhow::Result<()> {
    write(report, out)?;
    if json {
        return console::json(report);
    }
    report.table().iter().try_for_each(|line| console::out(line))?;
    console::out(&out.display().to_string())
}
