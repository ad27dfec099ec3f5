//! How much work is accepted: what fits into a batch, and a queue that is bounded in image-steps; with the time until
//! there is room from the measured rate.

use std::time::{Duration, Instant};

use super::order::Refusal;

/// A rate is measured over at least this long.
const WINDOW: Duration = Duration::from_millis(500);
/// Weight of a new window in the rate.
const NEWER: f64 = 0.4;
/// No client is told to come back sooner.
const SOONEST: Duration = Duration::from_millis(50);
/// No client is told to stay away longer.
const LATEST: Duration = Duration::from_hours(1);

/// Accepted work of one model.
#[derive(Debug)]
pub(super) struct Backlog {
    limit: u64,
    /// Image-steps that are accepted and not done.
    waiting: u64,
    /// Rows of the largest batch.
    slots: u64,
    /// Rows of images that are not done.
    rows: u64,
    /// Image-steps a second while there is work for full batches.
    rate: f64,
    window: Option<(Instant, u64)>,
}

impl Backlog {
    /// `rate` is what the step-time curve promises.
    pub(super) fn new(limit: u64, rate: f64, slots: u64) -> Self {
        Self { limit, waiting: 0, slots, rows: 0, rate, window: None }
    }

    /// Accepts work, or says when it would fit. What finds its rows free in the largest batch waits for nobody, and an
    /// idle engine takes anything.
    pub(super) fn accept(&mut self, work: u64, rows: u64) -> Result<(), Refusal> {
        let Self { limit, waiting, rate, .. } = *self;
        if waiting > 0 && waiting + work > limit && self.rows + rows > self.slots {
            // What is larger than the limit fits once nothing waits.
            let excess = (waiting + work - limit).min(waiting);
            let seconds = excess as f64 / rate.max(f64::MIN_POSITIVE);
            let retry_after = Duration::try_from_secs_f64(seconds).unwrap_or(LATEST).clamp(SOONEST, LATEST);
            return Err(Refusal::Full { waiting, work, limit, retry_after });
        }
        self.waiting += work;
        self.rows += rows;
        Ok(())
    }

    /// Takes back work that will not be done, and the rows of images that are done or given up.
    pub(super) fn release(&mut self, work: u64, rows: u64) {
        self.waiting = self.waiting.saturating_sub(work);
        self.rows = self.rows.saturating_sub(rows);
    }

    /// Notes work that was done.
    pub(super) fn done(&mut self, work: u64, now: Instant) {
        self.release(work, 0);
        if self.waiting < self.slots {
            self.window = None;
            return;
        }
        let (start, sum) = self.window.get_or_insert((now, 0));
        if *start == now {
            return;
        }
        *sum += work;
        let span = now.duration_since(*start);
        if span >= WINDOW {
            self.rate += NEWER * (*sum as f64 / span.as_secs_f64() - self.rate);
            self.window = Some((now, 0));
        }
    }

    pub(super) fn waiting(&self) -> u64 {
        self.waiting
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn rate(&self) -> f64 {
        self.rate
    }

    /// How near the next refusal is: 1 where both the rows of the largest batch and the queue are taken.
    pub(super) fn fill(&self) -> f64 {
        let share = |part: u64, whole: u64| part as f64 / (whole as f64).max(1.0);
        share(self.rows, self.slots).min(share(self.waiting, self.limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(refused: Result<(), Refusal>) -> Duration {
        match refused {
            Err(Refusal::Full { retry_after, .. }) => retry_after,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_limit_holds_and_the_wait_follows_the_rate() {
        let mut backlog = Backlog::new(1000, 100.0, 10);
        backlog.accept(600, 6).unwrap();
        backlog.accept(400, 4).unwrap();
        assert_eq!(retry(backlog.accept(200, 2)), Duration::from_secs(2));
        assert_eq!(backlog.waiting(), 1000);
        backlog.release(200, 0);
        backlog.accept(200, 2).unwrap();
    }

    #[test]
    fn free_rows_of_a_batch_are_given_away_whatever_waits() {
        // Long orders: one alone is the whole queue, and the batch has eight rows.
        let mut backlog = Backlog::new(100, 10.0, 8);
        for _ in 0..4 {
            backlog.accept(500, 2).unwrap();
        }
        assert_eq!(backlog.fill(), 1.0);
        assert_eq!(retry(backlog.accept(500, 2)), Duration::from_secs(200));
        backlog.release(500, 2);
        assert_eq!(backlog.fill(), 0.75);
        backlog.accept(500, 2).unwrap();
    }

    #[test]
    fn an_empty_queue_takes_more_than_the_limit() {
        let mut backlog = Backlog::new(100, 10.0, 1);
        backlog.accept(500, 2).unwrap();
        // The larger one waits until nothing else does.
        assert_eq!(retry(backlog.accept(5000, 1)), Duration::from_secs(50));
    }

    #[test]
    fn the_rate_is_that_of_the_saturated_engine() {
        let mut backlog = Backlog::new(1_000_000, 100.0, 50);
        backlog.accept(100_000, 60).unwrap();
        let start = Instant::now();
        for i in 0..=400 {
            backlog.done(10, start + Duration::from_millis(20 * i));
        }
        assert!((backlog.rate() - 500.0).abs() < 5.0, "{}", backlog.rate());
        // With little to do, the engine is slow because nobody asks.
        let mut idle = Backlog::new(1000, 100.0, 50);
        for i in 0..100 {
            idle.accept(1, 1).unwrap();
            idle.done(1, start + Duration::from_millis(500 * i));
        }
        assert_eq!(idle.rate(), 100.0);
    }
}
