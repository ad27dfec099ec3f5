//! `mudit sample`: images from a checkpoint or an engine, as pictures and arrays; or a trajectory for comparison.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Args;
use graph_builder::Shape;
use indexmap::IndexMap;
use models::{DitConfig, Solver};
use runtime::{HostTensor, read_safetensors_file, write_safetensors_file};
use serde_json::json;

use super::solving::Solving;
use super::weights::{self, Which};
use super::{Machine, Target};
use crate::Usage;
use crate::built::BuiltEngine;
use crate::console;
use crate::execution::{Execution, Placed};
use crate::render::arrays::SampleArchive;
use crate::render::grid::{Caption, Column, grid, save_png};
use crate::render::pixels;
use crate::render::progress::{Job, Progress};
use crate::sampler::{NoiseSource, Sampler, Settings};

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
    /// Seed of the noise; image i of a seed is always the same.
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
    fn model(&self) -> &DitConfig {
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
        if let Some(path) = self.out.iter().find(|p| ending(p).is_none()) {
            return Err(Usage(format!("`{}` must end in .png, .npz or .safetensors", path.display())).into());
        }
        if self.batch == 0 {
            return Err(Usage("--batch must be 1 or more".into()).into());
        }
        let made_by = self.open()?;
        let model = made_by.model();
        let solver = self.solving.solver(model);
        let plan = solver.plan(model.objective, model.learn_sigma)?;
        let image = [model.in_channels, model.input_size, model.input_size];
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
        let images =
            sampler.run(&labels, source, trajectory.as_mut(), &mut |done| progress.update(done, None))?;
        let seconds = start.elapsed().as_secs_f64();
        progress.finish();
        ensure!(images.iter().all(|v| v.is_finite()), "an image is not finite; nothing was written");
        self.write(model, &labels, &images, trajectory, sampler.steps(), &solver)?;
        let written: Vec<&PathBuf> = self.out.iter().chain(&self.save_trajectory).collect();
        if self.json {
            return console::json(&json!({
                "images": n, "seconds": seconds, "images_per_s": n as f64 / seconds, "files": written,
                "sampler": solver.kind.name(), "steps": sampler.steps(), "cfg": self.solving.cfg, "seed": self.seed,
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

    fn labels(&self, model: &DitConfig) -> anyhow::Result<Vec<i64>> {
        let classes: Vec<i64> = if self.classes.is_empty() {
            (0..model.num_classes.min(DEFAULT_CLASSES)).map(|c| c as i64).collect()
        } else {
            model.classes(&self.classes)?.into_iter().map(|class| class as i64).collect()
        };
        let count = self.count.unwrap_or(DEFAULT_ROWS * classes.len());
        if count == 0 {
            return Err(Usage("--count must be 1 or more".into()).into());
        }
        let first = self.first as usize;
        Ok((first..first + count).map(|i| classes[i % classes.len()]).collect())
    }

    fn write(
        &self,
        model: &DitConfig,
        labels: &[i64],
        images: &[f32],
        trajectory: Option<Vec<f32>>,
        steps: usize,
        solver: &Solver,
    ) -> anyhow::Result<()> {
        let (n, c, side) = (labels.len(), model.in_channels, model.input_size);
        let shape = [n, c, side, side];
        let meta = BTreeMap::from([
            ("sampler".to_owned(), solver.kind.to_string()),
            ("cfg".to_owned(), self.solving.cfg.to_string()),
            ("seed".to_owned(), self.seed.to_string()),
        ]);
        for path in &self.out {
            match ending(path) {
                Some(Ending::Png) => {
                    let names: Vec<String> = model.class_names.clone().unwrap_or_default();
                    let columns = Column::by_class(labels, &names, n);
                    let title = format!("{} {steps} steps, guidance {}", solver.kind, self.solving.cfg);
                    let caption = Caption { title: Some(title), note: None };
                    save_png(&grid(images, shape, &columns, &caption)?, path)?;
                }
                Some(Ending::Npz) => {
                    let mut archive = SampleArchive::create(path, n, [side, side, c])?;
                    archive.push(&pixels::channels_last(images, shape)?)?;
                    archive.finish(labels)?;
                }
                Some(Ending::Safetensors) => {
                    let mut tensors = IndexMap::new();
                    tensors.insert("samples".to_owned(), HostTensor::f32(shape, images.to_vec())?);
                    tensors.insert("y".to_owned(), HostTensor::i64([n], labels.to_vec())?);
                    write_safetensors_file(path, &tensors, &meta)?;
                }
                None => bail!("internal: an unchecked ending of `{}`", path.display()),
            }
        }
        if let (Some(path), Some(values)) = (&self.save_trajectory, trajectory) {
            let mut tensors = IndexMap::new();
            let tensor = HostTensor::f32([steps, n, c, side, side], values)?;
            tensors.insert("trajectory".to_owned(), tensor);
            write_safetensors_file(path, &tensors, &meta)?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Ending {
    Png,
    Npz,
    Safetensors,
}

fn ending(path: &Path) -> Option<Ending> {
    match path.extension()?.to_str()? {
        "png" => Some(Ending::Png),
        "npz" => Some(Ending::Npz),
        "safetensors" => Some(Ending::Safetensors),
        _ => None,
    }
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
