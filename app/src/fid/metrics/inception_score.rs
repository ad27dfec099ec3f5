//! The Inception score: how sure the classifier is of each image, and how varied its answers are.

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use super::numpy_random::Mt19937;

/// Which images share a split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "rule")]
pub enum Splits {
    /// Consecutive images, so many a split, the last one with what is left: ADM's evaluator takes 5000.
    Consecutive {
        /// Images of a split.
        size: u32,
    },
    /// So many splits of a permutation by NumPy's legacy generator: torch-fidelity takes 10 with seed 2020.
    Shuffled {
        /// Number of splits.
        splits: u32,
        /// Seed of the permutation.
        seed: u32,
    },
}

impl Splits {
    /// ADM's rule.
    pub const ADM: Self = Self::Consecutive { size: 5000 };
    /// torch-fidelity's rule.
    pub const TORCH_FIDELITY: Self = Self::Shuffled { splits: 10, seed: 2020 };

    /// The split of each of `n` images, and the number of splits.
    fn assign(self, n: usize) -> (Vec<u32>, usize) {
        match self {
            Self::Consecutive { size } => {
                let size = size.max(1) as usize;
                ((0..n).map(|i| (i / size) as u32).collect(), n.div_ceil(size))
            }
            Self::Shuffled { splits, seed } => {
                let splits = (splits as usize).clamp(1, n.max(1));
                let mut split = vec![0; n];
                let order = Mt19937::new(seed).permutation(n as u32);
                for k in 0..splits {
                    for place in k * n / splits..(k + 1) * n / splits {
                        split[order[place] as usize] = k as u32;
                    }
                }
                (split, splits)
            }
        }
    }
}

/// Mean and population deviation of the score over the splits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct InceptionScore {
    /// Mean over splits.
    pub mean: f64,
    /// Deviation over splits, divided by their number.
    pub std: f64,
}

/// Collects the class scores of images in order; memory grows with the splits only.
#[derive(Debug)]
pub struct Scores {
    split: Vec<u32>,
    seen: usize,
    classes: usize,
    /// For each split: images, `Σ p` and `Σ p·ln p`.
    sums: Vec<(u64, Vec<f64>, f64)>,
    probabilities: Vec<f64>,
}

impl Scores {
    /// For `n` images and `classes` classes.
    pub fn new(splits: Splits, n: usize, classes: usize) -> Self {
        let (split, count) = splits.assign(n);
        let sums = vec![(0, vec![0.0; classes], 0.0); count];
        Self { split, seen: 0, classes, sums, probabilities: vec![0.0; classes] }
    }

    /// Adds the scores before the softmax (classes) of the next image.
    ///
    /// # Errors
    /// More images or other classes than announced, a value that is not finite.
    pub fn add(&mut self, logits: &[f32]) -> anyhow::Result<()> {
        ensure!(
            self.seen < self.split.len() && logits.len() == self.classes,
            "internal: image {} of {} with {} classes of {}",
            self.seen,
            self.split.len(),
            logits.len(),
            self.classes
        );
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        ensure!(
            logits.iter().all(|x| x.is_finite()),
            "the class scores of image {} are not finite",
            self.seen
        );
        let mut total = 0.0;
        for (p, x) in self.probabilities.iter_mut().zip(logits) {
            *p = (f64::from(*x) - f64::from(most)).exp();
            total += *p;
        }
        let log_total = total.ln();
        let (count, sum, entropy) = &mut self.sums[self.split[self.seen] as usize];
        for ((p, x), sum) in self.probabilities.iter().zip(logits).zip(sum) {
            let p = p / total;
            *sum += p;
            *entropy += p * (f64::from(*x) - f64::from(most) - log_total);
        }
        *count += 1;
        self.seen += 1;
        Ok(())
    }

    /// `exp(mean KL(p ‖ mean p))` of each split, then mean and deviation.
    ///
    /// # Errors
    /// Fewer images than announced, or none.
    pub fn finish(self) -> anyhow::Result<InceptionScore> {
        ensure!(
            self.seen == self.split.len() && self.seen > 0,
            "internal: {} of {} images",
            self.seen,
            self.split.len()
        );
        let score = |(count, sum, entropy): &(u64, Vec<f64>, f64)| {
            let n = *count as f64;
            let marginal: f64 = sum.iter().map(|s| s / n).filter(|q| *q > 0.0).map(|q| q * q.ln()).sum();
            (entropy / n - marginal).exp()
        };
        let scores: Vec<f64> = self.sums.iter().map(score).collect();
        let n = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / n;
        let std = (scores.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / n).sqrt();
        Ok(InceptionScore { mean, std })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(splits: Splits, logits: &[[f32; 2]]) -> InceptionScore {
        let mut scores = Scores::new(splits, logits.len(), 2);
        for row in logits {
            scores.add(row).unwrap();
        }
        scores.finish().unwrap()
    }

    #[test]
    fn sure_and_varied_answers_score_the_number_of_classes() {
        let (a, b) = ([90.0, -90.0], [-90.0, 90.0]);
        let chunks = Splits::Consecutive { size: 2 };
        let sure = score(chunks, &[a, b, b, a]);
        assert!((sure.mean - 2.0).abs() < 1e-12 && sure.std < 1e-12, "{sure:?}");
        // The first split says one class only; the third has one image.
        let mixed = score(chunks, &[a, a, a, b, b]);
        assert!((mixed.mean - 4.0 / 3.0).abs() < 1e-12, "{mixed:?}");
        assert!((mixed.std - (2.0f64 / 9.0).sqrt()).abs() < 1e-12, "{mixed:?}");
        let unsure = score(chunks, &[[3.0, 3.0]; 4]);
        assert!((unsure.mean - 1.0).abs() < 1e-12, "{unsure:?}");
    }

    #[test]
    fn every_image_is_in_one_split() {
        for (rule, sizes) in [
            (Splits::Consecutive { size: 4 }, vec![4, 4, 3]),
            (Splits::Shuffled { splits: 4, seed: 2020 }, vec![2, 3, 3, 3]),
        ] {
            let (split, count) = rule.assign(11);
            let found: Vec<usize> =
                (0..count).map(|k| split.iter().filter(|s| **s as usize == k).count()).collect();
            assert_eq!(found, sizes, "{rule:?}");
        }
        assert_eq!(Splits::TORCH_FIDELITY.assign(3).1, 3);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut scores = Scores::new(Splits::ADM, 1, 2);
        assert!(scores.add(&[f32::NAN, 0.0]).unwrap_err().to_string().contains("not finite"));
        assert!(scores.add(&[0.0]).is_err());
        assert!(scores.finish().is_err());
    }
}
