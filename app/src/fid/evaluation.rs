//! From parts to a reference file or to the metrics.

use anyhow::{bail, ensure};
use runtime::file::sha256_bytes;
use serde::{Deserialize, Serialize};

use super::metrics::inception_score::{InceptionScore, Scores, Splits};
use super::metrics::kernel_distance::{KernelDistance, Subsets, kernel_distance};
use super::metrics::manifold::{Overlap, overlap};
use super::metrics::moments::Moments;
use super::metrics::{Rows, frechet};
use super::part::{Part, Seen};
use super::plan::Plan;
use super::statistics::{About, Statistics};

/// Samples that keep their features: the published number, and what bounds memory and time of precision and recall.
pub const KEPT_SAMPLES: u64 = 50_000;
/// Reference images that keep their features: ADM's number.
pub const KEPT_REFERENCE: u64 = 10_000;

/// All features of a set, in finished parts.
#[derive(Debug)]
pub struct Features {
    parts: Vec<Part>,
    seen: Seen,
    pool: Moments,
    spatial: Option<Moments>,
}

impl Features {
    /// Puts finished parts together; their order is of no matter.
    ///
    /// # Errors
    /// Parts of different sets, images that are missing or there twice.
    pub fn of(mut parts: Vec<Part>) -> anyhow::Result<Self> {
        parts.sort_by_key(|p| p.range().start);
        let Some(first) = parts.first() else { bail!("no parts are given") };
        let plan = first.plan().clone();
        let mut pool = Moments::new(plan.network.pool);
        let mut spatial = plan.network.spatial.map(Moments::new);
        let (mut seen, mut next) = (Seen::default(), 0);
        for part in &parts {
            let (place, range) = (part.directory().display(), part.range());
            let begun = first.directory().display();
            let same = first.identity().zip(part.identity()).map(|(a, b)| a == b);
            let mut other = part.plan().clone();
            if same == Some(true) && plan.images.without_place() == other.images.without_place() {
                // The same images in another place, such as another machine's.
                other.images = plan.images.clone();
            }
            if let Some(what) = plan.differs_from(&other)? {
                bail!("`{place}` is of another set than `{begun}`: {what}");
            }
            ensure!(
                same != Some(false),
                "`{place}` was made when the images were others than those of `{begun}`: run the commands of both again; what \
                 is still right of them is kept"
            );
            ensure!(
                range.start == next,
                "images {}..{} are {}: `{place}` begins with image {}",
                next.min(range.start),
                next.max(range.start),
                if range.start > next { "missing" } else { "there twice" },
                range.start
            );
            next = range.end;
            pool.merge(&part.pool)?;
            if let (Some(all), Some(own)) = (&mut spatial, &part.spatial) {
                all.merge(own)?;
            }
            seen = join(seen, &part.seen, part, plan.mixed_sizes)?;
        }
        ensure!(next == plan.count, "images {next}..{} are missing: give all parts", plan.count);
        Ok(Self { parts, seen, pool, spatial })
    }

    /// What they are of.
    pub fn plan(&self) -> &Plan {
        self.parts[0].plan()
    }

    /// What was seen of the images.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    /// SHA-256 of the blocks' hashes, which are of all sizes and pixels.
    pub fn pixels_sha256(&self) -> String {
        sha256_bytes(self.seen.blocks.concat().as_bytes())
    }

    /// The pooled features that were kept, row after row.
    fn kept(&self) -> anyhow::Result<Vec<f32>> {
        let mut values = Vec::new();
        self.parts.iter().try_for_each(|p| p.kept_features(&mut values))?;
        Ok(values)
    }

    /// The statistics of a reference set.
    ///
    /// # Errors
    /// Fewer than 2 images, files that cannot be read.
    pub fn statistics(&self, version: &str) -> anyhow::Result<Statistics> {
        let about = About {
            mudit: version.to_owned(),
            plan: self.plan().clone(),
            size: self.seen.size,
            other_sizes: self.seen.other_sizes,
            grey: self.seen.grey,
            pixels_sha256: self.pixels_sha256(),
            moments_of: None,
        };
        Ok(Statistics {
            pool: self.pool.gaussian()?,
            spatial: self.spatial.as_ref().map(Moments::gaussian).transpose()?,
            features: self.kept()?,
            about: Some(about),
        })
    }

    /// A warning of each side in which nearly nothing varies.
    ///
    /// # Errors
    /// Fewer than 2 images.
    pub fn constant(&self, reference: &Statistics) -> anyhow::Result<Vec<String>> {
        let (own, real) = (self.pool.gaussian()?, &reference.pool);
        let sides = [("samples", &own, real), ("reference images", real, &own)];
        let equal = sides.into_iter().filter(|(_, side, other)| side.is_nearly_constant(Some(other)));
        Ok(equal.map(|(name, ..)| format!("all {name} are (nearly) equal")).collect())
    }

    /// Removes the parts' directories.
    ///
    /// # Errors
    /// Files that cannot be removed.
    pub fn remove(self) -> anyhow::Result<()> {
        self.parts.into_iter().try_for_each(Part::remove)
    }

    /// All metrics that the features and the reference allow.
    ///
    /// # Errors
    /// A reference of other features; what the metrics say.
    pub fn metrics(&self, reference: &Statistics, settings: &Settings) -> anyhow::Result<Metrics> {
        let fid = frechet::distance(&self.pool.gaussian()?, &reference.pool)?;
        let sfid = match (&self.spatial, &reference.spatial) {
            (Some(ours), Some(theirs)) => Some(frechet::distance(&ours.gaussian()?, theirs)?),
            _ => None,
        };
        let inception_score = match self.plan().network.logits {
            Some(classes) => {
                let mut scores = Scores::new(settings.splits, self.seen.images as usize, classes);
                self.parts.iter().try_for_each(|p| p.each_logits(|row| scores.add(row)))?;
                Some(scores.finish()?)
            }
            None => None,
        };
        let (mut manifold, mut kid) = (None, None);
        if !reference.features.is_empty() {
            let kept = self.kept()?;
            let samples = Rows::new(&kept, self.plan().network.pool)?;
            let real = Rows::new(&reference.features, reference.pool.mean.len())?;
            let least = samples.len().min(real.len());
            if least > settings.neighbours {
                let counts = overlap(samples, real, settings.neighbours)?;
                manifold = Some(Manifold { precision: counts.precision(), recall: counts.recall(), counts });
            }
            if least >= settings.kid.size as usize {
                kid = Some(kernel_distance(samples, real, settings.kid)?);
            }
        }
        Ok(Metrics { fid, sfid, inception_score, manifold, kid })
    }
}

fn join(mut all: Seen, own: &Seen, part: &Part, mixed_sizes: bool) -> anyhow::Result<Seen> {
    if let (Some(a), Some(b)) = (all.size, own.size)
        && a != b
    {
        ensure!(
            mixed_sizes,
            "the images of `{}` are {} by {}, those before {} by {}",
            part.directory().display(),
            b[0],
            b[1],
            a[0],
            a[1]
        );
    }
    all.size = all.size.or(own.size);
    all.images += own.images;
    all.other_sizes += own.other_sizes;
    all.grey += own.grey;
    all.blocks.extend(own.blocks.iter().cloned());
    Ok(all)
}

/// What else decides about the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Splits of the Inception score.
    pub splits: Splits,
    /// Neighbours of precision and recall.
    pub neighbours: usize,
    /// Subsets of KID.
    pub kid: Subsets,
}

impl Settings {
    /// The usual ones for sets that keep `least` features or more.
    pub fn usual(splits: Splits, least: usize) -> Self {
        Self { splits, neighbours: 3, kid: Subsets::fitting(least.max(2)) }
    }
}

/// The numbers; a metric that cannot be computed is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Fréchet distance of the pooled features.
    pub fid: f64,
    /// Fréchet distance of the spatial features.
    pub sfid: Option<f64>,
    /// Inception score.
    pub inception_score: Option<InceptionScore>,
    /// Precision and recall.
    pub manifold: Option<Manifold>,
    /// Kernel distance.
    pub kid: Option<KernelDistance>,
}

/// Precision and recall with their counts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifold {
    /// Part of the samples on the reference's manifold.
    pub precision: f64,
    /// Part of the reference on the samples' manifold.
    pub recall: f64,
    /// What they are quotients of.
    pub counts: Overlap,
}

impl Metrics {
    /// The numbers by name, in the usual order.
    pub fn named(&self) -> Vec<(&'static str, f64)> {
        let score = self.inception_score;
        let all = [
            ("IS", score.map(|s| s.mean)),
            ("IS std", score.map(|s| s.std)),
            ("IS unsplit", score.and_then(|s| s.unsplit)),
            ("FID", Some(self.fid)),
            ("sFID", self.sfid),
            ("precision", self.manifold.map(|m| m.precision)),
            ("recall", self.manifold.map(|m| m.recall)),
            ("KID", self.kid.map(|k| k.mean)),
            ("KID std", self.kid.map(|k| k.std)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::path::Path;

    use super::super::pass::tests::{Mixer, Toy};
    use super::super::pass::{Outcome, run};
    use super::super::plan::tests::plan;
    use super::super::plan::{Shard, Side};
    use super::*;

    fn part(at: &Path, plan: &Plan, range: Range<u64>) -> Part {
        let mut part = Part::open(at, plan, range).unwrap();
        let mut source = Toy { count: plan.count, odd: None };
        let done = run(&mut part, &mut source, &mut Mixer { calls: 0 }, &|| false, &mut |_| {}).unwrap();
        assert_eq!(done, Outcome::Finished);
        part
    }

    fn shards(at: &Path, plan: &Plan, of: u64) -> Vec<Part> {
        (1..=of)
            .map(|number| {
                let range = plan.shard(Shard { number, of }).unwrap();
                part(&at.join(format!("{number}-{of}")), plan, range)
            })
            .collect()
    }

    #[test]
    fn ten_shards_in_any_order_give_every_bit_of_one_pass() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(2603, 2000);
        let mut real = plan.clone();
        (real.side, real.count, real.kept) = (Side::Reference, 700, 600);
        let reference =
            Features::of(shards(&dir.path().join("r"), &real, 1)).unwrap().statistics("0").unwrap();
        let settings = Settings::usual(Splits::ADM, 600);
        let one = Features::of(shards(&dir.path().join("s"), &plan, 1)).unwrap();
        let mut parts = shards(&dir.path().join("s"), &plan, 10);
        parts.reverse();
        parts.swap(2, 7);
        let many = Features::of(parts).unwrap();
        let (a, b) =
            (one.metrics(&reference, &settings).unwrap(), many.metrics(&reference, &settings).unwrap());
        assert_eq!(a, b);
        assert_eq!(a.named().len(), 9);
        assert_eq!(one.pixels_sha256(), many.pixels_sha256());
        assert!(one.statistics("0").unwrap() == many.statistics("0").unwrap());
        let halves = Settings { splits: Splits::TORCH_FIDELITY, ..settings };
        assert_eq!(one.metrics(&reference, &halves).unwrap(), many.metrics(&reference, &halves).unwrap());
    }

    #[test]
    fn a_set_against_itself_has_distance_zero() {
        let dir = tempfile::tempdir().unwrap();
        let features = Features::of(shards(dir.path(), &plan(600, 600), 1)).unwrap();
        let own = features.statistics("0").unwrap();
        let found = features.metrics(&own, &Settings::usual(Splits::ADM, 600)).unwrap();
        let scale: f64 = own.pool.mean.iter().map(|m| m * m).sum();
        assert!(found.fid < 1e-9 * scale && found.sfid.unwrap() < 1e-9 * scale, "{found:?}");
        let manifold = found.manifold.unwrap();
        assert_eq!((manifold.precision, manifold.recall), (1.0, 1.0));
    }

    #[test]
    fn parts_that_do_not_make_a_set_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(1000, 0);
        let mut parts = shards(dir.path(), &plan, 4);
        let last = parts.pop().unwrap();
        let error = |parts: Vec<Part>| Features::of(parts).unwrap_err().to_string();
        assert!(error(parts).contains("750..1000 are missing"));
        let copy = dir.path().join("copy");
        let twice = vec![part(&copy, &plan, 750..1000), last];
        assert!(error(twice).contains("0..750 are missing"));
        let twice =
            vec![part(&dir.path().join("a"), &plan, 0..500), part(&dir.path().join("b"), &plan, 250..1000)];
        assert!(error(twice).contains("there twice"));
        let mut other = plan.clone();
        other.network.weights_sha256 = "1".into();
        let mixed =
            vec![part(&dir.path().join("c"), &plan, 0..500), part(&dir.path().join("d"), &other, 500..1000)];
        assert!(error(mixed).contains("network.weights_sha256"));
        assert!(error(Vec::new()).contains("no parts"));
    }
}
