//! What the batcher is asked for, and what it tells.

use std::sync::Arc;
use std::time::{Duration, Instant};

use models::SolverPlan;

/// Images that belong together: one plan, one guidance scale, one fate.
#[derive(Clone, Debug)]
pub struct Order {
    /// Which of the engine's models.
    pub model: usize,
    /// The images.
    pub samples: Vec<Sample>,
    /// The steps of each.
    pub plan: Arc<SolverPlan>,
    /// Scale of classifier-free guidance; 1 is none, and then an image takes one row of a batch instead of two.
    pub guidance: f32,
    /// Previews of each image on its way, evenly spaced.
    pub previews: usize,
    /// When the order is worth nothing any more.
    pub deadline: Option<Instant>,
}

/// One image of an order.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The class, or the model's null class.
    pub label: i64,
    /// Key of every random draw of this image.
    pub seed: u64,
    /// The starting point, where it is not drawn.
    pub start: Option<Vec<f32>>,
}

impl Order {
    /// Rows of a batch that each image takes.
    pub fn rows(&self) -> usize {
        if self.guidance == 1.0 { 1 } else { 2 }
    }

    /// All that is to be computed, in image-steps; a guided one counts two.
    pub fn work(&self) -> u64 {
        (self.samples.len() * self.plan.steps.len() * self.rows()) as u64
    }

    /// Rows of a batch that all images together take.
    pub(super) fn all_rows(&self) -> u64 {
        (self.samples.len() * self.rows()) as u64
    }

    /// Whether an image is shown after its `done`-th step; the last one is no preview.
    pub(super) fn previews_at(&self, done: usize) -> Option<usize> {
        let (steps, count) = (self.plan.steps.len(), self.previews);
        (1..=count).find(|k| done < steps && (steps * k).div_ceil(count + 1) == done).map(|k| k - 1)
    }
}

/// What happens to an order. Events of one image come in order; [`Event::Finished`] or [`Event::Failed`] is the last.
#[derive(Clone, Debug)]
pub enum Event {
    /// An image made a step.
    Step {
        /// The image.
        sample: usize,
        /// Steps it has made.
        done: usize,
    },
    /// What an image looks like so far: the predicted data.
    Preview {
        /// The image.
        sample: usize,
        /// Number of the preview, from 0.
        index: usize,
        /// Steps it has made.
        done: usize,
        /// Values (C, H, W).
        values: Vec<f32>,
    },
    /// An image is ready.
    Image {
        /// The image.
        sample: usize,
        /// Values (C, H, W).
        values: Vec<f32>,
    },
    /// All images are ready.
    Finished(Cost),
    /// The order came to nothing.
    Failed(Failure),
}

/// What an order took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Before its first step.
    pub queued: Duration,
    /// From its first step to its last.
    pub computed: Duration,
    /// Mean rows in use of the batches that it met.
    pub rows: f64,
}

/// Why an order failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// Whoever wanted it is gone.
    #[error("the request was cancelled")]
    Cancelled,
    /// Its deadline passed.
    #[error("the deadline passed before the images were ready")]
    Deadline,
    /// The program that computes steps failed; the engine starts anew.
    #[error("the engine failed and is being restarted: {0}")]
    Engine(String),
    /// The model gave values that are no numbers.
    #[error("image {0} is not finite: the model gave NaN or infinity")]
    NotFinite(usize),
    /// The server ends, and its time to drain is over.
    #[error("the server stopped before the images were ready")]
    Stopped,
}

/// Why an order was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Too much work waits already.
    #[error("{waiting} image-steps wait and {work} more do not fit into the limit of {limit}")]
    Full {
        /// Image-steps that are accepted and not done.
        waiting: u64,
        /// Image-steps of the order.
        work: u64,
        /// The limit.
        limit: u64,
        /// When it would fit, by the measured rate.
        retry_after: Duration,
    },
    /// The engine is not ready yet, or is being restarted.
    #[error("the engine is loading")]
    Loading,
    /// The server ends.
    #[error("the server is shutting down")]
    Draining,
}

impl Refusal {
    /// A word for counters.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Full { .. } => "full",
            Self::Loading => "loading",
            Self::Draining => "draining",
        }
    }
}

impl Failure {
    /// A word for counters.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
            Self::Engine(_) => "engine",
            Self::NotFinite(_) => "not_finite",
            Self::Stopped => "stopped",
        }
    }
}

/// Receives an order's events. It is called between steps, so it must not wait.
pub type Sink = Box<dyn Fn(Event) + Send + Sync>;
