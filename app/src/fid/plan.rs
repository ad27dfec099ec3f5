//! What is to be computed of which images: everything that decides about features, written down before the first image.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::ensure;
use graph_builder::Precision;
use runtime::Provider;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::extractor::Description;
use super::source::scale::Scale;
use crate::Usage;

/// Images whose features are summed at once; shards begin and end at its multiples. It divides ADM's splits of 5000.
pub const BLOCK: u64 = 250;
/// Most images of a set: exact sums and permutations are for fewer than 2²⁸.
pub const MOST_IMAGES: u64 = 100_000_000;
/// Version of the files; another one is refused.
const FORMAT: u32 = 1;

/// Which side of the comparison the images are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The real images.
    Reference,
    /// What is judged.
    Samples,
}

/// Where the images are from, with all that is needed to get them again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Images {
    /// Files and directories as the user named them.
    Files {
        /// The names.
        inputs: Vec<String>,
        /// The Parquet column that was asked for.
        column: Option<String>,
        /// How many of the images are taken, from the first on; all if none.
        first: Option<u64>,
        /// Whether these are spread over all images.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        spread: bool,
        /// Range of the pixels of arrays, if it was given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        scale: Option<Scale>,
    },
    /// Samples of a checkpoint.
    Checkpoint(Box<Recipe>),
}

impl Images {
    /// Images of files, all of them.
    pub fn files(inputs: Vec<String>) -> Self {
        Self::Files { inputs, column: None, first: None, spread: false, scale: None }
    }

    /// The choice without the places and the number: what images in another place may have alike.
    pub(super) fn without_place(&self) -> Self {
        let mut choice = self.clone();
        match &mut choice {
            Self::Files { inputs, first, .. } => (*inputs, *first) = (Vec::new(), None),
            Self::Checkpoint(recipe) => (recipe.checkpoint, recipe.count) = (PathBuf::new(), 0),
        }
        choice
    }

    /// Whether both are in the same place, by their names.
    pub(super) fn is_in_place_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Files { inputs: a, .. }, Self::Files { inputs: b, .. }) => a == b,
            (Self::Checkpoint(a), Self::Checkpoint(b)) => a.checkpoint == b.checkpoint,
            _ => false,
        }
    }
}

/// How a checkpoint is sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The directory as the user named it.
    pub checkpoint: PathBuf,
    /// `ema` or `model`.
    pub weights: String,
    /// SHA-256 of the weights' file.
    pub weights_sha256: String,
    /// The model's `config.json`.
    pub model: Value,
    /// Name of the solver.
    pub sampler: String,
    /// Its steps, as on the command line.
    pub steps: String,
    /// Noise of ddim.
    pub eta: f64,
    /// Time shift of flow solvers.
    pub shift: f64,
    /// Scale of the guidance.
    pub cfg: f64,
    /// Channels it changes: a number or `all`.
    pub cfg_channels: String,
    /// Classes in turn; drawn at random if none.
    pub classes: Option<Vec<i64>>,
    /// Seed of noise and classes.
    pub seed: u64,
    /// Number of samples.
    pub count: u64,
    /// Samples of one run of the program.
    pub batch: usize,
    /// Threads inside one op; 0 is one a core.
    pub threads: usize,
    /// Who computed them.
    #[serde(default = "Recipe::cpu")]
    pub provider: String,
    /// What they were computed in.
    #[serde(default)]
    pub precision: Precision,
}

impl Recipe {
    /// The provider of results that do not name one.
    fn cpu() -> String {
        Provider::default().to_string()
    }
}

/// One set's features, whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    format: u32,
    /// Which side they are.
    pub side: Side,
    /// The images.
    pub images: Images,
    /// Number of images.
    pub count: u64,
    /// The network.
    pub network: Description,
    /// Images of a block.
    pub block: u64,
    /// The first so many images keep their features, for precision, recall and KID.
    pub kept: u64,
    /// Whether images of different sizes are allowed.
    pub mixed_sizes: bool,
}

impl Plan {
    /// Of all that is asked for.
    pub fn new(
        side: Side,
        images: Images,
        count: u64,
        network: Description,
        kept: u64,
        mixed_sizes: bool,
    ) -> Self {
        Self {
            format: FORMAT,
            side,
            images,
            count,
            network,
            block: BLOCK,
            kept: kept.min(count),
            mixed_sizes,
        }
    }

    /// Images of a shard.
    ///
    /// # Errors
    /// Fewer blocks than shards.
    pub fn shard(&self, shard: Shard) -> anyhow::Result<Range<u64>> {
        shard.range(self.count, self.block)
    }

    /// Another plan's first difference beside the places and the number of the images.
    ///
    /// # Errors
    /// A plan that cannot be written as JSON.
    pub(super) fn differs_beside_place(&self, other: &Self) -> anyhow::Result<Option<String>> {
        let mut moved = other.clone();
        if self.images.without_place() == other.images.without_place() {
            moved.images = self.images.clone();
        }
        (moved.count, moved.kept) = (self.count, self.kept);
        self.differs_from(&moved)
    }

    /// The first thing in which another plan differs, as `key: this against that`.
    ///
    /// # Errors
    /// A plan that cannot be written as JSON.
    pub fn differs_from(&self, other: &Self) -> anyhow::Result<Option<String>> {
        Ok(difference("", &serde_json::to_value(self)?, &serde_json::to_value(other)?))
    }
}

/// The first difference of two values, with its place.
fn difference(at: &str, a: &Value, b: &Value) -> Option<String> {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let missing = Value::Null;
            let keys = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k)));
            keys.into_iter().find_map(|key| {
                let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                difference(&at, a.get(key).unwrap_or(&missing), b.get(key).unwrap_or(&missing))
            })
        }
        _ => (a != b).then(|| format!("{at}: {a} against {b}")),
    }
}

/// One part of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1.
    pub number: u64,
    /// How many there are.
    pub of: u64,
}

impl Shard {
    /// Everything in one part.
    pub const WHOLE: Self = Self { number: 1, of: 1 };

    /// Its images among `count`: whole blocks, as evenly as they go.
    ///
    /// # Errors
    /// Fewer blocks than shards.
    pub fn range(self, count: u64, block: u64) -> anyhow::Result<Range<u64>> {
        let (Self { number, of }, blocks) = (self, count.div_ceil(block));
        ensure!(
            of <= blocks,
            Usage(format!("{count} images are {blocks} blocks of {block}, too few for {of} shards"))
        );
        let border = |k: u64| (k * blocks / of * block).min(count);
        Ok(border(number - 1)..border(number))
    }
}

impl std::str::FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match parts {
            Some((number, of)) if (1..=of).contains(&number) => Ok(Self { number, of }),
            _ => Err("expected number/of, from 1/1, such as 3/10".into()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn plan(count: u64, kept: u64) -> Plan {
        let images = Images::files(vec!["x".into()]);
        let network = Description {
            preset: "toy".into(),
            network: "toy".into(),
            weights: "none".into(),
            weights_sha256: "0".into(),
            preprocessing: "none".into(),
            precision: "f32".into(),
            runtime: "none".into(),
            pool: 4,
            spatial: Some(3),
            logits: Some(2),
        };
        Plan::new(Side::Samples, images, count, network, kept, false)
    }

    #[test]
    fn shards_tile_the_set_in_whole_blocks() {
        for (count, of) in [(10_000, 10), (10_001, 7), (500, 2), (1, 1), (50_000, 3)] {
            let plan = plan(count, 0);
            let mut end = 0;
            for number in 1..=of {
                let range = plan.shard(Shard { number, of }).unwrap();
                assert_eq!(range.start, end);
                assert!(range.start < range.end && range.start.is_multiple_of(BLOCK));
                end = range.end;
            }
            assert_eq!(end, count);
        }
        let error = plan(500, 0).shard(Shard { number: 1, of: 3 }).unwrap_err().to_string();
        assert!(error.contains("2 blocks"), "{error}");
    }

    #[test]
    fn shards_are_written_from_one() {
        assert_eq!("3/10".parse(), Ok(Shard { number: 3, of: 10 }));
        for bad in ["0/10", "11/10", "3", "a/b", "-1/2"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_difference_is_named_with_its_place() {
        let (a, mut b) = (plan(10, 0), plan(10, 0));
        assert_eq!(a.differs_from(&b).unwrap(), None);
        b.network.weights_sha256 = "1".into();
        b.mixed_sizes = true;
        let found = a.differs_from(&b).unwrap().unwrap();
        assert_eq!(found, "network.weights_sha256: \"0\" against \"1\"");
    }
}
