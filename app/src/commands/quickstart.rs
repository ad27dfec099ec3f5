//! `mudit quickstart`: one command from nothing to pictures.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use models::{Guidance, Solver};
use runtime::Runtime;
use runtime::file::check_writable;
use serde_json::json;
use train_engine::config::TrainConfig;
use train_engine::data::{self, BatchPlan, Dataset, Loader};
use train_engine::trainer::{self, Outcome, RUN_CONFIG_FILE, Trainer};

use super::fid;
use super::fid::quick::{self, Distances};
use super::observer::{Console, SAMPLE_BATCH, draw_grid, guidance};
use super::train::{draw_loss, further, stopped};
use super::weights::{self, Which};
use super::{Machine, listen, of_training};
use crate::Usage;
use crate::console;
use crate::execution::Placed;
use crate::render::progress::duration;
use crate::sampler::{Sampler, Settings};

/// Arguments of `mudit quickstart`.
#[derive(Debug, Args)]
pub struct QuickstartArgs {
    /// Minutes of training.
    #[arg(long, default_value_t = 4.0)]
    minutes: f64,
    /// The run's directory.
    #[arg(long, default_value = "runs/quickstart")]
    out: PathBuf,
    /// Pictures that are made to measure their distance to real images; 0 leaves that out.
    #[arg(long, default_value_t = 1000)]
    fid_images: u64,
    /// Overrides of the settings, such as `train.seed=1`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Print the outcome as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

/// The settings without the number of steps.
const SETTINGS: &str = include_str!("quickstart.toml");
/// Steps of the pictures whose distance is measured: half of the shown ones', to be done in a minute.
const DISTANCE_STEPS: usize = 25;
/// Steps before the clock starts.
const WARM_UP: u64 = 3;
/// Seconds that the speed is measured for, at most, and as a part of the whole training.
const MEASURE: (f64, f64) = (5.0, 0.02);

impl QuickstartArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if !(self.minutes > 0.0 && self.minutes.is_finite()) {
            return Err(Usage(format!("--minutes must be above 0, not {}", self.minutes)).into());
        }
        let saved = self.out.join(RUN_CONFIG_FILE);
        let resumed = saved.is_file();
        let mut config = if resumed {
            TrainConfig::load(&saved, &self.overrides)?
        } else {
            TrainConfig::parse(SETTINGS, "the quickstart's settings", &self.overrides)?
        };
        if config.train.threads == 0 {
            config.train.threads = self.machine.threads;
        }
        if resumed {
            console::note(&format!(
                "found a run of {} steps in `{}`; --minutes decides about new runs only",
                config.train.steps,
                self.out.display()
            ));
        }
        let pictures = self.out.join("samples.png");
        check_writable(&pictures)?;
        let runtime = self.machine.runtime()?;
        let dataset = data::open(&config.data, self.machine.offline, &console::note)?;
        let chosen = self.overrides.iter().any(|o| o.starts_with("train.steps"));
        if !resumed && !chosen {
            console::note("measuring this machine's speed");
            config.train.steps = self.fitting_steps(&runtime, &config, &dataset)?;
        }
        let stop = listen("step")?;
        let mut shown = Console::new(&runtime, &self.out, &config);
        let result = trainer::run(&runtime, &config, &self.out, &dataset, &stop, &mut shown);
        let pace = shown.finish();
        drop(stop);
        let outcome = result?;
        let (run, quoted) = (self.out.display(), console::quoted(&self.out));
        if let Outcome::Interrupted(step) = outcome {
            return Err(stopped(&self.out, step));
        }
        if outcome == Outcome::Finished || !pictures.is_file() {
            draw_loss(&self.out);
            self.draw(&runtime, &config, &pictures)?;
        }
        let distances = (self.fid_images > 0).then(|| self.distances(&runtime, &config)).transpose()?;
        if self.json {
            return console::json(&json!({
                "run": self.out, "steps": config.train.steps, "pictures": pictures,
                "already_finished": outcome == Outcome::AlreadyFinished,
                "seconds": pace.map(|p| p.seconds), "images_per_s": pace.map(|p| p.images_per_s),
                "gflops_per_s": pace.map(|p| p.gflops_per_s),
                "fid_images": self.fid_images, "fid": distances.map(|d| d.samples),
                "fid_of_training_images": distances.map(|d| d.floor), "fid_of_noise": distances.map(|d| d.noise),
            }));
        }
        match pace {
            Some(pace) => console::out(&format!(
                "trained {} steps in {} ({:.0} images/s, {:.0} GFLOP/s)",
                pace.steps,
                duration(pace.seconds),
                pace.images_per_s,
                pace.gflops_per_s
            ))?,
            None => console::out(&format!("{run} is finished: it has its {} steps", config.train.steps))?,
        }
        if let Some(d) = distances {
            console::out(&format!(
                "Fréchet distance to the test set, {} images: {:.1} (real training images {:.1}, noise {:.0})",
                self.fid_images, d.samples, d.floor, d.noise
            ))?;
        }
        for (file, what) in [
            ("samples.png", "pictures, one class a column"),
            ("loss.svg", "the loss"),
            ("metrics.jsonl", "every logged step"),
            ("checkpoints/latest/", "the model, its average, the optimizer"),
            (RUN_CONFIG_FILE, "all settings"),
            ("fid.json", "the distance, and how it was measured"),
        ] {
            if !self.out.join(file).exists() {
                continue;
            }
            console::out(&format!("  {:40} {what}", self.out.join(file).display()))?;
        }
        console::out("next:")?;
        console::out(&format!(
            "  mudit sample --checkpoint {quoted} --classes 5,8,9 --cfg 3 --out more.png"
        ))?;
        console::out(&format!("  {}", further(&config, &self.out)))?;
        console::out("  mudit quickstart --minutes 15 --out runs/longer")?;
        console::out("(`cargo run --release --` in place of `mudit` runs it from this folder)")
    }

    /// How many steps fit into the minutes: a short run on throw-away parameters.
    fn fitting_steps(
        &self,
        runtime: &Arc<Runtime>,
        config: &TrainConfig,
        dataset: &Arc<dyn Dataset>,
    ) -> anyhow::Result<u64> {
        let wanted = self.minutes * 60.0;
        let limit = MEASURE.0.min(MEASURE.1 * wanted).max(0.5);
        let model = config.model_config(dataset.as_ref())?;
        let mut trainer = Trainer::new(runtime, config, &model)?;
        let plan = BatchPlan::new(config.train.seed, dataset.len(), config.train.batch_size)?;
        let (flip, data) = (config.data.flip, &config.data);
        let loader =
            Loader::start(Arc::clone(dataset), plan, flip, 0..u64::MAX / 2, data.prefetch, data.workers)?;
        let mut start = Instant::now();
        let mut timed = 0;
        for batch in loader {
            let batch = batch?;
            trainer.step(&batch)?;
            if batch.step + 1 == WARM_UP {
                start = Instant::now();
            } else if batch.step >= WARM_UP {
                timed += 1;
                if start.elapsed().as_secs_f64() >= limit {
                    break;
                }
            }
        }
        let per_second = timed as f64 / start.elapsed().as_secs_f64();
        Ok(((wanted - start.elapsed().as_secs_f64()).max(1.0) * per_second).ceil() as u64)
    }

    /// How far the pictures are from real ones.
    fn distances(&self, runtime: &Arc<Runtime>, config: &TrainConfig) -> anyhow::Result<Distances> {
        let loaded = weights::open(&self.out, Which::Ema)?;
        let section = &config.sample;
        let kind = section.solver(loaded.model.objective).kind;
        let settings = Settings {
            solver: Solver::new(kind, DISTANCE_STEPS.min(section.steps)),
            guidance: guidance(section.guidance, &loaded.model),
            guided: Guidance::All,
            batch: SAMPLE_BATCH,
            execution: of_training(config),
        };
        let recipe = fid::set::recipe(&self.out, &loaded, &settings, config.train.seed, self.fid_images)?;
        quick::distances(runtime, &self.out, config.data.path.as_deref(), recipe, self.machine)
    }

    fn draw(
        &self,
        runtime: &Arc<Runtime>,
        config: &TrainConfig,
        path: &std::path::Path,
    ) -> anyhow::Result<()> {
        let loaded = weights::open(&self.out, Which::Ema)?;
        let model = &loaded.model;
        let section = &config.sample;
        let settings = Settings {
            solver: section.solver(model.objective),
            guidance: guidance(section.guidance, model),
            guided: Guidance::All,
            batch: SAMPLE_BATCH,
            execution: of_training(config),
        };
        let placed = Placed::of(&loaded.parameters, model, &settings.execution)?;
        let mut sampler = Sampler::new(runtime, model, &placed, &settings)?;
        let title = format!("Fashion-MNIST, {} training steps", config.train.steps);
        draw_grid(&mut sampler, model, section.per_class, config.train.seed, title, path)
    }
}
