//! Solvers of the linear flow `x_s = (1 − s)·x_0 + s·e`: noise at `s = 1`, data at `s = 0`.
//!
//! The model gives the velocity `v = e − x_0` and sees `t = 1000·s`; the data prediction is `x̂_0 = x − s·v`.

use super::{SolverStep, Update};

/// The model's timestep at pure noise.
const TIME_SCALE: f64 = 1000.0;

/// Where the stochastic solver stops adding noise and steps to the data at once.
const SDE_LAST_STEP: f64 = 0.04;

/// The times from 1 to 0 in `steps` intervals, shifted towards noise by `s' = k·s / (1 + (k − 1)·s)`.
/// The divisor is taken as `(1 − s) + k·s`, which keeps 1 at 1 for every `k`.
///
/// # Source
/// Esser et al. 2024 (Stable Diffusion 3), equation 23.
pub(super) fn grid(steps: usize, shift: f64) -> Vec<f64> {
    (0..=steps).map(|i| 1.0 - i as f64 / steps as f64).map(|s| shift * s / ((1.0 - s) + shift * s)).collect()
}

/// The times of the stochastic solver: `steps` of them from 1 to 0.04, then 0.
pub(super) fn sde_grid(steps: usize) -> Vec<f64> {
    (0..steps)
        .map(|i| 1.0 + (SDE_LAST_STEP - 1.0) * i as f64 / (steps - 1) as f64)
        .chain(std::iter::once(0.0))
        .collect()
}

/// `x_next = x + ds·v`, with `ds < 0`.
pub(super) fn euler(grid: &[f64]) -> Vec<SolverStep> {
    grid.windows(2).map(|pair| euler_step(pair[0], pair[1] - pair[0])).collect()
}

/// Two calls a step: the predictor is an Euler step that hands on `x + ½·ds·v`, the corrector adds
/// `½·ds·v(x_pred, s + ds)` to it. The last step is the predictor alone, for the data end needs no evaluation.
pub(super) fn heun(grid: &[f64]) -> Vec<SolverStep> {
    let mut steps = Vec::with_capacity(2 * grid.len());
    for pair in grid.windows(2) {
        let (s, next) = (pair[0], pair[1]);
        let ds = next - s;
        if next == 0.0 {
            steps.push(euler_step(s, ds));
            continue;
        }
        steps.push(
            Update { x0: (1.0, -s), next: (1.0, ds, 0.0), history: (1.0, 0.5 * ds), ..Update::default() }
                .at(TIME_SCALE * s),
        );
        steps.push(
            Update { x0: (1.0, -next), next: (0.0, 0.5 * ds, 1.0), ..Update::default() }
                .at(TIME_SCALE * next),
        );
    }
    steps
}

/// `x_next = x + ds·(v − ½·g²·score) + g·√|ds|·z` with `g² = 2s` and `score = −(x + (1 − s)·v)/s`, so the drift is
/// `v + x + (1 − s)·v = x + (2 − s)·v`. The last step adds no noise.
///
/// # Source
/// Ma et al. 2024 (SiT), the reverse-time equation, in the direction and with the diffusion `g² = 2s` of Yu et al.
/// 2025 (REPA).
pub(super) fn euler_maruyama(grid: &[f64]) -> Vec<SolverStep> {
    grid.windows(2)
        .map(|pair| {
            let (s, ds) = (pair[0], pair[1] - pair[0]);
            let noise = if pair[1] == 0.0 { 0.0 } else { (2.0 * s * ds.abs()).sqrt() };
            Update {
                x0: (1.0, -s),
                next: (1.0 + ds, ds * (2.0 - s), 0.0),
                noise: (noise, 0.0),
                ..Update::default()
            }
            .at(TIME_SCALE * s)
        })
        .collect()
}

fn euler_step(s: f64, ds: f64) -> SolverStep {
    Update { x0: (1.0, -s), next: (1.0, ds, 0.0), ..Update::default() }.at(TIME_SCALE * s)
}
