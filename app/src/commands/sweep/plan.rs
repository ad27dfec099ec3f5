//! `mudit sweep plan`: what would be run, and what it costs.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use train_engine::data::{BatchPlan, Loader};
use train_engine::sweep::plan::{StepCost, TRIALS_FILE, step_cost};
use train_engine::sweep::{Journals, Trial};
use train_engine::trainer::Trainer;

use super::super::of_training;
use super::{Machine, Opened, Which};
use crate::Usage;
use crate::console;

/// Arguments of `mudit sweep plan`.
#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    which: Which,
    /// Rate of the machine that is to run it, in GFLOP/s of one worker, such as 400000 for a large GPU; left out, this
    /// machine's is measured.
    #[arg(long)]
    gflops: Option<f64>,
    /// Workers at once.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

/// Seconds that a rate is measured for, at most, and steps at least.
const MEASURE: (f64, u64) = (2.0, 3);

/// Trials of one shape.
struct Row<'a> {
    shape: String,
    trials: Vec<&'a Trial>,
    cost: StepCost,
    left: f64,
    all: f64,
}

impl PlanArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.workers == 0 || self.gflops.is_some_and(|g| !(g > 0.0 && g.is_finite())) {
            return Err(Usage("--workers and --gflops must be above 0".into()).into());
        }
        let opened = self.which.open(self.machine, true)?;
        let journals = Journals::open(&opened.folder)?;
        let results = journals.results();
        let mut rows = Vec::new();
        for (shape, trials) in opened.plan.shapes() {
            let cost = step_cost(&trials[0].config, &trials[0].model)?;
            let flops = |t: &&Trial| t.config.train.steps as f64 * cost.flops;
            let left = trials.iter().filter(|t| !results.contains_key(t.id.as_str())).map(flops).sum();
            let all = trials.iter().map(flops).sum();
            rows.push(Row { shape: shape.to_string(), trials, cost, left, all });
        }
        let (rate, origin) = self.rate(&opened, &journals, &rows)?;
        self.report(&opened, &rows, rate, &origin)
    }

    /// Operations a second, and where the number is from.
    fn rate(&self, opened: &Opened, journals: &Journals, rows: &[Row<'_>]) -> anyhow::Result<(f64, String)> {
        if let Some(gflops) = self.gflops {
            return Ok((gflops * 1e9, "as given".into()));
        }
        let (mut flops, mut seconds) = (0.0, 0.0);
        for result in journals.results().values() {
            flops += result.flops;
            seconds += result.seconds;
        }
        if seconds > 0.0 {
            return Ok((flops / seconds, "measured on the trials that ended".into()));
        }
        let Some(row) = rows.iter().min_by(|a, b| a.cost.flops.total_cmp(&b.cost.flops)) else {
            return Ok((f64::NAN, "unknown".into()));
        };
        let trial = row.trials[0];
        of_training(&opened.base).check()?;
        let runtime = self.machine.runtime_for(&opened.base.train.provider)?;
        let mut trainer = Trainer::shared(&runtime, &trial.config, &trial.model)?;
        let plan = BatchPlan::new(0, opened.dataset.len(), trial.config.train.batch_size)?;
        let data = &trial.config.data;
        let steps = 0..u64::MAX / 2;
        let loader =
            Loader::start(opened.dataset.clone(), plan, data.flip, steps, data.prefetch, data.workers)?;
        let (mut start, mut timed) = (Instant::now(), 0);
        for batch in loader {
            let batch = batch?;
            trainer.step(&batch)?;
            if batch.step == 1 {
                (start, timed) = (Instant::now(), 0); // the first two settle the memory
            } else {
                timed += 1;
            }
            if batch.step > MEASURE.1 && start.elapsed().as_secs_f64() >= MEASURE.0 {
                break;
            }
        }
        let rate = f64::from(timed) * row.cost.flops / start.elapsed().as_secs_f64();
        Ok((rate, "measured here on the smallest shape".into()))
    }

    fn report(&self, opened: &Opened, rows: &[Row<'_>], rate: f64, origin: &str) -> anyhow::Result<()> {
        let trials = opened.plan.trials.len();
        let (all, left) = rows.iter().fold((0.0, 0.0), |sum, r| (sum.0 + r.all, sum.1 + r.left));
        let hours = |flops: f64| flops / rate / 3600.0;
        if self.json {
            let shapes: Vec<_> = rows
                .iter()
                .map(|r| {
                    json!({
                        "shape": r.shape, "trials": r.trials.len(), "parameters": r.cost.parameters,
                        "step_gflop": r.cost.flops / 1e9, "flops": r.all, "hours": hours(r.all),
                    })
                })
                .collect();
            return console::json(&json!({
                "trials": trials, "compilations": rows.len(), "flops": all, "flops_left": left,
                "gflops_per_s": rate / 1e9, "rate_is": origin, "hours": hours(all), "hours_left": hours(left),
                "wall_hours_left": hours(left) / self.workers as f64, "shapes": shapes,
            }));
        }
        console::out(&format!(
            "{:>8} {:>8} {:>7} {:>6} {:>9} {:>12} {:>12} {:>10}",
            "trials", "width", "depth", "batch", "steps", "M parameters", "GFLOP a step", "hours"
        ))?;
        for row in rows {
            let model = &row.trials[0].model;
            let mut steps: BTreeMap<u64, usize> = BTreeMap::new();
            row.trials.iter().for_each(|t| *steps.entry(t.config.train.steps).or_insert(0) += 1);
            let steps: Vec<String> = steps.keys().map(ToString::to_string).collect();
            console::out(&format!(
                "{:>8} {:>8} {:>7} {:>6} {:>9} {:>12.2} {:>12.2} {:>10.3}",
                row.trials.len(),
                model.network.width(),
                model.network.depth(),
                row.trials[0].config.train.batch_size,
                steps.join("/"),
                row.cost.parameters as f64 / 1e6,
                row.cost.flops / 1e9,
                hours(row.all)
            ))?;
        }
        let on = if self.gflops.is_some() { "hours of such a machine" } else { "CPU-hours of this machine" };
        console::out(&format!(
            "{trials} trials on {} compiled steps, {:.3e} FLOP, {:.2} {on} at {:.0} GFLOP/s ({origin}); left: {:.2} hours, \
             with {} workers {:.2}",
            rows.len(),
            all,
            hours(all),
            rate / 1e9,
            hours(left),
            self.workers,
            hours(left) / self.workers as f64
        ))?;
        console::out(&opened.folder.join(TRIALS_FILE).display().to_string())
    }
}
