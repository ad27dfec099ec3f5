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
    /// Score of all images as one split.
    #[serde(default)]
    pub unsplit: Option<f64>,
    /// What the order of the images does to consecutive splits, if there are several.
    #[serde(default)]
    pub order: Option<Order>,
}

/// What the order of the images does to the score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Mean over splits of the same sizes, of shuffled images.
    pub shuffled: f64,
    /// Deviation over these.
    pub shuffled_std: f64,
    /// Part of the images whose likeliest class is also that of the image before.
    pub repeats: f64,
    /// That part if the order were by chance.
    pub by_chance: f64,
}

/// A score this much below the one of shuffled images is not that by chance …
const FALL: f64 = 0.05;
/// … nor one further below than so many deviations of its mean.
const DEVIATIONS: f64 = 3.0;
/// So many more neighbours of one class are an order.
const MORE_REPEATS: f64 = 0.1;
/// Seed of the shuffled splits.
const SEED: u32 = 2020;

impl InceptionScore {
    /// A warning if the images are sorted by class, so that consecutive splits have few classes each.
    pub fn warning(&self) -> Option<String> {
        let order = self.order?;
        let chance = DEVIATIONS * order.shuffled_std;
        let falls = order.shuffled - self.mean > chance.max(FALL * order.shuffled);
        if !falls && order.repeats - order.by_chance <= MORE_REPEATS {
            return None;
        }
        Some(format!(
            "the samples seem to be sorted by class ({:.0} % follow one of the same class, by chance {:.0} %), so that each \
             split has few: IS is {:.4} in this order and {:.4} shuffled; shuffle them, or say --is-splits torch-fidelity",
            100.0 * order.repeats,
            100.0 * order.by_chance,
            self.mean,
            order.shuffled
        ))
    }
}

/// Sums of the images of each split: their number, `Σ p` and `Σ p·ln p`.
#[derive(Debug)]
struct Sums {
    split: Vec<u32>,
    sums: Vec<(u64, Vec<f64>, f64)>,
}

impl Sums {
    fn new(split: Vec<u32>, count: usize, classes: usize) -> Self {
        Self { split, sums: vec![(0, vec![0.0; classes], 0.0); count] }
    }

    fn add(&mut self, image: usize, probabilities: &[f64], logs: &[f64]) {
        let (count, sum, entropy) = &mut self.sums[self.split[image] as usize];
        for ((p, log), sum) in probabilities.iter().zip(logs).zip(sum) {
            *sum += p;
            *entropy += p * log;
        }
        *count += 1;
    }

    /// Mean and population deviation of `exp(mean KL(p ‖ mean p))` over the splits.
    fn scores(&self) -> (f64, f64) {
        let score = |(count, sum, entropy): &(u64, Vec<f64>, f64)| {
            let n = *count as f64;
            let marginal: f64 = sum.iter().map(|s| s / n).filter(|q| *q > 0.0).map(|q| q * q.ln()).sum();
            (entropy / n - marginal).exp()
        };
        let scores: Vec<f64> = self.sums.iter().map(score).collect();
        let n = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / n;
        (mean, (scores.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / n).sqrt())
    }
}

/// Collects the class scores of images in order; memory grows with the splits only.
#[derive(Debug)]
pub struct Scores {
    splits: Sums,
    /// All images as one split.
    whole: Sums,
    /// The same splits of shuffled images, where the order counts.
    shuffled: Option<Sums>,
    seen: usize,
    classes: usize,
    /// Images by likeliest class, the class of the last one, and how many followed one of their own.
    likeliest: Vec<u64>,
    last: Option<usize>,
    repeats: u64,
    probabilities: Vec<f64>,
    logs: Vec<f64>,
}

impl Scores {
    /// For `n` images and `classes` classes.
    pub fn new(splits: Splits, n: usize, classes: usize) -> Self {
        let (split, count) = splits.assign(n);
        let shuffled = (matches!(splits, Splits::Consecutive { .. }) && count > 1).then(|| {
            let order = Mt19937::new(SEED).permutation(n as u32);
            Sums::new(order.iter().map(|i| split[*i as usize]).collect(), count, classes)
        });
        Self {
            splits: Sums::new(split, count, classes),
            whole: Sums::new(vec![0; n], 1, classes),
            shuffled,
            seen: 0,
            classes,
            likeliest: vec![0; classes],
            last: None,
            repeats: 0,
            probabilities: vec![0.0; classes],
            logs: vec![0.0; classes],
        }
    }

    /// Adds the scores before the softmax (classes) of the next image.
    ///
    /// # Errors
    /// More images or other classes than announced, a value that is not finite.
    pub fn add(&mut self, logits: &[f32]) -> anyhow::Result<()> {
        let images = self.splits.split.len();
        ensure!(
            self.seen < images && logits.len() == self.classes,
            "internal: image {} of {images} with {} classes of {}",
            self.seen,
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
        for ((p, log), x) in self.probabilities.iter_mut().zip(&mut self.logs).zip(logits) {
            *p /= total;
            *log = f64::from(*x) - f64::from(most) - log_total;
        }
        for sums in
            [Some(&mut self.splits), Some(&mut self.whole), self.shuffled.as_mut()].into_iter().flatten()
        {
            sums.add(self.seen, &self.probabilities, &self.logs);
        }
        let class = logits.iter().position(|x| *x == most);
        self.repeats += u64::from(class.is_some() && class == self.last);
        if let Some(class) = class {
            self.likeliest[class] += 1;
        }
        self.last = class;
        self.seen += 1;
        Ok(())
    }

    /// `exp(mean KL(p ‖ mean p))` of each split, then mean and deviation.
    ///
    /// # Errors
    /// Fewer images than announced, or none.
    pub fn finish(self) -> anyhow::Result<InceptionScore> {
        let images = self.splits.split.len();
        ensure!(self.seen == images && images > 0, "internal: {} of {images} images", self.seen);
        let (mean, std) = self.splits.scores();
        let part = |count: u64| count as f64 / images as f64;
        let order = self.shuffled.map(|sums| {
            let (shuffled, shuffled_std) = sums.scores();
            let by_chance = self.likeliest.iter().map(|n| part(*n) * part(*n)).sum();
            Order { shuffled, shuffled_std, repeats: part(self.repeats), by_chance }
        });
        Ok(InceptionScore { mean, std, unsplit: Some(self.whole.scores().0), order })
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
    fn the_order_of_the_images_is_seen() {
        // 4 sure classes, 400 images, splits of 100.
        let score = |class: fn(usize) -> usize, splits: Splits| {
            let mut scores = Scores::new(splits, 400, 4);
            for i in 0..400 {
                let mut row = [0.0; 4];
                row[class(i)] = 9.0;
                scores.add(&row).unwrap();
            }
            scores.finish().unwrap()
        };
        let consecutive = Splits::Consecutive { size: 100 };
        let sorted = score(|i| i / 100, consecutive);
        let turns = score(|i| i % 4, consecutive);
        // Classes come in runs, but all of them in each split.
        let runs = score(|i| i / 5 % 4, consecutive);
        let chance = score(|i| (i * i * 31 + i * 7) / 13 % 4, consecutive);
        assert!(sorted.mean < 1.1 && sorted.unsplit.unwrap() > 3.9, "{sorted:?}");
        let warning = sorted.warning().unwrap();
        assert!(warning.contains("sorted by class (99 %") && warning.contains("25 %"), "{warning}");
        assert!(
            runs.warning().is_some() && turns.warning().is_none() && chance.warning().is_none(),
            "{chance:?}"
        );
        for alone in [Splits::Consecutive { size: 400 }, Splits::TORCH_FIDELITY] {
            let score = score(|i| i / 100, alone);
            assert!(score.warning().is_none() && score.unsplit == sorted.unsplit, "{score:?}");
        }
        // One class, as a collapsed generator has, is no order.
        let one = score(|_| 2, consecutive);
        assert!((one.mean - 1.0).abs() < 1e-12 && one.warning().is_none(), "{one:?}");
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
