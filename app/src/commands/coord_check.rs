//! `mudit coord-check`: do activations and their updates keep their size over widths?

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, ValueEnum};
use models::{InitScheme, Model};
use runtime::file::{check_writable, write_atomically};
use serde_json::json;
use train_engine::config::TrainConfig;
use train_engine::coordinates::{CheckPlan, Coordinates, LayerVerdict, Quantity, Trend, at_width, measure};
use train_engine::data::{self, Batch, BatchPlan, Dataset, GaussianImages, Loader};

use super::{Machine, listen};
use crate::console;
use crate::render::panels::{Line, Panel, Panels, Scale};
use crate::render::progress::{Job, Progress};
use crate::{Stopped, Usage};

/// Which parameterisation is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Parameterisation {
    /// Rates and the output layer follow the parameters' roles.
    Mup,
    /// One rate for all parameters, no factor.
    Sp,
}

/// Arguments of `mudit coord-check`.
#[derive(Debug, Args)]
pub struct CoordCheckArgs {
    /// A run's TOML file: its model, objective, data and parameterisation.
    #[arg(long, conflicts_with = "model")]
    config: Option<PathBuf>,
    /// Without a run: a preset such as `DiT-S/2@8x8x4:10` or a config.json, checked on Gaussian images.
    #[arg(long)]
    model: Option<String>,
    /// Overrides such as `model.depth=28`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Widths, multiples of the head size.
    #[arg(long, value_delimiter = ',', default_value = "72,144,288,576")]
    widths: Vec<usize>,
    /// Size of an attention head, the same at all widths; that of the model where none is given.
    #[arg(long)]
    head_size: Option<usize>,
    /// Optimizer steps.
    #[arg(long, default_value_t = 4)]
    steps: u64,
    /// Seeds.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Images; one batch serves all steps.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Learning rate at the base width, larger than for training so that few steps show what they do.
    #[arg(long, default_value_t = 1.0 / 128.0)]
    rate: f64,
    /// muP or the standard parameterisation.
    #[arg(long, value_enum, default_value = "mup")]
    parameterisation: Parameterisation,
    /// First values, `mup` or `dit`. Default: the configuration's, or `mup` for both parameterisations.
    #[arg(long)]
    init: Option<InitScheme>,
    /// Width at which the rate holds; default the smallest.
    #[arg(long)]
    base_width: Option<usize>,
    /// A layer passes when no size changes faster than the width to this power, either way.
    #[arg(long, default_value_t = 0.35)]
    tolerance: f64,
    /// Folder for coord-check.svg, coord-check-updates.svg and coord-check.json.
    #[arg(long, default_value = "coord-check")]
    out: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

impl CoordCheckArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.widths.len() < 2 || self.steps == 0 || self.seeds == 0 || self.batch == 0 {
            return Err(Usage(
                "a check needs two or more widths, and one or more steps, seeds and images".into(),
            )
            .into());
        }
        let start = Instant::now();
        let (mut config, dataset) = self.settings()?;
        check_writable(self.out.join(REPORT))?;
        let mut widths = self.widths.clone();
        widths.sort_unstable();
        widths.dedup();
        config.mup.enabled = self.parameterisation == Parameterisation::Mup;
        config.mup.base_width = self.base_width.unwrap_or(widths[0]);
        config.mup.init = self.init.unwrap_or(config.mup.init);
        config.train.learning_rate = self.rate;
        config.train.warmup_steps = 0;
        config.train.batch_size = self.batch;
        config.train.accumulate = 1;
        config.train.threads = self.machine.threads;
        let mut model = config.model_config(dataset.as_ref())?;
        if let Some(head) = self.head_size {
            if head == 0 || !widths[0].is_multiple_of(head) {
                return Err(Usage(format!("--head-size {head} does not divide width {}", widths[0])).into());
            }
            model.network = model.network.resized(widths[0], head);
        }
        for &width in &widths {
            at_width(&model, width)?; // before anything is compiled
        }
        let runtime = self.machine.runtime()?;
        let batch = first_batch(&config, &dataset)?;
        let plan = CheckPlan { widths, steps: self.steps, seeds: (0..self.seeds).collect() };
        let mut progress = Progress::new(Job {
            name: "coord-check".into(),
            first_step: 0,
            total_steps: (plan.widths.len() * plan.seeds.len()) as u64,
            images_per_step: 0.0,
            flops_per_step: 0.0,
        });
        let stop = listen("training")?;
        let measured = measure(&runtime, &config, &model, &batch, &plan, &mut |done, _| {
            progress.update(done as u64, None);
            !stop.is_set()
        })?;
        drop(stop);
        progress.finish();
        let Some(measured) = measured else {
            return Err(Stopped("stopped; a check is whole or nothing, so nothing was written".into()).into());
        };
        let verdict = measured.verdict(self.tolerance);
        self.report(&measured, &verdict, &config, start.elapsed().as_secs_f64())?;
        match worst(&verdict) {
            None => Ok(()),
            Some((layer, quantity, trend)) => anyhow::bail!(
                "the coordinate check fails in {} of {} layers, worst in `{}`{}: its {} goes as width^{:.2} after step {}",
                verdict.iter().filter(|v| !v.passed).count(),
                verdict.len(),
                layer.layer,
                layer.role.map_or(String::new(), |r| format!(" ({})", format!("{r:?}").to_lowercase())),
                word(quantity),
                trend.slope,
                trend.step
            ),
        }
    }

    /// The configuration and its data.
    fn settings(&self) -> anyhow::Result<(TrainConfig, Arc<dyn Dataset>)> {
        if let Some(path) = &self.config {
            let config = TrainConfig::load(path, &self.overrides)?;
            let dataset = data::open(&config.data, self.machine.offline, &console::note)?;
            return Ok((config, dataset));
        }
        let name = self.model.as_deref().unwrap_or(DEFAULT_MODEL);
        let model = Model::resolve(name)?;
        let mut config = TrainConfig::parse("", "the defaults", &self.overrides)?;
        if config.model.config.is_none() && config.model.preset.is_none() {
            let is_file = self.model.is_some()
                && Model::preset(name.split(['@', ':']).next().unwrap_or(name)).is_none();
            if is_file {
                config.model.config = Some(name.into());
            } else {
                config.model.preset = Some(name.to_owned());
            }
        }
        config.objective.kind = model.objective;
        config.data.flip = false;
        let (images, classes) = (self.batch.max(2), model.conditioning().class_count());
        let dataset = GaussianImages::new(images, model.latent().channels, model.latent().height, classes);
        Ok((config, Arc::new(dataset)))
    }

    fn report(
        &self,
        measured: &Coordinates,
        verdict: &[LayerVerdict],
        config: &TrainConfig,
        seconds: f64,
    ) -> anyhow::Result<()> {
        let (plot, updates) = (self.out.join("coord-check.svg"), self.out.join("coord-check-updates.svg"));
        picture(measured, verdict, Quantity::Activation, config).save(&plot)?;
        picture(measured, verdict, Quantity::Update, config).save(&updates)?;
        let passed = verdict.iter().all(|v| v.passed);
        let worst = worst(verdict).map(|(layer, ..)| layer.layer.clone());
        let report = json!({
            "parameterisation": if config.mup.enabled { "mup" } else { "sp" }, "init": config.mup.init.name(),
            "base_width": config.mup.base_width, "rate": self.rate, "batch": self.batch,
            "tolerance": self.tolerance, "passed": passed, "worst": worst, "seconds": seconds,
            "roles": by_role(verdict).into_iter().map(|(r, _, t)| (r, t.slope)).collect::<BTreeMap<_, _>>(),
            "verdict": verdict, "sizes": measured,
        });
        let file = self.out.join(REPORT);
        write_atomically(&file, |out| writeln!(out, "{report:#}"))?;
        if self.json {
            return console::json(&report);
        }
        console::out(&format!(
            "{:40} {:8} {:>18} {:>18}   size ~ width^slope, steepest of {} steps, ± over {} seeds",
            "layer", "role", "activation", "update", self.steps, self.seeds
        ))?;
        for v in verdict {
            console::out(&format!(
                "{:40} {:8} {:>18} {:>18}   {}",
                v.layer,
                v.role.map_or("-".into(), |r| format!("{r:?}").to_lowercase()),
                slope(v.activation),
                slope(v.update),
                if v.passed { "ok" } else { "FAILS" }
            ))?;
        }
        for (role, quantity, trend) in by_role(verdict) {
            console::out(&format!("{role:9} worst {:10} width^{:+.2}", word(quantity), trend.slope))?;
        }
        console::out(&format!(
            "{}: {} of {} layers within width^±{} over widths {:?}, in {seconds:.0} s",
            if passed { "passed" } else { "FAILED" },
            verdict.iter().filter(|v| v.passed).count(),
            verdict.len(),
            self.tolerance,
            measured.widths
        ))?;
        [plot, updates, file].iter().try_for_each(|path| console::out(&path.display().to_string()))
    }
}

/// File of the verdict.
const REPORT: &str = "coord-check.json";
/// The model that is checked where none is named: as small as shows every kind of layer.
const DEFAULT_MODEL: &str = "DiT-S/4@16x16x4:10";

fn first_batch(config: &TrainConfig, dataset: &Arc<dyn Dataset>) -> anyhow::Result<Batch> {
    let plan = BatchPlan::new(config.train.seed, dataset.len(), config.train.batch_size)?;
    let mut loader = Loader::start(Arc::clone(dataset), plan, false, 0..1, 1, 1)?;
    loader.next().transpose()?.context("internal: the loader gave no batch")
}

fn worst(verdict: &[LayerVerdict]) -> Option<(&LayerVerdict, Quantity, Trend)> {
    let failed = verdict.iter().filter(|v| !v.passed);
    let steep = failed.filter_map(|v| v.steepest().map(|(quantity, trend)| (v, quantity, trend)));
    let size = |t: &Trend| if t.slope.is_nan() { f64::INFINITY } else { t.slope.abs() };
    steep.max_by(|a, b| size(&a.2).total_cmp(&size(&b.2)))
}

/// The steepest trend of each role's layers.
fn by_role(verdict: &[LayerVerdict]) -> Vec<(String, Quantity, Trend)> {
    let mut roles: BTreeMap<String, (Quantity, Trend)> = BTreeMap::new();
    for v in verdict {
        let (Some(role), Some((quantity, trend))) = (v.role, v.steepest()) else { continue };
        let name = format!("{role:?}").to_lowercase();
        let steeper = roles.get(&name).is_none_or(|(_, known)| trend.slope.abs() > known.slope.abs());
        if steeper || trend.slope.is_nan() {
            roles.insert(name, (quantity, trend));
        }
    }
    roles.into_iter().map(|(role, (quantity, trend))| (role, quantity, trend)).collect()
}

fn word(quantity: Quantity) -> &'static str {
    match quantity {
        Quantity::Activation => "activation",
        Quantity::Update => "update",
    }
}

fn slope(trend: Option<Trend>) -> String {
    trend.map_or_else(|| "does not move".into(), |t| format!("{:+.2} ± {:.2} @{}", t.slope, t.error, t.step))
}

/// One panel a layer: size over width, a line a step.
fn picture(
    measured: &Coordinates,
    verdict: &[LayerVerdict],
    quantity: Quantity,
    config: &TrainConfig,
) -> Panels {
    let panels = measured.layers.iter().zip(verdict).map(|(layer, verdict)| {
        let sizes = match quantity {
            Quantity::Activation => &layer.activation,
            Quantity::Update => &layer.update,
        };
        let lines = sizes.iter().enumerate().map(|(step, of_width)| {
            let mean = |seeds: &Vec<f64>| seeds.iter().sum::<f64>() / seeds.len() as f64;
            let points = measured.widths.iter().zip(of_width).map(|(w, s)| (*w as f64, mean(s))).collect();
            Line { series: step, points, spread: Vec::new(), marked: None, joined: true }
        });
        Panel { title: layer.layer.clone(), lines: lines.collect(), alarm: !verdict.passed }
    });
    let failed = verdict.iter().filter(|v| !v.passed).count();
    Panels {
        title: format!(
            "Coordinate check, {}: {}",
            if config.mup.enabled { "muP" } else { "standard parameterisation" },
            if failed == 0 { "passed".into() } else { format!("{failed} of {} layers fail", verdict.len()) }
        ),
        subtitle: format!(
            "mean size of a layer's {} over the width, rate {} at width {}, {} seeds",
            word(quantity),
            config.train.learning_rate,
            config.mup.base_width,
            measured.seeds.len()
        ),
        x_label: "width".into(),
        y_label: format!("|{}|", if quantity == Quantity::Activation { "x" } else { "change of x" }),
        x: Scale::Log2,
        y: Scale::Log2,
        common_y: false,
        legend: (0..=measured.steps).map(|step| format!("after step {step}")).collect(),
        columns: 5,
        zoom: 1.0,
        panels: panels.collect(),
    }
}
