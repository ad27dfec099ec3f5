//! What is asked, and when.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use train_engine::random::{Purpose, Stream};

use super::client::{Answer, Client};
use crate::Usage;

/// Most requests at a time: each is a connection.
pub(super) const MOST_WORKERS: usize = 50_000;
/// Most requests of a run.
const MOST_REQUESTS: usize = 10_000_000;
/// Most steps, and most images, of a request: beyond all that a server takes, and their product is a number.
const MOST: u64 = 1_000_000;

/// When requests are sent.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Arrivals {
    /// At random times, whatever the answers are.
    Poisson {
        /// Requests a second.
        rate: f64,
        /// How long.
        seconds: f64,
    },
    /// By workers that wait for each answer.
    Closed {
        /// Requests at a time.
        workers: usize,
        /// Requests.
        requests: usize,
    },
}

impl Arrivals {
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let (good, expected) = match self {
            Self::Poisson { rate, seconds } => {
                let count = rate * seconds;
                let good = *rate > 0.0 && *seconds > 0.0 && count <= MOST_REQUESTS as f64;
                (
                    good,
                    format!(
                        "--rate and --duration must be above 0 and make at most {MOST_REQUESTS} requests"
                    ),
                )
            }
            Self::Closed { workers, requests } => {
                let good = (1..=MOST_WORKERS).contains(workers) && (1..=MOST_REQUESTS).contains(requests);
                let text = format!(
                    "--concurrency must be from 1 to {MOST_WORKERS} and --requests from 1 to {MOST_REQUESTS}"
                );
                (good, text)
            }
        };
        if good { Ok(()) } else { Err(Usage(expected).into()) }
    }
}

/// Requests that are drawn at random; the same seed gives the same ones.
#[derive(Debug)]
pub(super) struct Mix {
    steps: Vec<u64>,
    cfg: Vec<f64>,
    images: Vec<u64>,
    model: Option<String>,
    seed: u64,
}

/// One request of the mix.
#[derive(Debug)]
pub(super) struct Asked {
    body: Value,
    images: u64,
    /// Steps of all rows.
    work: u64,
}

/// What came of a request.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) answer: Answer,
    pub(super) images: u64,
    pub(super) work: u64,
}

impl Mix {
    pub(super) fn new(
        steps: &[u64],
        cfg: &[f64],
        images: &[u64],
        model: Option<String>,
        seed: u64,
    ) -> anyhow::Result<Self> {
        if steps.is_empty() || cfg.is_empty() || images.is_empty() {
            return Err(Usage("--steps, --cfg and --images need at least one value".into()).into());
        }
        if let Some(wrong) = steps.iter().chain(images).find(|n| !(1..=MOST).contains(*n)) {
            return Err(Usage(format!("--steps and --images must be from 1 to {MOST}, got {wrong}")).into());
        }
        Ok(Self { steps: steps.to_vec(), cfg: cfg.to_vec(), images: images.to_vec(), model, seed })
    }

    fn request(&self, number: u64) -> Asked {
        let mut draws = Stream::new(self.seed, Purpose::SampleLabel, 0, number);
        let mut pick = |count: usize| draws.below(count as u64) as usize;
        let steps = self.steps[pick(self.steps.len())];
        let cfg = self.cfg[pick(self.cfg.len())];
        let images = self.images[pick(self.images.len())];
        let mut body = json!({
            "class_label": 0, "seed": number, "steps": steps, "guidance_scale": cfg, "n": images,
        });
        if let Some(model) = &self.model {
            body["model"] = json!(model);
        }
        Asked { body, images, work: steps * images * if cfg == 1.0 { 1 } else { 2 } }
    }
}

async fn ask(client: &Client, asked: Asked) -> Outcome {
    let answer = client.generate(&asked.body).await;
    Outcome { answer, images: asked.images, work: asked.work }
}

/// All outcomes, and the seconds from the first request to the last answer.
pub(super) async fn run(client: &Client, mix: &Mix, arrivals: &Arrivals, seed: u64) -> (Vec<Outcome>, f64) {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    match arrivals {
        Arrivals::Poisson { rate, seconds } => {
            let mut draws = Stream::new(seed, Purpose::Timestep, 0, 0);
            let (mut at, mut number) = (0.0, 0);
            loop {
                at += -(1.0 - draws.uniform_f64()).max(f64::MIN_POSITIVE).ln() / rate;
                if at >= *seconds {
                    break;
                }
                tokio::time::sleep_until((start + Duration::from_secs_f64(at)).into()).await;
                let (client, asked) = (client.clone(), mix.request(number));
                tasks.spawn(async move { vec![ask(&client, asked).await] });
                number += 1;
            }
        }
        Arrivals::Closed { workers, requests } => {
            for worker in 0..*workers {
                let client = client.clone();
                let asked: Vec<Asked> =
                    (worker..*requests).step_by(*workers).map(|i| mix.request(i as u64)).collect();
                tasks.spawn(async move {
                    let mut outcomes = Vec::new();
                    for asked in asked {
                        outcomes.push(ask(&client, asked).await);
                    }
                    outcomes
                });
            }
        }
    }
    let mut outcomes = Vec::new();
    while let Some(done) = tasks.join_next().await {
        // A task that panicked has no outcome; the report then counts fewer requests than were sent.
        outcomes.extend(done.unwrap_or_default());
    }
    (outcomes, start.elapsed().as_secs_f64())
}
