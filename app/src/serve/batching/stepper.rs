//! One step of a batch of images: the state of an image on its way, and who computes.

use std::sync::Arc;

use anyhow::Context;
use models::{COEFFICIENTS, Guidance, Model, ProgramKind, ProgramSpec, SolverPlan, SolverStep};
use runtime::cuda::kernels::NormalStream;
use runtime::{Binding, Runtime, SessionOptions};
use train_engine::random::{Purpose, Stream};

use crate::built::ProgramSource;
use crate::execution::Execution;

/// An image on its way. Nothing in it depends on its neighbours in a batch.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The class, or the null class.
    pub label: i64,
    /// Key of every draw.
    pub seed: u64,
    /// Guidance scale; 1 is none.
    pub guidance: f32,
    /// The steps.
    pub plan: Arc<SolverPlan>,
    /// Steps made.
    pub done: usize,
    /// The sample (C, H, W); empty before the first step, unless it was given.
    pub x: Vec<f32>,
    /// The solver's memory (C, H, W); empty where the plan has none.
    pub history: Vec<f32>,
    /// Whether the predicted data of the next step is wanted.
    pub wants_preview: bool,
    /// The predicted data (C, H, W) of the last step, where it was wanted.
    pub preview: Option<Vec<f32>>,
}

impl Slot {
    /// An image that makes one step without guidance, to measure with.
    pub fn still(label: i64) -> Self {
        let step = SolverStep { t: 500.0, coef: [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] };
        let plan = SolverPlan { steps: vec![step], needs_history: false, needs_noise: false };
        Self {
            label,
            seed: 0,
            guidance: 1.0,
            plan: Arc::new(plan),
            done: 0,
            x: Vec::new(),
            history: Vec::new(),
            wants_preview: false,
            preview: None,
        }
    }

    /// Rows of a batch that it takes.
    pub fn rows(&self) -> usize {
        if self.guidance == 1.0 { 1 } else { 2 }
    }

    /// Draws the starting point where there is none yet.
    fn begin(&mut self, values: usize) {
        if self.x.is_empty() {
            self.x.resize(values, 0.0);
            Stream::new(self.seed, Purpose::SampleInit, 0, 0).fill_normal(&mut self.x);
        }
        if self.plan.needs_history && self.history.is_empty() {
            self.history.resize(values, 0.0);
        }
    }
}

/// Computes steps.
pub trait Stepper: Send {
    /// Makes one step of all `slots`, in a batch of `bucket` rows.
    ///
    /// # Errors
    /// The program failed; the slots are then lost.
    fn step(&mut self, model: usize, bucket: usize, slots: &mut [Slot]) -> anyhow::Result<()>;
}

/// The `step-rows` program of one batch size, bound to a model's parameters.
#[derive(Debug)]
pub struct RowProgram {
    binding: Binding,
    rows: usize,
    values: usize,
    null_class: Option<i64>,
    paired: bool,
}

/// What a row program is made of.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// ONNX Runtime.
    pub runtime: Arc<Runtime>,
    /// The model.
    pub model: Model,
    /// Its programs.
    pub programs: ProgramSource,
    /// Channels that guidance changes.
    pub guided: Guidance,
    /// Who computes a step, and in what.
    pub execution: Execution,
}

impl RowProgram {
    /// Compiles or loads the program for batches of `rows` rows, and binds it.
    ///
    /// # Errors
    /// ONNX Runtime refuses the program, or there is no memory.
    pub fn new(recipe: &Recipe, rows: usize) -> anyhow::Result<Self> {
        let model = &recipe.model;
        let null_class = model.conditioning().null_class().map(|n| n as i64);
        // Requests, decoding and PNG want the cores between the ops: threads that spin there slow the server down.
        let options = SessionOptions { spinning: false, ..recipe.execution.session_options() };
        let guided = if null_class.is_some() { recipe.guided } else { Guidance::Off };
        let graph = || model.program(&ProgramSpec::new(ProgramKind::StepRows, rows).guided(guided));
        let wanted = (ProgramKind::StepRows, rows);
        let Recipe { runtime, programs, execution, .. } = recipe;
        let binding = programs.binding(runtime, wanted, graph, execution, &options)?;
        let values = model.latent().values();
        let paired = binding.session().inputs().iter().any(|input| input.name == "pair");
        Ok(Self { binding, rows, values, null_class, paired })
    }

    /// Values of an input of the program that the last step has read.
    ///
    /// # Errors
    /// The program has no such input in f32.
    pub fn read_input(&self, name: &str) -> anyhow::Result<Vec<f32>> {
        Ok(self.binding.read_input(name)?)
    }

    /// Makes one step of all slots; the rows that they leave are computed for nothing.
    ///
    /// # Errors
    /// They do not fit, or the run fails.
    pub fn step(&mut self, slots: &mut [Slot]) -> anyhow::Result<()> {
        let used: usize = slots.iter().map(Slot::rows).sum();
        anyhow::ensure!(used <= self.rows, "internal: {used} rows for a batch of {}", self.rows);
        for slot in slots.iter_mut() {
            slot.begin(self.values);
        }
        self.fill(slots)?;
        self.binding.run().context("a step")?;
        self.take(slots)
    }

    fn fill(&mut self, slots: &[Slot]) -> anyhow::Result<()> {
        let (n, values) = (self.rows, self.values);
        let first_rows = first_rows(slots);
        let null = self.null_class.unwrap_or(0);
        // Rows without an image compute something, and it must be finite.
        let (mut y, mut pair) = (vec![null; n], (0..n as i64).collect::<Vec<_>>());
        let (mut guidance, mut t) = (vec![1.0; n], vec![0.0; n]);
        let mut coef = vec![0.0; n * COEFFICIENTS];
        for (slot, &row) in slots.iter().zip(&first_rows) {
            let step = &slot.plan.steps[slot.done];
            y[row] = slot.label;
            t[row..row + slot.rows()].fill(step.t);
            coef[row * COEFFICIENTS..(row + 1) * COEFFICIENTS].copy_from_slice(&step.row());
            if slot.rows() == 2 {
                pair[row] = row as i64 + 1;
                guidance[row] = slot.guidance;
            }
        }
        self.binding.set_input("y", &y)?;
        self.binding.set_input("t", &t)?;
        self.binding.set_input("coef", &coef)?;
        if self.paired {
            self.binding.set_input("pair", &pair)?;
            self.binding.set_input("guidance", &guidance)?;
        }
        let x = self.binding.input_f32("x")?;
        x.fill(0.0);
        for (slot, &row) in slots.iter().zip(&first_rows) {
            for row in row..row + slot.rows() {
                x[row * values..(row + 1) * values].copy_from_slice(&slot.x);
            }
        }
        let noisy = || slots.iter().zip(&first_rows).filter(|(slot, _)| slot.plan.needs_noise);
        let stream = |slot: &Slot| Stream::new(slot.seed, Purpose::SampleNoise, slot.done as u64, 0);
        if self.binding.draws("noise") {
            let mut streams = vec![NormalStream::ZEROS; n];
            noisy().for_each(|(slot, &row)| streams[row] = stream(slot).on_device());
            self.binding.draw("noise", &streams)?;
        } else {
            let noise = self.binding.input_f32("noise")?;
            noise.fill(0.0);
            for (slot, &row) in noisy() {
                stream(slot).fill_normal(&mut noise[row * values..(row + 1) * values]);
            }
        }
        let history = self.binding.input_f32("history")?;
        history.fill(0.0);
        for (slot, &row) in slots.iter().zip(&first_rows).filter(|(slot, _)| !slot.history.is_empty()) {
            history[row * values..(row + 1) * values].copy_from_slice(&slot.history);
        }
        Ok(())
    }

    fn take(&mut self, slots: &mut [Slot]) -> anyhow::Result<()> {
        let values = self.values;
        let x = self.binding.output_f32("x_next")?;
        let x0 = self.binding.output_f32("x0_hat")?;
        let history = self.binding.output_f32("history_next")?;
        for (row, slot) in first_rows(slots).into_iter().zip(slots) {
            let at = row * values..(row + 1) * values;
            slot.x.copy_from_slice(&x[at.clone()]);
            if !slot.history.is_empty() {
                slot.history.copy_from_slice(&history[at.clone()]);
            }
            slot.preview = slot.wants_preview.then(|| x0[at].to_vec());
            slot.done += 1;
        }
        Ok(())
    }
}

/// The row of each slot; the second one of a guided slot comes right after.
fn first_rows(slots: &[Slot]) -> Vec<usize> {
    let mut next = 0;
    let row = |slot: &Slot| {
        let row = next;
        next += slot.rows();
        row
    };
    slots.iter().map(row).collect()
}
