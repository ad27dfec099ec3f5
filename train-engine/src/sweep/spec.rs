//! A sweep's TOML: the run that is varied, what is varied and how, what counts as diverged.

use std::fs;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::config::TrainConfig;
use crate::error::{Result, TrainError};
use crate::random::{Purpose, Stream};

/// Most trials that are planned: each costs some memory before the first has run.
const MOST_TRIALS: f64 = 1e6;

/// How values are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Every combination.
    #[default]
    Grid,
    /// `run_cap` independent draws.
    Random,
}

/// How a random value is drawn; the names are those of the sweep files in common use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distribution {
    /// Evenly between `min` and `max`.
    Uniform,
    /// Evenly in the logarithm between `min` and `max`.
    LogUniformValues,
    /// A whole number, evenly.
    IntUniform,
    /// A whole number, evenly in the logarithm.
    IntLogUniform,
}

/// What one key takes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParameterSpec {
    /// These values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<toml::Value>,
    /// Powers of two, from and to these exponents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub octaves: Option<[f64; 2]>,
    /// Values in each octave; 1 where none is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_octave: Option<u32>,
    /// A random search's draw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distribution: Option<Distribution>,
    /// Its lower end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Its upper end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// In a random search: every value for each draw, as for seeds and widths.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub each: bool,
}

/// Overrides of a run's configuration by dotted key.
pub type Overrides = IndexMap<String, toml::Value>;

/// A sweep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SweepSpec {
    /// A run's TOML file, relative to the sweep's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// `grid` or `random`.
    pub method: Method,
    /// Draws of a random search.
    pub run_cap: usize,
    /// Seed of the draws; the runs' own is `train.seed`.
    pub seed: u64,
    /// Where given, `model.num_heads` is `model.hidden_size` over it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_size: Option<usize>,
    /// The metric is the mean loss over this last share of the steps.
    pub tail: f64,
    /// A trial ends as diverged when its smoothed loss is above this many times its first; 0 waits for what is not
    /// finite.
    pub diverged: f64,
    /// Whether the weights of each trial are kept, for judges other than the loss.
    pub keep_weights: bool,
    /// The run's sections, in place of `config`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<toml::Table>,
    /// What is varied, by dotted key.
    pub parameters: IndexMap<String, ParameterSpec>,
    /// Named sets of overrides, each swept.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub variants: IndexMap<String, Overrides>,
    /// Transfer: what the target has in place of the proxy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Overrides>,
    /// Transfer: what the run that the target is compared with has in place of the target's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Overrides>,
}

impl Default for SweepSpec {
    fn default() -> Self {
        Self {
            config: None,
            method: Method::Grid,
            run_cap: 16,
            seed: 0,
            head_size: None,
            tail: 0.2,
            diverged: 2.0,
            keep_weights: false,
            run: None,
            parameters: IndexMap::new(),
            variants: IndexMap::new(),
            target: None,
            baseline: None,
        }
    }
}

impl SweepSpec {
    /// Reads a sweep's file and the run that it varies; `overrides` apply to the run.
    ///
    /// # Errors
    /// [`TrainError::Io`], [`TrainError::ConfigSyntax`], and what [`TrainConfig::load`] gives.
    pub fn load(path: &Path, overrides: &[String]) -> Result<(Self, TrainConfig)> {
        let text = fs::read_to_string(path).map_err(TrainError::io("read", path))?;
        let origin = format!("`{}`", path.display());
        let spec = Self::parse(&text, &origin)?;
        let config = match (&spec.config, &spec.run) {
            (Some(file), None) => {
                let beside = path.parent().unwrap_or(Path::new("")).join(file);
                TrainConfig::load(&beside, overrides)?
            }
            (None, Some(run)) => {
                TrainConfig::parse(&run.to_string(), &format!("[run] of {origin}"), overrides)?
            }
            _ => {
                let reason = "it names its run either by `config = \"FILE\"` or in `[run]`".to_owned();
                return Err(TrainError::ConfigSyntax { origin, reason });
            }
        };
        Ok((spec, config))
    }

    /// Reads and checks a sweep's text; `origin` names it in errors.
    ///
    /// # Errors
    /// [`TrainError::ConfigSyntax`].
    pub fn parse(text: &str, origin: &str) -> Result<Self> {
        let bad = |reason: String| TrainError::ConfigSyntax { origin: origin.to_owned(), reason };
        let spec: Self = toml::from_str(text).map_err(|e| bad(e.to_string().trim_end().to_owned()))?;
        if !(0.0..=1.0).contains(&spec.tail) || spec.tail == 0.0 {
            return Err(bad(format!("`tail = {}` must be above 0 and at most 1", spec.tail)));
        }
        if !(spec.diverged.is_finite() && spec.diverged >= 0.0) {
            return Err(bad(format!("`diverged = {}` must be 0 or above", spec.diverged)));
        }
        if spec.head_size == Some(0) || spec.run_cap == 0 {
            return Err(bad("`head_size` and `run_cap` must be 1 or more".into()));
        }
        for (key, parameter) in &spec.parameters {
            parameter.check(spec.method).map_err(|reason| bad(format!("parameters.\"{key}\": {reason}")))?;
        }
        let trials = spec.trials();
        if trials > MOST_TRIALS {
            let reason = format!(
                "it makes {trials} trials, at most {MOST_TRIALS:.0} are planned: vary less, or draw at random"
            );
            return Err(bad(reason));
        }
        Ok(spec)
    }

    /// How many trials there will be, before any is made. A number, as it may be beyond all integers.
    fn trials(&self) -> f64 {
        let drawn = |parameter: &ParameterSpec| self.method == Method::Random && !parameter.each;
        let draws = if self.parameters.values().any(drawn) { self.run_cap as f64 } else { 1.0 };
        let longest = self.parameters.values().map(ParameterSpec::count).fold(1.0, f64::max);
        let crossed =
            self.parameters.values().filter(|parameter| !drawn(parameter)).map(ParameterSpec::count);
        longest.max(draws * crossed.product::<f64>() * self.variants.len().max(1) as f64)
    }

    /// All combinations of values, keys by name: the last changes first.
    pub(super) fn points(&self) -> Vec<Overrides> {
        let crossed = |points: Vec<Overrides>, key: &String, values: Vec<toml::Value>| -> Vec<Overrides> {
            let with = |point: &Overrides, value: &toml::Value| {
                let mut point = point.clone();
                point.insert(key.clone(), value.clone());
                point
            };
            points.iter().flat_map(|p| values.iter().map(move |v| with(p, v))).collect()
        };
        let drawn = |parameter: &ParameterSpec| self.method == Method::Random && !parameter.each;
        let draws = if self.parameters.values().any(drawn) { self.run_cap } else { 1 };
        let mut points: Vec<Overrides> = (0..draws as u64)
            .map(|draw| {
                let with_key = |(i, (key, parameter)): (usize, (&String, &ParameterSpec))| {
                    let mut stream = Stream::new(self.seed, Purpose::Sweep, draw, i as u64);
                    drawn(parameter).then(|| (key.clone(), parameter.draw(&mut stream)))
                };
                self.parameters.iter().enumerate().filter_map(with_key).collect()
            })
            .collect();
        for (key, parameter) in self.parameters.iter().filter(|(_, p)| !drawn(p)) {
            points = crossed(points, key, parameter.listed());
        }
        points
    }
}

/// No number of a run spans more powers of two.
const MOST_OCTAVES: f64 = 64.0;

impl ParameterSpec {
    fn check(&self, method: Method) -> Result<(), String> {
        let given = [!self.values.is_empty(), self.octaves.is_some(), self.distribution.is_some()];
        if given.iter().filter(|g| **g).count() != 1 {
            return Err("give one of `values`, `octaves` and `distribution`".into());
        }
        if let Some([from, to]) = self.octaves {
            if !(from <= to && self.per_octave != Some(0)) {
                return Err(
                    "`octaves` are two exponents, the smaller first, and `per_octave` is 1 or more".into()
                );
            }
            if to - from > MOST_OCTAVES {
                return Err(format!("`octaves` span {} octaves, at most {MOST_OCTAVES}", to - from));
            }
        }
        if let Some(distribution) = self.distribution {
            if method == Method::Grid || self.each {
                return Err("a `distribution` is for `method = \"random\"`, without `each`".into());
            }
            let (Some(min), Some(max)) = (self.min, self.max) else {
                return Err("a `distribution` needs `min` and `max`".into());
            };
            let log = matches!(distribution, Distribution::LogUniformValues | Distribution::IntLogUniform);
            if !(min <= max && max.is_finite() && (min > 0.0 || !log && min.is_finite())) {
                return Err(format!("`min = {min}` and `max = {max}` are no range for it"));
            }
        }
        Ok(())
    }

    /// How many values a list has.
    fn count(&self) -> f64 {
        let Some([from, to]) = self.octaves else { return self.values.len() as f64 };
        ((to - from) * f64::from(self.per_octave.unwrap_or(1)) + 1e-9).floor() + 1.0
    }

    /// The values of a list.
    pub fn listed(&self) -> Vec<toml::Value> {
        let Some([from, _]) = self.octaves else { return self.values.clone() };
        let per_octave = f64::from(self.per_octave.unwrap_or(1));
        (0..self.count() as usize)
            .map(|k| toml::Value::Float((from + k as f64 / per_octave).exp2()))
            .collect()
    }

    fn draw(&self, stream: &mut Stream) -> toml::Value {
        let Some(distribution) = self.distribution else {
            let mut values = self.listed();
            return values.swap_remove(stream.below(values.len() as u64) as usize);
        };
        let (min, max, u) = (self.min.unwrap_or(0.0), self.max.unwrap_or(0.0), stream.uniform_f64());
        match distribution {
            Distribution::Uniform => toml::Value::Float(min + u * (max - min)),
            Distribution::LogUniformValues => toml::Value::Float(min * (max / min).powf(u)),
            Distribution::IntUniform => toml::Value::Integer((min + u * (max - min + 1.0)).floor() as i64),
            Distribution::IntLogUniform => {
                toml::Value::Integer((min * ((max + 1.0) / min).powf(u)).floor().min(max) as i64)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> SweepSpec {
        SweepSpec::parse(text, "a").unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn a_grid_is_every_combination_with_the_last_key_fastest() {
        let spec = spec(
            "[parameters]\n\"model.hidden_size\" = { values = [72, 144] }\n\"train.learning_rate\" = { octaves = [-9, -7] }",
        );
        let points = spec.points();
        assert_eq!(points.len(), 6);
        let rates: Vec<f64> = points.iter().map(|p| p["train.learning_rate"].as_float().unwrap()).collect();
        assert_eq!(rates[..3], [1.0 / 512.0, 1.0 / 256.0, 1.0 / 128.0]);
        assert_eq!(points[3]["model.hidden_size"].as_integer(), Some(144));
    }

    #[test]
    fn random_draws_repeat_lie_in_their_range_and_cross_with_each() {
        let spec = spec(
            "method = \"random\"\nrun_cap = 40\n[parameters]\n\
             \"train.learning_rate\" = { distribution = \"log_uniform_values\", min = 1e-4, max = 1e-2 }\n\
             \"train.warmup_steps\" = { distribution = \"int_log_uniform\", min = 1, max = 16 }\n\
             \"train.seed\" = { values = [0, 1], each = true }",
        );
        let points = spec.points();
        assert_eq!((points.len(), &points), (80, &spec.points()));
        let rates: Vec<f64> = points.iter().map(|p| p["train.learning_rate"].as_float().unwrap()).collect();
        assert!(rates.iter().all(|r| (1e-4..=1e-2).contains(r)));
        assert!(rates[0] == rates[1] && rates[0] != rates[2], "both seeds of a draw share its rate");
        assert!(rates.iter().filter(|r| **r < 1e-3).count() > 24, "evenly in the logarithm: {rates:?}");
        let steps: Vec<i64> = points.iter().map(|p| p["train.warmup_steps"].as_integer().unwrap()).collect();
        assert!(steps.iter().all(|s| (1..=16).contains(s)) && steps.contains(&1));
    }

    #[test]
    fn what_makes_no_sweep_is_refused() {
        for (text, part) in [
            ("methd = \"grid\"", "methd"),
            ("[parameters]\n\"train.seed\" = { value = [0] }", "value"),
            ("[parameters]\n\"train.seed\" = {}", "give one of"),
            ("[parameters]\n\"train.seed\" = { octaves = [3, 1] }", "the smaller first"),
            ("[parameters]\n\"train.seed\" = { distribution = \"uniform\", min = 0, max = 1 }", "random"),
            (
                "method = \"random\"\n[parameters]\n\"a.b\" = { distribution = \"log_uniform_values\", min = 0, max = 1 }",
                "no range",
            ),
            ("tail = 0.0", "tail"),
            (
                "[parameters]\n\"train.seed\" = { octaves = [0, 1e12] }",
                "span 1000000000000 octaves, at most 64",
            ),
            ("[parameters]\n\"train.seed\" = { octaves = [0, 9], per_octave = 4000000000 }", "trials"),
            (
                "method = \"random\"\nrun_cap = 100000000000000\n[parameters]\n\"a.b\" = { values = [1] }",
                "100000000000000 trials",
            ),
        ] {
            let error = SweepSpec::parse(text, "`s.toml`").unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("`s.toml`"), "{text}: {error}");
        }
    }
}
