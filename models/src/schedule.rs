//! The discrete noise schedule of DDPM: tables in `f64` over linear betas, and their respacing to fewer steps.
//!
//! `q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I)` with `ᾱ_t = Π_{s ≤ t} (1 − β_s)`, indices from 0 (almost clean) to
//! `T − 1` (almost noise).

use std::{collections::BTreeSet, fmt, str::FromStr};

use crate::error::ModelError;

/// The number of timesteps that DDPM models are trained on.
pub const TRAINING_STEPS: usize = 1000;

/// The shortest schedule whose last beta, `0.02 · 1000 / T`, stays below 1.
const LEAST_STEPS: usize = 21;

/// Which of the training timesteps a sampler visits.
///
/// Written as text: `"250"` spreads 250 steps evenly, `"10,20,30"` gives each third of the schedule its own count,
/// `"ddim50"` takes every twentieth step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spacing {
    /// The schedule is cut into as many near-equal sections as there are counts; each section keeps `count` steps,
    /// from its first to its last, at a fractional stride.
    Sections(Vec<usize>),
    /// The one integer stride from timestep 0 that keeps exactly this many steps.
    Ddim(usize),
}

impl Spacing {
    /// One section of `steps` steps.
    pub fn even(steps: usize) -> Self {
        Self::Sections(vec![steps])
    }

    /// The number of steps kept.
    pub fn count(&self) -> usize {
        match self {
            Self::Sections(counts) => counts.iter().fold(0, |sum: usize, n| sum.saturating_add(*n)),
            Self::Ddim(count) => *count,
        }
    }

    /// The kept timesteps of a schedule of `total`, ascending.
    ///
    /// # Errors
    /// [`ModelError::BadSpacing`] when fewer than 2 steps are kept, when a section is asked for more steps than it
    /// has, or when no integer stride gives the count.
    /// # Source
    /// Nichol and Dhariwal 2021, section 4; the fractional stride accumulates in `f64` and rounds half to even.
    pub fn timesteps(&self, total: usize) -> Result<Vec<usize>, ModelError> {
        let bad = |reason: String| ModelError::BadSpacing { spec: self.to_string(), reason };
        if self.count() < 2 {
            // A lone step would stand at timestep 0, where the model takes its input for almost clean.
            return Err(bad("at least 2 steps are needed".into()));
        }
        match self {
            Self::Ddim(count) => (1..total)
                .find(|stride| total.div_ceil(*stride) == *count)
                .map(|stride| (0..total).step_by(stride).collect())
                .ok_or_else(|| {
                    bad(format!(
                        "no integer stride over {total} timesteps keeps exactly {count}; a plain \"{count}\" uses a fractional one"
                    ))
                }),
            Self::Sections(counts) => {
                let (share, extra) = (total / counts.len(), total % counts.len());
                let mut kept = BTreeSet::new();
                let mut start = 0;
                for (section, &count) in counts.iter().enumerate() {
                    let size = share + usize::from(section < extra);
                    if count > size {
                        return Err(bad(format!(
                            "section {section} has {size} timesteps, {count} were asked for"
                        )));
                    }
                    let stride = if count > 1 { (size - 1) as f64 / (count - 1) as f64 } else { 1.0 };
                    let mut current = 0.0_f64;
                    for _ in 0..count {
                        kept.insert(start + current.round_ties_even() as usize);
                        current += stride;
                    }
                    start += size;
                }
                Ok(kept.into_iter().collect())
            }
        }
    }
}

impl From<usize> for Spacing {
    fn from(steps: usize) -> Self {
        Self::even(steps)
    }
}

impl fmt::Display for Spacing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ddim(count) => write!(f, "ddim{count}"),
            Self::Sections(counts) => {
                for (i, count) in counts.iter().enumerate() {
                    write!(f, "{}{count}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

impl FromStr for Spacing {
    type Err = ModelError;

    fn from_str(spec: &str) -> Result<Self, ModelError> {
        let count = |text: &str| {
            text.trim().parse::<usize>().map_err(|_| ModelError::BadSpacing {
                spec: spec.to_owned(),
                reason: format!("\"{}\" is no count; write \"250\", \"10,20,30\" or \"ddim50\"", text.trim()),
            })
        };
        match spec.trim().strip_prefix("ddim") {
            Some(rest) => count(rest).map(Self::Ddim),
            None => spec.split(',').map(count).collect::<Result<_, _>>().map(Self::Sections),
        }
    }
}

/// The tables of a DDPM schedule, one entry a step, the cleanest first.
///
/// All tables have the length of `timesteps`. After respacing they describe the shortened chain, while `timesteps`
/// keeps the original indices, which are what the model sees.
#[derive(Debug, Clone, PartialEq)]
pub struct DdpmSchedule {
    /// The original index of each step, ascending.
    pub timesteps: Vec<usize>,
    /// `β`
    pub betas: Vec<f64>,
    /// `ln β`, the largest log-variance of the learned range.
    pub log_betas: Vec<f64>,
    /// `ᾱ`
    pub alphas_cumprod: Vec<f64>,
    /// `ᾱ` of the next cleaner step; 1 for the first.
    pub alphas_cumprod_prev: Vec<f64>,
    /// `√ᾱ`, the weight of the data in `x_t`.
    pub sqrt_alphas_cumprod: Vec<f64>,
    /// `√(1 − ᾱ)`, the weight of the noise in `x_t`.
    pub sqrt_one_minus_alphas_cumprod: Vec<f64>,
    /// `√(1/ᾱ)`, the weight of `x_t` in the predicted data.
    pub sqrt_recip_alphas_cumprod: Vec<f64>,
    /// `√(1/ᾱ − 1)`, minus the weight of ε in the predicted data.
    pub sqrt_recipm1_alphas_cumprod: Vec<f64>,
    /// `β √ᾱ_prev / (1 − ᾱ)`, the weight of `x_0` in the posterior mean.
    pub posterior_mean_coef1: Vec<f64>,
    /// `(1 − ᾱ_prev) √(1 − β) / (1 − ᾱ)`, the weight of `x_t` in the posterior mean.
    pub posterior_mean_coef2: Vec<f64>,
    /// `β̃ = β (1 − ᾱ_prev) / (1 − ᾱ)`; 0 for the first step.
    pub posterior_variance: Vec<f64>,
    /// `ln β̃` with the first entry replaced by the second: the smallest log-variance of the learned range.
    pub posterior_log_variance_clipped: Vec<f64>,
}

impl DdpmSchedule {
    /// Linear betas from `1e-4` to `0.02` over `total` steps, both scaled by `1000 / total`.
    ///
    /// # Errors
    /// [`ModelError::ScheduleTooShort`] when the last beta would reach 1.
    /// # Source
    /// Ho et al. 2020, section 4; the scaling is Nichol and Dhariwal's.
    pub fn linear(total: usize) -> Result<Self, ModelError> {
        if total < LEAST_STEPS {
            return Err(ModelError::ScheduleTooShort { total, least: LEAST_STEPS });
        }
        Ok(Self::linear_unchecked(total))
    }

    fn linear_unchecked(total: usize) -> Self {
        let scale = TRAINING_STEPS as f64 / total as f64;
        let (first, last) = (1e-4 * scale, 0.02 * scale);
        let step = (last - first) / (total - 1) as f64;
        Self::from_betas((0..total).collect(), (0..total).map(|i| first + step * i as f64).collect())
    }

    /// The schedule of fewer steps that has this schedule's `ᾱ` at the kept ones:
    /// `β'_k = 1 − ᾱ[s_k] / ᾱ[s_{k−1}]`, and every table made anew from `β'`.
    ///
    /// # Errors
    /// [`ModelError::BadSpacing`] as [`Spacing::timesteps`].
    pub fn respaced(&self, spacing: &Spacing) -> Result<Self, ModelError> {
        let kept = spacing.timesteps(self.len())?;
        let mut previous = 1.0;
        let betas = kept
            .iter()
            .map(|&s| {
                let alpha_bar = self.alphas_cumprod[s];
                let beta = 1.0 - alpha_bar / previous;
                previous = alpha_bar;
                beta
            })
            .collect();
        Ok(Self::from_betas(kept.iter().map(|&s| self.timesteps[s]).collect(), betas))
    }

    /// The number of steps.
    pub fn len(&self) -> usize {
        self.timesteps.len()
    }

    /// Whether there is no step; no constructor makes such a schedule.
    pub fn is_empty(&self) -> bool {
        self.timesteps.is_empty()
    }

    /// `betas` has at least two entries, each in `(0, 1)`.
    fn from_betas(timesteps: Vec<usize>, betas: Vec<f64>) -> Self {
        let alphas_cumprod: Vec<f64> = betas
            .iter()
            .scan(1.0, |product, beta| {
                *product *= 1.0 - beta;
                Some(*product)
            })
            .collect();
        let alphas_cumprod_prev: Vec<f64> =
            std::iter::once(1.0).chain(alphas_cumprod.iter().copied()).take(betas.len()).collect();
        let over = |f: fn(f64) -> f64| alphas_cumprod.iter().map(|&ab| f(ab)).collect::<Vec<f64>>();
        let posterior = |f: fn(f64, f64, f64) -> f64| -> Vec<f64> {
            (0..betas.len()).map(|i| f(betas[i], alphas_cumprod[i], alphas_cumprod_prev[i])).collect()
        };
        let posterior_variance = posterior(|beta, ab, prev| beta * (1.0 - prev) / (1.0 - ab));
        let posterior_log_variance_clipped =
            (0..betas.len()).map(|i| posterior_variance[i.max(1)].ln()).collect();
        Self {
            sqrt_alphas_cumprod: over(f64::sqrt),
            sqrt_one_minus_alphas_cumprod: over(|ab| (1.0 - ab).sqrt()),
            sqrt_recip_alphas_cumprod: over(|ab| (1.0 / ab).sqrt()),
            sqrt_recipm1_alphas_cumprod: over(|ab| (1.0 / ab - 1.0).sqrt()),
            posterior_mean_coef1: posterior(|beta, ab, prev| beta * prev.sqrt() / (1.0 - ab)),
            posterior_mean_coef2: posterior(|beta, ab, prev| (1.0 - prev) * (1.0 - beta).sqrt() / (1.0 - ab)),
            log_betas: betas.iter().map(|beta| beta.ln()).collect(),
            timesteps,
            betas,
            alphas_cumprod,
            alphas_cumprod_prev,
            posterior_variance,
            posterior_log_variance_clipped,
        }
    }
}

/// The schedule that DDPM models are trained on: [`TRAINING_STEPS`] linear betas.
impl Default for DdpmSchedule {
    fn default() -> Self {
        Self::linear_unchecked(TRAINING_STEPS)
    }
}

#[cfg(test)]
mod tests;
