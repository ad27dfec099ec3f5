//! `mudit train`: a run from its configuration file; the same command goes on where it stopped.

use std::path::{Path, PathBuf};

use clap::Args;
use runtime::memory::peak_resident_bytes;
use serde_json::json;
use train_engine::config::TrainConfig;
use train_engine::metrics::{self, MetricsLog};
use train_engine::trainer::{self, Outcome, RUN_CONFIG_FILE};
use train_engine::{checkpoint, data};

use super::observer::Console;
use super::{Machine, TargetOverrides, listen, of_training};
use crate::console;
use crate::profile::memory::megabytes;
use crate::render::plot::LinePlot;
use crate::render::progress::duration;
use crate::{Stopped, Usage};

/// Arguments of `mudit train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The run's TOML file; left out, that of the run directory.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Overrides such as `train.steps=1000`; may be repeated. `train.from=RUN` starts from the weights of a run, a checkpoint or
    /// a .safetensors file.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// The run's directory.
    #[arg(long)]
    out: PathBuf,
    /// Go on with a run though its data set has changed: other classes of the same number, images or labels.
    #[arg(long)]
    accept_data_change: bool,
    /// Print the resolved configuration and stop.
    #[arg(long)]
    dry_run: bool,
    /// Print the outcome as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: TargetOverrides,
    #[command(flatten)]
    machine: Machine,
}

impl TrainArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mut config = self.config()?;
        self.target.apply(&mut config, self.machine);
        if self.dry_run {
            return console::out(config.to_toml()?.trim_end());
        }
        of_training(&config).check_training()?;
        let dataset = data::open(&config.data, self.machine.offline, &console::note)?;
        let runtime = self.machine.runtime_for(&config.train.provider)?;
        let stop = listen("step")?;
        let mut shown = Console::new(&runtime, &self.out, &config);
        shown.accept_data = self.accept_data_change;
        let result = trainer::run(&runtime, &config, &self.out, &dataset, &stop, &mut shown);
        let pace = shown.finish();
        drop(stop);
        let outcome = result?;
        draw_loss(&self.out);
        let peak = peak_resident_bytes();
        if self.json {
            let (word, step) = match outcome {
                Outcome::Finished => ("finished", config.train.steps),
                Outcome::AlreadyFinished => ("already-finished", config.train.steps),
                Outcome::Interrupted(step) => ("interrupted", step),
            };
            let told = console::json(&json!({
                "outcome": word, "step": step, "run": self.out,
                "images_per_s": pace.map(|p| p.images_per_s), "gflops_per_s": pace.map(|p| p.gflops_per_s),
                "peak_memory_bytes": peak,
            }));
            return if matches!(outcome, Outcome::Interrupted(_)) {
                Err(stopped(&self.out, step))
            } else {
                told
            };
        }
        let (run, quoted) = (self.out.display(), console::quoted(&self.out));
        match outcome {
            Outcome::Finished => {
                let seconds = pace.map_or(0.0, |p| p.seconds);
                let memory =
                    peak.map_or(String::new(), |b| format!(", {} MB of memory at most", megabytes(b)));
                console::out(&format!(
                    "trained {} steps in {}{memory}: {run}",
                    config.train.steps,
                    duration(seconds)
                ))?;
                console::out(&format!("pictures: mudit sample --checkpoint {quoted} --out samples.png"))
            }
            Outcome::AlreadyFinished => {
                let why = if config.train.decay_end().is_none() {
                    "to go on:"
                } else {
                    "its learning rate has decayed, so a new run begins with its weights:"
                };
                let command = further(&config, &self.out);
                console::out(&format!("{run} has its {} steps; {why} {command}", config.train.steps))
            }
            Outcome::Interrupted(step) => Err(stopped(&self.out, step)),
        }
    }

    fn config(&self) -> anyhow::Result<TrainConfig> {
        let path = match &self.config {
            Some(path) => path.clone(),
            None => self.out.join(RUN_CONFIG_FILE),
        };
        if self.config.is_none() && !path.is_file() {
            return Err(Usage(format!(
                "no configuration: give --config FILE.toml, or an --out that holds a run (`{}` is not there)",
                path.display()
            ))
            .into());
        }
        Ok(TrainConfig::load(&path, &self.overrides)?)
    }
}

/// A run that a signal stopped after a step.
pub(super) fn stopped(run: &Path, step: u64) -> anyhow::Error {
    let run = run.display();
    Stopped(match step {
        0 => format!("stopped before the first step; the same command starts it again: {run}"),
        _ => format!("stopped and saved after step {step}; the same command goes on from there: {run}"),
    })
    .into()
}

/// The command that trains a finished run further: where the rate decays, a longer run would be another one from its
/// first step.
pub(super) fn further(config: &TrainConfig, run_dir: &Path) -> String {
    let (run, steps) = (console::quoted(run_dir), config.train.steps);
    if config.train.decay_end().is_none() {
        return format!("mudit train --out {run} --set train.steps={}", 2 * steps);
    }
    let mut next = run_dir.as_os_str().to_owned();
    next.push("-2");
    format!(
        "mudit train --config {} --set train.from={run} --out {}",
        console::quoted(run_dir.join(RUN_CONFIG_FILE)),
        console::quoted(next)
    )
}

/// Draws `loss.svg` from the run's metrics; a run is not worth less without it.
pub(super) fn draw_loss(run_dir: &Path) {
    if let Err(error) = try_draw_loss(run_dir) {
        console::note(&format!("warning: the loss is not drawn: {error:#}"));
    }
}

fn try_draw_loss(run_dir: &Path) -> anyhow::Result<()> {
    let path = run_dir.join(MetricsLog::FILE);
    if !path.is_file() {
        return Ok(());
    }
    let rows = metrics::read(&path)?;
    let points: Vec<(f64, f64)> =
        rows.iter().filter_map(|(step, row)| Some((*step as f64, row.get("loss")?.as_f64()?))).collect();
    if points.len() < 2 {
        return Ok(());
    }
    let count = points.len();
    let half_life = (count as f64 / 100.0).max(1.0);
    let steps = checkpoint::list(run_dir)?.last().map_or(0, |(step, _)| *step);
    LinePlot::new("Training loss", "step", "loss")
        .subtitle(format!("{count} points, newest checkpoint at step {steps}"))
        .log_y()
        .smoothed("loss", points, half_life)
        .save(&run_dir.join("loss.svg"))
}
