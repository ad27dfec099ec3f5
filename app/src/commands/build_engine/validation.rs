//! Are a built program's answers right? Compared with the plain program, and between batches that share a sample.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use graph_builder::{DType, Graph, Precision, TensorSpec};
use half::{bf16, f16};
use models::{Guidance, Model, Objective, ProgramKind, ProgramSpec, TRAINING_STEPS};
use runtime::memory::available_bytes;
use runtime::{Arena, Binding, Runtime, Session, SessionOptions, SharedArena};
use serde::Serialize;
use train_engine::random::{Purpose, Stream};
use train_engine::step::{parameter_layout, read_lock};

use super::super::weights;
use super::difference::{Outputs, Worst, worst};
use crate::console;
use crate::profile::memory::{Prediction, megabytes};

/// Largest relative difference from the f32 answers: sums in another order in f32, a dozen layers' roundings else.
const fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-4,
        Precision::F16 => 2e-2,
        Precision::Bf16 => 1e-1,
    }
}

/// Spread of parameters where no weights were given.
const PARAMETER_STD: f32 = 0.02;
/// Random inputs that all samples but the first are drawn from, one after the other.
const DRAWS: [u64; 2] = [0, 1];

/// A built program with what is needed to judge it.
pub(super) struct Case<'a> {
    pub(super) model: &'a Model,
    pub(super) kind: ProgramKind,
    pub(super) batch: usize,
    pub(super) guidance: Guidance,
    pub(super) precision: Precision,
    pub(super) weights: Option<&'a Path>,
}

/// What of a batch can be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Comparable {
    /// So many samples, the first of the batch.
    Samples(usize),
    /// Nothing: why.
    Not(String),
}

/// What came out.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    program: String,
    batch: usize,
    load_seconds: f64,
    run_ms: f64,
    /// `None` when it was not asked for, or could not be.
    validation: Option<Validation>,
    /// Why it was not compared though that was asked for.
    not_compared: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
struct Validation {
    /// Relative L2 difference from the plain program, the largest of the outputs, each gradient one of them.
    difference: f64,
    /// The output where it is largest.
    output: String,
    /// Outputs that were compared.
    outputs: usize,
    /// Samples that were compared, the first of the batch: those that the plain program has memory for here.
    samples: usize,
    tolerance: f64,
    /// Whether the first sample kept its bits beside other samples; `None` for programs and batches without others.
    slots_independent: Option<bool>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { program, batch, load_seconds, run_ms, validation, not_compared } = self;
        write!(f, "{program} at batch {batch} loads in {load_seconds:.2} s and runs in {run_ms:.1} ms")?;
        if let Some(v) = validation {
            let Validation { difference, output, tolerance, samples, .. } = v;
            write!(
                f,
                "; within {difference:.1e} of the plain program, farthest in `{output}` (allowed {tolerance:.0e})"
            )?;
            if samples < batch {
                write!(f, "; the first {samples} samples were compared")?;
            }
            if v.slots_independent == Some(true) {
                f.write_str("; a sample's answer is the same bits beside others")?;
            }
        }
        match not_compared {
            Some(reason) => write!(f, "; NOT compared: {reason}"),
            None => Ok(()),
        }
    }
}

impl Report {
    /// What the manifest keeps: no times, which differ from build to build.
    pub(super) fn kept(&self) -> serde_json::Value {
        serde_json::json!({
            "program": self.program, "batch": self.batch, "validation": self.validation,
            "not_compared": self.not_compared,
        })
    }
}

impl Case<'_> {
    /// Runs the program in each of its forms, and judges their answers if `judge`.
    ///
    /// # Errors
    /// The program does not run, an output differs by more than the tolerance or is not finite, or a sample's answer
    /// depends on the others.
    pub(super) fn run(
        &self,
        forms: &[Arc<Session>],
        load_seconds: f64,
        judge: bool,
    ) -> anyhow::Result<Report> {
        let parameters = self.parameters()?;
        let bound = parameters.as_ref().filter(|_| self.kind.feeds_parameters());
        let mut report = Report {
            program: self.kind.to_string(),
            batch: self.batch,
            load_seconds,
            run_ms: 0.0,
            validation: None,
            not_compared: None,
        };
        let (mut answers, mut slots_independent) = (Vec::new(), None);
        for session in forms {
            let mut binding = bind(session, bound)?;
            self.fill(&mut binding, DRAWS[0])?;
            binding.run()?;
            let start = Instant::now();
            binding.run()?;
            report.run_ms = start.elapsed().as_secs_f64() * 1e3;
            if judge {
                let found = outputs(&binding)?;
                let same = self.probe_slots(&mut binding, &found)?;
                slots_independent = if slots_independent == Some(false) { slots_independent } else { same };
                answers.push(found);
            }
        }
        let Some(first) = forms.first().filter(|_| judge) else { return Ok(report) };
        let samples = match self.comparable(available_bytes().unwrap_or(u64::MAX))? {
            Comparable::Samples(samples) => samples,
            Comparable::Not(reason) => {
                console::note(&format!("{} at batch {} is not compared: {reason}", self.kind, self.batch));
                report.not_compared = Some(reason);
                return Ok(report);
            }
        };
        let wanted = Case { batch: samples, ..*self }.reference(first.runtime(), parameters.as_ref())?;
        let judged = |found: &Outputs| worst(&self.first_samples(found, samples)?, &wanted);
        let worst = answers.iter().map(judged).collect::<anyhow::Result<Vec<_>>>()?;
        let worst = worst.into_iter().max_by(|a, b| a.difference.total_cmp(&b.difference));
        let Worst { output, difference } = worst.context("internal: nothing was run")?;
        let tolerance = tolerance(self.precision);
        ensure!(
            difference <= tolerance,
            "`{output}` differs from the plain program's by {difference:.2e}, allowed {tolerance:.0e}: the engine is not \
             published; a device or library that computes wrongly, or a fault of this program"
        );
        ensure!(
            slots_independent != Some(false),
            "the first sample's answer depends on the samples beside it: the engine is not published"
        );
        let outputs = wanted.len();
        report.validation =
            Some(Validation { difference, output, outputs, samples, tolerance, slots_independent });
        Ok(report)
    }

    /// The parameters of the program: the given ones, or random ones that leave no product zero.
    fn parameters(&self) -> anyhow::Result<Option<SharedArena>> {
        if let Some(file) = self.weights {
            return Ok(Some(weights::read(self.model, file)?.into_shared()));
        }
        let graph = self.model.program(&ProgramSpec::new(self.kind, self.batch).guided(self.guidance))?;
        let mut arena = Arena::zeros(parameter_layout(graph.parameters())?)?;
        for (i, view) in arena.views_mut().into_iter().enumerate() {
            Stream::new(0, Purpose::Init, 0, i as u64).fill_normal(view);
            for value in view.iter_mut() {
                *value *= PARAMETER_STD;
            }
        }
        Ok(Some(arena.into_shared()))
    }

    /// The graph without fused ops, whose attention has all T×T weights in memory.
    fn plain(&self) -> anyhow::Result<Graph> {
        Ok(self
            .model
            .program(&ProgramSpec::new(self.kind, self.batch).guided(self.guidance))?
            .optimised_until("simplify")?)
    }

    /// How many samples the plain program can answer within `free` bytes. A sampling program's answers are each its own
    /// sample's; those of training are of the whole batch or not at all.
    fn comparable(&self, free: u64) -> anyhow::Result<Comparable> {
        let mut samples = self.batch;
        loop {
            let memory = Prediction::new(&Case { batch: samples, ..*self }.plain()?, self.kind);
            let needed =
                memory.parameters + memory.gradients + memory.inputs_and_outputs + memory.activations;
            if needed <= free {
                return Ok(Comparable::Samples(samples));
            }
            if self.kind.feeds_parameters() || samples == 1 {
                return Ok(Comparable::Not(format!(
                    "the plain program in f32 takes {} MB at batch {samples}, and {} MB of this machine's memory are free; \
                     build it at a smaller batch to have it compared",
                    megabytes(needed),
                    megabytes(free)
                )));
            }
            samples = samples.div_ceil(2);
        }
    }

    /// Answers of the first samples alone.
    fn first_samples(&self, found: &Outputs, samples: usize) -> anyhow::Result<Outputs> {
        let cut = |(name, values): &(String, Vec<f32>)| {
            ensure!(values.iter().all(|v| v.is_finite()), "`{name}` is not finite");
            let length =
                if samples < self.batch { values.len() / self.batch * samples } else { values.len() };
            Ok((name.clone(), values[..length].to_vec()))
        };
        found.iter().map(cut).collect()
    }

    /// Answers of the plain program on ONNX Runtime's own kernels, in f32 on the CPU.
    fn reference(&self, runtime: &Arc<Runtime>, parameters: Option<&SharedArena>) -> anyhow::Result<Outputs> {
        let emitted = self.plain()?.emit(graph_builder::Weights::Inputs)?;
        let options = SessionOptions { native_kernels: false, ..SessionOptions::default() };
        let session = Session::load(runtime, &emitted, &runtime::Weights::Inside, &options)?;
        let mut binding = bind(&session, parameters)?;
        self.fill(&mut binding, DRAWS[0])?;
        binding.run()?;
        outputs(&binding)
    }

    /// Whether the first sample's answer keeps its bits when the other samples are others.
    fn probe_slots(&self, binding: &mut Binding, first: &Outputs) -> anyhow::Result<Option<bool>> {
        if self.kind.feeds_parameters() || self.batch < 2 {
            return Ok(None);
        }
        self.fill(binding, DRAWS[1])?;
        binding.run()?;
        let same = outputs(binding)?.iter().zip(first).all(|((_, now), (_, before))| {
            let sample = now.len() / self.batch;
            now[..sample].iter().zip(&before[..sample]).all(|(a, b)| a.to_bits() == b.to_bits())
        });
        Ok(Some(same))
    }

    /// Fills every input that no arena feeds. The first sample is the same in every draw.
    fn fill(&self, binding: &mut Binding, draw: u64) -> anyhow::Result<()> {
        let specs: Vec<TensorSpec> = binding.session().inputs().to_vec();
        for spec in &specs {
            let values = match spec.dtype {
                DType::F32 | DType::I64 => self.values(spec, draw),
                _ => continue,
            };
            // A parameter's memory is an arena: there is nothing to fill.
            match (spec.dtype, values) {
                (_, None) => {}
                (DType::I64, Some(values)) => {
                    let whole: Vec<i64> = values.iter().map(|v| *v as i64).collect();
                    binding.set_input(&spec.name, &whole)?;
                }
                (_, Some(values)) => binding.set_input(&spec.name, &values)?,
            }
        }
        Ok(())
    }

    /// Values of an input by the meaning of its name; `None` for parameters.
    fn values(&self, spec: &TensorSpec, draw: u64) -> Option<Vec<f32>> {
        // By name: the two programs do not have the same inputs at the same places.
        let name =
            u64::from_be_bytes(std::array::from_fn(|i| spec.name.as_bytes().get(i).copied().unwrap_or(0)));
        let numel = spec.shape.numel();
        let sample = numel / self.batch.max(1);
        let mut values = vec![0.0; numel];
        let ddpm = self.model.objective == Objective::Ddpm;
        for (row, part) in values.chunks_mut(sample.max(1)).enumerate() {
            let seed = if row == 0 { DRAWS[0] } else { draw };
            let mut stream = Stream::new(seed ^ name, Purpose::Noise, 0, row as u64);
            match spec.name.as_str() {
                "x" | "x0" | "noise" | "history" | "coef" => stream.fill_normal(part),
                // At the first times a bin's mass is a difference of nearly equal numbers.
                "t" if ddpm => part.fill(100.0 + (800.0 * stream.uniform()).floor()),
                "t" => part.fill(TRAINING_STEPS as f32 * (0.1 + 0.8 * stream.uniform())),
                "guidance" => part.fill(1.0 + 4.0 * stream.uniform()),
                "y" => part.fill(stream.below(self.model.conditioning().class_count().max(1) as u64) as f32),
                "pair" => part.fill(row as f32),
                name if name.starts_with("hp.") => part.fill(1.0),
                _ => return None,
            }
        }
        Some(values)
    }
}

/// Binds the parameters of a program that takes them: f32 ones in place, narrower ones converted.
fn bind(session: &Arc<Session>, parameters: Option<&SharedArena>) -> anyhow::Result<Binding> {
    let mut builder = Binding::builder(session);
    let Some(arena) = parameters else { return Ok(builder.finish()?) };
    let layout = read_lock(arena)?.layout().clone();
    let (mut whole, mut narrow) = (Vec::new(), Vec::new());
    for spec in session.inputs().iter().filter(|s| layout.entries().contains_key(&s.name)) {
        if spec.dtype == DType::F32 { &mut whole } else { &mut narrow }.push(spec);
    }
    for spec in whole {
        builder.bind_input_arena(&spec.name, arena, &spec.name)?;
    }
    let mut binding = builder.finish()?;
    let values = read_lock(arena)?;
    for spec in narrow {
        let values = values.view(&spec.name)?;
        if spec.dtype == DType::Bf16 {
            let narrowed: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            binding.set_input(&spec.name, &narrowed)?;
        } else {
            let narrowed: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            binding.set_input(&spec.name, &narrowed)?;
        }
    }
    drop(values);
    Ok(binding)
}

fn outputs(binding: &Binding) -> anyhow::Result<Outputs> {
    let specs = binding.session().outputs();
    let values = |spec: &TensorSpec| -> anyhow::Result<Vec<f32>> {
        Ok(match spec.dtype {
            DType::Bf16 => binding.output::<bf16>(&spec.name)?.iter().map(|v| v.to_f32()).collect(),
            DType::F16 => binding.output::<f16>(&spec.name)?.iter().map(|v| v.to_f32()).collect(),
            _ => binding.output_f32(&spec.name)?.to_vec(),
        })
    };
    specs.iter().map(|spec| Ok((spec.name.clone(), values(spec)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_batches_are_compared_as_far_as_memory_goes() {
        let model = Model::resolve("DiT-S/4@8x8x4:10").unwrap();
        let case = |kind, batch| Case {
            model: &model,
            kind,
            batch,
            guidance: Guidance::All,
            precision: Precision::Bf16,
            weights: None,
        };
        let comparable = |kind, free| case(kind, 1024).comparable(free).unwrap();
        // The parameters are 131 MB.
        assert_eq!(comparable(ProgramKind::Step, u64::MAX), Comparable::Samples(1024));
        let Comparable::Samples(some) = comparable(ProgramKind::Step, 140_000_000) else { panic!() };
        assert!((1..1024).contains(&some), "{some}");
        for (kind, free) in [(ProgramKind::Step, 1_000_000), (ProgramKind::TrainStep, 140_000_000)] {
            let Comparable::Not(reason) = comparable(kind, free) else { panic!("{kind}") };
            assert!(reason.contains("MB") && reason.contains("smaller batch"), "{reason}");
        }
        let found = vec![("out".to_owned(), (0..128).map(|v| v as f32).collect())];
        let cut = case(ProgramKind::Step, 64).first_samples(&found, 4).unwrap();
        assert_eq!(cut, [("out".to_owned(), (0..8).map(|v| v as f32).collect::<Vec<f32>>())]);
    }
}
