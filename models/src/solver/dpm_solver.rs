//! DPM-Solver++(2M) on the discrete linear-beta schedule.

use super::{SolverStep, Update};
use crate::schedule::DdpmSchedule;

/// Below this many steps the last one is of first order.
const LOWER_ORDER_FINAL_BELOW: usize = 10;

/// `x_next = (σ_t/σ_s)·x − α_t·(e^{−h} − 1)·(D + (D − D_prev)/(2r))` with the data prediction
/// `D = (x − σ_s·ε)/α_s`, `λ = ln α − ln σ`, `h = λ_t − λ_s`, `r = h_prev/h`.
///
/// The first step has no `D_prev` and drops that term; so does the last when there are fewer than ten. The
/// history is `D`. Putting `D = a·x + b·ε` in, with `E = −α_t·(e^{−h} − 1)` and `w = 1/(2r)`:
/// `x_next = (σ_t/σ_s + E·(1 + w)·a)·x + E·(1 + w)·b·ε − E·w·history`.
///
/// Times are uniform from 1 to `1/T` in `steps` intervals, the model sees `(τ − 1/T)·T`, which is no integer in
/// general, and the sample returned is that of the cleanest timestep, where `ᾱ` is 0.9999.
///
/// # Source
/// Lu et al. 2022 (DPM-Solver++), algorithm 2.
pub(super) fn multistep_2m(schedule: &DdpmSchedule, steps: usize) -> Vec<SolverStep> {
    let last = (schedule.len() - 1) as f64;
    let nodes: Vec<Node> =
        (0..=steps).map(|k| Node::at(schedule, last * (1.0 - k as f64 / steps as f64))).collect();
    let mut previous_h = None;
    nodes
        .windows(2)
        .enumerate()
        .map(|(k, pair)| {
            let (s, t) = (&pair[0], &pair[1]);
            let h = t.lambda() - s.lambda();
            let lower_order = k + 1 == steps && steps < LOWER_ORDER_FINAL_BELOW;
            let w =
                previous_h.replace(h).filter(|_| !lower_order).map_or(0.0, |before: f64| 0.5 * h / before);
            let e = -t.alpha * (-h).exp_m1();
            let (a, b) = (1.0 / s.alpha, -s.sigma / s.alpha);
            Update {
                x0: (a, b),
                next: (t.sigma / s.sigma + e * (1.0 + w) * a, e * (1.0 + w) * b, -e * w),
                history: (a, b),
                ..Update::default()
            }
            .at(s.index)
        })
        .collect()
}

/// The schedule at one time, between its discrete steps where need be.
struct Node {
    /// `τ·T − 1`: the index into the schedule, and what the model sees.
    index: f64,
    alpha: f64,
    sigma: f64,
}

impl Node {
    /// `ln α` is linear between the discrete steps.
    fn at(schedule: &DdpmSchedule, index: f64) -> Self {
        let log_alpha = |i: usize| 0.5 * schedule.alphas_cumprod[i.min(schedule.len() - 1)].ln();
        let below = index.floor();
        let (low, high) = (log_alpha(below as usize), log_alpha(below as usize + 1));
        let log_alpha = low + (high - low) * (index - below);
        Self { index, alpha: log_alpha.exp(), sigma: (-(2.0 * log_alpha).exp_m1()).sqrt() }
    }

    fn lambda(&self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }
}
