//! `mudit doctor`: what this machine has, what is missing, what to do.

use clap::Args;
use runtime::doctor::{Check, Status, report};

use crate::console;

/// Arguments of `mudit doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print a JSON list instead of text.
    #[arg(long)]
    json: bool,
}

impl DoctorArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let checks = report();
        if self.json {
            console::json(&checks)?;
        } else {
            let wide = checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
            for check in &checks {
                console::out(&line(check, wide))?;
                if let Some(remedy) = check.remedy.as_ref().filter(|_| check.status != Status::Ok) {
                    console::out(&format!("  {:wide$}           → {remedy}", ""))?;
                }
            }
        }
        let broken: Vec<_> = checks.iter().filter(|c| c.required && c.status != Status::Ok).collect();
        anyhow::ensure!(
            broken.is_empty(),
            "training and sampling on the CPU lack: {}",
            broken.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ")
        );
        Ok(())
    }
}

fn line(check: &Check, wide: usize) -> String {
    let status = match check.status {
        Status::Ok => "ok",
        Status::Missing => "missing",
        Status::Error => "error",
    };
    format!("  {:wide$}  {status:7}  {}", check.name, check.detail)
}
