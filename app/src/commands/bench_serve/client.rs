//! The client of the load generator.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, header};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// Talks to one server over connections that are kept.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pool: Pool<HttpConnector, Full<Bytes>>,
    url: String,
    key: Option<String>,
    limit: Duration,
}

/// How a request was answered.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// HTTP status; none when the request was lost.
    pub(super) status: Option<u16>,
    /// From the first byte sent to the last received.
    pub(super) took: Duration,
    /// Whether a refusal said when to come again.
    pub(super) retry_after: bool,
}

impl Client {
    pub(super) fn new(url: &str, key: Option<&str>, timeout: f64) -> anyhow::Result<Self> {
        let limit = Duration::try_from_secs_f64(timeout).context("--timeout")?;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let pool = Pool::builder(TokioExecutor::new()).build(connector);
        Ok(Self { pool, url: url.trim_end_matches('/').to_owned(), key: key.map(ToOwned::to_owned), limit })
    }

    fn request(&self, method: Method, path: &str, body: String) -> anyhow::Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        request.body(Full::from(body)).context("--url")
    }

    /// The server's counters without labels, and the sums over the labels of the others.
    pub(super) async fn metrics(&self) -> anyhow::Result<BTreeMap<String, f64>> {
        let request = self.request(Method::GET, "/metrics", String::new())?;
        let answer = tokio::time::timeout(self.limit, self.pool.request(request)).await??;
        let text = answer.into_body().collect().await?.to_bytes();
        let mut sums = BTreeMap::new();
        for line in String::from_utf8_lossy(&text).lines().filter(|l| !l.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap_or((line, "0"));
            let name = name.split('{').next().unwrap_or(name);
            *sums.entry(name.to_owned()).or_default() += value.parse::<f64>().unwrap_or(0.0);
        }
        Ok(sums)
    }

    /// Asks for images and reads the whole answer.
    pub(super) async fn generate(&self, body: &Value) -> Answer {
        let start = Instant::now();
        let exchange = async {
            let request = self.request(Method::POST, "/v1/images/generations", body.to_string())?;
            let answer = self.pool.request(request).await?;
            let status = answer.status().as_u16();
            let retry_after = answer.headers().contains_key(header::RETRY_AFTER);
            answer.into_body().collect().await?;
            anyhow::Ok((status, retry_after))
        };
        let outcome = tokio::time::timeout(self.limit, exchange).await;
        let took = start.elapsed();
        match outcome {
            Ok(Ok((status, retry_after))) => Answer { status: Some(status), took, retry_after },
            _ => Answer { status: None, took, retry_after: false },
        }
    }
}
