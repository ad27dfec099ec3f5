//! A result: the numbers, and everything that is needed to compare and to repeat them.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::evaluation::{Metrics, Settings};
use super::extractor::Preset;
use super::metrics::inception_score::Splits;
use super::part::Seen;
use super::plan::{Images, MOST_IMAGES, Plan, Side};
use super::statistics::About;
use crate::execution::Execution;

/// Fewer images are refused unless asked for: the covariance of 2048 features has no full rank.
pub const FEWEST: u64 = 2048;
/// Fewer images are worth a warning: the published numbers are of so many.
pub const USUAL: u64 = 50_000;

/// The reference that samples were compared with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// The file as the user named it.
    pub path: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// SHA-256 of all its pixels, or of the file where these are not known.
    pub identity: String,
    /// Number of images, if known.
    pub images: Option<u64>,
    /// Images whose features precision, recall and KID use.
    pub kept: u64,
    /// What the file says of itself.
    pub about: Option<About>,
}

/// How the network was opened, in the command line's words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkChoice {
    /// The preset; none for a network of the user's own.
    pub preset: Option<Preset>,
    /// Weights, or the user's network; none for the published weights.
    pub file: Option<PathBuf>,
    /// Input of the user's network.
    pub onnx_input: Option<String>,
    /// Output of the user's network.
    pub onnx_output: Option<String>,
    /// Subtracted from its pixels, which are 0 to 1.
    pub onnx_mean: [f32; 3],
    /// Divides them after that.
    pub onnx_std: [f32; 3],
    /// Images that it is given at once.
    pub batch: usize,
}

impl NetworkChoice {
    /// Images that the network is given at once unless another number is asked for.
    pub const BATCH: usize = 16;
    /// Mean and deviation of the pixels of the user's network unless others are given: the range becomes -1 … 1.
    pub const HALF: [f32; 3] = [0.5; 3];

    /// A preset with its usual weights.
    pub fn preset(preset: Preset) -> Self {
        Self {
            preset: Some(preset),
            file: None,
            onnx_input: None,
            onnx_output: None,
            onnx_mean: Self::HALF,
            onnx_std: Self::HALF,
            batch: Self::BATCH,
        }
    }
}

/// A machine's part in a result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Version of the program.
    pub mudit: String,
    /// Operating system and architecture.
    pub system: String,
    /// Who ran the network.
    #[serde(default = "Machine::cpu")]
    pub provider: String,
    /// Threads inside one op; 0 is one a core.
    pub threads: usize,
    /// Cores.
    pub cores: usize,
}

impl Machine {
    /// The machine that this runs on.
    pub fn here(execution: &Execution) -> Self {
        Self {
            mudit: env!("CARGO_PKG_VERSION").to_owned(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            provider: execution.provider.to_string(),
            threads: execution.threads,
            cores: std::thread::available_parallelism().map_or(0, usize::from),
        }
    }

    /// The provider of results that do not name one.
    fn cpu() -> String {
        Execution::default().provider.to_string()
    }
}

/// A result, as it is written to JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The numbers.
    pub metrics: Metrics,
    /// What makes them less than they seem.
    pub warnings: Vec<String>,
    /// What was computed of which images.
    pub samples: Plan,
    /// What was seen of them; hashes by block are left out.
    pub seen: Seen,
    /// SHA-256 of all pixels.
    pub pixels_sha256: String,
    /// The other side.
    pub reference: Reference,
    /// How the network was opened.
    pub network_choice: Option<NetworkChoice>,
    /// What else decides.
    pub settings: Settings,
    /// Where it was computed.
    pub machine: Machine,
}

impl Report {
    /// Reads a result.
    ///
    /// # Errors
    /// A file that is no result, or of another version.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{} is no result of `mudit fid calc`", path.display()))
    }

    /// Why two results must not be compared, each reason a line; none if they may.
    pub fn unlike(&self, other: &Self) -> Vec<String> {
        let mut reasons = Vec::new();
        reasons.extend(self.samples.network.differs_from(&other.samples.network));
        let (a, b) = (&self.reference, &other.reference);
        if a.identity != b.identity {
            reasons.push(format!("reference: `{}` against `{}`, which are different sets", a.path, b.path));
        } else if (a.images, a.kept) != (b.images, b.kept) {
            let count = |r: &Reference| r.images.map_or("unknown".to_owned(), |n| n.to_string());
            reasons.push(format!(
                "images of the reference: {} ({} kept) against {} ({} kept)",
                count(a),
                a.kept,
                count(b),
                b.kept
            ));
        }
        let (a, b) = (self.samples.count, other.samples.count);
        if a != b {
            reasons.push(format!(
                "number of samples: {a} against {b}; the distance falls with the number alone"
            ));
        }
        if self.seen.size != other.seen.size {
            let text = |s: &Seen| s.size.map_or("none".to_owned(), |[h, w]| format!("{h} by {w}"));
            reasons.push(format!("size of the images: {} against {}", text(&self.seen), text(&other.seen)));
        }
        let (a, b) = (&self.settings, &other.settings);
        if a != b {
            reasons.push(format!("settings: {} against {}", settings(a), settings(b)));
        }
        reasons
    }

    /// The table for people.
    pub fn table(&self) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        let mut row = |name: &str, value: String| lines.push(format!("{name:10} {value}"));
        let m = &self.metrics;
        row("FID", format!("{:.4}", m.fid));
        if let Some(sfid) = m.sfid {
            row("sFID", format!("{sfid:.4}"));
        }
        if let Some(score) = m.inception_score {
            row("IS", format!("{:.4} ± {:.4}", score.mean, score.std));
            if let Some(whole) = score.unsplit {
                row("IS unsplit", format!("{whole:.4}"));
            }
        }
        if let Some(manifold) = m.manifold {
            let c = manifold.counts;
            row("precision", format!("{:.4}  ({} of {})", manifold.precision, c.samples_inside, c.samples));
            row("recall", format!("{:.4}  ({} of {})", manifold.recall, c.reference_inside, c.reference));
        }
        if let Some(kid) = m.kid {
            row("KID", format!("{:.6} ± {:.6} (deviation over subsets)", kid.mean, kid.std));
        }
        let network = &self.samples.network;
        row("samples", format!("{} of {}", self.samples.count, origin(&self.samples.images)));
        let count = self.reference.images.map_or("an unknown number".to_owned(), |n| n.to_string());
        row("reference", format!("{count} of {}", self.reference.path));
        row("preset", format!("{}: {}", network.preset, network.preprocessing));
        lines.extend(self.warnings.iter().map(|w| format!("warning: {w}")));
        lines
    }
}

fn settings(s: &Settings) -> String {
    let splits = match s.splits {
        Splits::Consecutive { size } => format!("IS of consecutive {size}"),
        Splits::Shuffled { splits, seed } => format!("IS of {splits} shuffled splits, seed {seed}"),
    };
    let k = s.kid;
    format!("{splits}, k = {}, KID of {} × {}, seed {}", s.neighbours, k.count, k.size, k.seed)
}

/// Where images are from, in a few words.
pub fn origin(images: &Images) -> String {
    match images {
        Images::Files { inputs, .. } => match &inputs[..] {
            [one] => one.clone(),
            [first, rest @ ..] => format!("{first} and {} more", rest.len()),
            [] => "nothing".to_owned(),
        },
        Images::Checkpoint(r) => format!(
            "{} ({} {}, guidance {}, seed {})",
            r.checkpoint.display(),
            r.sampler,
            r.steps,
            r.cfg,
            r.seed
        ),
    }
}

/// Refuses sets that are too small, unless `few` says so, and absurd ones; gives a warning for those below the usual size.
///
/// # Errors
/// Fewer than [`FEWEST`] images without `few`, more than [`MOST_IMAGES`].
pub fn check_count(side: Side, count: u64, few: bool) -> anyhow::Result<Option<String>> {
    let name = match side {
        Side::Reference => "reference images",
        Side::Samples => "samples",
    };
    ensure!(
        count <= MOST_IMAGES,
        crate::Usage(format!("{count} {name} are more than any set has ({MOST_IMAGES} at most)"))
    );
    ensure!(
        few || count >= FEWEST,
        crate::Usage(format!(
            "{count} {name} are too few for a Fréchet distance ({FEWEST} at least): give more, or say --few and \
             compare with nothing else"
        ))
    );
    Ok((count < USUAL).then(|| {
        format!(
            "{count} {name}, fewer than the usual {USUAL}: the distance is too large by what is missing; compare equal \
             numbers only"
        )
    }))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::plan::tests::plan;
    use super::*;

    pub(crate) fn report() -> Report {
        let about = None;
        Report {
            metrics: Metrics { fid: 1.5, sfid: None, inception_score: None, manifold: None, kid: None },
            warnings: vec!["small".into()],
            samples: plan(3000, 3000),
            seen: Seen { images: 3000, size: Some([4, 4]), ..Seen::default() },
            pixels_sha256: "p".into(),
            reference: Reference {
                path: "r.npz".into(),
                sha256: "f".into(),
                identity: "i".into(),
                images: Some(10),
                kept: 5,
                about,
            },
            network_choice: None,
            settings: Settings::usual(Splits::ADM, 1000),
            machine: Machine::here(&Execution::cpu(0)),
        }
    }

    #[test]
    fn a_result_reads_back_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::fs::write(&path, serde_json::to_vec(&report()).unwrap()).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report());
        std::fs::write(&path, "{}").unwrap();
        assert!(Report::read(&path).unwrap_err().to_string().contains("no result"));
    }

    #[test]
    fn each_thing_that_makes_results_unlike_is_named() {
        let spoilt = |spoil: fn(&mut Report)| {
            let mut other = report();
            spoil(&mut other);
            report().unlike(&other)
        };
        assert!(spoilt(|_| ()).is_empty());
        // Other images of another origin are what is compared.
        assert!(spoilt(|r| r.pixels_sha256 = "q".into()).is_empty());
        for (spoil, part) in [
            (
                (|r| r.samples.network.preset = "clean".into()) as fn(&mut Report),
                "preset: `toy` against `clean`",
            ),
            (|r| r.samples.network.weights_sha256 = "9".into(), "weights"),
            (|r| r.samples.count = 9000, "number of samples: 3000 against 9000"),
            (|r| r.reference.identity = "j".into(), "different sets"),
            (|r| r.reference.kept = 6, "(6 kept)"),
            (|r| r.seen.size = Some([8, 4]), "4 by 4 against 8 by 4"),
            (|r| r.settings.kid.seed = 1, "seed 1"),
        ] {
            let found = spoilt(spoil);
            assert!(found.len() == 1 && found[0].contains(part), "{found:?} {part}");
        }
        assert_eq!(spoilt(|r| (r.samples.count, r.settings.neighbours) = (1, 5)).len(), 2);
    }

    #[test]
    fn few_images_are_refused_or_warned_of() {
        let check = |count, few| check_count(Side::Samples, count, few);
        assert!(check(2047, false).unwrap_err().to_string().contains("--few"));
        assert!(check(2047, true).unwrap().unwrap().contains("2047 samples"));
        assert!(check(2048, false).unwrap().unwrap().contains("50000"));
        assert_eq!(check(50_000, false).unwrap(), None);
        assert!(check(100_000_000_000_000, true).unwrap_err().to_string().contains("100000000 at most"));
    }
}
