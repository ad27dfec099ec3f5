//! A `step` program, a solver and seeds → images. Shared by every command that samples.
//!
//! An image is a function of its own seed: image i of a call with seed s has the seed s + i, and is the one that this seed
//! makes alone, here, in a preview or on the server.

use std::sync::Arc;

use anyhow::{Context, ensure};
use graph_builder::Graph;
use models::{
    COEFFICIENTS, Guidance, Model, ModelError, Objective, ProgramKind, ProgramSpec, Solver, SolverKind,
    SolverPlan,
};
use runtime::cuda::kernels::NormalStream;
use runtime::{Binding, Runtime};
use train_engine::random::{Purpose, Stream};

use crate::Usage;
use crate::built::BuiltEngine;
use crate::console;
use crate::execution::{Execution, Placed};
use crate::gpu_memory::SamplingPlan;

/// The solver where none is asked for.
pub fn default_sampler(objective: Objective) -> SolverKind {
    match objective {
        Objective::Ddpm => SolverKind::Ddpm,
        Objective::Flow => SolverKind::Euler,
    }
}

/// The steps of a solver where none are asked for.
pub fn default_steps(sampler: SolverKind) -> usize {
    if sampler == SolverKind::Ddpm { 250 } else { 50 }
}

/// Reads channels of guidance: a number, `all` or `off`.
///
/// # Errors
/// What is expected.
pub fn channels(text: &str) -> Result<Guidance, String> {
    match text {
        "all" => Ok(Guidance::All),
        "off" => Ok(Guidance::Off),
        n => match n.parse() {
            Ok(n) if n > 0 => Ok(Guidance::First(n)),
            _ => Err("expected a number of channels from 1, `all` or `off`".into()),
        },
    }
}

/// Channels of guidance as [`channels`] reads them.
pub fn channels_text(guided: Guidance) -> String {
    match guided {
        Guidance::All => "all".to_owned(),
        Guidance::Off => "off".to_owned(),
        Guidance::First(n) => n.to_string(),
    }
}

/// Rows of a guided image where the unguided answer is a row of its own.
const GUIDED_ROWS: usize = 2;

/// How images are made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Update rule, steps, η, shift.
    pub solver: Solver,
    /// Scale of classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// Channels that guidance changes.
    pub guided: Guidance,
    /// Images of one run of the program.
    pub batch: usize,
    /// Who computes, and in what.
    pub execution: Execution,
}

impl Settings {
    /// The channels that the program guides.
    fn channels(&self) -> Guidance {
        if self.guidance == 1.0 { Guidance::Off } else { self.guided }
    }

    /// The program of one step, before the passes.
    ///
    /// # Errors
    /// Guidance that the model cannot give.
    pub fn program(&self, model: &Model) -> Result<Graph, ModelError> {
        model.program(&ProgramSpec::new(ProgramKind::Step, self.batch).guided(self.channels()))
    }
}

/// Where the starting points and the solver's noise come from.
#[derive(Clone, Copy, Debug)]
pub enum NoiseSource<'a> {
    /// Drawn: image i of the call has the seed `seed + first + i`.
    Seeded {
        /// The user's seed.
        seed: u64,
        /// Number of the first image.
        first: u64,
    },
    /// Given: `x_T` (N, C, H, W) and, for solvers that need it, `noise` (steps, N, C, H, W).
    Given {
        /// Starting points.
        x_t: &'a [f32],
        /// Noise of each executed step.
        noise: Option<&'a [f32]>,
    },
}

/// Where an image starts.
fn starting_point(seed: u64) -> Stream {
    Stream::new(seed, Purpose::SampleInit, 0, 0)
}

/// What a stochastic solver adds to an image at a step.
fn step_noise(seed: u64, step: usize) -> Stream {
    Stream::new(seed, Purpose::SampleNoise, step as u64, 0)
}

/// The seed of an image by its number.
fn seed_of(seed: u64, image: u64) -> u64 {
    seed.wrapping_add(image)
}

/// A compiled sampling step bound to a model's parameters.
#[derive(Debug)]
pub struct Sampler {
    binding: Binding,
    plan: SolverPlan,
    /// Rows of one run of the program.
    rows: usize,
    /// Rows that an image takes: 2 where the program wants the unguided answer as a row of its own.
    rows_each: usize,
    /// Whether rows name the row with their unguided answer.
    paired: bool,
    /// Values of an image.
    image: usize,
    /// Classes, the one that stands for none included.
    label_rows: usize,
    null_class: Option<usize>,
    guidance: Option<f32>,
}

impl Sampler {
    /// Compiles the `step` program of `model` and binds it to `parameters`.
    ///
    /// # Errors
    /// A solver that does not fit the model's objective, guidance without a null class, a batch that does not fit a GPU's
    /// memory, a session that does not load.
    pub fn new(
        runtime: &Arc<Runtime>,
        model: &Model,
        parameters: &Placed,
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        if let Some(plan) = SamplingPlan::before(settings, model)? {
            console::note(&plan.to_string());
            plan.check(settings, model)?;
        }
        let graph = settings.program(model)?;
        let execution = &settings.execution;
        let binding = parameters.load(runtime, &graph, execution, &execution.session_options())?;
        Self::over(binding, settings.batch, model, settings)
    }

    /// Loads a program of an engine: `step` where it does what is asked for, else `step-rows`, in the smallest of the
    /// engine's batch sizes that holds [`Settings::batch`] images, or its largest.
    ///
    /// # Errors
    /// As [`Sampler::new`]; an engine without such a program, with the command that adds it.
    pub fn on_engine(
        runtime: &Arc<Runtime>,
        engine: &BuiltEngine,
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        let guided = settings.guidance != 1.0;
        let fits = (engine.guided() != Guidance::Off) == guided;
        // In `step` guidance is for all images or for none; in `step-rows` for each.
        let each = if guided { GUIDED_ROWS } else { 1 };
        let found = [(ProgramKind::Step, 1, fits), (ProgramKind::StepRows, each, fits || !guided)];
        let mut found = found.into_iter().filter(|(_, _, fits)| *fits).filter_map(|(kind, each, _)| {
            let batches: Vec<usize> = engine.batches(kind).into_iter().filter(|rows| *rows >= each).collect();
            let holding = batches.iter().find(|rows| **rows >= settings.batch * each);
            Some((kind, *holding.or(batches.last())?))
        });
        let Some((kind, rows)) = found.next() else {
            if guided && engine.guided() == Guidance::Off {
                return Err(Usage("the engine's programs have no guidance: use --cfg 1".into()).into());
            }
            return Err(engine.lacks(ProgramKind::StepRows, each));
        };
        let binding = engine.binding(runtime, kind, rows, &settings.execution.session_options())?;
        Self::over(binding, rows, engine.model(), settings)
    }

    /// `binding` is a `step` or `step-rows` program of so many rows.
    fn over(binding: Binding, rows: usize, model: &Model, settings: &Settings) -> anyhow::Result<Self> {
        let plan = settings.solver.plan(model.objective, model.learns_variance())?;
        let has = |name: &str| binding.session().inputs().iter().any(|input| input.name == name);
        let (paired, guided) = (has("pair"), has("guidance"));
        let rows_each = if paired && settings.guidance != 1.0 { GUIDED_ROWS } else { 1 };
        let image = model.latent().values();
        let guidance = guided.then_some(settings.guidance as f32);
        let null_class = model.conditioning().null_class();
        let label_rows = model.conditioning().class_count() + usize::from(null_class.is_some());
        Ok(Self { binding, plan, rows, rows_each, paired, image, label_rows, null_class, guidance })
    }

    /// Images of one run of the program.
    pub fn batch(&self) -> usize {
        self.rows / self.rows_each
    }

    /// Values of an input of the program that the last step has read.
    ///
    /// # Errors
    /// The program has no such input in f32.
    pub fn read_input(&self, name: &str) -> anyhow::Result<Vec<f32>> {
        Ok(self.binding.read_input(name)?)
    }

    /// Executed steps of one image.
    pub fn steps(&self) -> usize {
        self.plan.steps.len()
    }

    /// Images (N, C, H, W) of the classes `labels`; `trajectory` receives (steps, N, C, H, W), the sample after each
    /// executed step; `progress` is told how many steps of how many batches are done.
    ///
    /// # Errors
    /// A label that is no class, given noise of the wrong length, a session that fails.
    pub fn run(
        &mut self,
        labels: &[i64],
        source: NoiseSource<'_>,
        trajectory: Option<&mut Vec<f32>>,
        progress: &mut dyn FnMut(u64),
    ) -> anyhow::Result<Vec<f32>> {
        let mut images = Vec::new();
        let mut goes_on = |done| {
            progress(done);
            true
        };
        self.run_into(&mut images, labels, source, trajectory, &mut goes_on)?;
        Ok(images)
    }

    /// [`run`](Self::run) that keeps what it has: `images` holds those of all whole batches after an error, too, and after
    /// `goes_on`, which is told as `progress` is, has said no.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_into(
        &mut self,
        images: &mut Vec<f32>,
        labels: &[i64],
        source: NoiseSource<'_>,
        mut trajectory: Option<&mut Vec<f32>>,
        goes_on: &mut dyn FnMut(u64) -> bool,
    ) -> anyhow::Result<()> {
        let (n, image) = (labels.len(), self.image);
        if let Some(label) = labels.iter().find(|y| !(0..self.label_rows as i64).contains(*y)) {
            let none = self.null_class.map_or(String::new(), |null| format!(", where {null} is no class"));
            anyhow::bail!("class {label} is none of the model's: 0..{}{none}", self.label_rows);
        }
        if let NoiseSource::Given { x_t, noise } = source {
            ensure!(x_t.len() == n * image, "x_T holds {} values, {n} images need {}", x_t.len(), n * image);
            let wanted = self.steps() * n * image;
            let held = noise.map_or(0, <[f32]>::len);
            ensure!(
                held == wanted || (noise.is_none() && !self.plan.needs_noise),
                "noise holds {held} values, {} steps of {n} images need {wanted}",
                self.steps()
            );
        }
        if let Some(trajectory) = &mut trajectory {
            trajectory.clear();
            trajectory.resize(self.steps() * n * image, 0.0);
        }
        images.clear();
        if n.checked_mul(image).is_none_or(|values| images.try_reserve_exact(values).is_err()) {
            anyhow::bail!("{n} images do not fit into memory at once: make fewer at a time");
        }
        let mut done = 0;
        let batch = self.batch();
        let whole = (n.div_ceil(batch) * self.steps()) as u64;
        for first in (0..n).step_by(batch) {
            let rows = first..(first + batch).min(n);
            let mut states = self.begin(labels, rows.clone(), source)?;
            for k in 0..self.steps() {
                self.step(k, rows.clone(), n, source, &mut states).context("sampling")?;
                if let Some(trajectory) = &mut trajectory {
                    let at = (k * n + first) * image;
                    trajectory[at..at + rows.len() * image].copy_from_slice(&states[..rows.len() * image]);
                }
                done += 1;
                if !goes_on(done) && done < whole {
                    return Ok(());
                }
            }
            images.extend_from_slice(&states[..rows.len() * image]);
        }
        Ok(())
    }

    /// Sets what stays the same over the steps of a batch; returns the starting points, padded.
    fn begin(
        &mut self,
        labels: &[i64],
        rows: std::ops::Range<usize>,
        source: NoiseSource<'_>,
    ) -> anyhow::Result<Vec<f32>> {
        let (each, null) = (self.rows_each, self.null_class.unwrap_or(0) as i64);
        let mut y = vec![0; self.rows];
        for (label, rows) in labels[rows.clone()].iter().zip(y.chunks_mut(each)) {
            rows.fill(null);
            rows[0] = *label;
        }
        self.binding.set_input("y", &y)?;
        if self.paired {
            // The last row of an image is its unguided answer; itself, where there is one row.
            let pair: Vec<i64> =
                (0..self.rows).map(|row| (row - row % each + each).min(self.rows) as i64 - 1).collect();
            self.binding.set_input("pair", &pair)?;
        }
        if let Some(guidance) = self.guidance {
            self.binding.set_input("guidance", &vec![guidance; self.rows])?;
        }
        self.binding.input_f32("history")?.fill(0.0);
        let mut x = vec![0.0; self.batch() * self.image];
        if self.streams("x", 0, &rows, source).is_some() {
            return Ok(x); // the first step draws them
        }
        for (slot, row) in rows.enumerate() {
            let out = &mut x[slot * self.image..(slot + 1) * self.image];
            match source {
                NoiseSource::Seeded { seed, first } => {
                    starting_point(seed_of(seed, first + row as u64)).fill_normal(out);
                }
                NoiseSource::Given { x_t, .. } => {
                    out.copy_from_slice(&x_t[row * self.image..(row + 1) * self.image]);
                }
            }
        }
        Ok(x)
    }

    /// The streams of an input of step `k`, a row of the batch each, where a GPU draws it.
    fn streams(
        &self,
        input: &str,
        k: usize,
        rows: &std::ops::Range<usize>,
        source: NoiseSource<'_>,
    ) -> Option<Vec<NormalStream>> {
        let NoiseSource::Seeded { seed, first } = source else { return None };
        let stream = |row: usize| match input {
            "x" => starting_point(seed_of(seed, first + row as u64)),
            _ => step_noise(seed_of(seed, first + row as u64), k),
        };
        let mut streams = Vec::with_capacity(self.rows);
        for row in rows.clone() {
            let drawn = stream(row).on_device();
            // All rows of an image are at the same place; its solver moves the first.
            let others = if input == "x" { drawn } else { NormalStream::ZEROS };
            streams.push(drawn);
            streams.resize(streams.len() + self.rows_each - 1, others);
        }
        streams.resize(self.rows, NormalStream::ZEROS);
        self.binding.draws(input).then_some(streams)
    }

    /// Executes step `k` for the images `rows` of `n`, in place.
    fn step(
        &mut self,
        k: usize,
        rows: std::ops::Range<usize>,
        n: usize,
        source: NoiseSource<'_>,
        x: &mut [f32],
    ) -> anyhow::Result<()> {
        let (step, image, each) = (&self.plan.steps[k], self.image, self.rows_each);
        match self.streams("x", k, &rows, source) {
            Some(streams) if k == 0 => self.binding.draw("x", &streams)?,
            _ => {
                let all = self.binding.input_f32("x")?;
                for (rows, one) in all.chunks_mut(each * image).zip(x.chunks(image)) {
                    rows.chunks_mut(image).for_each(|row| row.copy_from_slice(one));
                }
            }
        }
        self.binding.input_f32("t")?.fill(step.t);
        let row: [f32; COEFFICIENTS] = step.row();
        for coef in self.binding.input_f32("coef")?.chunks_mut(COEFFICIENTS) {
            coef.copy_from_slice(&row);
        }
        if let Some(streams) = self.streams("noise", k, &rows, source).filter(|_| self.plan.needs_noise) {
            self.binding.draw("noise", &streams)?;
        } else if self.plan.needs_noise {
            let noise = self.binding.input_f32("noise")?;
            for (slot, row) in rows.enumerate() {
                let out = &mut noise[slot * each * image..][..image];
                match source {
                    NoiseSource::Seeded { seed, first } => {
                        step_noise(seed_of(seed, first + row as u64), k).fill_normal(out);
                    }
                    NoiseSource::Given { noise: Some(given), .. } => {
                        let at = (k * n + row) * image;
                        out.copy_from_slice(&given[at..at + image]);
                    }
                    NoiseSource::Given { noise: None, .. } => out.fill(0.0),
                }
            }
        }
        self.binding.run()?;
        let next = self.binding.output_f32("x_next")?;
        for (one, rows) in x.chunks_mut(image).zip(next.chunks(each * image)) {
            one.copy_from_slice(&rows[..image]);
        }
        if self.plan.needs_history {
            let history = self.binding.output_f32("history_next")?.to_vec();
            self.binding.set_input("history", &history)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_of_guidance_are_read_as_they_are_written() {
        for guided in [Guidance::All, Guidance::Off, Guidance::First(3)] {
            assert_eq!(channels(&channels_text(guided)), Ok(guided));
        }
        assert!(channels("0").is_err() && channels("First(3)").is_err());
    }
}
