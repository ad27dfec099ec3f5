//! `mudit sweep`: many runs over settings and sizes, planned, run by any number of workers, collected.

mod collect;
mod picture;
mod plan;
mod run;
mod submit;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use runtime::file::write_atomically;
use train_engine::config::TrainConfig;
use train_engine::data::{self, Dataset};
use train_engine::sweep::{Event, Journals, Plan, SweepSpec, journal::Writer};

use super::{Machine, TargetOverrides, of_training};
use crate::Usage;
use crate::console;

pub(super) use collect::edges;
pub(super) use picture::curves_picture;
pub(super) use run::work;

/// Arguments of `mudit sweep`.
#[derive(Debug, Args)]
pub struct SweepArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List the trials and tell what they cost, on this machine or another.
    Plan(plan::PlanArgs),
    /// Run what has no result yet; may run several times at once on one folder.
    Run(run::RunArgs),
    /// Table, plot, CSV and JSON of the results so far.
    Collect(collect::CollectArgs),
    /// Write the script that runs the sweep on a cluster.
    Submit(submit::SubmitArgs),
    /// Add another judge's numbers for a trial, such as its FID.
    Tell(TellArgs),
}

impl SweepArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.what {
            What::Plan(args) => args.run(),
            What::Run(args) => args.run(),
            What::Collect(args) => args.run(),
            What::Submit(args) => args.run(),
            What::Tell(args) => args.run(),
        }
    }
}

/// Which sweep is meant.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// The sweep's TOML file; left out, that of the folder.
    #[arg(long)]
    pub(super) config: Option<PathBuf>,
    /// Overrides of the run that is varied, such as `train.steps=100`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub(super) overrides: Vec<String>,
    #[command(flatten)]
    pub(super) target: TargetOverrides,
    /// The sweep's folder.
    #[arg(long)]
    pub(super) out: PathBuf,
}

/// File of the sweep in its folder, with its run inside.
const SWEEP_FILE: &str = "sweep.toml";

/// A sweep that was read.
pub(super) struct Opened {
    pub(super) plan: Plan,
    pub(super) base: TrainConfig,
    pub(super) dataset: Arc<dyn Dataset>,
    pub(super) folder: PathBuf,
}

impl Which {
    /// Reads the sweep; `save` writes it and its trials into the folder.
    pub(super) fn open(&self, machine: Machine, save: bool) -> anyhow::Result<Opened> {
        let saved = self.out.join(SWEEP_FILE);
        let path = match &self.config {
            Some(path) => path,
            None if saved.is_file() => &saved,
            None => {
                return Err(Usage(format!(
                    "no sweep: give --config FILE.toml, or an --out that holds one (`{}` is not there)",
                    saved.display()
                ))
                .into());
            }
        };
        let (mut spec, mut base) = SweepSpec::load(path, &self.overrides)?;
        if let Some(precision) = self.target.precision {
            base.train.precision = precision;
        }
        spec.config = None;
        spec.run = Some(base.anchored()?.to_toml()?.parse()?);
        // Each worker's own.
        self.target.apply(&mut base, machine);
        of_training(&base).can_train()?;
        let dataset = data::open(&base.data, machine.offline, &console::note)?;
        let plan = Plan::new(&spec, &base, dataset.as_ref())?;
        if save {
            save_sweep(&spec, &saved)?;
            plan.write(&self.out)?;
        }
        Ok(Opened { plan, base, dataset, folder: self.out.clone() })
    }
}

fn save_sweep(spec: &SweepSpec, path: &Path) -> anyhow::Result<()> {
    let text = toml::to_string(spec)?;
    Ok(write_atomically(path, |out| out.write_all(text.as_bytes()))?)
}

/// Arguments of `mudit sweep tell`.
#[derive(Debug, Args)]
struct TellArgs {
    #[command(flatten)]
    which: Which,
    /// The trial's number in `trials.jsonl`.
    #[arg(long)]
    trial: usize,
    /// Metrics such as `fid=12.3`.
    #[arg(required = true, value_name = "METRIC=VALUE")]
    metrics: Vec<String>,
    #[command(flatten)]
    machine: Machine,
}

impl TellArgs {
    fn run(self) -> anyhow::Result<()> {
        let opened = self.which.open(self.machine, false)?;
        let count = opened.plan.trials.len();
        let trial = opened
            .plan
            .trials
            .get(self.trial)
            .ok_or_else(|| Usage(format!("trial {} is not in 0..{count}", self.trial)))?;
        if !Journals::open(&opened.folder)?.has(&trial.id) {
            return Err(Usage(format!("trial {} has no result yet", self.trial)).into());
        }
        let parsed = self.metrics.iter().map(|text| {
            let malformed = || Usage(format!("`{text}` is no METRIC=VALUE with a number"));
            let (metric, value) = text.split_once('=').ok_or_else(malformed)?;
            let value: f64 = value.trim().parse().map_err(|_| malformed())?;
            if metric.trim().is_empty() || !value.is_finite() {
                return Err(malformed());
            }
            Ok(Event::Told { id: trial.id.clone(), metric: metric.trim().to_owned(), value })
        });
        let events: Vec<Event> = parsed.collect::<Result<_, Usage>>()?;
        let mut writer = Writer::create(&opened.folder)?;
        events.iter().try_for_each(|event| writer.append(event))?;
        console::out(&format!("{} numbers for trial {}", events.len(), self.trial))
    }
}

/// A power of two as such, any other number in four digits.
pub(super) fn number(x: f64) -> String {
    let log = x.log2();
    if x > 0.0 && x < 1.0 && (log - log.round()).abs() < 1e-9 {
        return format!("2^{}", log.round());
    }
    if x == x.round() && x.abs() < 1e9 {
        return format!("{x}");
    }
    if !(1e-3..1e5).contains(&x.abs()) {
        return format!("{x:.3e}");
    }
    let decimals = (3 - x.abs().log10().floor() as i32).max(0) as usize;
    let text = format!("{x:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_are_short() {
        let table = [
            (1.0 / 256.0, "2^-8"),
            (0.5, "2^-1"),
            (72.0, "72"),
            (0.015_845_3, "0.01585"),
            (6.626_07, "6.626"),
            (12_345.678, "12346"),
            (1.234_56e-5, "1.235e-5"),
            (0.250_01, "0.25"),
        ];
        for (x, expected) in table {
            assert_eq!(number(x), expected);
        }
    }
}
