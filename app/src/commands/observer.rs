//! What a user sees of a training run: the progress bar, warnings, sample grids.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use graph_builder::Graph;
use models::{Guidance, Model};
use runtime::{Runtime, SharedArena};
use train_engine::TrainError;
use train_engine::config::SampleSection;
use train_engine::trainer::{MemoryPlan, Observer, RunInfo, StepReport};

use super::of_training;
use crate::console;
use crate::execution::{Execution, Placed};
use crate::render::grid::{Caption, Column, grid, save_png};
use crate::render::progress::{Job, Pace, Progress};
use crate::sampler::{NoiseSource, Sampler, Settings};

/// Images of one run of the sampling program.
pub(super) const SAMPLE_BATCH: usize = 50;

/// Shows a run on standard error and draws its sample grids.
pub(super) struct Console {
    pub(super) runtime: Arc<Runtime>,
    pub(super) run_dir: PathBuf,
    pub(super) sample: SampleSection,
    pub(super) seed: u64,
    pub(super) execution: Execution,
    /// Whether a run may go on with other data than it began with.
    pub(super) accept_data: bool,
    pub(super) progress: Option<Progress>,
    pub(super) info: Option<RunInfo>,
    /// Compiled on the first grid.
    pub(super) sampler: Option<Sampler>,
}

impl Console {
    pub(super) fn new(
        runtime: &Arc<Runtime>,
        run_dir: &Path,
        config: &train_engine::config::TrainConfig,
    ) -> Self {
        Self {
            runtime: Arc::clone(runtime),
            run_dir: run_dir.to_path_buf(),
            sample: config.sample.clone(),
            seed: config.train.seed,
            // Its own parameters are where the run is; pictures are drawn in f32.
            execution: of_training(config).in_f32(),
            accept_data: false,
            progress: None,
            info: None,
            sampler: None,
        }
    }

    /// Ends the bar.
    pub(super) fn finish(&mut self) -> Option<Pace> {
        self.progress.take().map(Progress::finish)
    }

    /// How pictures are drawn.
    fn settings(&self, model: &Model) -> Settings {
        Settings {
            solver: self.sample.solver(model.objective),
            guidance: guidance(self.sample.guidance, model),
            guided: Guidance::usual(model.objective),
            batch: SAMPLE_BATCH.min(self.sample.per_class * model.conditioning().class_count()),
            execution: self.execution.clone(),
        }
    }

    fn say(&mut self, line: &str) {
        match &mut self.progress {
            Some(progress) => progress.say(line),
            None => console::note(line),
        }
    }
}

/// Guidance that the model can give.
pub(super) fn guidance(wanted: f64, model: &Model) -> f64 {
    if model.conditioning().has_null() { wanted } else { 1.0 }
}

/// Draws `per_class` images of each class, one class a column.
pub(super) fn draw_grid(
    sampler: &mut Sampler,
    model: &Model,
    per_class: usize,
    seed: u64,
    title: String,
    path: &Path,
) -> anyhow::Result<()> {
    let names: Vec<String> = match &model.class_names {
        Some(names) => names.clone(),
        None => (0..model.conditioning().class_count()).map(|i| i.to_string()).collect(),
    };
    let shown = model.conditioning().class_count().min(MOST_COLUMNS);
    let labels: Vec<i64> = (0..per_class * shown).map(|i| (i % shown) as i64).collect();
    let images = sampler.run(&labels, NoiseSource::Seeded { seed, first: 0 }, None, &mut |_| {})?;
    let shape = model.latent().batch(labels.len());
    let columns = Column::row_major(&names[..shown], labels.len());
    let picture = grid(&images, shape, &columns, &Caption { title: Some(title), note: None })?;
    save_png(&picture, path)
}

/// Columns of a grid of a model with many classes.
const MOST_COLUMNS: usize = 16;

impl Observer for Console {
    fn pictures(&self, model: &Model) -> train_engine::Result<Option<Graph>> {
        let settings = self.settings(model);
        Ok(Some(settings.program(model)?.optimised().map_err(models::ModelError::from)?))
    }

    fn planned(&mut self, plan: &MemoryPlan) {
        console::note(&plan.to_string());
    }

    fn started(&mut self, info: &RunInfo) {
        if info.resumed_at > 0 {
            console::note(&format!("going on after step {} of {}", info.resumed_at, info.total_steps));
        }
        console::note(&format!(
            "{:.2} M trainable parameters, {:.2} GFLOP a step of {} images, compiled in {:.1} s",
            info.trainable_parameters as f64 / 1e6,
            info.flops_per_step / 1e9,
            info.batch_size,
            info.compile_seconds
        ));
        self.progress = Some(Progress::new(Job {
            name: "train".into(),
            first_step: info.resumed_at,
            total_steps: info.total_steps,
            images_per_step: info.batch_size as f64,
            flops_per_step: info.flops_per_step,
        }));
        self.info = Some(info.clone());
    }

    fn stepped(&mut self, report: &StepReport) {
        if let Some(progress) = &mut self.progress {
            progress.update(report.step, Some(report.loss.loss));
        }
    }

    fn saved(&mut self, _: &Path) {}

    fn sample(&mut self, step: u64, model: &Model, ema: &SharedArena) -> train_engine::Result<()> {
        let path = self.run_dir.join("samples").join(format!("step-{step:08}.png"));
        let settings = self.settings(model);
        let drawn = (|| -> anyhow::Result<()> {
            let sampler = match &mut self.sampler {
                Some(sampler) => sampler,
                none => none.insert(Sampler::new(&self.runtime, model, &Placed::following(ema), &settings)?),
            };
            draw_grid(sampler, model, self.sample.per_class, self.seed, format!("step {step}"), &path)
        })();
        drawn.map_err(|e| TrainError::Picture { path, reason: format!("{e:#}") })
    }

    fn accepts_data(&mut self, _: &str) -> bool {
        self.accept_data
    }

    fn warn(&mut self, message: &str) {
        self.say(&format!("warning: {message}"));
    }
}
