//! `mudit sweep collect`: the results so far.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use runtime::file::write_atomically;
use serde_json::json;
use train_engine::sweep::results::{Curve, LOSS, Metric, RATE_KEY, Ranked, curves, ranking};
use train_engine::sweep::spec::Method;
use train_engine::sweep::{Journals, Plan, Status};

use super::{Machine, Which, curves_picture, number};
use crate::console;
use crate::render::panels::{Line, Panel, Panels, Scale};

/// Arguments of `mudit sweep collect`.
#[derive(Debug, Args)]
pub(super) struct CollectArgs {
    #[command(flatten)]
    which: Which,
    /// The setting that curves go over.
    #[arg(long, default_value = RATE_KEY)]
    over: String,
    /// `loss`, or a metric that `sweep tell` was told.
    #[arg(long, default_value = LOSS)]
    metric: String,
    /// The loss after this many steps instead of all, from the trials' curves.
    #[arg(long)]
    at_step: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

/// Trials of a random search that are listed.
const LISTED: usize = 10;
/// Share of a range, at either end, in which a best value counts as on its edge.
const EDGE: f64 = 0.05;

impl CollectArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let opened = self.which.open(self.machine, false)?;
        let (plan, folder) = (&opened.plan, &opened.folder);
        let journals = Journals::open(folder)?;
        let metric = Metric { name: &self.metric, at_step: self.at_step };
        let results = journals.results();
        let done = plan.trials.iter().filter(|t| results.contains_key(t.id.as_str())).count();
        let of_trial = |t: &&train_engine::sweep::Trial| results.get(t.id.as_str()).map(|r| r.status);
        let ended = |status| plan.trials.iter().filter(|t| of_trial(t) == Some(status)).count();
        let (diverged, failed) = (ended(Status::Diverged), ended(Status::Failed));
        let csv = folder.join("trials.csv");
        let table = csv_table(plan, &journals, metric);
        write_atomically(&csv, |out| out.write_all(table.as_bytes()))?;
        let ranked = ranking(plan, &journals, metric);
        let grid = plan.spec.method == Method::Grid;
        let curves = if grid { curves(plan, &journals, &self.over, metric) } else { Vec::new() };
        let mut warnings = if grid { edges(&curves, &self.over) } else { range_edges(plan, ranked.first()) };
        if done < plan.trials.len() {
            warnings.push(format!(
                "{} of {} trials have no result yet",
                plan.trials.len() - done,
                plan.trials.len()
            ));
        }
        let svg = folder.join("collect.svg");
        let title = format!("{} over {}", self.metric, self.over);
        if grid {
            curves_picture(&curves, &self.over, &self.metric, title)
        } else {
            scatter(plan, &journals, metric)
        }
        .save(&svg)?;
        let report = json!({
            "trials": plan.trials.len(), "done": done, "diverged": diverged, "failed": failed, "metric": self.metric,
            "over": self.over, "at_step": self.at_step, "compilations": journals.compilations(),
            "warnings": warnings, "best": ranked.first(), "curves": curves,
        });
        let file = folder.join("collect.json");
        write_atomically(&file, |out| writeln!(out, "{report:#}"))?;
        if self.json {
            return console::json(&report);
        }
        for curve in &curves {
            console::out(&words(curve))?;
        }
        if !grid {
            for one in ranked.iter().take(LISTED) {
                console::out(&ranked_line(one))?;
            }
        }
        console::out(&format!(
            "{done} of {} trials have results, {diverged} of them diverged and {failed} failed; {} compilations",
            plan.trials.len(),
            journals.compilations()
        ))?;
        for warning in &warnings {
            console::out(&format!("warning: {warning}"))?;
        }
        let files: [&PathBuf; 3] = [&svg, &csv, &file];
        files.iter().try_for_each(|path| console::out(&path.display().to_string()))
    }
}

/// A curve as a row: each value of the setting with its mean and spread, the best one in brackets.
fn words(curve: &Curve) -> String {
    let name = curve.words();
    let mut line = format!("{}:", if name.is_empty() { "all" } else { &name });
    for (i, p) in curve.points.iter().enumerate() {
        let value = match p.mean {
            Some(mean) if p.seeds.len() > 1 => format!("{mean:.4}±{:.4}", p.sd),
            Some(mean) => format!("{mean:.4}"),
            None if p.diverged > 0 => "diverged".into(),
            None => "-".into(),
        };
        let x = number(p.x);
        // Writing to a `String` cannot fail.
        let _ = if curve.best == Some(i) {
            write!(line, "  [{x} {value}]")
        } else {
            write!(line, "  {x} {value}")
        };
    }
    line
}

fn ranked_line(one: &Ranked) -> String {
    let set =
        one.set.iter().map(|(k, v)| format!("{k}={}", v.as_float().map_or_else(|| v.to_string(), number)));
    let metric = one.mean.map_or_else(|| "diverged".into(), |mean| format!("{mean:.5} ± {:.5}", one.sd));
    format!("{metric}  {} {}", one.variant, set.collect::<Vec<_>>().join(" "))
}

/// A warning for each optimum that lies on the edge of its grid.
pub(in crate::commands) fn edges(curves: &[Curve], over: &str) -> Vec<String> {
    let on_edge = curves.iter().filter(|c| c.edge);
    let words = on_edge.filter_map(|c| {
        let best = c.optimum()?;
        let side = if c.best == Some(0) { "lowest" } else { "highest" };
        Some(format!(
            "{}: the best {over} is the {side} of the grid ({}): widen the grid, the true optimum may lie beyond",
            c.words(),
            number(best.x)
        ))
    });
    words.collect()
}

/// A warning for each drawn setting whose best value is close to an end of its range.
fn range_edges(plan: &Plan, best: Option<&Ranked>) -> Vec<String> {
    let Some(best) = best else { return Vec::new() };
    let near = plan.spec.parameters.iter().filter_map(|(key, parameter)| {
        let (min, max) = (parameter.min?, parameter.max?);
        let value = best.set.get(key)?;
        let x = value.as_float().or_else(|| value.as_integer().map(|n| n as f64))?;
        let place = if min > 0.0 { (x / min).ln() / (max / min).ln() } else { (x - min) / (max - min) };
        (!(EDGE..=1.0 - EDGE).contains(&place)).then(|| {
            format!("the best {key} ({}) is at an end of its range {min} … {max}: widen it", number(x))
        })
    });
    near.collect()
}

fn csv_table(plan: &Plan, journals: &Journals, metric: Metric<'_>) -> String {
    let results = journals.results();
    let keys = plan.varied();
    let mut text = format!("trial,id,variant,{},status,{}", keys.join(","), metric.name);
    text.push_str(",steps,seconds,step_seconds,gflop,parameters,images\n");
    for trial in &plan.trials {
        let variant = trial.variant.replace([',', '"', '\n'], " ");
        let values = keys.iter().map(|key| trial.set.get(key).map_or(String::new(), ToString::to_string));
        let mut row =
            format!("{},{},{variant},{}", trial.index, trial.id, values.collect::<Vec<_>>().join(","));
        let _ = match results.get(trial.id.as_str()) {
            Some(r) => {
                let value = metric.of(r, journals, plan.spec.tail).map_or(String::new(), |v| v.to_string());
                let status = match r.status {
                    Status::Finished => "finished",
                    Status::Diverged => "diverged",
                    Status::Failed => "failed",
                };
                writeln!(
                    row,
                    ",{status},{value},{},{:.3},{:.3},{:.3},{},{}",
                    r.steps,
                    r.seconds,
                    r.step_seconds,
                    r.flops / 1e9,
                    r.parameters,
                    r.images
                )
            }
            None => writeln!(row, ",missing,,,,,,,"),
        };
        text.push_str(&row);
    }
    text
}

/// A panel a setting, a point a trial.
fn scatter(plan: &Plan, journals: &Journals, metric: Metric<'_>) -> Panels {
    let results = journals.results();
    let panel = |key: &String| {
        let points: Vec<(f64, f64)> = plan
            .trials
            .iter()
            .filter_map(|t| {
                let value = metric.of(results.get(t.id.as_str())?, journals, plan.spec.tail)?;
                Some((t.number(key)?, value))
            })
            .collect();
        let best = points.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1)).map(|(i, _)| i);
        let line = Line { series: 0, points, spread: Vec::new(), marked: best, joined: false };
        Panel { title: key.clone(), lines: vec![line], alarm: false }
    };
    Panels {
        title: format!("{} of a random search", metric.name),
        subtitle: format!(
            "{} trials; the ring marks the best; diverged trials are left out",
            plan.trials.len()
        ),
        x_label: String::new(),
        y_label: metric.name.to_owned(),
        x: Scale::Log2,
        y: Scale::Linear,
        common_y: true,
        legend: Vec::new(),
        columns: 3,
        zoom: 1.2,
        panels: plan.varied().iter().map(panel).collect(),
    }
}
