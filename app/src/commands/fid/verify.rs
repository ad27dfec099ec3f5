//! `mudit fid verify`: a result run again from its own file.

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use clap::Args;
use runtime::file::sha256_file;
use serde_json::json;

use super::super::Machine;
use super::calc::{self, How, Other};
use super::{network, set};
use crate::Usage;
use crate::console;
use crate::execution::Execution;
use crate::fid::plan::{Images, Shard};
use crate::fid::report::Report;

/// Arguments of `mudit fid verify`.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// A result of `mudit fid calc`.
    result: PathBuf,
    /// Largest relative difference of a number.
    #[arg(long, default_value_t = 1e-6)]
    tolerance: f64,
    /// Where unfinished work is kept; default beside the result.
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Fetch nothing; fail where something is missing.
    #[arg(long)]
    offline: bool,
}

impl VerifyArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let said = Report::read(&self.result)?;
        let path = self.result.display();
        let choice = said
            .network_choice
            .clone()
            .ok_or_else(|| Usage(format!("{path} does not say how its network was opened")))?;
        let reference = Path::new(&said.reference.path);
        let other = Other::read(reference)?;
        let hash = sha256_file(reference)?;
        ensure!(
            hash == said.reference.sha256,
            "the reference {} has sha256 {hash}, the result was made with {}",
            reference.display(),
            said.reference.sha256
        );
        let execution =
            Execution { provider: said.machine.provider.parse()?, ..Execution::cpu(said.machine.threads) };
        let sampled_by = match &said.samples.images {
            Images::Checkpoint(recipe) => recipe.provider.parse()?,
            Images::Files { .. } => execution.provider.clone(),
        };
        execution.check()?;
        sampled_by.check()?;
        let machine = Machine { threads: execution.threads, offline: self.offline };
        // A library for GPUs runs programs on the CPU, too.
        let runtime =
            machine.runtime_for(if sampled_by.is_gpu() { &sampled_by } else { &execution.provider })?;
        let mut source = set::open(&said.samples.images, &runtime, self.offline)?;
        ensure!(
            source.count() == said.samples.count,
            "there are {} images now, the result is of {}",
            source.count(),
            said.samples.count
        );
        let mut extractor = network::open(&choice, &runtime, &execution, self.offline)?;
        if let Some(what) = said.samples.network.differs_from(extractor.describe()) {
            bail!("the network is another one ({what}, then against now)");
        }
        let mut plan = said.samples.clone();
        plan.network = extractor.describe().clone();
        let work = self.work.clone().unwrap_or_else(|| {
            let mut name = self.result.as_os_str().to_owned();
            name.push(".verify");
            name.into()
        });
        let part = set::run(&plan, Shard::WHOLE, &work, source.as_mut(), &mut extractor)?;
        let features = set::alone(part)?;
        let pixels = features.pixels_sha256();
        let how = How { choice: None, few: true, execution, warnings: Vec::new() };
        let again = calc::judge_with(&features, &other, said.settings.splits, how)?;
        features.remove()?;
        let rows = rows(&said, &again, self.tolerance);
        let same = rows.iter().all(|r| r.agrees);
        if self.json {
            let list: Vec<_> = rows
                .iter()
                .map(|r| json!({ "metric": r.name, "said": r.said, "again": r.again, "agrees": r.agrees }))
                .collect();
            console::json(
                &json!({ "agrees": same, "same_pixels": pixels == said.pixels_sha256, "metrics": list }),
            )?;
        } else {
            for row in &rows {
                let word = match row {
                    Row { agrees: false, .. } => "DIFFERS",
                    Row { said, again: Some(again), .. } if said == again => "the same",
                    _ => "agrees",
                };
                let again = row.again.map_or("-".to_owned(), |x| format!("{x:.10}"));
                console::out(&format!("{:10} {:>18.10} {again:>18}  {word}", row.name, row.said))?;
            }
        }
        if !same {
            let cause = if pixels == said.pixels_sha256 {
                "the images are the same"
            } else {
                "the images are not the same"
            };
            bail!("{path} is not confirmed: {cause}, and a number differs by more than {}", self.tolerance);
        }
        Ok(())
    }
}

/// A metric then and now.
struct Row {
    name: &'static str,
    said: f64,
    again: Option<f64>,
    agrees: bool,
}

fn rows(said: &Report, again: &Report, tolerance: f64) -> Vec<Row> {
    let now = again.metrics.named();
    let row = |(name, said): (&'static str, f64)| {
        let again = now.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
        let agrees = again.is_some_and(|x| (x - said).abs() <= tolerance * said.abs().max(x.abs()));
        Row { name, said, again, agrees }
    };
    said.metrics.named().into_iter().map(row).collect()
}
