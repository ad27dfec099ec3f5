//! One set of images through the network: what `ref`, `calc` and `verify` have in common.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use models::{Solver, SolverKind, Spacing};
use runtime::Runtime;
use runtime::file::sha256_file;

use super::super::listen;
use super::super::solving::Solving;
use super::super::weights::{self, Loaded, Which};
use super::network;
use crate::console;
use crate::execution::{Execution, Placed};
use crate::fid::evaluation::Features;
use crate::fid::extractor::Extractor;
use crate::fid::part::Part;
use crate::fid::pass::{self, Outcome};
use crate::fid::plan::{BLOCK, Images, MOST_IMAGES, Plan, Recipe, Shard, Side};
use crate::fid::report::check_count;
use crate::fid::resuming;
use crate::fid::source::sampled::{Classes, Sampled};
use crate::fid::source::scale::Scale;
use crate::fid::source::subset::{Subset, groups_of_first};
use crate::fid::source::{self, OpenOptions, Source};
use crate::render::progress::{Job, Progress};
use crate::sampler::{Sampler, Settings, channels, channels_text};
use crate::{Stopped, Usage};

/// Options of every command that reads images.
#[allow(clippy::struct_excessive_bools, reason = "independent switches of a command line")]
#[derive(Clone, Debug, Args)]
pub(super) struct SetArgs {
    /// Images: .npz (`arr_0`), .npy, folders, .zip, .tar, .parquet, `fashion-mnist:test`; several are one set.
    pub(super) inputs: Vec<String>,
    /// Range of the pixels of arrays (.npz, .npy). Default: bytes, and arrays that look like another one are refused.
    #[arg(long, value_enum)]
    scale: Option<Scale>,
    /// Column of the images in a .parquet file.
    #[arg(long)]
    column: Option<String>,
    /// Number of images, from the first on; default all.
    #[arg(id = "images_of_set", short = 'n', long = "count", value_parser = clap::value_parser!(u64).range(1..=MOST_IMAGES))]
    pub(super) count: Option<u64>,
    /// Take the images of -n evenly from all that are there, as the first ones of sorted folders are of few classes.
    #[arg(long, requires = "images_of_set", requires = "inputs")]
    spread: bool,
    /// Allow images of different sizes; each is resized on its own.
    #[arg(long)]
    pub(super) mixed_sizes: bool,
    /// Allow fewer than 2048 images.
    #[arg(long)]
    pub(super) few: bool,
    /// Do one part of several, such as 3/10; `mudit fid merge` puts them together.
    #[arg(long, value_name = "I/N")]
    pub(super) shard: Option<Shard>,
    /// Where unfinished work is kept, so that the same command goes on; default beside --out.
    #[arg(long, value_name = "DIR")]
    pub(super) work: Option<PathBuf>,
    /// Keep the features after the result is written.
    #[arg(long)]
    pub(super) keep_work: bool,
}

impl SetArgs {
    /// The files as they are written into results.
    pub(super) fn images(&self) -> Images {
        Images::Files {
            inputs: self.inputs.clone(),
            column: self.column.clone(),
            first: self.count,
            spread: self.spread,
            scale: self.scale,
        }
    }

    /// Where the work is kept.
    pub(super) fn work(&self, out: &Path) -> PathBuf {
        if let Some(work) = &self.work {
            return work.clone();
        }
        let mut name = out.as_os_str().to_owned();
        name.push(match self.shard {
            Some(Shard { number, of }) => format!(".part-{number}-of-{of}"),
            None => ".part".to_owned(),
        });
        name.into()
    }
}

/// Options of a checkpoint's samples.
#[derive(Clone, Debug, Args)]
pub(super) struct CheckpointArgs {
    /// Sample this checkpoint or run directory; -n says how many images.
    #[arg(long, conflicts_with = "inputs")]
    pub(super) checkpoint: Option<PathBuf>,
    /// Which parameters: the moving average or the model's own.
    #[arg(long, value_enum, default_value = "ema")]
    weights: Which,
    #[command(flatten)]
    solving: Solving,
    /// Classes in turn, by name or number, separated by commas; `@2` is number 2 whatever the names are. Default drawn
    /// at random, all alike.
    #[arg(long)]
    classes: Vec<String>,
    /// Seed of noise and classes; image i of a seed is always the same.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Samples made at once.
    #[arg(id = "batch_of_sampler", long = "sample-batch", default_value_t = 50, value_parser = network::batch)]
    sample_batch: usize,
}

impl CheckpointArgs {
    /// All that decides about the samples, looked up in the checkpoint.
    pub(super) fn recipe(&self, path: &Path, count: u64, execution: &Execution) -> anyhow::Result<Recipe> {
        let loaded = weights::open(path, self.weights)?;
        let model = &loaded.model;
        let solver = self.solving.solver(model);
        solver.plan(model.objective, model.learns_variance())?;
        let classes: Vec<i64> = model.classes(&self.classes)?.into_iter().map(|class| class as i64).collect();
        let settings = Settings {
            solver,
            guidance: self.solving.cfg,
            guided: self.solving.guided(model)?,
            batch: self.sample_batch,
            execution: execution.clone(),
        };
        Ok(Recipe {
            weights: if self.weights == Which::Ema { "ema" } else { "model" }.to_owned(),
            classes: (!classes.is_empty()).then_some(classes),
            ..recipe(path, &loaded, &settings, self.seed, count)?
        })
    }
}

/// The recipe of `count` samples of a checkpoint's average, of classes drawn at random.
pub(in super::super) fn recipe(
    path: &Path,
    loaded: &Loaded,
    settings: &Settings,
    seed: u64,
    count: u64,
) -> anyhow::Result<Recipe> {
    let solver = &settings.solver;
    Ok(Recipe {
        checkpoint: path.to_path_buf(),
        weights: "ema".to_owned(),
        weights_sha256: sha256_file(&loaded.file)?,
        model: serde_json::to_value(&loaded.model)?,
        sampler: solver.kind.name().to_owned(),
        steps: solver.spacing.to_string(),
        eta: solver.eta,
        shift: solver.shift,
        cfg: settings.guidance,
        cfg_channels: channels_text(settings.guided),
        classes: None,
        seed,
        count,
        batch: settings.batch,
        threads: settings.execution.threads,
        provider: settings.execution.provider.to_string(),
        precision: settings.execution.precision,
    })
}

/// Refuses sets that are too small or too large, and shards that are not there, before anything is computed; tells what
/// a user should know of the images, and gives it for the result. Features of `kept` images are kept.
///
/// # Errors
/// As [`check_count`] and [`Shard::range`].
pub(super) fn check(
    side: Side,
    source: &dyn Source,
    args: &SetArgs,
    kept: u64,
) -> anyhow::Result<Vec<String>> {
    let count = source.count();
    let few = check_count(side, count, args.few)?;
    args.shard.unwrap_or(Shard::WHOLE).range(count, BLOCK)?;
    let mut remarks = source.remarks();
    if let Some((some, all)) = groups_of_first(source, kept) {
        remarks.push(format!(
            "features of {kept} images are kept, from {some} of {all} folders or files only: precision, recall and KID are of \
             these"
        ));
    }
    for remark in &remarks {
        console::note(&format!("warning: {remark}"));
    }
    Ok(few.into_iter().chain(remarks).collect())
}

/// Opens what a plan's images are.
pub(super) fn open(
    images: &Images,
    runtime: &Arc<Runtime>,
    offline: bool,
) -> anyhow::Result<Box<dyn Source>> {
    match images {
        Images::Files { inputs, column, first, spread, scale } => {
            let options = OpenOptions { column: column.clone(), scale: *scale, offline };
            let source = source::open(inputs, &options, &console::note)?;
            Ok(match first {
                Some(count) => Box::new(Subset::new(source, *count, *spread)?),
                None => source,
            })
        }
        Images::Checkpoint(recipe) => Ok(Box::new(sampled(recipe, runtime)?)),
    }
}

fn sampled(recipe: &Recipe, runtime: &Arc<Runtime>) -> anyhow::Result<Sampled> {
    let usage = |what: &str| Usage(format!("the recipe's {what} cannot be read"));
    let which = if recipe.weights == "model" { Which::Model } else { Which::Ema };
    let loaded = weights::open(&recipe.checkpoint, which)?;
    let hash = sha256_file(&loaded.file)?;
    anyhow::ensure!(
        hash == recipe.weights_sha256,
        "{} has sha256 {hash}, the recipe was made with {}: it is another checkpoint",
        loaded.file.display(),
        recipe.weights_sha256
    );
    let kind: SolverKind = recipe.sampler.parse().map_err(|_| usage("sampler"))?;
    let spacing: Spacing = recipe.steps.parse().map_err(|_| usage("steps"))?;
    let solver = Solver { eta: recipe.eta, shift: recipe.shift, ..Solver::new(kind, spacing) };
    let settings = Settings {
        solver,
        guidance: recipe.cfg,
        guided: channels(&recipe.cfg_channels).map_err(|_| usage("guidance"))?,
        batch: recipe.batch,
        execution: Execution {
            provider: recipe.provider.parse().map_err(|_| usage("provider"))?,
            precision: recipe.precision,
            threads: recipe.threads,
        },
    };
    let placed = Placed::of(&loaded.parameters, &loaded.model, &settings.execution)?;
    let sampler = Sampler::new(runtime, &loaded.model, &placed, &settings)?;
    let classes = recipe.classes.clone().map_or(Classes::Random, Classes::Cycle);
    Sampled::new(sampler, &loaded.model, classes, recipe.seed, recipe.count, recipe.batch)
}

/// Does what is missing of a shard of `plan` in `work`.
///
/// # Errors
/// What reading, the network or the disk say; a stop by a signal.
pub(super) fn run(
    plan: &Plan,
    shard: Shard,
    work: &Path,
    source: &mut dyn Source,
    network: &mut Extractor,
) -> anyhow::Result<Part> {
    let range = plan.shard(shard)?;
    let mut part = Part::open(work, plan, range.clone())?;
    resuming::settle(&mut part, source, &console::note)?;
    let (done, total) = (part.seen.images, range.end - range.start);
    if done > 0 {
        console::note(&format!("going on after {done} of {total} images, found in {}", work.display()));
    }
    let stop = listen("group of images")?;
    let mut progress = Progress::new(Job {
        name: "features".into(),
        first_step: done,
        total_steps: total,
        images_per_step: 1.0,
        flops_per_step: 0.0,
    });
    let outcome = pass::run(&mut part, source, network, &|| stop.is_set(), &mut |n| progress.update(n, None));
    progress.finish();
    if part.seen.images == 0 && !matches!(outcome, Ok(Outcome::Finished)) {
        // What never began is nothing to go on with.
        part.remove()?;
        return match outcome {
            Err(error) => Err(error),
            Ok(_) => anyhow::bail!(
                "stopped before the first {} of {total} images were done",
                plan.block.min(total)
            ),
        };
    }
    if outcome.is_err() {
        console::note(&format!(
            "features of {} of {total} images are kept in {}; the same command goes on from there",
            part.seen.images,
            work.display()
        ));
    }
    if outcome? == Outcome::Stopped {
        let done = part.seen.images;
        let text =
            format!("stopped and saved after {done} of {total} images; the same command goes on from there");
        return Err(Stopped(text).into());
    }
    Ok(part)
}

/// A finished part's features, if it is all there is.
pub(super) fn alone(part: Part) -> anyhow::Result<Features> {
    Features::of(vec![part])
}

/// Says where a shard lies and what comes next.
pub(super) fn tell_shard(part: &Part, json: bool) -> anyhow::Result<()> {
    let (range, place) = (part.range(), part.directory());
    if json {
        return console::json(&serde_json::json!({
            "part": place, "first": range.start, "end": range.end, "of": part.plan().count,
        }));
    }
    console::out(&format!(
        "images {}..{} of {}: {}",
        range.start,
        range.end,
        part.plan().count,
        place.display()
    ))?;
    console::out("next, when all parts are done: mudit fid merge PARTS --out FILE")
}
