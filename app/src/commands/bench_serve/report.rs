//! What a load run comes to.

use std::collections::BTreeMap;

use serde::Serialize;

use super::load::{Arrivals, Outcome};

/// Figures of one run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    arrivals: Arrivals,
    requests: usize,
    /// Answered with images.
    done: usize,
    /// Refused with 429, and how many of them said when to come again.
    refused: usize,
    refused_with_retry_after: usize,
    /// Refused with 503.
    unavailable: usize,
    /// Any other answer.
    failed: usize,
    /// Not answered at all.
    lost: usize,
    seconds: f64,
    requests_per_s: f64,
    images_per_s: f64,
    /// Steps of rows of requests that were answered with images.
    image_steps_per_s: f64,
    /// Latency of those, in milliseconds.
    p50_ms: f64,
    p90_ms: f64,
    p99_ms: f64,
    /// Rows that belonged to an image, of all rows that were computed.
    slot_use: f64,
    /// Mean rows of a batch.
    mean_rows: f64,
    memory_mb: (f64, f64),
}

impl Report {
    pub(super) const HEAD: &str = "load                 sent   done    429    503 failed lost  images/s  steps/s  \
         p50 ms  p90 ms  p99 ms  slot use  rows";

    pub(super) fn new(
        arrivals: &Arrivals,
        (outcomes, seconds): &(Vec<Outcome>, f64),
        before: &BTreeMap<String, f64>,
        after: &BTreeMap<String, f64>,
    ) -> Self {
        let count = |want: Option<u16>| outcomes.iter().filter(|o| o.answer.status == want).count();
        let good = || outcomes.iter().filter(|o| o.answer.status == Some(200));
        let mut times: Vec<f64> = good().map(|o| o.answer.took.as_secs_f64() * 1e3).collect();
        times.sort_by(f64::total_cmp);
        let (done, refused, unavailable, lost) =
            (count(Some(200)), count(Some(429)), count(Some(503)), count(None));
        let grown = |name: &str| {
            let value = |m: &BTreeMap<String, f64>| m.get(name).copied().unwrap_or_default();
            value(after) - value(before)
        };
        let memory =
            |m: &BTreeMap<String, f64>| m.get("mudit_resident_memory_bytes").map_or(0.0, |b| b / 1e6);
        Self {
            arrivals: arrivals.clone(),
            requests: outcomes.len(),
            done,
            refused,
            refused_with_retry_after: outcomes.iter().filter(|o| o.answer.retry_after).count(),
            unavailable,
            failed: outcomes.len() - done - refused - unavailable - lost,
            lost,
            seconds: *seconds,
            requests_per_s: done as f64 / seconds,
            images_per_s: good().map(|o| o.images).sum::<u64>() as f64 / seconds,
            image_steps_per_s: good().map(|o| o.work).sum::<u64>() as f64 / seconds,
            p50_ms: quantile(&times, 0.5),
            p90_ms: quantile(&times, 0.9),
            p99_ms: quantile(&times, 0.99),
            slot_use: grown("mudit_rows_used_total") / grown("mudit_rows_run_total").max(1.0),
            mean_rows: grown("mudit_rows_used_total") / grown("mudit_steps_total").max(1.0),
            memory_mb: (memory(before), memory(after)),
        }
    }

    /// The figures under [`Report::HEAD`].
    pub(super) fn line(&self) -> String {
        let load = match self.arrivals {
            Arrivals::Poisson { rate, seconds } => format!("{rate}/s for {seconds} s"),
            Arrivals::Closed { workers, .. } => format!("{workers} at a time"),
        };
        format!(
            "{load:<18} {:>6} {:>6} {:>6} {:>6} {:>6} {:>4} {:>9.2} {:>8.0} {:>7.0} {:>7.0} {:>7.0} {:>8.1}% {:>5.1}",
            self.requests,
            self.done,
            self.refused,
            self.unavailable,
            self.failed,
            self.lost,
            self.images_per_s,
            self.image_steps_per_s,
            self.p50_ms,
            self.p90_ms,
            self.p99_ms,
            self.slot_use * 100.0,
            self.mean_rows
        )
    }
}

/// The smallest of the sorted values that is not below the share `q` of them; 0 of none.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([0.5, 0.9, 0.99, 1.0].map(|q| quantile(&values, q)), [50.0, 90.0, 99.0, 100.0]);
        assert_eq!((quantile(&[7.0], 0.5), quantile(&[], 0.5)), (7.0, 0.0));
    }
}
