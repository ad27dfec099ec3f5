//! `mudit sweep run`: the trials that have no result yet.

use std::sync::Arc;

use clap::Args;
use runtime::Runtime;
use serde_json::json;
use train_engine::signals::StopSignal;
use train_engine::sweep::worker::News;
use train_engine::sweep::{Journals, Status, Summary, Work};

use super::super::{listen, of_training};
use super::{Machine, Opened, Which, number};
use crate::console;
use crate::render::progress::{Job, Progress, duration};
use crate::{Stopped, Usage};

/// Arguments of `mudit sweep run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    which: Which,
    /// This worker's number, from 0, of --of that share the trials; left out, it takes any that is free.
    #[arg(long, requires = "of")]
    index: Option<usize>,
    /// Number of workers that share the trials.
    #[arg(long, requires = "index")]
    of: Option<usize>,
    /// Print the outcome as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

impl RunArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (index, of) = (self.index.unwrap_or(0), self.of.unwrap_or(1));
        if index >= of {
            return Err(Usage(format!("--index {index} is not below --of {of}")).into());
        }
        let opened = self.which.open(self.machine, true)?;
        of_training(&opened.base).check()?;
        let runtime = self.machine.runtime_for(&opened.base.train.provider)?;
        let stop = listen("step")?;
        let summary = work(&opened, &runtime, &stop, index, of)?;
        let journals = Journals::open(&opened.folder)?;
        let results = journals.results();
        let done = opened.plan.trials.iter().filter(|t| results.contains_key(t.id.as_str())).count();
        let all = opened.plan.trials.len();
        if summary.stopped {
            let text =
                format!("stopped by a signal with {done} of {all} trials done; the same command goes on");
            return Err(Stopped(text).into());
        }
        if self.json {
            return console::json(&json!({
                "trials": all, "done": done, "overhead": summary.overhead(), "this_worker": summary,
                "compilations_of_all_workers": journals.compilations(),
            }));
        }
        console::out(&format!(
            "{} trials ended here ({} diverged, {} failed), {} compilations, {} in all, {:.1} % of it outside steps and compiling",
            summary.ended,
            summary.diverged,
            summary.failed,
            summary.compilations,
            duration(summary.seconds),
            100.0 * summary.overhead()
        ))?;
        let folder = console::quoted(&opened.folder);
        if summary.elsewhere > 0 {
            console::out(&format!("{} trials are in the hands of other workers", summary.elsewhere))?;
        }
        console::out(&format!("{done} of {all} trials have results: mudit sweep collect --out {folder}"))
    }
}

/// Runs what is left of a sweep and shows it.
pub(in crate::commands) fn work(
    opened: &Opened,
    runtime: &Arc<Runtime>,
    stop: &StopSignal,
    index: usize,
    of: usize,
) -> anyhow::Result<Summary> {
    let journals = Journals::open(&opened.folder)?;
    let mine = || opened.plan.trials.iter().filter(|t| t.index % of == index);
    let steps = |done: bool| -> u64 {
        mine().filter(|t| journals.has(&t.id) == done).map(|t| t.config.train.steps).sum()
    };
    let (before, left) = (steps(true), steps(false));
    let mut progress = Progress::new(Job {
        name: format!("sweep of {}", mine().count()),
        first_step: before,
        total_steps: before + left,
        images_per_step: 0.0,
        flops_per_step: 0.0,
    });
    let mut done = before;
    let mut in_trial = 0;
    let work = Work {
        plan: &opened.plan,
        folder: &opened.folder,
        runtime,
        dataset: &opened.dataset,
        index,
        of,
        stop,
    };
    let summary = work.run(&mut |news| match news {
        News::Compiling(trial) => progress.say(&format!(
            "compiling: width {}, depth {}, batch {}",
            trial.model.network.width(),
            trial.model.network.depth(),
            trial.config.train.batch_size
        )),
        News::Planned(plan) => progress.say(&plan.to_string()),
        News::Unrecorded(reason) => {
            progress.say(&format!("the training step is not recorded as a CUDA graph: {reason}"));
        }
        News::Unlocked(stand_in) => progress.say(&format!(
            "warning: {stand_in}; workers on several machines better share the trials by number, with --index and --of"
        )),
        News::Held(trial, holder) => {
            progress.say(&format!("warning: trial {} is left to {holder}", trial.index));
        }
        News::Started(_) => in_trial = 0,
        News::Stepped(_, loss) => {
            in_trial += 1;
            progress.update(done + in_trial, Some(loss));
        }
        News::Ended(trial, result) => {
            done += trial.config.train.steps; // a diverged trial has no more to do
            progress.update(done, None);
            let set = trial.set.iter().map(|(key, value)| {
                let value = value.as_float().map_or_else(|| value.to_string(), number);
                format!("{}={value}", key.rsplit('.').next().unwrap_or(key))
            });
            let outcome = match (result.status, result.loss) {
                (Status::Finished, Some(loss)) => format!("loss {loss:.4}"),
                (Status::Failed, _) => {
                    format!("failed: {}", result.reason.as_deref().unwrap_or("no reason kept"))
                }
                _ => format!("diverged at step {}", result.steps),
            };
            let set = set.collect::<Vec<_>>().join(" ");
            progress.say(&format!("trial {} {} {set}: {outcome}", trial.index, trial.variant));
        }
    });
    progress.finish();
    Ok(summary?)
}
