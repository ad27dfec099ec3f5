//! How much work is accepted: what fits into a batch, and a queue that is bounded in image-steps; with the time until
//! there is room, from the measured rate and from what others were told before.

use std::time::{Duration, Instant};

use super::order::Refusal;

/// A rate is measured over at least this long.
const WINDOW: Duration = Duration::from_millis(500);
/// Weight of a new window in the rate.
const NEWER: f64 = 0.4;
/// No client is told to come back sooner: `Retry-After` has whole seconds, and a finer wait stays within a few times of it.
const SOONEST: Duration = Duration::from_millis(250);
/// No client is told to stay away longer.
const LATEST: Duration = Duration::from_hours(1);
/// So much time is kept for clients that were sent away. They may not come back, and others shall not wait for that.
const KEPT: Duration = Duration::from_secs(20);

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
    /// When there is room for those who were sent away and will come back.
    promised: Option<Instant>,
}

impl Backlog {
    /// `rate` is what the step-time curve promises.
    pub(super) fn new(limit: u64, rate: f64, slots: u64) -> Self {
        Self { limit, waiting: 0, slots, rows: 0, rate, window: None, promised: None }
    }

    /// Accepts work, or says when it would fit. What finds its rows free in the largest batch waits for nobody, and an
    /// idle engine takes anything.
    pub(super) fn accept(&mut self, work: u64, rows: u64, now: Instant) -> Result<(), Refusal> {
        let Self { limit, waiting, .. } = *self;
        if waiting > 0 && waiting.saturating_add(work) > limit && self.rows + rows > self.slots {
            return Err(Refusal::Full { waiting, work, limit, retry_after: self.promise(work, now) });
        }
        self.waiting += work;
        self.rows += rows;
        Ok(())
    }

    /// Keeps a turn for work that does not fit: one after the other, so that those who were sent away do not all come
    /// back for the same room.
    fn promise(&mut self, work: u64, now: Instant) -> Duration {
        let time = |work: u64| {
            let seconds = work as f64 / self.rate.max(f64::MIN_POSITIVE);
            Duration::try_from_secs_f64(seconds).unwrap_or(LATEST).min(LATEST)
        };
        // What is larger than the limit fits once nothing waits.
        let excess = self.waiting.saturating_add(work).saturating_sub(self.limit).min(self.waiting);
        let room = now + time(excess);
        let turn = self.promised.map_or(room, |promised| promised.clamp(room, room.max(now + KEPT)));
        self.promised = Some(turn + time(work));
        (turn - now).clamp(SOONEST, LATEST)
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

    fn accept(backlog: &mut Backlog, work: u64, rows: u64) -> Result<(), Refusal> {
        backlog.accept(work, rows, Instant::now())
    }

    fn retry(refused: Result<(), Refusal>) -> Duration {
        match refused {
            Err(Refusal::Full { retry_after, .. }) => retry_after,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_limit_holds_and_the_wait_follows_the_rate() {
        let mut backlog = Backlog::new(1000, 100.0, 10);
        accept(&mut backlog, 600, 6).unwrap();
        accept(&mut backlog, 400, 4).unwrap();
        let now = Instant::now();
        assert_eq!(retry(backlog.accept(200, 2, now)), Duration::from_secs(2));
        assert_eq!(backlog.waiting(), 1000);
        // The next one's turn is when the first has had its own; a small one does not jump the queue.
        assert_eq!(retry(backlog.accept(200, 2, now)), Duration::from_secs(4));
        assert_eq!(retry(backlog.accept(10, 2, now)), Duration::from_secs(6));
        // Turns pass, whoever comes …
        assert_eq!(retry(backlog.accept(200, 2, now + Duration::from_secs(10))), Duration::from_secs(2));
        // … and no more of them are kept than would be reasonable to wait for.
        for _ in 0..100 {
            let wait = retry(backlog.accept(500, 2, now + Duration::from_secs(20)));
            assert!(wait <= KEPT, "{wait:?}");
        }
        backlog.release(200, 0);
        accept(&mut backlog, 200, 2).unwrap();
    }

    #[test]
    fn obedient_clients_are_served_within_a_few_repeats() {
        // Thirty orders of a tenth of a second each, every hundredth of a second; a quarter of a second fits. The engine
        // keeps the promised rate, or half of it; clients come when they are told, or at the next whole second.
        for (slower, whole_seconds) in [(1.0, false), (1.0, true), (2.0, false), (2.0, true)] {
            let start = Instant::now();
            let mut backlog = Backlog::new(250, 1000.0, 1);
            let mut coming: Vec<(f64, u32)> = (0..30).map(|i| (f64::from(i) / 100.0, 0)).collect();
            let (mut clock, mut left, mut served) = (0.0, 0.0, 0);
            while let Some(next) = (0..coming.len()).min_by(|a, b| coming[*a].0.total_cmp(&coming[*b].0)) {
                let (at, tries) = coming.swap_remove(next);
                // The engine works until then.
                let made = (((at - clock) * 1000.0 / slower).max(0.0) + left).min(backlog.waiting() as f64);
                backlog.release(made as u64, 0);
                (clock, left) = (at, made.fract());
                match backlog.accept(100, 1, start + Duration::from_secs_f64(at)) {
                    Ok(()) => served += 1,
                    Err(Refusal::Full { retry_after, .. }) if tries < 5 => {
                        let wait = retry_after.as_secs_f64();
                        coming.push((at + if whole_seconds { wait.ceil() } else { wait }, tries + 1));
                    }
                    Err(_) => {}
                }
            }
            assert!(served >= 28, "{served} of 30 at 1/{slower} of the rate, whole seconds: {whole_seconds}");
        }
    }

    #[test]
    fn free_rows_of_a_batch_are_given_away_whatever_waits() {
        // Long orders: one alone is the whole queue, and the batch has eight rows.
        let mut backlog = Backlog::new(100, 10.0, 8);
        for _ in 0..4 {
            accept(&mut backlog, 500, 2).unwrap();
        }
        assert_eq!(backlog.fill(), 1.0);
        let now = Instant::now();
        assert_eq!(retry(backlog.accept(500, 2, now)), Duration::from_secs(200));
        backlog.release(500, 2);
        assert_eq!(backlog.fill(), 0.75);
        accept(&mut backlog, 500, 2).unwrap();
    }

    #[test]
    fn an_empty_queue_takes_more_than_the_limit() {
        let mut backlog = Backlog::new(100, 10.0, 1);
        accept(&mut backlog, 500, 2).unwrap();
        // The larger one waits until nothing else does.
        let now = Instant::now();
        assert_eq!(retry(backlog.accept(5000, 1, now)), Duration::from_secs(50));
    }

    #[test]
    fn the_rate_is_that_of_the_saturated_engine() {
        let mut backlog = Backlog::new(1_000_000, 100.0, 50);
        accept(&mut backlog, 100_000, 60).unwrap();
        let start = Instant::now();
        for i in 0..=400 {
            backlog.done(10, start + Duration::from_millis(20 * i));
        }
        assert!((backlog.rate() - 500.0).abs() < 5.0, "{}", backlog.rate());
        // With little to do, the engine is slow because nobody asks.
        let mut idle = Backlog::new(1000, 100.0, 50);
        for i in 0..100 {
            accept(&mut idle, 1, 1).unwrap();
            idle.done(1, start + Duration::from_millis(500 * i));
        }
        assert_eq!(idle.rate(), 100.0);
    }
}
