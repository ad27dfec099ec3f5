//! Algorithm 4: the best settings of the proxy's search, the target trained with them, and what that cost and gained.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use models::Model;
use runtime::Runtime;
use runtime::file::{check_writable, write_atomically};
use serde_json::json;
use train_engine::config::TrainConfig;
use train_engine::metrics::{self, MetricsLog};
use train_engine::signals::StopSignal;
use train_engine::sweep::Journals;
use train_engine::sweep::plan::{resolve, step_cost};
use train_engine::sweep::results::{LOSS, Metric, Ranked, ranking};
use train_engine::sweep::spec::Overrides;
use train_engine::sweep::verdict::Work;
use train_engine::trainer::{self, Outcome};
use train_engine::{checkpoint, data::Dataset};

use crate::Stopped;
use crate::commands::observer::Console;
use crate::commands::sweep::{Opened, Which, number, work};
use crate::commands::{Machine, listen, of_training};
use crate::console;
use crate::render::plot::LinePlot;

/// Folder of the search, in that of the transfer.
pub(super) const PROXY: &str = "proxy";

/// One long run.
struct Long {
    /// Step and loss of each logged row.
    losses: Vec<(u64, f64)>,
    /// Mean loss over the sweep's share of its last steps; none when it diverged.
    last: Option<f64>,
    work: Work,
}

/// What stays the same over both long runs.
struct Scene<'a> {
    runtime: &'a Arc<Runtime>,
    dataset: &'a Arc<dyn Dataset>,
    stop: &'a StopSignal,
    tail: f64,
}

/// Searches, trains, reports; goes on where it was stopped.
pub(super) fn run(which: &Which, out: &Path, machine: Machine, as_json: bool) -> anyhow::Result<()> {
    let opened = which.open(machine, true)?;
    let spec = &opened.plan.spec;
    let target_set =
        spec.target.clone().context("the sweep's file has no [target]: which model is it for?")?;
    of_training(&opened.base).check()?;
    let runtime = machine.runtime_for(&opened.base.train.provider)?;
    check_writable(out.join("transfer.json"))?;
    let stop = listen("step")?;
    let searched = work(&opened, &runtime, &stop, 0, 1)?;
    let stopped = || Err(Stopped("stopped by a signal; the same command goes on".into()).into());
    if searched.stopped {
        return stopped();
    }
    let journals = Journals::open(&opened.folder)?;
    let ranked = ranking(&opened.plan, &journals, Metric { name: LOSS, at_step: None });
    let best = ranked.first().filter(|r| r.mean.is_some()).context("every trial of the search diverged")?;
    let search = search_work(&opened, &journals);
    console::note(&format!("best of the proxy: {}", words(best)));

    let scene = Scene { runtime: &runtime, dataset: &opened.dataset, stop: &stop, tail: spec.tail };
    let target = with(&opened, best, &[&target_set])?;
    let Some(long) = scene.train(&target, &out.join("target"))? else { return stopped() };
    let baseline = match &spec.baseline {
        None => None,
        Some(set) => {
            let config = with(&opened, best, &[&target_set, set])?;
            match scene.train(&config, &out.join("baseline"))? {
                Some(long) => Some(long),
                None => return stopped(),
            }
        }
    };
    report(&opened, best, search, &long, baseline.as_ref(), out, as_json)
}

/// The target's configuration: the run, the best settings, and what replaces them.
fn with(opened: &Opened, best: &Ranked, replaced: &[&Overrides]) -> anyhow::Result<TrainConfig> {
    let mut set = opened.plan.spec.variants.get(&best.variant).cloned().unwrap_or_default();
    set.extend(best.set.clone());
    for more in replaced {
        set.extend((*more).clone());
    }
    Ok(resolve(&opened.base, &set, opened.plan.spec.head_size)?)
}

/// Everything that the search did, the diverged trials included.
fn search_work(opened: &Opened, journals: &Journals) -> Work {
    let results = journals.results();
    let of_plan = opened.plan.trials.iter().filter_map(|t| results.get(t.id.as_str()));
    of_plan.fold(Work::default(), |sum, r| sum.and(Work::of(r.parameters, r.images, r.flops, r.seconds)))
}

impl Scene<'_> {
    /// Trains one run to its end, or goes on with it; none when it was stopped.
    fn train(&self, config: &TrainConfig, directory: &Path) -> anyhow::Result<Option<Long>> {
        let mut config = config.clone();
        // Enough rows for the mean over the tail.
        config.log.every_steps = config.log.every_steps.min((config.train.steps / 100).max(1));
        let model: Model = config.model_config(self.dataset.as_ref())?;
        console::note(&format!("training `{}`: width {}", directory.display(), model.network.width()));
        let mut shown = Console::new(self.runtime, directory, &config);
        let ended = trainer::run(self.runtime, &config, directory, self.dataset, self.stop, &mut shown);
        shown.finish();
        let diverged = match ended {
            Ok(Outcome::Interrupted(_)) => return Ok(None),
            Ok(_) => false,
            Err(train_engine::TrainError::NotFinite { step, .. }) => {
                console::note(&format!("diverged at step {step}"));
                true
            }
            Err(error) => return Err(error.into()),
        };
        let steps = config.train.steps;
        let rows = metrics::read(&directory.join(MetricsLog::FILE))?;
        let loss = |(step, row): &(u64, serde_json::Map<String, serde_json::Value>)| {
            Some((*step, row.get("loss")?.as_f64()?))
        };
        let losses: Vec<(u64, f64)> = rows.iter().filter_map(loss).collect();
        let from = steps as f64 * (1.0 - self.tail);
        let tail: Vec<f64> = losses.iter().filter(|(s, _)| *s as f64 > from).map(|(_, l)| *l).collect();
        ensure!(diverged || !tail.is_empty(), "`{}` holds no losses of its last steps", directory.display());
        let last = (!diverged).then(|| tail.iter().sum::<f64>() / tail.len() as f64);
        let seconds =
            checkpoint::latest_valid(directory, &console::note)?.map_or(0.0, |(_, s)| s.elapsed_seconds);
        let cost = step_cost(&config, &model)?;
        let images = steps * config.train.batch_size as u64;
        let work = Work::of(cost.parameters, images, steps as f64 * cost.flops, seconds);
        Ok(Some(Long { losses, last, work }))
    }
}

/// The first step from which on the smoothed loss of `run` is below `level`.
fn reaches(run: &Long, level: f64) -> Option<u64> {
    let points: Vec<(f64, f64)> = run.losses.iter().map(|(s, l)| (*s as f64, *l)).collect();
    let smooth = crate::render::plot::smooth(&points, 4.0);
    let above = smooth.iter().rposition(|(_, loss)| *loss > level);
    smooth.get(above.map_or(0, |i| i + 1)).map(|(step, _)| *step as u64)
}

fn report(
    opened: &Opened,
    best: &Ranked,
    search: Work,
    target: &Long,
    baseline: Option<&Long>,
    out: &Path,
    as_json: bool,
) -> anyhow::Result<()> {
    let ratio = search.over(target.work);
    let gain = baseline.and_then(|b| Some((b.last?, target.last?)));
    let sooner = baseline.and_then(|b| {
        let step = reaches(target, b.last?)?;
        Some((step, target.losses.last()?.0))
    });
    let report = json!({
        "best": best, "trials": opened.plan.trials.len(), "search": search, "target": target.work,
        "target_loss": target.last, "cost_ratio": ratio, "baseline_loss": baseline.map(|b| b.last),
        "baseline": baseline.map(|b| b.work),
        "gain": gain.map(|(b, t)| b - t), "reaches_baseline_at_step": sooner.map(|s| s.0),
    });
    let file = out.join("transfer.json");
    write_atomically(&file, |o| writeln!(o, "{report:#}"))?;
    let svg = out.join("transfer.svg");
    let line = |run: &Long| run.losses.iter().map(|(s, l)| (*s as f64, *l)).collect::<Vec<_>>();
    let mut plot = LinePlot::new("The target with the proxy's settings", "step", "loss")
        .subtitle(words(best))
        .log_y()
        .smoothed("target", line(target), 4.0);
    if let Some(baseline) = baseline {
        plot = plot.smoothed("baseline", line(baseline), 4.0);
    }
    plot.save(&svg)?;
    if as_json {
        return console::json(&report);
    }
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    console::out(&format!("best of {} trials on the proxy: {}", opened.plan.trials.len(), words(best)))?;
    console::out(&format!(
        "cost of the search over that of the target, equation (1): {} by parameters x images, {} by counted FLOP, {} by time",
        percent(ratio.parameter_images),
        percent(ratio.flops),
        percent(ratio.seconds)
    ))?;
    let loss = |l: Option<f64>| l.map_or_else(|| "diverged".into(), |l| format!("{l:.4}"));
    console::out(&format!("target: loss {}", loss(target.last)))?;
    if let Some(baseline) = baseline {
        console::out(&format!("baseline: loss {}", loss(baseline.last)))?;
        if let Some((b, t)) = gain {
            console::out(&format!("gain: {:+.4} of loss ({:+.1} %)", b - t, 100.0 * (b - t) / b))?;
        }
        if let Some((step, of)) = sooner {
            console::out(&format!(
                "the target reaches the baseline's last loss at step {step} of {of}: {:.2} times sooner",
                of as f64 / step as f64
            ))?;
        }
    }
    [&svg, &file].iter().try_for_each(|path| console::out(&path.display().to_string()))
}

fn words(best: &Ranked) -> String {
    let set =
        best.set.iter().map(|(k, v)| format!("{k} = {}", v.as_float().map_or_else(|| v.to_string(), number)));
    let mean = best.mean.map_or_else(String::new, |m| format!(" (loss {m:.4} ± {:.4})", best.sd));
    format!("{}{mean}", set.collect::<Vec<_>>().join(", "))
}
