//! mudit's side of the comparisons with PyTorch: `mudit-speed-worker WORK MODEL SIZE THREADS [PROVIDER PRECISION]`, or
//! `mudit-speed-worker product FORM:ROWSxINPUTSxOUTPUTS mudit|onnxruntime|gemm THREADS`.
//!
//! | WORK | SIZE | one run |
//! |---|---|---|
//! | `train` | batch | a whole optimizer step |
//! | `forward` | batch | the `denoise` program |
//! | `sample` | steps | one image by DDIM with guidance |
//! | `guided`, `unguided` | batch | [`STEPS`] steps of DDPM |
//! | `update`, `copy` | | the update of all parameters; a copy of them |
//! | `answer` | folder | no time is measured: see [`answer`] |
//!
//! Sets up as `mudit train`, an engine or `mudit sample` does, runs once, says so, then runs whenever standard input
//! has a line with a number of runs, and answers with their milliseconds. Idle, it blocks on that read and uses no core.

mod answer;
mod product;
mod traffic;

use std::collections::BTreeMap;
use std::io::{BufRead as _, Write as _, stdin, stdout};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use graph_builder::Weights;
use models::{Guidance, Model, Objective, ProgramKind, ProgramSpec, Solver, SolverKind};
use mudit::execution::{Execution, Placed};
use mudit::external;
use mudit::sampler::{NoiseSource, Sampler, Settings};
use runtime::memory::peak_resident_bytes;
use runtime::safetensors_file::SafetensorsReader;
use runtime::{Arena, Binding, Runtime, RuntimeOptions, Session, SessionOptions};
use serde_json::json;
use train_engine::config::TrainConfig;
use train_engine::data::{Batch, Dataset};
use train_engine::random::{Purpose, Stream};
use train_engine::step::parameter_layout;
use train_engine::trainer::Trainer;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Work = Box<dyn FnMut() -> Result<()>>;

/// The quickstart's own settings.
const QUICKSTART: &str = include_str!("../../app/src/commands/quickstart.toml");
/// Scale of guidance when sampling.
const GUIDANCE: f64 = 4.0;
/// Steps of one run of `guided` and `unguided`.
const STEPS: usize = 10;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (kind, model, size, execution) = match arguments.as_slice() {
        [kind, model, size, threads] => (kind, model, size, Execution::cpu(threads.parse()?)),
        [kind, model, size, threads, provider, precision] => {
            let (provider, precision) = (provider.parse()?, precision.parse()?);
            (kind, model, size, Execution { provider, precision, threads: threads.parse()? })
        }
        _ => return Err("usage: mudit-speed-worker WORK MODEL SIZE THREADS [PROVIDER PRECISION]".into()),
    };
    let threads = execution.threads;
    let gpu = execution.provider.is_gpu();
    let runtime = Runtime::start(&RuntimeOptions { offline: true, gpu, ..RuntimeOptions::default() })?;
    if kind == "answer" {
        return answer::write(&runtime, model, Path::new(size), &execution);
    }
    execution.check()?;
    let mut bytes = None;
    let (mut work, flops) = match kind.as_str() {
        "train" => training(&runtime, model, size.parse()?, &execution)?,
        "forward" if gpu => forward_on_gpu(&runtime, model, size.parse()?, &execution)?,
        "forward" => forward(&runtime, model, size.parse()?, threads)?,
        "sample" => {
            let solver = Solver::new(SolverKind::Ddim, size.parse::<usize>()?);
            sampling(&runtime, model, 1, solver, (GUIDANCE, Guidance::All), execution)?
        }
        "guided" | "unguided" => {
            // As published: 3 channels guided.
            let guided = if kind == "guided" { (GUIDANCE, Guidance::First(3)) } else { (1.0, Guidance::Off) };
            let solver = Solver::new(SolverKind::Ddpm, STEPS);
            sampling(&runtime, model, size.parse()?, solver, guided, execution)?
        }
        "update" | "copy" => {
            let prepare = if kind == "update" { traffic::update } else { traffic::copy };
            let (work, moved) = prepare(model, &execution)?;
            bytes = Some(moved);
            (work, 0.0)
        }
        "product" => {
            let product = product::Product::parse(model)?;
            let work = match size.as_str() {
                "gemm" => product.by_gemm(threads),
                means => product.in_graph(&runtime, means == "mudit", threads)?,
            };
            (work, product.flops())
        }
        other => return Err(format!("`{other}` is no work of this program").into()),
    };
    work()?;
    let version = &runtime.library().version;
    let version = format!("onnxruntime {version}");
    say(&json!({ "ready": true, "flops": flops, "bytes": bytes, "version": version }))?;
    for line in stdin().lock().lines() {
        let mut milliseconds = Vec::new();
        for _ in 0..line?.trim().parse()? {
            let start = Instant::now();
            work()?;
            milliseconds.push(start.elapsed().as_secs_f64() * 1e3);
        }
        say(&json!({ "ms": milliseconds, "peak_rss_mb": peak_resident_bytes().map(|b| b as f64 / 1e6) }))?;
    }
    Ok(())
}

fn say(value: &serde_json::Value) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

/// Images that are never read: only their size and number of classes matter.
struct Blank {
    channels: usize,
    side: usize,
    classes: usize,
}

impl Dataset for Blank {
    fn len(&self) -> usize {
        1
    }
    fn channels(&self) -> usize {
        self.channels
    }
    fn height(&self) -> usize {
        self.side
    }
    fn width(&self) -> usize {
        self.side
    }
    fn num_classes(&self) -> usize {
        self.classes
    }
    fn class_names(&self) -> &[String] {
        &[]
    }
    fn label(&self, _: usize) -> i64 {
        0
    }
    fn read(&self, _: usize, _: bool, _: &mut Stream, out: &mut [f32]) -> train_engine::Result<i64> {
        out.fill(0.0);
        Ok(0)
    }
}

/// Whole optimizer steps: draws, forward, loss, backward, clip, AdamW, EMA.
fn training(runtime: &Arc<Runtime>, model: &str, batch: usize, execution: &Execution) -> Result<(Work, f64)> {
    let size = [
        format!("train.batch_size={batch}"),
        format!("train.threads={}", execution.threads),
        format!("train.provider={}", execution.provider),
        format!("train.precision={}", execution.precision),
    ];
    let (config, blank) = if model == "quickstart" {
        (TrainConfig::parse(QUICKSTART, model, &size)?, Blank { channels: 1, side: 28, classes: 10 })
    } else {
        let text = format!(
            "[model]\npreset = \"{model}\"\n[objective]\nkind = \"ddpm\"\n[mup]\nenabled = false\ninit = \"dit\"\n\
             [data]\nkind = \"latents\"\npath = \"none\"\n[train]\nclip = 1.0\n"
        );
        let dit = Model::resolve(model)?;
        let blank = Blank {
            channels: dit.latent().channels,
            side: dit.latent().height,
            classes: dit.conditioning().class_count(),
        };
        (TrainConfig::parse(&text, model, &size)?, blank)
    };
    let dit = config.model_config(&blank)?;
    let mut trainer = Trainer::new(runtime, &config, &dit)?;
    let flops = trainer.compiled().cost.flops as f64;
    let mut x0 = vec![0.0; batch * blank.image_len()];
    Stream::new(0, Purpose::SampleInit, 0, 0).fill_normal(&mut x0);
    let y = (0..batch).map(|i| (i % blank.classes) as i64).collect();
    let mut images = Batch { step: 0, indices: vec![0; batch], x0, y };
    let work = move || {
        let (loss, update) = trainer.step(&images)?;
        images.step += 1;
        if update.finite && loss.loss.is_finite() { Ok(()) } else { Err("the loss is not finite".into()) }
    };
    Ok((Box::new(work), flops))
}

/// Parameters of the size that trained ones have.
fn parameters(model: &Model) -> Result<Arena> {
    let graph = model.program(&ProgramSpec::new(ProgramKind::Denoise, 1))?;
    let mut arena = Arena::zeros(parameter_layout(graph.parameters())?)?;
    for (i, view) in arena.views_mut().into_iter().enumerate() {
        Stream::new(0, Purpose::Init, 0, i as u64).fill_normal(view);
        for value in view.iter_mut() {
            *value *= 0.02;
        }
    }
    Ok(arena)
}

/// The `denoise` program of an engine: parameters are initializers that point into a safetensors file.
fn forward(runtime: &Arc<Runtime>, model: &str, batch: usize, threads: usize) -> Result<(Work, f64)> {
    const FILE: &str = "model.safetensors";
    let dit = Model::resolve(model)?;
    let directory = tempfile::tempdir()?;
    let arena = parameters(&dit)?;
    arena.write_safetensors(directory.path().join(FILE), &BTreeMap::new())?;
    let reader = SafetensorsReader::open(directory.path().join(FILE))?;
    let tensors = external::tensors(&reader, arena.layout(), |_| graph_builder::DType::F32)?;
    drop(arena);
    let graph = dit.compiled(&ProgramSpec::new(ProgramKind::Denoise, batch))?;
    let emitted = graph.emit(Weights::External { file: FILE, tensors: &tensors })?;
    let weights = runtime::Weights::Directory(directory.path().to_path_buf());
    let options = SessionOptions { threads, ..SessionOptions::default() };
    let session = Session::load(runtime, &emitted, &weights, &options)?;
    let mut binding = Binding::owned(&session)?;
    Stream::new(0, Purpose::SampleInit, 0, 0).fill_normal(binding.input_f32("x")?);
    for (i, (t, y)) in [(999.0, 1), (500.0, 2), (1.0, 3)].into_iter().cycle().take(batch).enumerate() {
        binding.input_f32("t")?[i] = t;
        binding.input_i64("y")?[i] = y;
    }
    let flops = graph.cost().flops as f64;
    let work = move || {
        binding.run()?;
        let finite = binding.output_f32("out")?.iter().all(|v| v.is_finite());
        // The files live as long as the session that maps them.
        if finite && directory.path().exists() { Ok(()) } else { Err("the answer is not finite".into()) }
    };
    Ok((Box::new(work), flops))
}

/// The `denoise` program with its parameters on the GPU.
fn forward_on_gpu(
    runtime: &Arc<Runtime>,
    model: &str,
    batch: usize,
    execution: &Execution,
) -> Result<(Work, f64)> {
    let dit = Model::resolve(model)?;
    let placed = Placed::of(&parameters(&dit)?.into_shared(), &dit, execution)?;
    let graph = dit.program(&ProgramSpec::new(ProgramKind::Denoise, batch))?;
    let flops = graph.optimised()?.cost().flops as f64;
    let mut binding = placed.load(runtime, &graph, execution, &execution.session_options())?;
    Stream::new(0, Purpose::SampleInit, 0, 0).fill_normal(binding.input_f32("x")?);
    binding.input_f32("t")?.fill(500.0);
    let work = move || {
        binding.run()?;
        let finite = binding.output_f32("out")?.iter().all(|v| v.is_finite());
        if finite { Ok(()) } else { Err("the answer is not finite".into()) }
    };
    Ok((Box::new(work), flops))
}

/// Images of one batch, whole.
fn sampling(
    runtime: &Arc<Runtime>,
    model: &str,
    batch: usize,
    solver: Solver,
    (guidance, guided): (f64, Guidance),
    execution: Execution,
) -> Result<(Work, f64)> {
    let mut dit = Model::resolve(model)?;
    dit.objective = Objective::Ddpm;
    let arena = parameters(&dit)?.into_shared();
    let settings = Settings { solver, guidance, guided, batch, execution };
    let placed = Placed::of(&arena, &dit, &settings.execution)?;
    let mut sampler = Sampler::new(runtime, &dit, &placed, &settings)?;
    let flops = dit.compiled(&ProgramSpec::new(ProgramKind::Step, batch).guided(guided))?.cost().flops as f64;
    let flops = flops * sampler.steps() as f64;
    let labels = vec![7; batch];
    let mut seed = 0;
    let work = move || {
        seed += 1;
        let images = sampler.run(&labels, NoiseSource::Seeded { seed, first: 0 }, None, &mut |_| {})?;
        if images.iter().all(|v| v.is_finite()) { Ok(()) } else { Err("an image is not finite".into()) }
    };
    Ok((Box::new(work), flops))
}
