//! What the batcher counts; read as a whole by whoever publishes it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// Upper bounds of the histograms' buckets, in seconds.
pub const BOUNDS: [f64; 16] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Times by size.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    /// How many fell below each bound and not below the one before; the last entry is for the rest.
    pub counts: [u64; BOUNDS.len() + 1],
    /// Sum in seconds.
    pub sum: f64,
}

impl Histogram {
    /// Notes one time.
    pub fn note(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts[BOUNDS.iter().position(|b| seconds <= *b).unwrap_or(BOUNDS.len())] += 1;
        self.sum += seconds;
    }

    /// How many were noted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Steps or orders, and their time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// How many.
    pub count: u64,
    /// Seconds that they took.
    pub seconds: f64,
}

impl Times {
    /// Notes one more.
    pub fn note(&mut self, time: Duration) {
        self.count += 1;
        self.seconds += time.as_secs_f64();
    }
}

/// Orders of one model since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Orders {
    /// Those that got all images, from acceptance to the end.
    pub finished: Times,
    /// Those that failed, from acceptance to the end.
    pub failed: Times,
    /// Those whose first step was made, from acceptance to it.
    pub queued: Times,
    /// Finished images.
    pub images: u64,
    /// When an image was finished last.
    pub last: Option<SystemTime>,
}

/// Counters since the start, and what is there now.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Steps by model and rows of the batch.
    pub steps: BTreeMap<(usize, usize), Times>,
    /// Orders by model.
    pub orders: BTreeMap<usize, Orders>,
    /// Rows that belonged to an image; a guided one has two.
    pub rows_used: u64,
    /// Rows of all batches.
    pub rows_run: u64,
    /// Finished images.
    pub images: u64,
    /// Finished orders.
    pub finished: u64,
    /// Failed orders by reason.
    pub failed: BTreeMap<&'static str, u64>,
    /// Refused orders by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Faults of the engine.
    pub faults: u64,
    /// How often the engine was started anew after a fault.
    pub restarts: u64,
    /// Time between an order's acceptance and its first step.
    pub queued: Histogram,
    /// Time between an order's acceptance and its end.
    pub total: Histogram,
}

/// What is there at a moment, of one model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Image-steps that are accepted and not done.
    pub waiting: u64,
    /// Most image-steps that are accepted.
    pub limit: u64,
    /// Measured image-steps a second with full batches.
    pub rate: f64,
    /// How near the next refusal is; from 1 on, orders are refused.
    pub fill: f64,
}
