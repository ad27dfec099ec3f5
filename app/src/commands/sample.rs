//! `mudit sample`: images from a checkpoint or an engine, as pictures and arrays; or a trajectory for comparison.

mod files;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use graph_builder::Shape;
use models::Model;
use runtime::{HostTensor, read_safetensors_file};
use serde_json::json;

use self::files::{Files, Made};
use super::solving::Solving;
use super::weights::{self, Which};
use super::{Machine, Target, listen};
use crate::built::BuiltEngine;
use crate::console;
use crate::execution::{Execution, Placed};
use crate::render::progress::{Job, Progress};
use crate::sampler::{NoiseSource, Sampler, Settings};
use crate::{Stopped, Usage};

/// Arguments of `mudit sample`.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// A checkpoint directory (config.json, model.safetensors, perhaps ema.safetensors) or a run directory.
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// An engine directory with `step-rows` or `step`, whose programs run as they are. With --checkpoint, it must have
    /// been built from that.
    #[arg(long)]
    engine: Option<PathBuf>,
    /// Which parameters of the checkpoint: the moving average (ema, the default) or the model's own.
    #[arg(long, value_enum)]
    weights: Option<Which>,
    #[command(flatten)]
    solving: Solving,
    /// Classes by name or number, separated by commas, repeated in turn; `@2` is number 2 whatever the names are.
    /// Default all.
    #[arg(long)]
    classes: Vec<String>,
    /// Number of images; default 8 of each class, of at most 16 classes.
    #[arg(short = 'n', long)]
    count: Option<usize>,
    /// Seed of the noise: image i has the seed `seed + i`, and is the image that its seed makes alone, here or on the server.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of the first image, for making a large set in parts.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Images computed at once.
    #[arg(long, default_value_t = 50)]
    batch: usize,
    /// Use the noise of this safetensors file: `x_T` (N,C,H,W), `noise` (steps,N,C,H,W), `y` (N).
    #[arg(long, conflicts_with_all = ["classes", "count", "seed", "first"])]
    noise: Option<PathBuf>,
    /// Write the sample after each executed step: `trajectory` (steps,N,C,H,W).
    #[arg(long)]
    save_trajectory: Option<PathBuf>,
    /// Files to write, by ending: .png (grid, one class a column), .npz (`arr_0` u8 NHWC, `arr_1` labels),
    /// .safetensors (`samples` f32, `y`). Default samples.png.
    #[arg(long, value_delimiter = ',')]
    out: Vec<PathBuf>,
    /// Print a JSON report.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    machine: Machine,
}

/// Classes of a default grid.
const DEFAULT_CLASSES: usize = 16;
/// Images a class of a default grid.
const DEFAULT_ROWS: usize = 8;

/// What makes the images, and how it computes.
enum MadeBy {
    Checkpoint(weights::Loaded, Execution),
    Engine(Box<BuiltEngine>, Execution),
}

impl MadeBy {
    fn model(&self) -> &Model {
        match self {
            Self::Checkpoint(loaded, _) => &loaded.model,
            Self::Engine(engine, _) => engine.model(),
        }
    }
}

/// Starting points from a file.
struct GivenNoise {
    x_t: Vec<f32>,
    noise: Option<Vec<f32>>,
}

impl SampleArgs {
    pub(super) fn run(mut self) -> anyhow::Result<()> {
        if self.out.is_empty() && self.save_trajectory.is_none() {
            self.out.push("samples.png".into());
        }
        let files = Files::new(&self.out, self.save_trajectory.as_deref())?;
        if self.batch == 0 {
            return Err(Usage("--batch must be 1 or more".into()).into());
        }
        let made_by = self.open()?;
        let model = made_by.model();
        let solver = self.solving.solver(model);
        let plan = solver.plan(model.objective, model.learns_variance())?;
        let image = model.latent().shape();
        let (labels, given) = match &self.noise {
            Some(path) => {
                let (labels, given) = read_noise(path, image, plan.steps.len())
                    .with_context(|| format!("`{}`", path.display()))?;
                (labels, Some(given))
            }
            None => (self.labels(model)?, None),
        };
        let n = labels.len();
        let (execution, guided) = match &made_by {
            MadeBy::Checkpoint(_, execution) => (execution.clone(), self.solving.guided(model)?),
            MadeBy::Engine(engine, execution) => (execution.clone(), self.solving.guided_by(engine)?),
        };
        files.check_writable()?;
        let runtime = self.machine.runtime_for(&execution.provider)?;
        let settings = Settings {
            solver: solver.clone(),
            guidance: self.solving.cfg,
            guided,
            batch: self.batch.min(n),
            execution,
        };
        let (mut sampler, file) = match &made_by {
            MadeBy::Checkpoint(loaded, execution) => {
                let placed = Placed::of(&loaded.parameters, model, execution)?;
                (Sampler::new(&runtime, model, &placed, &settings)?, loaded.file.clone())
            }
            MadeBy::Engine(engine, _) => {
                (Sampler::on_engine(&runtime, engine, &settings)?, engine.weights_file())
            }
        };
        let source = match &given {
            Some(g) => NoiseSource::Given { x_t: &g.x_t, noise: g.noise.as_deref() },
            None => NoiseSource::Seeded { seed: self.seed, first: self.first },
        };
        let mut trajectory = self.save_trajectory.as_ref().map(|_| Vec::new());
        let batches = n.div_ceil(sampler.batch()) as u64;
        let mut progress = Progress::new(Job {
            name: "sample".into(),
            first_step: 0,
            total_steps: batches * sampler.steps() as u64,
            images_per_step: n as f64 / (batches as f64 * sampler.steps() as f64),
            flops_per_step: 0.0,
        });
        let start = Instant::now();
        let stop = listen("solver step")?;
        let mut images = Vec::new();
        let ended = sampler.run_into(&mut images, &labels, source, trajectory.as_mut(), &mut |done| {
            progress.update(done, None);
            !stop.is_set()
        });
        drop(stop);
        let seconds = start.elapsed().as_secs_f64();
        progress.finish();
        let size = image.iter().product::<usize>();
        let kept = images.chunks(size).take_while(|image| image.iter().all(|v| v.is_finite())).count();
        let short = self.short_of(n, kept, kept * size < images.len(), ended);
        if kept > 0 {
            let steps = sampler.steps();
            let trajectory = trajectory.map(|values| first_rows(values, steps, n, kept, size));
            let (labels, images) = (&labels[..kept], &images[..kept * size]);
            files.write(Made {
                model,
                labels,
                images,
                trajectory,
                steps,
                settings: &settings,
                seed: self.seed,
            })?;
        }
        if let Some(short) = short {
            return Err(short);
        }
        let written: Vec<&PathBuf> = self.out.iter().chain(&self.save_trajectory).collect();
        if self.json {
            return console::json(&json!({
                "images": n, "seconds": seconds, "images_per_s": n as f64 / seconds, "files": written,
                "sampler": solver.kind.name(), "steps": sampler.steps(), "cfg": self.solving.cfg, "seed": self.seed,
                "seeds": (0..n as u64).map(|i| self.seed.wrapping_add(self.first + i)).collect::<Vec<_>>(),
                "weights": file,
            }));
        }
        console::out(&format!(
            "{n} images in {seconds:.1} s ({:.2} images/s, {} in {} steps)",
            n as f64 / seconds,
            solver.kind,
            sampler.steps()
        ))?;
        written.into_iter().try_for_each(|path| console::out(&path.display().to_string()))
    }

    /// Why not all `n` images were made, and what becomes of the first `kept`.
    fn short_of(
        &self,
        n: usize,
        kept: usize,
        spoiled: bool,
        ended: anyhow::Result<()>,
    ) -> Option<anyhow::Error> {
        let fate = match (kept, &self.noise) {
            (0, _) => "nothing was written".to_owned(),
            (_, Some(_)) => format!("the first {kept} of {n} images were written"),
            (_, None) => format!(
                "the first {kept} of {n} images were written; --first {} --count {} makes the rest",
                self.first + kept as u64,
                n - kept
            ),
        };
        match ended {
            Err(error) => {
                console::note(&fate);
                Some(error)
            }
            Ok(()) if spoiled => Some(anyhow!("image {kept} is not finite; {fate}")),
            Ok(()) if kept < n => Some(Stopped(format!("stopped: {fate}")).into()),
            Ok(()) => None,
        }
    }

    /// The engine where one is given, else the checkpoint; refuses what cannot be computed before it reads weights.
    fn open(&self) -> anyhow::Result<MadeBy> {
        let checkpoint = self.checkpoint.as_deref();
        match (&self.engine, checkpoint) {
            (Some(directory), _) => {
                let engine = weights::open_engine(directory, checkpoint, self.weights)?;
                let execution = self.target.execution_of(&engine, self.machine)?;
                Ok(MadeBy::Engine(Box::new(engine), execution))
            }
            (None, Some(checkpoint)) => {
                let execution = self.target.execution(self.machine)?;
                let loaded = weights::open(checkpoint, self.weights.unwrap_or(Which::Ema))?;
                Ok(MadeBy::Checkpoint(loaded, execution))
            }
            (None, None) => Err(Usage("give --checkpoint or --engine".into()).into()),
        }
    }

    fn labels(&self, model: &Model) -> anyhow::Result<Vec<i64>> {
        let classes: Vec<i64> = if self.classes.is_empty() {
            (0..model.conditioning().class_count().min(DEFAULT_CLASSES)).map(|c| c as i64).collect()
        } else {
            model.classes(&self.classes)?.into_iter().map(|class| class as i64).collect()
        };
        let count = self.count.unwrap_or(DEFAULT_ROWS * classes.len());
        if count == 0 {
            return Err(Usage("--count must be 1 or more".into()).into());
        }
        room(count, model)?;
        let first = self.first as usize;
        let end = first.checked_add(count);
        let end =
            end.ok_or_else(|| Usage(format!("--first {first} and {count} images are beyond all numbers")))?;
        Ok((first..end).map(|i| classes[i % classes.len()]).collect())
    }
}

/// Of (steps, N, …) the first `kept` of each step.
fn first_rows(values: Vec<f32>, steps: usize, n: usize, kept: usize, size: usize) -> Vec<f32> {
    if kept == n {
        return values;
    }
    (0..steps).flat_map(|k| values[k * n * size..][..kept * size].iter().copied()).collect()
}

/// Refuses a number of images that the machine has no memory for, before it is asked for piece by piece.
fn room(count: usize, model: &Model) -> anyhow::Result<()> {
    let values = model.latent().values();
    let mut images: Vec<f32> = Vec::new();
    let fits = count.checked_mul(values).is_some_and(|all| images.try_reserve_exact(all).is_ok());
    ensure!(
        fits,
        "there is no memory for {count} images of {values} values each: make them in parts, with a smaller --count and \
         --first"
    );
    Ok(())
}

fn read_noise(path: &Path, image: [usize; 3], steps: usize) -> anyhow::Result<(Vec<i64>, GivenNoise)> {
    let tensors = read_safetensors_file(path)?;
    let find = |name: &str| tensors.get(name).with_context(|| format!("tensor `{name}` is missing"));
    let (x_t, y) = (find("x_T")?, find("y")?);
    let labels = y.to_i64().context("tensor `y` must hold integers")?;
    let n = labels.len();
    ensure!(n > 0, "tensor `y` is empty");
    let [c, h, w] = image;
    let expected = Shape::from([n, c, h, w]);
    ensure!(*x_t.shape() == expected, "tensor `x_T`: expected shape {expected}, got {}", x_t.shape());
    let noise = tensors.get("noise");
    if let Some(noise) = noise {
        let expected = Shape::from([steps, n, c, h, w]);
        ensure!(
            *noise.shape() == expected,
            "tensor `noise`: expected shape {expected} for {steps} executed steps, got {}",
            noise.shape()
        );
    }
    Ok((labels, GivenNoise { x_t: x_t.to_f32(), noise: noise.map(HostTensor::to_f32) }))
}
