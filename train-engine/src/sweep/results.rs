//! Results as curves over one setting: means and spreads over seeds, optima, and optima on the grid's edge.

use std::collections::BTreeMap;

use serde::Serialize;

use super::journal::{Journals, Status, TrialResult};
use super::plan::{Plan, SEED_KEY, Trial};
use super::spec::Overrides;
use crate::coordinates::mean_and_error;

/// The setting that curves go over where no other is asked for.
pub const RATE_KEY: &str = "train.learning_rate";
/// The metric that every finished trial has.
pub const LOSS: &str = "loss";

/// One value of the setting.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// The setting's value.
    pub x: f64,
    /// Metric of each seed that finished, by seed.
    pub seeds: BTreeMap<u64, f64>,
    /// Mean over them; none where a seed diverged or none is there yet.
    pub mean: Option<f64>,
    /// Standard deviation over them; 0 with one.
    pub sd: f64,
    /// Seeds that diverged or failed.
    pub diverged: usize,
    /// Seeds without a result yet.
    pub missing: usize,
}

/// A metric over one setting, all others fixed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curve {
    /// Name of the variant; empty without variants.
    pub variant: String,
    /// Values of the other varied settings.
    pub at: BTreeMap<String, f64>,
    /// Points by growing setting.
    pub points: Vec<Point>,
    /// Index of the point with the least mean.
    pub best: Option<usize>,
    /// Whether a lower or higher setting might be better still: the optimum is the first or last point of the grid.
    pub edge: bool,
}

/// What trials are compared by.
#[derive(Debug, Clone, Copy)]
pub struct Metric<'a> {
    /// `loss`, or a name that another judge has told.
    pub name: &'a str,
    /// Use the loss after this many steps, from the trials' curves.
    pub at_step: Option<u64>,
}

impl Metric<'_> {
    /// A finished trial's value.
    pub fn of(&self, result: &TrialResult, journals: &Journals, tail: f64) -> Option<f64> {
        match (self.name, self.at_step) {
            (LOSS, None) => result.loss,
            (LOSS, Some(step)) => result.loss_at(step, tail),
            (name, _) => journals.told(&result.id, name),
        }
    }
}

/// The curves of a sweep over the setting `x_key`.
pub fn curves(plan: &Plan, journals: &Journals, x_key: &str, metric: Metric<'_>) -> Vec<Curve> {
    let results = journals.results();
    let others: Vec<String> = plan.varied().into_iter().filter(|k| k != x_key && k != SEED_KEY).collect();
    let mut groups: Vec<(String, BTreeMap<String, f64>, Vec<&Trial>)> = Vec::new();
    for trial in &plan.trials {
        let at: BTreeMap<String, f64> =
            others.iter().map(|k| (k.clone(), trial.number(k).unwrap_or(f64::NAN))).collect();
        match groups.iter_mut().find(|(variant, other, _)| *variant == trial.variant && *other == at) {
            Some((.., trials)) => trials.push(trial),
            None => groups.push((trial.variant.clone(), at, vec![trial])),
        }
    }
    let curve = |(variant, at, trials): (String, BTreeMap<String, f64>, Vec<&Trial>)| {
        let mut points: Vec<Point> = Vec::new();
        for trial in trials {
            let x = trial.number(x_key).unwrap_or(f64::NAN);
            if !points.iter().any(|p| p.x == x) {
                let seeds = BTreeMap::new();
                points.push(Point { x, seeds, mean: None, sd: 0.0, diverged: 0, missing: 0 });
            }
            let Some(point) = points.iter_mut().find(|p| p.x == x) else { continue };
            match results.get(trial.id.as_str()) {
                Some(result) if result.status != Status::Finished => point.diverged += 1,
                Some(result) => match metric.of(result, journals, plan.spec.tail) {
                    Some(value) => drop(point.seeds.insert(trial.config.train.seed, value)),
                    None => point.missing += 1,
                },
                None => point.missing += 1,
            }
        }
        finish(variant, at, points)
    };
    groups.into_iter().map(curve).collect()
}

fn finish(variant: String, at: BTreeMap<String, f64>, mut points: Vec<Point>) -> Curve {
    points.sort_by(|a, b| a.x.total_cmp(&b.x));
    for point in &mut points {
        let values: Vec<f64> = point.seeds.values().copied().collect();
        if point.diverged == 0 && !values.is_empty() {
            let (mean, error) = mean_and_error(&values);
            point.mean = Some(mean);
            point.sd = error * (values.len() as f64).sqrt();
        }
    }
    let means = points.iter().enumerate().filter_map(|(i, p)| Some((i, p.mean?)));
    let best = means.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i);
    // Beside a diverged point there is nothing further to look for.
    let edge = best.is_some_and(|i| points.len() > 1 && (i == 0 || i + 1 == points.len()));
    Curve { variant, at, points, best, edge }
}

/// One setting of everything but the seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ranked {
    /// Name of the variant.
    pub variant: String,
    /// What it sets, without the seed.
    pub set: Overrides,
    /// Mean metric over the seeds; none where one diverged.
    pub mean: Option<f64>,
    /// Standard deviation over them; 0 with one.
    pub sd: f64,
    /// Seeds that finished.
    pub seeds: usize,
    /// Seeds that diverged or failed.
    pub diverged: usize,
}

/// All settings that have results, the best first, diverged ones last.
pub fn ranking(plan: &Plan, journals: &Journals, metric: Metric<'_>) -> Vec<Ranked> {
    let results = journals.results();
    let mut ranked: Vec<(Ranked, Vec<f64>)> = Vec::new();
    for trial in &plan.trials {
        let Some(result) = results.get(trial.id.as_str()) else { continue };
        let mut set = trial.set.clone();
        set.shift_remove(SEED_KEY);
        let found = ranked.iter().position(|(r, _)| r.variant == trial.variant && r.set == set);
        let at = found.unwrap_or(ranked.len());
        if found.is_none() {
            let variant = trial.variant.clone();
            ranked.push((Ranked { variant, set, mean: None, sd: 0.0, seeds: 0, diverged: 0 }, Vec::new()));
        }
        let Some((one, values)) = ranked.get_mut(at) else { continue };
        match result.status {
            Status::Diverged | Status::Failed => one.diverged += 1,
            Status::Finished => values.extend(metric.of(result, journals, plan.spec.tail)),
        }
    }
    let finish = |(mut one, values): (Ranked, Vec<f64>)| {
        one.seeds = values.len();
        if one.diverged == 0 && !values.is_empty() {
            let (mean, error) = mean_and_error(&values);
            (one.mean, one.sd) = (Some(mean), error * (values.len() as f64).sqrt());
        }
        one
    };
    let mut ranked: Vec<Ranked> = ranked.into_iter().map(finish).collect();
    let key = |one: &Ranked| one.mean.unwrap_or(f64::INFINITY);
    ranked.sort_by(|a, b| key(a).total_cmp(&key(b)));
    ranked
}

impl Curve {
    /// The best point.
    pub fn optimum(&self) -> Option<&Point> {
        self.points.get(self.best?)
    }

    /// Whether all its trials have their results.
    pub fn complete(&self) -> bool {
        self.points.iter().all(|p| p.missing == 0)
    }

    /// What it is of, in words: `muP, width 72`.
    pub fn words(&self) -> String {
        let at = self.at.iter().map(|(key, value)| format!("{} {value}", short(key)));
        let variant = Some(self.variant.clone()).filter(|v| !v.is_empty());
        variant.into_iter().chain(at).collect::<Vec<_>>().join(", ")
    }

    /// Base-2 logarithm of the setting at which a parabola through the best point of one seed and its neighbours is
    /// lowest; the best point itself at the edge or beside a diverged one.
    pub fn refined_optimum(&self, seed: u64) -> Option<f64> {
        let value = |p: &Point| if p.diverged == 0 { p.seeds.get(&seed).copied() } else { None };
        let values: Vec<Option<f64>> = self.points.iter().map(value).collect();
        let found = values.iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?)));
        let best = found.min_by(|a, b| a.1.total_cmp(&b.1))?.0;
        let x = |i: usize| self.points[i].x.log2();
        let around = |i: usize| values.get(i).copied().flatten().map(|y| (x(i), y));
        match (best.checked_sub(1).and_then(around), around(best), around(best + 1)) {
            (Some(a), Some(b), Some(c)) => Some(vertex(a, b, c).unwrap_or(b.0)),
            _ => Some(x(best)),
        }
    }

    /// Mean at a given setting, if it is there.
    pub fn mean_at(&self, x: f64) -> Option<f64> {
        self.points.iter().find(|p| p.x == x)?.mean
    }
}

/// Where a parabola through three points is lowest.
fn vertex(a: (f64, f64), b: (f64, f64), c: (f64, f64)) -> Option<f64> {
    let (left, right) = ((b.1 - a.1) / (b.0 - a.0), (c.1 - b.1) / (c.0 - b.0));
    let bend = (right - left) / (c.0 - a.0);
    let at = 0.5 * (a.0 + b.0 - left / bend);
    (bend > 0.0 && at.is_finite()).then(|| at.clamp(a.0, c.0))
}

/// A key in the words of a plot.
pub fn short(key: &str) -> &str {
    match key {
        "model.hidden_size" => "width",
        "train.learning_rate" => "rate",
        "train.batch_size" => "batch",
        "train.steps" => "steps",
        "mup.output_multiplier" => "output multiplier",
        other => other.rsplit('.').next().unwrap_or(other),
    }
}

impl Trial {
    /// The number that it sets a key to; 0 and 1 for false and true.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.set.get(key)? {
            toml::Value::Integer(n) => Some(*n as f64),
            toml::Value::Float(x) => Some(*x),
            toml::Value::Boolean(b) => Some(f64::from(u8::from(*b))),
            _ => None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A curve over octaves from `first`; each row a seed's values, NaN for a diverged trial.
    pub(in crate::sweep) fn curve(width: f64, first: i32, seeds: &[&[f64]]) -> Curve {
        let points = (0..seeds[0].len()).map(|i| {
            let values = seeds.iter().enumerate().map(|(seed, row)| (seed as u64, row[i]));
            let (good, bad): (BTreeMap<u64, f64>, BTreeMap<u64, f64>) =
                values.partition(|(_, v)| v.is_finite());
            let x = f64::from(first + i as i32).exp2();
            Point { x, seeds: good, mean: None, sd: 0.0, diverged: bad.len(), missing: 0 }
        });
        finish("muP".into(), BTreeMap::from([("model.hidden_size".to_owned(), width)]), points.collect())
    }

    #[test]
    fn the_optimum_is_that_of_the_mean_and_divergence_rules_a_point_out() {
        let c = curve(72.0, -9, &[&[3.0, 2.0, 1.0, f64::NAN], &[3.0, 1.5, 1.4, 0.1]]);
        assert_eq!((c.best, c.edge, c.words().as_str()), (Some(2), false, "muP, width 72"));
        assert_eq!(c.points[3].mean, None);
        assert!((c.points[1].sd - 0.125f64.sqrt()).abs() < 1e-12);
        assert!(curve(72.0, -9, &[&[1.0, 2.0, 3.0]]).edge && curve(72.0, -9, &[&[3.0, 2.0, 1.0]]).edge);
    }

    #[test]
    fn a_parabola_finds_the_optimum_between_the_points() {
        let parabola = |at: f64| (0..5).map(|i| (f64::from(i) - 9.0 - at).powi(2)).collect::<Vec<_>>();
        let c = curve(72.0, -9, &[&parabola(-6.7), &parabola(-8.9)]);
        assert!((c.refined_optimum(0).unwrap() + 6.7).abs() < 1e-9);
        assert!((c.refined_optimum(1).unwrap() + 9.0).abs() < 1e-9, "at the edge it is the grid's own");
        assert_eq!(c.refined_optimum(2), None);
    }
}
