//! `mudit serve`: a server that makes images on request.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::http::{HeaderValue, Uri};
use clap::Args;
use models::Guidance;
use models::class_names::misleading_number;
use runtime::file::sha256_file;
use runtime::library::cache_directory;
use serde_json::json;
use train_engine::signals::StopSignal;

use super::weights::{self, Which};
use super::{Machine, Target};
use crate::built::BuiltEngine;
use crate::execution::Execution;
use crate::sampler::channels;
use crate::serve::engine::EngineOptions;
use crate::serve::http::Limits;
use crate::serve::http::auth::Keys;
use crate::serve::model::{Origin, Source};
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
    #[arg(long, env = "MUDIT_CHECKPOINT")]
    checkpoint: Option<PathBuf>,
    /// An engine directory with `step-rows` at the batch sizes to be used, which run as they are; its last name is the
    /// model's. With --checkpoint, it must have been built from that.
    #[arg(long, env = "MUDIT_ENGINE")]
    engine: Option<PathBuf>,
    /// A further model, a checkpoint or an engine: NAME=DIR. May be given again.
    #[arg(long = "model", value_parser = named)]
    models: Vec<(String, PathBuf)>,
    /// Which parameters of checkpoints: the moving average (ema, the default) or the model's own.
    #[arg(long, value_enum, env = "MUDIT_WEIGHTS")]
    weights: Option<Which>,
    /// Channels that guidance changes: a number or `all`. Default an engine's; 3 for DDPM models as in the reference, else all.
    #[arg(long, value_parser = channels)]
    cfg_channels: Option<Guidance>,
    /// Address to listen on, or a name for it; all addresses of a name are listened on. Any but this machine's own needs
    /// API keys.
    #[arg(long, default_value = "127.0.0.1", env = "MUDIT_HOST")]
    host: String,
    /// Port to listen on; 0 is any free one.
    #[arg(long, default_value_t = 8000, env = "MUDIT_PORT")]
    port: u16,
    /// File of API keys, one a line. Or the variable MUDIT_API_KEYS, separated by commas.
    #[arg(long, env = "MUDIT_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
    /// Serve other machines without API keys.
    #[arg(long)]
    insecure: bool,
    /// An origin whose pages may ask, such as http://localhost:3000; `*` is any. May be given again.
    #[arg(long = "cors-origin", value_name = "URL", value_parser = origin, value_delimiter = ',', env = "MUDIT_CORS_ORIGIN")]
    cors_origins: Vec<HeaderValue>,
    /// Take any value of options that cannot matter here: quality, style, moderation, output_compression.
    #[arg(long, env = "MUDIT_IGNORE_UNUSED_OPTIONS")]
    ignore_unused_options: bool,
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
    /// A connection without a request is kept for this many seconds; clients are told. Behind a proxy, more than it keeps
    /// its own. 0 closes after each answer.
    #[arg(long, default_value_t = 75.0, value_parser = seconds, env = "MUDIT_KEEP_ALIVE")]
    keep_alive: f64,
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
        let places = self.places()?;
        let options = self.options(&places)?;
        let told = || console::interrupt("serve: finishing accepted requests; a second signal ends at once");
        let stop = StopSignal::install(told)?;
        let sources = self.sources(places)?;
        let names: Vec<String> = sources.iter().map(|s| s.name.clone()).collect();
        for source in &sources {
            let names = source.model.class_names.as_deref().unwrap_or_default();
            if let Some(class) = misleading_number(names) {
                console::note(&format!(
                    "serve: {}: number {class} is the class called `{}`; numbers in JSON are numbers of classes, and a text \
                     that may mean two classes is refused",
                    source.name, names[class]
                ));
            }
        }
        let runtime = self.machine.runtime_for(&options.engine.execution.provider)?;
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
            let others = &report.determinism.other_bits;
            if let Some(largest) = others.values().copied().reduce(f32::max) {
                let rows: Vec<String> = others.keys().map(ToString::to_string).collect();
                let fate = if report.determinism.exact {
                    "are not used; --no-deterministic uses them"
                } else {
                    "are used"
                };
                console::note(&format!(
                    "serve: {name}: batches of {} rows give a step other bits (by {largest:.1e} at most) and {fate}",
                    rows.join(", ")
                ));
            }
        }
        if self.json {
            console::json(&json!({"url": url, "models": names, "reports": server.reports()}))?;
        } else {
            console::out(&format!("serving {} at {url}", names.join(", ")))?;
        }
        while !stop.is_set() {
            std::thread::sleep(TICK);
        }
        let drained = server.drain();
        anyhow::ensure!(drained.complete, "accepted requests were not finished within --drain-timeout");
        console::note("serve: done");
        Ok(())
    }

    fn options(&self, places: &[(String, Place)]) -> anyhow::Result<ServeOptions> {
        for (name, value, least, most) in [
            ("--max-images", self.max_images as u64, 1, 10_000),
            ("--max-steps", self.max_steps as u64, 1, 100_000),
            ("--max-body", self.max_body as u64, 1, 1 << 32),
            ("--max-connections", self.max_connections as u64, 1, 1_000_000),
            ("--max-jobs", self.max_jobs as u64, 1, 1_000_000),
            ("--max-rows", self.batches.max_rows as u64, 1, 1_000_000),
            ("--max-queue", self.batches.max_queue.unwrap_or_default(), 0, 1_000_000_000_000),
        ] {
            if !(least..=most).contains(&value) {
                return Err(Usage(format!("{name} must be from {least} to {most}, got {value}")).into());
            }
        }
        let addresses = self.addresses()?;
        let keys = self.keys()?;
        if keys.is_empty() && addresses.iter().any(|address| !address.ip().is_loopback()) && !self.insecure {
            return Err(Usage(format!(
                "other machines reach {}: give --api-key-file or {KEYS_VARIABLE}, or say --insecure",
                self.host
            ))
            .into());
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if self.machine.threads == 0 { cores } else { self.machine.threads };
        let execution = Execution { threads, ..self.execution(places)? };
        Ok(ServeOptions {
            addresses,
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
                keep_alive: Duration::from_secs_f64(self.keep_alive),
                write_time: Duration::from_secs_f64(self.write_timeout),
                ignore_unused: self.ignore_unused_options,
                origins: self.cors_origins.clone(),
                ..Limits::default()
            },
            keys,
            drain_delay: Duration::from_secs_f64(self.drain_delay),
            drain_timeout: Duration::from_secs_f64(self.drain_timeout),
        })
    }

    /// What `--host` and `--port` mean; of a name all addresses, those of IPv4 first.
    fn addresses(&self) -> anyhow::Result<Vec<SocketAddr>> {
        let bare = self.host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&self.host);
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let none = |why: &str| {
            Usage(format!(
                "--host {}: {why}; expected an address such as 127.0.0.1 or ::1, or a name for one, without a port",
                self.host
            ))
        };
        let mut found: Vec<SocketAddr> =
            (bare, self.port).to_socket_addrs().map_err(|error| none(&error.to_string()))?.collect();
        found.sort_by_key(SocketAddr::is_ipv6);
        found.dedup();
        if found.is_empty() { Err(none("it has no address").into()) } else { Ok(found) }
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

    /// What is served under which names. Engines are opened, checkpoints are not read yet.
    fn places(&self) -> anyhow::Result<Vec<(String, Place)>> {
        let name_of = |path: &Path| {
            let full = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
            full.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned())
        };
        let engine = |path: &Path, checkpoint: Option<&Path>| -> anyhow::Result<Place> {
            // For checkpoints beside it, the choice of weights has a meaning.
            let which = self.weights.filter(|_| checkpoint.is_some() || self.models.is_empty());
            Ok(Place::Engine(Arc::new(weights::open_engine(path, checkpoint, which)?)))
        };
        let mut all = Vec::new();
        match (&self.engine, &self.checkpoint) {
            (Some(path), checkpoint) => all.push((name_of(path), engine(path, checkpoint.as_deref())?)),
            (None, Some(path)) => all.push((name_of(path), Place::Checkpoint(path.clone()))),
            (None, None) => {}
        }
        for (name, path) in &self.models {
            let place =
                if BuiltEngine::is_at(path) { engine(path, None)? } else { Place::Checkpoint(path.clone()) };
            if all.iter().any(|(known, _)| known == name) {
                let text = format!("two models are called `{name}`: name them with --model NAME=DIR");
                return Err(Usage(text).into());
            }
            all.push((name.clone(), place));
        }
        if all.is_empty() {
            return Err(Usage("give --checkpoint, --engine or --model".into()).into());
        }
        Ok(all)
    }

    /// How all models are computed: as the engines are built for, which must agree.
    fn execution(&self, places: &[(String, Place)]) -> anyhow::Result<Execution> {
        let mut known: Option<Execution> = None;
        for (_, place) in places {
            let Place::Engine(engine) = place else { continue };
            if let Some(asked) = self.cfg_channels {
                engine.check_guided(asked)?;
            }
            known = Some(match &known {
                None => self.target.execution_of(engine, self.machine)?,
                Some(first) => {
                    engine.execution(Some(&first.provider), Some(first.precision), first.threads)?
                }
            });
        }
        known.map_or_else(|| self.target.execution(self.machine), Ok)
    }

    fn sources(&self, places: Vec<(String, Place)>) -> anyhow::Result<Vec<Source>> {
        let source = |(name, place): (String, Place)| match place {
            Place::Engine(engine) => Ok(Source {
                name,
                model: engine.model().clone(),
                guided: engine.guided(),
                file: engine.weights_file(),
                sha256: engine.weights_sha256().unwrap_or_default().to_owned(),
                origin: Origin::Engine(engine),
            }),
            Place::Checkpoint(path) => {
                let loaded = weights::open(&path, self.weights.unwrap_or(Which::Ema))?;
                let guided = self.cfg_channels.unwrap_or(Guidance::usual(loaded.model.objective));
                let sha256 = sha256_file(&loaded.file)?;
                let weights::Loaded { model, parameters, file } = loaded;
                Ok(Source { name, model, origin: Origin::Parameters(parameters), guided, file, sha256 })
            }
        };
        places.into_iter().map(source).collect()
    }
}

/// Where a model is.
enum Place {
    Checkpoint(PathBuf),
    Engine(Arc<BuiltEngine>),
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

/// Reads an origin as browsers write it.
fn origin(text: &str) -> Result<HeaderValue, String> {
    const EXPECTED: &str = "expected SCHEME://HOST or SCHEME://HOST:PORT, without a path, or *";
    if text == "*" {
        return Ok(HeaderValue::from_static("*"));
    }
    let uri: Uri = text.parse().map_err(|_| EXPECTED)?;
    let (scheme, authority) = uri.scheme_str().zip(uri.authority()).ok_or(EXPECTED)?;
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() || authority.as_str().contains('@') {
        return Err(EXPECTED.into());
    }
    let usual = matches!((scheme, authority.port_u16()), ("http", Some(80)) | ("https", Some(443)));
    let place = if usual { authority.host() } else { authority.as_str() };
    HeaderValue::try_from(format!("{scheme}://{place}").to_lowercase()).map_err(|_| EXPECTED.into())
}

/// Reads a time in seconds.
pub(super) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(s) if (0.0..=86_400.0).contains(&s) => Ok(s),
        _ => Err("expected seconds from 0 to 86400".into()),
    }
}
