//! The trials of a sweep, grouped by the compiled step they share, and what they cost.

use std::collections::BTreeMap;
use std::path::Path;

use models::{Model, ModelError, ProgramKind, ProgramSpec};
use runtime::file::{sha256_bytes, write_atomically};
use serde::{Deserialize, Serialize};

use super::spec::{Overrides, SweepSpec};
use crate::config::TrainConfig;
use crate::data::{BatchPlan, Dataset};
use crate::error::{Result, TrainError};
use crate::step::StepShape;
use crate::trainer::refuse_precision;

/// File of the trials in a sweep's folder.
pub const TRIALS_FILE: &str = "trials.jsonl";
/// The key that sets a trial's seed.
pub const SEED_KEY: &str = "train.seed";

/// One run of a sweep.
#[derive(Debug, Clone)]
pub struct Trial {
    /// Its number in the plan.
    pub index: usize,
    /// What it computes, as a hash: a result belongs to whatever trial has its id, in this plan or a later one.
    pub id: String,
    /// Name of its variant; empty without variants.
    pub variant: String,
    /// What it changes of the run.
    pub set: Overrides,
    /// Its configuration.
    pub config: TrainConfig,
    /// Its model.
    pub model: Model,
    /// The compiled step that it can use.
    pub shape: StepShape,
}

/// A line of `trials.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct TrialLine {
    trial: usize,
    id: String,
    variant: String,
    set: Overrides,
    shape: String,
}

/// All trials of a sweep; those that share a compiled step stand together.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The sweep.
    pub spec: SweepSpec,
    /// The trials.
    pub trials: Vec<Trial>,
}

/// Work of one optimizer step of a shape.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepCost {
    /// Floating-point operations, counted from the graph.
    pub flops: f64,
    /// Trainable parameters.
    pub parameters: usize,
}

impl Plan {
    /// The trials of `spec` over the run `base` on a data set; everything that any of them would be refused for is
    /// refused here.
    ///
    /// # Errors
    /// What [`TrainConfig::with_overrides`] gives; [`TrainError::BadTrial`] for one that the data set, the model or this
    /// machine cannot run; [`TrainError::BadValue`] for a width that the head size does not divide.
    pub fn new(spec: &SweepSpec, base: &TrainConfig, data: &dyn Dataset) -> Result<Self> {
        let none = Overrides::new();
        let variants: Vec<(&str, &Overrides)> = if spec.variants.is_empty() {
            vec![("", &none)]
        } else {
            spec.variants.iter().map(|(name, set)| (name.as_str(), set)).collect()
        };
        let mut trials = Vec::new();
        for (variant, own) in variants {
            for point in spec.points() {
                let mut all = own.clone();
                all.extend(point.clone());
                let config = resolve(base, &all, spec.head_size)?;
                let model = fitting(&config, base, data).map_err(|error| refused(&all, error))?;
                let shape = StepShape::of(&config, &model);
                let id = id(&config, &model)?;
                trials.push(Trial {
                    index: 0,
                    id,
                    variant: variant.to_owned(),
                    set: point,
                    config,
                    model,
                    shape,
                });
            }
        }
        let mut order: BTreeMap<StepShape, usize> = BTreeMap::new();
        for trial in &trials {
            let next = order.len();
            order.entry(trial.shape.clone()).or_insert(next);
        }
        trials.sort_by_key(|trial| order.get(&trial.shape).copied());
        let mut seen = std::collections::BTreeSet::new();
        trials.retain(|trial| seen.insert((trial.variant.clone(), trial.id.clone())));
        for (index, trial) in trials.iter_mut().enumerate() {
            trial.index = index;
        }
        Ok(Self { spec: spec.clone(), trials })
    }

    /// Writes `trials.jsonl` into the sweep's folder.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        let line = |trial: &Trial| {
            let line = TrialLine {
                trial: trial.index,
                id: trial.id.clone(),
                variant: trial.variant.clone(),
                set: trial.set.clone(),
                shape: trial.shape.to_string(),
            };
            serde_json::to_string(&line).map_err(|e| TrainError::Internal(format!("a trial: {e}")))
        };
        let lines: Vec<String> = self.trials.iter().map(line).collect::<Result<_>>()?;
        let text = lines.join("\n") + "\n";
        Ok(write_atomically(folder.join(TRIALS_FILE), |out| out.write_all(text.as_bytes()))?)
    }

    /// The shapes in order, each with its trials' numbers.
    pub fn shapes(&self) -> Vec<(&StepShape, Vec<&Trial>)> {
        let mut shapes: Vec<(&StepShape, Vec<&Trial>)> = Vec::new();
        for trial in &self.trials {
            match shapes.last_mut() {
                Some((shape, trials)) if **shape == trial.shape => trials.push(trial),
                _ => shapes.push((&trial.shape, vec![trial])),
            }
        }
        shapes
    }

    /// The keys that differ between trials, by name; the seed last.
    pub fn varied(&self) -> Vec<String> {
        let mut keys: Vec<String> = self.spec.parameters.keys().cloned().collect();
        keys.sort_by_key(|key| key == SEED_KEY);
        keys
    }
}

/// The model of a trial that can run: everything is asked that a run asks before its first step.
fn fitting(config: &TrainConfig, base: &TrainConfig, data: &dyn Dataset) -> Result<Model> {
    if config.train.from.is_some() {
        return Err(TrainError::BadValue {
            key: "train.from",
            value: "set".into(),
            allowed: "left out: the trials of a sweep draw their first parameters".into(),
        });
    }
    let model = config.model_config(data)?;
    if config.train.precision != base.train.precision {
        refuse_precision(config)?; // the run's own is refused where it is run: plans are made elsewhere, too
    }
    BatchPlan::new(config.train.seed, data.len(), config.train.batch_size)?;
    if config.data.flip && !data.can_flip() {
        return Err(TrainError::BadValue {
            key: "data.flip",
            value: "true".into(),
            allowed: "false: the data set holds no mirrored images".into(),
        });
    }
    Ok(model)
}

/// Tells which trial an error is of.
fn refused(set: &Overrides, error: TrainError) -> TrainError {
    if set.is_empty() {
        return error;
    }
    let set: Vec<String> = set.iter().map(|(key, value)| format!("{key}={value}")).collect();
    TrainError::BadTrial { set: set.join(" "), source: Box::new(error) }
}

/// The run `base` with overrides, and heads of the asked size.
///
/// # Errors
/// As [`TrainConfig::with_overrides`].
pub fn resolve(base: &TrainConfig, set: &Overrides, head_size: Option<usize>) -> Result<TrainConfig> {
    let lines: Vec<String> = set.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut config = base.with_overrides(&lines)?;
    if let (Some(head), Some(width)) = (head_size, config.model.hidden_size) {
        if !width.is_multiple_of(head) {
            return Err(TrainError::BadValue {
                key: "model.hidden_size",
                value: width.to_string(),
                allowed: format!("a multiple of `head_size = {head}`"),
            });
        }
        config.model.num_heads = Some(width / head);
    }
    Ok(config)
}

/// Work of one optimizer step of a run.
///
/// # Errors
/// [`TrainError::Model`].
pub fn step_cost(config: &TrainConfig, model: &Model) -> Result<StepCost> {
    let micro = config.train.batch_size / config.train.accumulate;
    let graph = model.program(&ProgramSpec::new(ProgramKind::TrainStep, micro))?;
    let parameters = graph.parameter_counts().1;
    let cost = graph.optimised().map_err(ModelError::from)?.cost();
    Ok(StepCost { flops: cost.flops as f64 * config.train.accumulate as f64, parameters })
}

/// Everything that decides a trial's losses: the run without its paths, its length and its decay's where that is
/// another, its model.
fn id(config: &TrainConfig, model: &Model) -> Result<String> {
    let (train, decay) = (&config.train, config.train.decay_end());
    let decay = decay.filter(|end| *end != train.steps).map_or_else(String::new, |end| format!(" to {end}"));
    let text = format!("{} {}{decay} {}", config.hash()?, train.steps, model.to_json());
    Ok(sha256_bytes(text.as_bytes()).chars().take(16).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::GaussianImages;

    const SPEC: &str = r#"
        head_size = 12
        [run.model]
        patch_size = 4
        depth = 1
        hidden_size = 24
        [run.train]
        batch_size = 4
        steps = 5
        [parameters]
        "train.learning_rate" = { octaves = [-9, -8] }
        "model.hidden_size" = { values = [24, 48] }
        "train.seed" = { values = [0, 1, 2] }
        [variants.mup]
        "mup.enabled" = true
        [variants.sp]
        "mup.enabled" = false
        "mup.init" = "dit"
    "#;

    fn plan(change: &str) -> Result<Plan> {
        let spec = SweepSpec::parse(&SPEC.replace("head_size = 12", change), "a")?;
        let base = TrainConfig::parse(&spec.run.clone().unwrap().to_string(), "a", &[])?;
        Plan::new(&spec, &base, &GaussianImages::new(16, 1, 8, 4))
    }

    #[test]
    fn trials_of_one_shape_stand_together_over_variants_rates_and_seeds() {
        let plan = plan("head_size = 12").unwrap();
        assert_eq!(plan.trials.len(), 24);
        let shapes = plan.shapes();
        assert_eq!(shapes.iter().map(|(_, trials)| trials.len()).collect::<Vec<_>>(), [12, 12]);
        assert!(plan.trials.iter().enumerate().all(|(i, t)| t.index == i));
        let ids: std::collections::BTreeSet<&str> = plan.trials.iter().map(|t| t.id.as_str()).collect();
        assert_eq!(ids.len(), 24);
        assert!(plan.trials.iter().all(|t| t.model.network.head_size() == 12));
        assert_eq!(plan.trials[0].id, self::plan("head_size = 12").unwrap().trials[0].id);
        assert_eq!(plan.varied(), ["model.hidden_size", "train.learning_rate", "train.seed"]);
    }

    #[test]
    fn a_trial_that_the_data_cannot_feed_is_refused_by_its_settings() {
        let data = GaussianImages::new(16, 1, 8, 4);
        for (key, values, parts) in [
            ("train.batch_size", "[4, 17, 8]", &["train.batch_size=17", "16 images"][..]),
            ("train.precision", "[\"f32\", \"bf16\"]", &["train.precision=\"bf16\"", "`f32` on the CPU"]),
            ("model.input_size", "[8, 16]", &["model.input_size=16", "8 in the data"]),
            ("model.num_classes", "[4, 3]", &["model.num_classes=3", "4 in the data"]),
            ("train.from", "[\"run\"]", &["train.from=\"run\"", "left out"]),
        ] {
            let text = SPEC.split("[parameters]").next().unwrap();
            let text = text.replace("head_size = 12", "").replace("depth = 1", "depth = 1\nnum_heads = 2");
            let spec = format!("{text}[parameters]\n\"{key}\" = {{ values = {values} }}\n");
            let spec = SweepSpec::parse(&spec, "a").unwrap();
            let base = TrainConfig::parse(&spec.run.clone().unwrap().to_string(), "a", &[]).unwrap();
            let error = Plan::new(&spec, &base, &data).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn a_trial_that_cannot_be_is_refused_before_any_runs() {
        let error = plan("head_size = 16").unwrap_err().to_string();
        assert!(error.contains("model.hidden_size = 24") && error.contains("head_size = 16"), "{error}");
        let spec =
            SweepSpec::parse("[run]\n[parameters]\n\"train.learnin_rate\" = { values = [1] }", "a").unwrap();
        let error = Plan::new(&spec, &TrainConfig::default(), &GaussianImages::new(16, 1, 8, 4)).unwrap_err();
        assert!(error.to_string().contains("`train.learning_rate`?"), "{error}");
    }
}
