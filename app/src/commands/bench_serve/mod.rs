//! `mudit bench-serve`: load on a server, and what it makes of it.

mod client;
mod load;
mod report;

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::serve::seconds;
use crate::console;
use client::Client;
use load::{Arrivals, MOST_WORKERS, Mix};
use report::Report;

/// Where the server's key stands, so that it is in no process list.
const KEY_VARIABLE: &str = "MUDIT_API_KEY";

/// Arguments of `mudit bench-serve`.
#[derive(Debug, Args)]
pub struct BenchServeArgs {
    /// The server.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// The model; default: the server's first.
    #[arg(long)]
    model: Option<String>,
    /// Requests a second at random times (Poisson); several rates are run one after the other.
    #[arg(long, value_delimiter = ',', conflicts_with = "concurrency")]
    rate: Vec<f64>,
    /// Seconds of each rate.
    #[arg(long, default_value_t = 30.0, value_parser = seconds)]
    duration: f64,
    /// Instead of rates: so many requests at a time, the next one when one is answered.
    #[arg(long, value_delimiter = ',')]
    concurrency: Vec<usize>,
    /// Requests of each concurrency.
    #[arg(long, default_value_t = 64)]
    requests: usize,
    /// Step counts of the mix.
    #[arg(long, value_delimiter = ',', default_value = "10,20,30,50")]
    steps: Vec<u64>,
    /// Guidance scales of the mix; 1 is none.
    #[arg(long, value_delimiter = ',', default_value = "1,3")]
    cfg: Vec<f64>,
    /// Numbers of images of the mix.
    #[arg(short = 'n', long = "images", value_delimiter = ',', default_value = "1")]
    images: Vec<u64>,
    /// Seed of the mix and of the arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A request that is not answered after this many seconds is lost.
    #[arg(long, default_value_t = 120.0, value_parser = seconds)]
    timeout: f64,
    /// Print a JSON report.
    #[arg(long)]
    json: bool,
}

impl BenchServeArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mix = Mix::new(&self.steps, &self.cfg, &self.images, self.model.clone(), self.seed)?;
        let mut runs = Vec::new();
        for rate in &self.rate {
            runs.push(Arrivals::Poisson { rate: *rate, seconds: self.duration });
        }
        for workers in &self.concurrency {
            runs.push(Arrivals::Closed { workers: *workers, requests: self.requests });
        }
        if runs.is_empty() {
            runs.push(Arrivals::Closed { workers: 1, requests: self.requests });
            runs.push(Arrivals::Closed { workers: self.requests.min(MOST_WORKERS), requests: self.requests });
        }
        runs.iter().try_for_each(Arrivals::check)?;
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        tokio.block_on(async {
            let key = std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty());
            let client = Client::new(&self.url, key.as_deref(), self.timeout)?;
            client.metrics().await.with_context(|| format!("no server answers at {}", self.url))?;
            let mut reports = Vec::new();
            if !self.json {
                console::out(Report::HEAD)?;
            }
            for arrivals in &runs {
                let before = client.metrics().await?;
                let outcome = load::run(&client, &mix, arrivals, self.seed).await;
                let after = client.metrics().await.context("the server is gone")?;
                let report = Report::new(arrivals, &outcome, &before, &after);
                if !self.json {
                    console::out(&report.line())?;
                }
                reports.push(report);
            }
            if self.json {
                console::json(&json!({"url": self.url, "seed": self.seed, "runs": reports}))?;
            }
            Ok(())
        })
    }
}
