//! Does the best rate stay when the width, the batch or the number of steps grows? Algorithms 1–3 of the muP paper for
//! diffusion transformers as a test, and the cost ratio of its equation (1).

use serde::Serialize;

use super::results::Curve;
use crate::coordinates::mean_and_error;

/// Largest shift of an optimum that counts as staying, in octaves.
pub const TOLERANCE: f64 = 1.0;

/// One size along the axis.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SizeOptimum {
    /// The size.
    pub size: f64,
    /// Setting with the least mean metric.
    pub best: f64,
    /// Base-2 logarithm of each seed's refined optimum.
    pub refined: Vec<f64>,
    /// Metric there.
    pub metric: f64,
    /// Standard deviation over the seeds.
    pub sd: f64,
    /// Metric at the optimum of the smallest size; none where that diverges.
    pub transferred: Option<f64>,
    /// Whether the optimum is on the grid's edge.
    pub edge: bool,
}

/// The judgement of one family of curves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// What the curves have in common.
    pub of: String,
    /// The key along which the size grows.
    pub axis: String,
    /// One row a size, by growing size.
    pub sizes: Vec<SizeOptimum>,
    /// Octaves between the lowest and the highest best setting on the grid.
    pub grid_shift: f64,
    /// Mean over seeds of the refined optimum's move from the smallest to the largest size, in octaves.
    pub shift: f64,
    /// Its standard error over the seeds; 0 with one seed.
    pub shift_error: f64,
    /// Whether the best setting stays within [`TOLERANCE`].
    pub stays: bool,
    /// Whether the metric falls with the size at the smallest size's best setting.
    pub improves: bool,
    /// Whether an optimum lies on the edge of its grid, so that the verdict is not the last word.
    pub edge: bool,
}

/// Judges the curves of each family that differs along `axis` only; families of one size are left out.
pub fn judge(curves: &[Curve], axis: &str) -> Vec<Verdict> {
    let mut families: Vec<(String, Vec<&Curve>)> = Vec::new();
    for curve in curves.iter().filter(|c| c.at.contains_key(axis)) {
        let common = Curve {
            at: curve.at.iter().filter(|(k, _)| *k != axis).map(|(k, v)| (k.clone(), *v)).collect(),
            ..curve.clone()
        };
        let words = common.words();
        match families.iter_mut().find(|(of, _)| *of == words) {
            Some((_, family)) => family.push(curve),
            None => families.push((words, vec![curve])),
        }
    }
    families.into_iter().filter_map(|(of, family)| verdict(of, axis, family)).collect()
}

fn verdict(of: String, axis: &str, mut family: Vec<&Curve>) -> Option<Verdict> {
    family.sort_by(|a, b| a.at[axis].total_cmp(&b.at[axis]));
    let family: Vec<&Curve> = family.into_iter().filter(|c| c.optimum().is_some()).collect();
    let start = family.first()?.optimum()?.x;
    if family.len() < 2 {
        return None;
    }
    let seeds: Vec<u64> = family[0].points.iter().flat_map(|p| p.seeds.keys().copied()).collect();
    let seeds: std::collections::BTreeSet<u64> = seeds.into_iter().collect();
    let sizes: Vec<SizeOptimum> = family
        .iter()
        .filter_map(|curve| {
            let best = curve.optimum()?;
            Some(SizeOptimum {
                size: curve.at[axis],
                best: best.x,
                refined: seeds.iter().filter_map(|seed| curve.refined_optimum(*seed)).collect(),
                metric: best.mean?,
                sd: best.sd,
                transferred: curve.mean_at(start),
                edge: curve.edge,
            })
        })
        .collect();
    let logs = || sizes.iter().map(|s| s.best.log2());
    let grid_shift = logs().fold(f64::MIN, f64::max) - logs().fold(f64::MAX, f64::min);
    let (first, last) = (family.first()?, family.last()?);
    let moves: Vec<f64> = seeds
        .iter()
        .filter_map(|seed| Some(last.refined_optimum(*seed)? - first.refined_optimum(*seed)?))
        .collect();
    let (shift, shift_error) = mean_and_error(&moves);
    let transferred: Option<Vec<f64>> = sizes.iter().map(|s| s.transferred).collect();
    let improves = transferred.is_some_and(|t| t.windows(2).all(|pair| pair[1] < pair[0]));
    let edge = sizes.iter().any(|s| s.edge);
    // Grids are read off files, so an octave may be an octave and a rounding.
    let stays = grid_shift <= TOLERANCE + 1e-6;
    Some(Verdict { of, axis: axis.to_owned(), sizes, grid_shift, shift, shift_error, stays, improves, edge })
}

/// Work of some runs, in the three measures that ratios are told by.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Work {
    /// Parameters · batch · steps, summed over runs: equation (1)'s measure.
    pub parameter_images: f64,
    /// Floating-point operations, counted from the graphs.
    pub flops: f64,
    /// Seconds.
    pub seconds: f64,
}

impl Work {
    /// One run.
    pub fn of(parameters: usize, images: u64, flops: f64, seconds: f64) -> Self {
        Self { parameter_images: parameters as f64 * images as f64, flops, seconds }
    }

    /// Two together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            parameter_images: self.parameter_images + other.parameter_images,
            flops: self.flops + other.flops,
            seconds: self.seconds + other.seconds,
        }
    }

    /// Each measure over that of `whole`.
    #[must_use]
    pub fn over(self, whole: Self) -> Self {
        Self {
            parameter_images: self.parameter_images / whole.parameter_images,
            flops: self.flops / whole.flops,
            seconds: self.seconds / whole.seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::curve;
    use super::*;

    #[test]
    fn an_optimum_that_stays_transfers_and_one_that_drifts_does_not() {
        let stays = [
            curve(72.0, -9, &[&[3.0, 2.0, 2.2, 3.0], &[3.1, 2.1, 2.2, 3.0]]),
            curve(144.0, -9, &[&[2.5, 1.8, 1.7, 2.9], &[2.5, 1.7, 1.8, 2.9]]),
        ];
        let verdict = &judge(&stays, "model.hidden_size")[0];
        assert!(verdict.stays && verdict.improves && !verdict.edge, "{verdict:?}");
        assert!(verdict.shift.abs() < 1.0 && verdict.shift_error > 0.0, "{verdict:?}");
        assert_eq!((verdict.of.as_str(), verdict.sizes.len()), ("muP", 2));
        let drifts = [curve(72.0, -9, &[&[3.0, 2.0, 1.0, 3.0]]), curve(288.0, -9, &[&[0.5, 0.8, 1.7, 2.9]])];
        let verdict = &judge(&drifts, "model.hidden_size")[0];
        assert!(!verdict.stays && verdict.edge && !verdict.improves, "{verdict:?}");
        assert!((verdict.grid_shift - 2.0).abs() < 1e-12 && verdict.shift < -1.0, "{verdict:?}");
        assert!(judge(&drifts[..1], "model.hidden_size").is_empty(), "one size has no shift");
        assert!(judge(&drifts, "train.batch_size").is_empty());
    }

    #[test]
    fn the_cost_ratio_is_that_of_the_papers_examples() {
        // PixArt: five trials of 0.04 B parameters for 5 epochs against 0.61 B for 30.
        let run = |parameters: f64, images: u64| Work::of(parameters as usize, images, 1.0, 1.0);
        let search = (0..5).fold(Work::default(), |sum, _| sum.and(run(0.04e9, 5)));
        let ratio = search.over(run(0.61e9, 30));
        assert!((ratio.parameter_images - 0.0546).abs() < 1e-4, "{ratio:?}");
        assert_eq!(ratio.flops, 5.0);
    }
}
