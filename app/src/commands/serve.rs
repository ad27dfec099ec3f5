//! `mudit serve`: a server that makes images on request.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use models::Guidance;
use runtime::file::sha256_file;
use runtime::library::cache_directory;
use serde_json::json;
use train_engine::signals::StopSignal;

use super::weights::{self, Which};
use super::{Machine, Target, guided_channels};
use crate::execution::Execution;
use crate::sampler::default_guided;
use crate::serve::engine::EngineOptions;
use crate::serve::http::Limits;
use crate::serve::http::auth::Keys;
use crate::serve::model::Source;
use crate::serve::{ServeOptions, Server};
use crate::{Usage, console};

/// Where API keys may stand, so that they are in no process list.
const KEYS_VARIABLE: &str = "MUDIT_API_KEYS";
/// Between two looks for a signal.
const TICK: Duration = Duration::from_millis(20);

/// Arguments of `mudit serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A checkpoint or run directory; its last name is the model's.
    #[arg(long, env = "MUDIT_CHECKPOINT", required_unless_present = "models")]
    checkpoint: Option<PathBuf>,
    /// A further model: NAME=DIR. May be given again.
    #[arg(long = "model", value_parser = named)]
    models: Vec<(String, PathBuf)>,
    /// Which parameters: the moving average or the model's own.
    #[arg(long, value_enum, default_value = "ema", env = "MUDIT_WEIGHTS")]
    weights: Which,
    /// Channels that guidance changes: a number or `all`. Default 3 for DDPM models as in the reference, else all.
    #[arg(long, value_parser = guided_channels)]
    cfg_channels: Option<Guidance>,
    /// Address to listen on. Any but this machine's own needs API keys.
    #[arg(long, default_value = "127.0.0.1", env = "MUDIT_HOST")]
    host: IpAddr,
    /// Port to listen on; 0 is any free one.
    #[arg(long, default_value_t = 8000, env = "MUDIT_PORT")]
    port: u16,
    /// File of API keys, one a line. Or the variable MUDIT_API_KEYS, separated by commas.
    #[arg(long, env = "MUDIT_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
    /// Serve other machines without API keys.
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    batches: Batches,
    /// Most images of a request.
    #[arg(long, default_value_t = 10, env = "MUDIT_MAX_IMAGES")]
    max_images: usize,
    /// Most steps of an image.
    #[arg(long, default_value_t = 1000, env = "MUDIT_MAX_STEPS")]
    max_steps: usize,
    /// Most bytes of a body.
    #[arg(long, default_value_t = 1 << 20, env = "MUDIT_MAX_BODY")]
    max_body: usize,
    /// Most connections.
    #[arg(long, default_value_t = 1024, env = "MUDIT_MAX_CONNECTIONS")]
    max_connections: usize,
    /// Most jobs that run or are kept.
    #[arg(long, default_value_t = 256, env = "MUDIT_MAX_JOBS")]
    max_jobs: usize,
    /// A request that is not done after this many seconds fails.
    #[arg(long, default_value_t = 300.0, value_parser = seconds, env = "MUDIT_REQUEST_TIMEOUT")]
    request_timeout: f64,
    /// A client has this many seconds to send its head, and its body.
    #[arg(long, default_value_t = 10.0, value_parser = seconds, env = "MUDIT_READ_TIMEOUT")]
    read_timeout: f64,
    /// A client has this many seconds to take a piece of the answer.
    #[arg(long, default_value_t = 30.0, value_parser = seconds, env = "MUDIT_WRITE_TIMEOUT")]
    write_timeout: f64,
    /// After SIGTERM, go on taking requests for this many seconds while balancers notice.
    #[arg(long, default_value_t = 0.0, value_parser = seconds, env = "MUDIT_DRAIN_DELAY")]
    drain_delay: f64,
    /// After that, finish accepted requests for at most this many seconds.
    #[arg(long, default_value_t = 30.0, value_parser = seconds, env = "MUDIT_DRAIN_TIMEOUT")]
    drain_timeout: f64,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    machine: Machine,
    /// Tell what is served as JSON.
    #[arg(long)]
    json: bool,
}

/// How steps are batched.
#[derive(Debug, Args)]
struct Batches {
    /// Use batch sizes that give other bits, too.
    #[arg(long)]
    no_deterministic: bool,
    /// Most rows of a batch; the measured step times decide below that. A guided image takes two.
    #[arg(long, default_value_t = 192, env = "MUDIT_MAX_ROWS")]
    max_rows: usize,
    /// Most work that is accepted beyond what fits into the largest batch, in image-steps, a guided one counting two;
    /// default: a quarter of a second of it.
    #[arg(long, env = "MUDIT_MAX_QUEUE")]
    max_queue: Option<u64>,
    /// Measure the step times again even where the cache has them.
    #[arg(long)]
    remeasure: bool,
}

impl ServeArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let options = self.options()?;
        let stop = StopSignal::install()?;
        let sources = self.sources()?;
        let names: Vec<String> = sources.iter().map(|s| s.name.clone()).collect();
        let runtime = self.machine.runtime_for(&self.target.provider)?;
        let server = Server::bind(sources, options)?;
        let url = format!("http://{}", server.address());
        console::note(&format!("serve: {url} is open; loading {}", names.join(", ")));
        server.load(&runtime)?;
        for (name, report) in names.iter().zip(server.reports()) {
            let rows: Vec<String> = report.in_use.points.iter().map(|p| p.rows.to_string()).collect();
            let same = if report.determinism.exact {
                "the same bits in every batch"
            } else {
                "bits depend on the batch"
            };
            console::note(&format!(
                "serve: {name}: batches of {} rows, {:.2} ms a row, {same}; ready after {:.1} s",
                rows.join(", "),
                report.in_use.row_seconds() * 1e3,
                report.warm_up_seconds
            ));
        }
        if self.json {
            console::json(&json!({"url": url, "models": names, "reports": server.reports()}))?;
        } else {
            console::out(&format!("serving {} at {url}", names.join(", ")))?;
        }
        while !stop.is_set() {
            std::thread::sleep(TICK);
        }
        console::note("serve: finishing accepted requests; a second signal ends at once");
        let drained = server.drain();
        anyhow::ensure!(drained.complete, "accepted requests were not finished within --drain-timeout");
        console::note("serve: done");
        Ok(())
    }

    fn options(&self) -> anyhow::Result<ServeOptions> {
        for (name, value) in [
            ("--max-images", self.max_images),
            ("--max-steps", self.max_steps),
            ("--max-body", self.max_body),
            ("--max-connections", self.max_connections),
            ("--max-jobs", self.max_jobs),
        ] {
            if value == 0 {
                return Err(Usage(format!("{name} must be 1 or more")).into());
            }
        }
        let keys = self.keys()?;
        if keys.is_empty() && !self.host.is_loopback() && !self.insecure {
            return Err(Usage(format!(
                "other machines reach {}: give --api-key-file or {KEYS_VARIABLE}, or say --insecure",
                self.host
            ))
            .into());
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if self.machine.threads == 0 { cores } else { self.machine.threads };
        let execution = Execution { threads, ..self.target.execution(self.machine)? };
        Ok(ServeOptions {
            address: SocketAddr::new(self.host, self.port),
            engine: EngineOptions {
                execution,
                deterministic: !self.batches.no_deterministic,
                max_rows: self.batches.max_rows,
                max_queue: self.batches.max_queue,
                remeasure: self.batches.remeasure,
                cache: cache_directory(),
            },
            limits: Limits {
                images: self.max_images,
                steps: self.max_steps,
                body: self.max_body,
                connections: self.max_connections,
                jobs: self.max_jobs,
                request_time: Duration::from_secs_f64(self.request_timeout),
                read_time: Duration::from_secs_f64(self.read_timeout),
                write_time: Duration::from_secs_f64(self.write_timeout),
                ..Limits::default()
            },
            keys,
            drain_delay: Duration::from_secs_f64(self.drain_delay),
            drain_timeout: Duration::from_secs_f64(self.drain_timeout),
        })
    }

    fn keys(&self) -> anyhow::Result<Keys> {
        if let Some(file) = &self.api_key_file {
            let place = || format!("`{}`", file.display());
            return Keys::parse(&std::fs::read_to_string(file).with_context(place)?).with_context(place);
        }
        match std::env::var(KEYS_VARIABLE) {
            Ok(text) if !text.is_empty() => Keys::parse(&text).context(KEYS_VARIABLE),
            _ => Ok(Keys::default()),
        }
    }

    fn sources(&self) -> anyhow::Result<Vec<Source>> {
        let mut all: Vec<(String, &Path)> = Vec::new();
        if let Some(path) = &self.checkpoint {
            let full = path.canonicalize().unwrap_or_else(|_| path.clone());
            let name = full.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
            all.push((name, path));
        }
        all.extend(self.models.iter().map(|(name, path)| (name.clone(), path.as_path())));
        let mut sources: Vec<Source> = Vec::new();
        for (name, path) in all {
            if sources.iter().any(|s| s.name == name) {
                return Err(Usage(format!(
                    "two models are called `{name}`: name them with --model NAME=DIR"
                ))
                .into());
            }
            let loaded = weights::open(path, self.weights)?;
            let guided = self.cfg_channels.unwrap_or(default_guided(loaded.model.objective));
            let sha256 = sha256_file(&loaded.file)?;
            let weights::Loaded { model, parameters, file } = loaded;
            sources.push(Source { name, model, parameters, guided, file, sha256 });
        }
        Ok(sources)
    }
}

/// Reads NAME=DIR.
fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=DIR")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        return Err("a name has letters, digits, `-`, `_` and `.` only".into());
    }
    Ok((name.to_owned(), path.into()))
}

/// Reads a time in seconds.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(s) if (0.0..=86_400.0).contains(&s) => Ok(s),
        _ => Err("expected seconds from 0 to 86400".into()),
    }
}
