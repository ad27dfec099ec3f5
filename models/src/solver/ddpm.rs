//! The two samplers that walk a respaced DDPM chain: ancestral and DDIM.
//!
//! Both predict the data as `x̂_0 = √(1/ᾱ)·x − √(1/ᾱ − 1)·ε`.

use super::{SolverStep, Update};
use crate::schedule::DdpmSchedule;

/// `x_next = μ̃(x̂_0, x) + [k ≠ 0]·exp(½·logvar)·z` with the posterior mean `μ̃ = A·x̂_0 + B·x`.
///
/// Putting `x̂_0` in: `x_next = (A·√(1/ᾱ) + B)·x − A·√(1/ᾱ − 1)·ε + …`.
///
/// The learned range is `logvar = f·max + (1 − f)·min` with `f = (v + 1)/2`, `max = ln β`, `min = ln β̃`, so
/// `½·logvar = ¼·(max + min) + ¼·(max − min)·v`. Without learned variance `logvar = min`.
///
/// # Source
/// Ho et al. 2020, equations 6 and 7; Nichol and Dhariwal 2021, equation 15.
pub(super) fn ancestral(schedule: &DdpmSchedule, learn_sigma: bool) -> Vec<SolverStep> {
    let update = |k: usize| {
        let (recip, recipm1) = data_prediction(schedule, k);
        let (a, b) = (schedule.posterior_mean_coef1[k], schedule.posterior_mean_coef2[k]);
        let (max, min) = (schedule.log_betas[k], schedule.posterior_log_variance_clipped[k]);
        let noise = match (k, learn_sigma) {
            (0, _) => (0.0, 0.0),
            (_, true) => ((0.25 * (max + min)).exp(), 0.25 * (max - min)),
            (_, false) => ((0.5 * min).exp(), 0.0),
        };
        Update { x0: (recip, -recipm1), next: (a * recip + b, -a * recipm1, 0.0), noise, ..Update::default() }
            .at(schedule.timesteps[k] as f64)
    };
    (0..schedule.len()).rev().map(update).collect()
}

/// `x_next = √ᾱ_prev·x̂_0 + √(1 − ᾱ_prev − σ²)·ε + [k ≠ 0]·σ·z` with
/// `σ = η·√((1 − ᾱ_prev)/(1 − ᾱ))·√(1 − ᾱ/ᾱ_prev)`.
///
/// # Source
/// Song, Meng and Ermon 2021, equations 12 and 16.
pub(super) fn ddim(schedule: &DdpmSchedule, eta: f64) -> Vec<SolverStep> {
    let update = |k: usize| {
        let (recip, recipm1) = data_prediction(schedule, k);
        let (ab, prev) = (schedule.alphas_cumprod[k], schedule.alphas_cumprod_prev[k]);
        let sigma = eta * ((1.0 - prev) / (1.0 - ab) * (1.0 - ab / prev)).sqrt();
        let direction = (1.0 - prev - sigma * sigma).max(0.0).sqrt();
        Update {
            x0: (recip, -recipm1),
            next: (prev.sqrt() * recip, direction - prev.sqrt() * recipm1, 0.0),
            noise: (if k == 0 { 0.0 } else { sigma }, 0.0),
            ..Update::default()
        }
        .at(schedule.timesteps[k] as f64)
    };
    (0..schedule.len()).rev().map(update).collect()
}

/// `√(1/ᾱ)` and `√(1/ᾱ − 1)` of step `k`.
fn data_prediction(schedule: &DdpmSchedule, k: usize) -> (f64, f64) {
    (schedule.sqrt_recip_alphas_cumprod[k], schedule.sqrt_recipm1_alphas_cumprod[k])
}
