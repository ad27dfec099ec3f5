//! `mudit fid compare`: results side by side, if they may be.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use serde_json::json;

use crate::Usage;
use crate::console;
use crate::fid::report::{Report, origin};

/// Arguments of `mudit fid compare`.
#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Results of `mudit fid calc`, two or more.
    #[arg(required = true)]
    results: Vec<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl CompareArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.results.len() < 2 {
            return Err(Usage("give two results or more".into()).into());
        }
        let reports = self.results.iter().map(|p| Report::read(p)).collect::<anyhow::Result<Vec<_>>>()?;
        let mut reasons = Vec::new();
        for (path, other) in self.results.iter().zip(&reports).skip(1) {
            for reason in reports[0].unlike(other) {
                reasons.push(format!("\n  {} and {}: {reason}", self.results[0].display(), path.display()));
            }
        }
        if !reasons.is_empty() {
            bail!("these results must not be compared:{}", reasons.concat());
        }
        let rows: Vec<_> = self.results.iter().zip(&reports).collect();
        if self.json {
            let row = |(path, r): &(&PathBuf, &Report)| json!({ "result": path, "samples": origin(&r.samples.images), "metrics": r.metrics });
            return console::json(&rows.iter().map(row).collect::<Vec<_>>());
        }
        let names: Vec<&str> = reports[0].metrics.named().into_iter().map(|(name, _)| name).collect();
        let width = rows.iter().map(|(path, _)| path.display().to_string().len()).max().unwrap_or(0);
        let header: Vec<String> = names.iter().map(|n| format!("{n:>10}")).collect();
        console::out(&format!("{:width$} {}", "", header.join(" ")))?;
        for (path, report) in rows {
            let values = report.metrics.named();
            let cell = |name: &&str| match values.iter().find(|(n, _)| n == name) {
                Some((name, value)) if name.starts_with("KID") => format!(" {value:>10.6}"),
                Some((_, value)) => format!(" {value:>10.4}"),
                None => format!(" {:>10}", "-"),
            };
            let cells: String = names.iter().map(cell).collect();
            let name = path.display().to_string();
            console::out(&format!("{name:width$}{cells}  {}", origin(&report.samples.images)))?;
        }
        Ok(())
    }
}
