//! How good the quickstart's pictures are: their Fréchet distance to the test set, beside what real images and noise reach.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use runtime::Runtime;

use super::super::Machine;
use super::calc::{self, How, Other};
use super::{network, set};
use crate::console;
use crate::execution::Execution;
use crate::fid::evaluation::{Features, KEPT_REFERENCE, KEPT_SAMPLES};
use crate::fid::extractor::{Extractor, Preset};
use crate::fid::metrics::inception_score::Splits;
use crate::fid::plan::{Images, Plan, Recipe, Shard, Side};
use crate::fid::report::NetworkChoice;
use crate::fid::source::labelled::FASHION;
use crate::fid::source::noise::NOISE;

/// The distances to Fashion-MNIST's test set, of equal numbers of images.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Distances {
    /// Of the model's pictures.
    pub(in super::super) samples: f64,
    /// Of training images: what no model can be far below.
    pub(in super::super) floor: f64,
    /// Of noise.
    pub(in super::super) noise: f64,
}

/// Computes all three with the classifier of the preset `fashion`; writes `reference.npz` and `fid.json` into `run`.
///
/// `data` is the data set's directory, if it is a given one.
///
/// # Errors
/// What making the classifier, the samples or the distances says.
pub(in super::super) fn distances(
    runtime: &Arc<Runtime>,
    run: &Path,
    data: Option<&Path>,
    recipe: Recipe,
    machine: Machine,
) -> anyhow::Result<Distances> {
    let choice = NetworkChoice::preset(Preset::Fashion);
    let execution = Execution::cpu(machine.threads);
    let network = network::open(&choice, runtime, &execution, machine.offline)?;
    let count = recipe.count;
    let mut judge = Judge { runtime, network, work: run.join("fid.part"), machine };
    let place = data.map_or(String::new(), |d| format!("@{}", d.display()));
    let files = |name: String, first| Images::Files {
        inputs: vec![name],
        column: None,
        first,
        spread: false,
        scale: None,
    };
    let test = judge.features(Side::Reference, files(format!("{FASHION}test{place}"), None))?;
    let reference = run.join("reference.npz");
    test.statistics(env!("CARGO_PKG_VERSION"))?.write(&reference)?;
    test.remove()?;
    let reference = Other::read(&reference)?;
    let mut report = |images| -> anyhow::Result<_> {
        let features = judge.features(Side::Samples, images)?;
        let how = How {
            choice: Some(choice.clone()),
            few: true,
            execution: execution.clone(),
            warnings: Vec::new(),
        };
        let report = calc::judge_with(&features, &reference, Splits::ADM, how)?;
        features.remove()?;
        Ok(report)
    };
    let floor = report(files(format!("{FASHION}train{place}"), Some(count)))?.metrics.fid;
    let noise = report(files(format!("{NOISE}{count},28,28,1"), None))?.metrics.fid;
    let samples = report(Images::Checkpoint(Box::new(recipe)))?;
    calc::write(&samples, &run.join("fid.json"))?;
    Ok(Distances { samples: samples.metrics.fid, floor, noise })
}

struct Judge<'a> {
    runtime: &'a Arc<Runtime>,
    network: Extractor,
    work: PathBuf,
    machine: Machine,
}

impl Judge<'_> {
    fn features(&mut self, side: Side, images: Images) -> anyhow::Result<Features> {
        console::note(&format!("features of {}", crate::fid::report::origin(&images)));
        let mut source = set::open(&images, self.runtime, self.machine.offline)?;
        let kept = if side == Side::Reference { KEPT_REFERENCE } else { KEPT_SAMPLES };
        let description = self.network.describe().clone();
        let plan = Plan::new(side, images, source.count(), description, kept, false);
        // What an interrupted run left belongs to another set, perhaps.
        if self.work.is_dir() {
            std::fs::remove_dir_all(&self.work)?;
        }
        set::alone(set::run(&plan, Shard::WHOLE, &self.work, source.as_mut(), &mut self.network)?)
    }
}
