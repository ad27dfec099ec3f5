//! `mudit transfer`: Algorithms 1–3 of the muP paper as a verdict on a sweep, and Algorithm 4 whole: search on a proxy,
//! train the target with what was found, beside the baseline.

mod target;

use std::path::PathBuf;

use clap::Args;
use runtime::file::write_atomically;
use serde_json::json;
use train_engine::config::Schedule;
use train_engine::sweep::results::{Curve, LOSS, Metric, RATE_KEY, curves, short};
use train_engine::sweep::verdict::{TOLERANCE, Verdict, judge};
use train_engine::sweep::{Journals, Plan};

use super::sweep::{Which, curves_picture, edges, number};
use super::{Machine, TargetOverrides};
use crate::Usage;
use crate::console;

/// Arguments of `mudit transfer`.
#[derive(Debug, Args)]
pub struct TransferArgs {
    /// Judge this sweep's results instead of running one: does the optimum stay?
    #[arg(long, conflicts_with_all = ["config", "out"])]
    sweep: Option<PathBuf>,
    /// A sweep's TOML file with `[target]` and perhaps `[baseline]`: search, then train the target.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Overrides of the run, such as `train.steps=100`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    overrides: Vec<String>,
    /// Folder of the search, the target and the baseline.
    #[arg(long)]
    out: Option<PathBuf>,
    /// With --sweep: the setting whose optimum is followed.
    #[arg(long, default_value = RATE_KEY)]
    over: String,
    /// With --sweep: `loss`, or a metric that `sweep tell` was told.
    #[arg(long, default_value = LOSS)]
    metric: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: TargetOverrides,
    #[command(flatten)]
    machine: Machine,
}

/// The sizes of Algorithms 1, 2 and 3.
const AXES: [(&str, u32); 3] = [("model.hidden_size", 1), ("train.batch_size", 2), ("train.steps", 3)];
/// Shares of a run at which its curve stands for shorter runs.
const SHARES: [f64; 3] = [0.25, 0.5, 1.0];

impl TransferArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match (&self.sweep, &self.config, &self.out) {
            (Some(folder), None, None) => self.judge(folder.clone()),
            (None, config, Some(out)) => {
                let which = Which {
                    config: config.clone(),
                    overrides: self.overrides.clone(),
                    target: self.target.clone(),
                    out: out.join(target::PROXY),
                };
                target::run(&which, out, self.machine, self.json)
            }
            _ => Err(Usage(
                "give --sweep FOLDER to judge a sweep, or --config FILE.toml and --out FOLDER to run one"
                    .into(),
            )
            .into()),
        }
    }

    fn judge(&self, folder: PathBuf) -> anyhow::Result<()> {
        let which = Which { config: None, overrides: Vec::new(), target: self.target.clone(), out: folder };
        let opened = which.open(self.machine, false)?;
        let journals = Journals::open(&opened.folder)?;
        let metric = Metric { name: &self.metric, at_step: None };
        let measured = curves(&opened.plan, &journals, &self.over, metric);
        let mut verdicts: Vec<(u32, Verdict)> = Vec::new();
        for (axis, algorithm) in AXES {
            verdicts.extend(judge(&measured, axis).into_iter().map(|v| (algorithm, v)));
        }
        if !verdicts.iter().any(|(algorithm, _)| *algorithm == 3) && self.metric == LOSS {
            let shorter = over_steps(&opened.plan, &journals, &self.over, &measured);
            verdicts.extend(judge(&shorter, "train.steps").into_iter().map(|v| (3, v)));
        }
        if verdicts.is_empty() {
            anyhow::bail!(
                "`{}` has results of one width, batch and number of steps only: there is nothing to transfer between",
                opened.folder.display()
            );
        }
        let warnings = edges(&measured, &self.over);
        let svg = opened.folder.join("transfer.svg");
        let title = format!("Does the best {} stay?", short(&self.over));
        curves_picture(&measured, &self.over, &self.metric, title).save(&svg)?;
        let rows: Vec<_> = verdicts.iter().map(|(a, v)| json!({ "algorithm": a, "verdict": v })).collect();
        let report = json!({
            "sweep": opened.folder, "over": self.over, "metric": self.metric, "tolerance_octaves": TOLERANCE,
            "verdicts": rows, "warnings": warnings, "curves": measured,
        });
        let file = opened.folder.join("transfer.json");
        write_atomically(&file, |out| writeln!(out, "{report:#}"))?;
        if self.json {
            return console::json(&report);
        }
        for (algorithm, verdict) in &verdicts {
            show(*algorithm, verdict, &self.over)?;
        }
        for warning in warnings {
            console::out(&format!("warning: {warning}"))?;
        }
        [&svg, &file].iter().try_for_each(|path| console::out(&path.display().to_string()))
    }
}

/// With a constant rate, the first part of a run is a shorter run: its curve serves Algorithm 3.
fn over_steps(plan: &Plan, journals: &Journals, over: &str, whole: &[Curve]) -> Vec<Curve> {
    let Some(first) = plan.trials.first() else { return Vec::new() };
    let (train, steps) = (&first.config.train, first.config.train.steps);
    if train.schedule != Schedule::Constant || whole.iter().any(|c| c.at.contains_key("train.steps")) {
        return Vec::new();
    }
    let at = |share: f64| {
        let step = (steps as f64 * share).round() as u64;
        let mut part = curves(plan, journals, over, Metric { name: LOSS, at_step: Some(step) });
        for curve in &mut part {
            curve.at.insert("train.steps".to_owned(), step as f64);
        }
        part
    };
    SHARES.into_iter().flat_map(at).collect()
}

fn show(algorithm: u32, v: &Verdict, over: &str) -> anyhow::Result<()> {
    let of = if v.of.is_empty() { String::new() } else { format!(" of {}", v.of) };
    console::out(&format!("Algorithm {algorithm}: the best {}{of} over {}", short(over), short(&v.axis)))?;
    for s in &v.sizes {
        let refined: Vec<String> = s.refined.iter().map(|x| format!("{x:.2}")).collect();
        console::out(&format!(
            "  {} {:>6}: best {} with {:.4} ± {:.4}{}; log2 by seed: {}; at the smallest's best: {}",
            short(&v.axis),
            number(s.size),
            number(s.best),
            s.metric,
            s.sd,
            if s.edge { " (edge of the grid)" } else { "" },
            refined.join(", "),
            s.transferred.map_or_else(|| "diverged".into(), |t| format!("{t:.4}"))
        ))?;
    }
    console::out(&format!(
        "  {}: it moves by {:+.2} ± {:.2} octaves from the smallest to the largest, the grid's best by {:.0}{}{}",
        if v.stays { "stays" } else { "DRIFTS" },
        v.shift,
        v.shift_error,
        v.grid_shift,
        if v.improves {
            "; larger is better at the smallest's best"
        } else {
            "; larger is NOT always better there"
        },
        if v.edge { "; an optimum is on the grid's edge, so this is a bound" } else { "" }
    ))
}
