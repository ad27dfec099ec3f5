//! Brings models to life: compiles a `step-rows` program for each batch size and lane, measures the step time, probes
//! whether images depend on their neighbours, and opens the batcher.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use graph_builder::Weights;
use models::{Guidance, ProgramKind, program};
use runtime::Runtime;
use runtime::file::sha256_bytes;
use serde::Serialize;

use super::batching::curve::{CANDIDATES, Curve, CurveFile, Point};
use super::batching::probe::{REFERENCE, Verdict, probe};
use super::batching::stepper::{Recipe, RowProgram, Slot, Stepper};
use super::batching::{Batcher, Factory, Lot};
use super::model::Source;

/// How the engine computes.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Threads that make steps at the same time, each on batches of its own.
    pub lanes: usize,
    /// Threads inside one op.
    pub threads: usize,
    /// Use only batch sizes that give the same bits.
    pub deterministic: bool,
    /// Most rows of a batch; the measured curve decides below that.
    pub max_rows: usize,
    /// Most accepted work, in image-steps; else what the machine does in [`QUEUE`].
    pub max_queue: Option<u64>,
    /// Measure again even where the cache has the curve.
    pub remeasure: bool,
    /// Where curves are kept.
    pub cache: Option<PathBuf>,
}

/// The queue holds the work of this long, where its limit is not given.
const QUEUE: Duration = Duration::from_secs(4);
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
    /// SHA-256 of the program, for two rows.
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
    let mut lanes: Vec<LanePrograms> = (0..options.lanes).map(|_| LanePrograms::default()).collect();
    let (mut reports, mut lots, mut recipes) = (Vec::new(), Vec::new(), Vec::new());
    for (index, source) in sources.iter().enumerate() {
        let recipe = Recipe {
            runtime: runtime.clone(),
            model: source.model.clone(),
            parameters: source.parameters.clone(),
            guided: source.guided,
            threads: options.threads,
        };
        let warming = || format!("model `{}` does not run", source.name);
        let report = warm_up(index, source, &recipe, &mut lanes, options).with_context(warming)?;
        let buckets: Vec<usize> = report.in_use.points.iter().map(|p| p.rows).collect();
        let rate = options.lanes as f64 / report.in_use.row_seconds();
        let limit = options.max_queue.unwrap_or((rate * QUEUE.as_secs_f64()).ceil() as u64);
        lots.push(Lot { curve: report.in_use.clone(), limit });
        recipes.push((recipe, buckets));
        reports.push(report);
    }
    batcher.open(&lots, options.lanes, &factory(lanes, recipes))?;
    Ok(reports)
}

/// Gives the lanes that are there; after a fault, compiles anew.
fn factory(lanes: Vec<LanePrograms>, recipes: Vec<(Recipe, Vec<usize>)>) -> Factory {
    let ready: Mutex<Vec<Option<LanePrograms>>> = Mutex::new(lanes.into_iter().map(Some).collect());
    Arc::new(move |lane| {
        let first = ready.lock().unwrap_or_else(PoisonError::into_inner).get_mut(lane).and_then(Option::take);
        if let Some(programs) = first {
            return Ok(Box::new(programs) as Box<dyn Stepper>);
        }
        let mut programs = LanePrograms::default();
        for (recipe, buckets) in &recipes {
            let made = buckets.iter().map(|&rows| Ok((rows, RowProgram::new(recipe, rows)?)));
            programs.models.push(made.collect::<anyhow::Result<_>>()?);
        }
        Ok(Box::new(programs))
    })
}

/// The programs of one lane, by model and rows.
#[derive(Default)]
struct LanePrograms {
    models: Vec<BTreeMap<usize, RowProgram>>,
}

impl Stepper for LanePrograms {
    fn step(&mut self, model: usize, bucket: usize, slots: &mut [Slot]) -> anyhow::Result<()> {
        let program = self.models.get_mut(model).and_then(|m| m.get_mut(&bucket));
        program.with_context(|| format!("internal: no program for {bucket} rows"))?.step(slots)
    }
}

fn warm_up(
    index: usize,
    source: &Source,
    recipe: &Recipe,
    lanes: &mut [LanePrograms],
    options: &EngineOptions,
) -> anyhow::Result<ModelReport> {
    let start = Instant::now();
    let guided = if source.model.null_class().is_some() { recipe.guided } else { Guidance::Off };
    let graph = program(&source.model, ProgramKind::StepRows, REFERENCE, guided)?.optimised()?;
    let program_sha256 = sha256_bytes(&graph.emit(Weights::Inputs)?.bytes);
    let key = format!(
        "{program_sha256} {} lanes of {} threads, up to {} rows, ONNX Runtime {}, mudit {}, {}",
        options.lanes,
        options.threads,
        options.max_rows,
        recipe.runtime.library().version,
        env!("CARGO_PKG_VERSION"),
        processor()
    );
    let file = CurveFile::new(options.cache.as_deref(), &key);
    let cached = file.read().filter(|_| !options.remeasure);
    for lane in lanes.iter_mut() {
        lane.models.push(BTreeMap::new());
    }
    let from_cache = cached.is_some();
    let measured = match cached {
        Some(curve) => curve,
        None => measure(index, source, recipe, lanes, options.max_rows)?,
    };
    let kept = measured.kept();
    let mut buckets: Vec<usize> = kept.points.iter().map(|p| p.rows).collect();
    for lane in lanes.iter_mut() {
        let programs = &mut lane.models[index];
        // Guided images, and the probe, need two rows.
        programs.retain(|rows, _| buckets.contains(rows) || *rows == REFERENCE);
        for rows in buckets.iter().chain([&REFERENCE]) {
            if !programs.contains_key(rows) {
                programs.insert(*rows, RowProgram::new(recipe, *rows)?);
            }
        }
    }
    let first = lanes.first_mut().context("internal: no lane")?;
    let null = source.model.null_class().is_some();
    let determinism = probe(first, index, &buckets, source.values(), null, options.deterministic)?;
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

/// Step times with every lane busy; the programs stay in the lanes.
fn measure(
    index: usize,
    source: &Source,
    recipe: &Recipe,
    lanes: &mut [LanePrograms],
    max_rows: usize,
) -> anyhow::Result<Curve> {
    let mut curve = Curve::default();
    for rows in CANDIDATES.into_iter().filter(|rows| *rows <= max_rows.max(REFERENCE)) {
        for lane in lanes.iter_mut() {
            lane.models[index].insert(rows, RowProgram::new(recipe, rows)?);
        }
        let barrier = Barrier::new(lanes.len());
        let run = |lane: &mut LanePrograms| -> anyhow::Result<Vec<f64>> {
            let mut slots = vec![Slot::still(source.model.num_classes as i64 - 1); rows];
            let mut times = Vec::new();
            // The first run allocates. A lane that fails must not leave the others waiting.
            let first = lane.step(index, rows, &mut slots);
            barrier.wait();
            first?;
            let start = Instant::now();
            while times.len() < LEAST_RUNS || start.elapsed() < MEASURED {
                slots.iter_mut().for_each(|slot| slot.done = 0);
                let start = Instant::now();
                lane.step(index, rows, &mut slots)?;
                times.push(start.elapsed().as_secs_f64());
            }
            Ok(times)
        };
        let times = std::thread::scope(|scope| {
            let run = &run;
            let handles: Vec<_> = lanes.iter_mut().map(|lane| scope.spawn(move || run(lane))).collect();
            let joined =
                handles.into_iter().map(|h| h.join().map_err(|_| anyhow::anyhow!("a lane panicked"))?);
            joined.collect::<anyhow::Result<Vec<_>>>()
        })?;
        let mut times: Vec<f64> = times.concat();
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        curve.points.push(Point { rows, seconds });
        if (seconds > LONGEST_STEP && rows >= REFERENCE) || !curve.goes_on() {
            break;
        }
    }
    Ok(curve)
}

/// The processor's name: a curve is good for one machine.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim()));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{} × {cores}", name.unwrap_or(std::env::consts::ARCH))
}
