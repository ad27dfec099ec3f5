//! Brings models to life: compiles a `step-rows` program for each batch size, measures the step time, probes whether
//! images depend on their neighbours, and opens the batcher.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use graph_builder::Weights;
use models::{Guidance, ProgramKind, ProgramSpec};
use runtime::cuda::Gpu;
use runtime::file::sha256_bytes;
use runtime::{Device, Runtime, RuntimeError};
use serde::Serialize;

use super::batching::curve::{CANDIDATES, Curve, CurveFile, Point};
use super::batching::probe::{REFERENCE, Verdict, probe};
use super::batching::stepper::{Recipe, RowProgram, Slot, Stepper};
use super::batching::{Batcher, Factory, Lot};
use super::model::{Origin, Source};
use crate::built::ProgramSource;
use crate::execution::{Execution, Placed};

/// How the engine computes.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Who computes a step, and in what.
    pub execution: Execution,
    /// Use only batch sizes that give the same bits.
    pub deterministic: bool,
    /// Most rows of a batch; the measured curve decides below that.
    pub max_rows: usize,
    /// Most accepted work beyond what fits into a batch, in image-steps; else what the machine does in a quarter of a second.
    pub max_queue: Option<u64>,
    /// Measure again even where the cache has the curve.
    pub remeasure: bool,
    /// Where curves are kept.
    pub cache: Option<PathBuf>,
}

/// The queue holds the work of this long, where its limit is not given: bursts wait, an overload is refused before it
/// makes everybody wait.
const QUEUE: Duration = Duration::from_millis(250);
/// A batch size is measured for about so long, and at least [`LEAST_RUNS`] times.
const MEASURED: Duration = Duration::from_millis(120);
const LEAST_RUNS: usize = 3;
/// No batch that takes longer is tried: nobody could join or leave meanwhile.
const LONGEST_STEP: f64 = 5.0;

/// What is known of a model once it is loaded.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// Every batch size that was measured.
    pub measured: Curve,
    /// Whether the times come from the engine cache.
    pub from_cache: bool,
    /// The file of the times.
    #[serde(skip)]
    pub curve_file: Option<PathBuf>,
    /// The batch sizes in use.
    pub in_use: Curve,
    /// What the probe found.
    pub determinism: Verdict,
    /// SHA-256 of the program, for the smallest batch that holds a guided image; of all of an engine's.
    pub program_sha256: String,
    /// From nothing to ready.
    pub warm_up_seconds: f64,
}

/// Loads models and opens the batcher.
///
/// # Errors
/// A program does not load or run, or there is no memory.
pub fn start(
    batcher: &Batcher,
    runtime: &Arc<Runtime>,
    sources: &[Source],
    options: &EngineOptions,
) -> anyhow::Result<Vec<ModelReport>> {
    let mut programs = Programs::default();
    let (mut reports, mut lots, mut recipes) = (Vec::new(), Vec::new(), Vec::new());
    for (index, source) in sources.iter().enumerate() {
        let origin = match &source.origin {
            Origin::Parameters(parameters) => {
                ProgramSource::Compiled(Placed::of(parameters, &source.model, &options.execution)?)
            }
            Origin::Engine(engine) => ProgramSource::Built(engine.clone()),
        };
        let recipe = Recipe {
            runtime: runtime.clone(),
            model: source.model.clone(),
            programs: origin,
            guided: source.guided,
            execution: options.execution.clone(),
        };
        let warming = || format!("model `{}` does not run", source.name);
        let report = warm_up(index, source, &recipe, &mut programs, options).with_context(warming)?;
        let buckets: Vec<usize> = report.in_use.points.iter().map(|p| p.rows).collect();
        let queue = report.in_use.rate() * QUEUE.as_secs_f64();
        let limit = options.max_queue.unwrap_or(queue.ceil() as u64);
        lots.push(Lot { curve: report.in_use.clone(), limit });
        recipes.push((recipe, buckets));
        reports.push(report);
    }
    batcher.open(&lots, &factory(programs, recipes))?;
    Ok(reports)
}

/// Gives the programs that are there; after a fault, compiles anew.
fn factory(programs: Programs, recipes: Vec<(Recipe, Vec<usize>)>) -> Factory {
    let ready = Mutex::new(Some(programs));
    Arc::new(move || {
        let first = ready.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(programs) = first {
            return Ok(Box::new(programs) as Box<dyn Stepper>);
        }
        let mut programs = Programs::default();
        for (recipe, buckets) in &recipes {
            let made = buckets.iter().map(|&rows| Ok((rows, RowProgram::new(recipe, rows)?)));
            programs.models.push(made.collect::<anyhow::Result<_>>()?);
        }
        Ok(Box::new(programs))
    })
}

/// Programs by model and rows.
#[derive(Default)]
struct Programs {
    models: Vec<BTreeMap<usize, RowProgram>>,
}

impl Stepper for Programs {
    fn step(&mut self, model: usize, bucket: usize, slots: &mut [Slot]) -> anyhow::Result<()> {
        let program = self.models.get_mut(model).and_then(|m| m.get_mut(&bucket));
        program.with_context(|| format!("internal: no program for {bucket} rows"))?.step(slots)
    }
}

fn warm_up(
    index: usize,
    source: &Source,
    recipe: &Recipe,
    programs: &mut Programs,
    options: &EngineOptions,
) -> anyhow::Result<ModelReport> {
    let start = Instant::now();
    let null = source.model.conditioning().has_null();
    let candidates = candidates(&recipe.programs, options.max_rows)?;
    let reference = candidates.iter().copied().find(|rows| *rows >= REFERENCE).unwrap_or(REFERENCE);
    let program_sha256 = match &recipe.programs {
        ProgramSource::Compiled(_) => {
            let guided = if null { recipe.guided } else { Guidance::Off };
            let graph =
                source.model.compiled(&ProgramSpec::new(ProgramKind::StepRows, reference).guided(guided))?;
            sha256_bytes(&graph.emit(Weights::Inputs)?.bytes)
        }
        ProgramSource::Built(engine) => sha256_bytes(engine.identity(ProgramKind::StepRows).as_bytes()),
    };
    let key = format!(
        "{program_sha256} {}, {} threads, up to {} rows, ONNX Runtime {}, mudit {}, {}",
        options.execution.in_words(),
        options.execution.threads,
        options.max_rows,
        recipe.runtime.library().version,
        env!("CARGO_PKG_VERSION"),
        machine(&options.execution)?
    );
    let file = CurveFile::new(options.cache.as_deref(), &key);
    let cached = file.read().filter(|_| !options.remeasure);
    let from_cache = cached.is_some();
    let mut made = BTreeMap::new();
    let measured = match cached {
        Some(curve) => curve,
        None => measure(recipe, &mut made, &candidates)?,
    };
    let kept = measured.kept();
    let mut buckets: Vec<usize> = kept.points.iter().map(|p| p.rows).collect();
    // Guided images, and the probe, need two rows.
    made.retain(|rows, _| buckets.contains(rows) || *rows == reference);
    for rows in buckets.iter().chain([&reference]) {
        if !made.contains_key(rows) {
            made.insert(*rows, RowProgram::new(recipe, *rows)?);
        }
    }
    programs.models.push(made);
    let determinism =
        probe(programs, index, reference, &buckets, source.values(), null, options.deterministic)?;
    buckets.retain(|b| determinism.buckets.contains(b));
    let in_use = kept.only(|rows| buckets.contains(&rows));
    anyhow::ensure!(
        in_use.largest() >= REFERENCE,
        "no batch size of {REFERENCE} rows or more gives the same bits twice"
    );
    if !from_cache && let Err(error) = file.write(&measured) {
        // The next start measures again; that is no reason not to serve.
        crate::console::note(&format!("serve: the measured step times are not kept: {error:#}"));
    }
    Ok(ModelReport {
        measured,
        from_cache,
        curve_file: file.path().map(Into::into),
        in_use,
        determinism,
        program_sha256,
        warm_up_seconds: start.elapsed().as_secs_f64(),
    })
}

/// The batch sizes that come into question: any, or an engine's; one of them holds a guided image.
fn candidates(programs: &ProgramSource, max_rows: usize) -> anyhow::Result<Vec<usize>> {
    let all = match programs {
        ProgramSource::Compiled(_) => CANDIDATES.to_vec(),
        ProgramSource::Built(engine) => engine.batches(ProgramKind::StepRows),
    };
    let Some(least) = all.iter().copied().find(|rows| *rows >= REFERENCE) else {
        return Err(match programs {
            ProgramSource::Built(engine) => engine.lacks(ProgramKind::StepRows, REFERENCE),
            ProgramSource::Compiled(_) => anyhow::anyhow!("internal: no batch size for a guided image"),
        });
    };
    Ok(all.into_iter().filter(|rows| *rows <= max_rows.max(least)).collect())
}

/// Step times by rows; `made` keeps the programs.
fn measure(
    recipe: &Recipe,
    made: &mut BTreeMap<usize, RowProgram>,
    candidates: &[usize],
) -> anyhow::Result<Curve> {
    let mut curve = Curve::default();
    for &rows in candidates {
        let last_class = recipe.model.conditioning().class_count() as i64 - 1;
        let mut slots = vec![Slot::still(last_class); rows];
        // The first run allocates.
        let tried = RowProgram::new(recipe, rows).and_then(|mut program| {
            program.step(&mut slots)?;
            Ok(program)
        });
        let mut program = match tried {
            Ok(program) => program,
            Err(error) if curve.largest() >= REFERENCE && out_of_memory(&error) => {
                crate::console::note(&format!("serve: {rows} rows do not fit the GPU's memory"));
                break;
            }
            Err(error) => return Err(error),
        };
        let mut times = Vec::new();
        let start = Instant::now();
        while times.len() < LEAST_RUNS || start.elapsed() < MEASURED {
            for slot in &mut slots {
                slot.done = 0;
            }
            let start = Instant::now();
            program.step(&mut slots)?;
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        curve.points.push(Point { rows, seconds });
        made.insert(rows, program);
        if (seconds > LONGEST_STEP && rows >= REFERENCE) || !curve.goes_on() {
            break;
        }
    }
    Ok(curve)
}

fn out_of_memory(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<RuntimeError>());
    causes.any(|e| matches!(e, RuntimeError::GpuOutOfMemory { .. }))
}

/// Who computes: a curve is good for one processor, or one kind of GPU.
fn machine(execution: &Execution) -> anyhow::Result<String> {
    if let Device::Cuda { ordinal } = execution.provider.device() {
        let gpu = Gpu::open(ordinal)?;
        return Ok(format!("{}, {}", gpu.info().name, gpu.info().architecture()));
    }
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim()));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    Ok(format!("{} × {cores}", name.unwrap_or(std::env::consts::ARCH)))
}
