//! The sampling server: step-level batching behind HTTP.
//!
//! | module | holds |
//! |---|---|
//! | [`batching`] | orders, fairness, the bounded queue, the thread that makes steps; knows no HTTP |
//! | [`engine`] | from checkpoints to a running batcher: programs, measured step times, the probe |
//! | [`model`] | a model that is served |
//! | [`http`] | who may ask what, and how the answer is written; knows no batches |
//! | `handles` | how many connections the system allows |
//! | [`picture`] | values to PNG |
//! | [`metrics`] | counters as Prometheus reads them |

pub mod batching;
pub mod engine;
mod handles;
pub mod http;
pub mod metrics;
pub mod model;
pub mod picture;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use runtime::Runtime;
use tokio::net::TcpListener;
use tokio::sync::watch;

use batching::Batcher;
use engine::EngineOptions;
use http::auth::Keys;
use http::{App, Limits};
use model::Source;

/// EAFNOSUPPORT: the kernel has no IPv6.
const NO_SUCH_FAMILY: i32 = 97;

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where to listen: one address or more, of which one can be had at least. The first one's port is that of all.
    pub addresses: Vec<SocketAddr>,
    /// How to compute.
    pub engine: EngineOptions,
    /// What clients may ask for.
    pub limits: Limits,
    /// Who may ask.
    pub keys: Keys,
    /// Requests are still taken for so long after the server was asked to end, while balancers notice.
    pub drain_delay: Duration,
    /// Accepted requests are finished for so long after that.
    pub drain_timeout: Duration,
}

/// A server that runs in threads of its own.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    app: Arc<App>,
    options: ServeOptions,
    ended: watch::Sender<bool>,
    tokio: tokio::runtime::Runtime,
    listening: tokio::task::JoinHandle<()>,
}

/// How a server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Whether all accepted requests were finished.
    pub complete: bool,
}

impl Server {
    /// Listens. The server answers from now on, but takes no requests before [`Server::load`].
    ///
    /// # Errors
    /// An address is taken, or none is this machine's.
    pub fn bind(sources: Vec<Source>, mut options: ServeOptions) -> anyhow::Result<Self> {
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("http")
            .enable_all()
            .build()
            .context("cannot start the threads of the server")?;
        let (address, listeners) = tokio.block_on(listeners(&options.addresses))?;
        options.limits.connections = handles::connections(options.limits.connections);
        let app = Arc::new(App {
            batcher: Batcher::new(),
            sources,
            reports: OnceLock::new(),
            limits: options.limits.clone(),
            execution: options.engine.execution.clone(),
            keys: options.keys.clone(),
            metrics: metrics::Metrics::default(),
            jobs: http::jobs(&options.limits),
            leaving: AtomicBool::new(false),
        });
        let (ended, end) = watch::channel(false);
        let router = http::router(&app);
        let limits = options.limits.clone();
        let grace = options.limits.write_time;
        let listening = tokio.spawn(http::listen(listeners, router, limits, end, grace));
        Ok(Self { address, app, options, ended, tokio, listening })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Loads the models and takes requests.
    ///
    /// # Errors
    /// A model does not load or run.
    pub fn load(&self, runtime: &Arc<Runtime>) -> anyhow::Result<()> {
        let reports = engine::start(&self.app.batcher, runtime, &self.app.sources, &self.options.engine)?;
        self.app.reports.set(reports).map_err(|_| anyhow::anyhow!("internal: the models were loaded twice"))
    }

    /// What is known of the models, once they are loaded.
    pub fn reports(&self) -> &[engine::ModelReport] {
        self.app.reports.get().map_or(&[], Vec::as_slice)
    }

    /// Ends: readiness goes, then no more requests are taken, those accepted are finished, the connections closed.
    pub fn drain(self) -> Drained {
        self.app.leaving.store(true, Ordering::Relaxed);
        std::thread::sleep(self.options.drain_delay);
        self.app.batcher.close();
        let complete = self.app.batcher.drained(self.options.drain_timeout);
        self.app.batcher.stop();
        // Nobody listens when the task is gone already.
        let _ = self.ended.send(true);
        let grace = self.options.limits.write_time + Duration::from_secs(1);
        let closing = async { tokio::time::timeout(grace, self.listening).await };
        let _ = self.tokio.block_on(closing);
        self.tokio.shutdown_timeout(Duration::from_secs(1));
        Drained { complete }
    }
}

/// Listens on all addresses that are this machine's; tells the first of them.
async fn listeners(addresses: &[SocketAddr]) -> anyhow::Result<(SocketAddr, Vec<TcpListener>)> {
    let (mut listeners, mut first) = (Vec::new(), None::<SocketAddr>);
    let mut refused = anyhow::anyhow!("no address to listen on");
    for address in addresses {
        let port = first.map_or(address.port(), |first| first.port());
        let address = SocketAddr::new(address.ip(), port);
        match TcpListener::bind(address).await {
            Ok(listener) => {
                first = first.or(listener.local_addr().ok());
                listeners.push(listener);
            }
            Err(error) => {
                // A name may have an address of a kind that this machine has not, such as ::1 without IPv6.
                let missing = matches!(error.kind(), ErrorKind::AddrNotAvailable | ErrorKind::Unsupported)
                    || error.raw_os_error() == Some(NO_SUCH_FAMILY);
                refused = anyhow::Error::new(error).context(format!("cannot listen on {address}"));
                if !missing {
                    return Err(refused);
                }
            }
        }
    }
    first.map(|first| (first, listeners)).ok_or(refused)
}
