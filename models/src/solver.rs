//! Samplers as tables of coefficients, computed on the host in `f64`.
//!
//! One `step` program serves every solver, step count and seed, because each update below is linear in the sample
//! `x`, the model's output `e` (ε or velocity) and one tensor of `history`, with a noise term whose scale is
//! log-linear in the variance logits `v`. With the row `c` of the executed step:
//!
//! ```text
//! x0_hat       = c0·x + c1·e
//! x_next       = c2·x + c3·e + c4·history + c7·exp(c8·v)·noise
//! history_next = c5·x + c6·e
//! ```
//!
//! A model without learned variance has no `v`; its `c8` is 0. The history before the first step is 0.

use std::{fmt, str::FromStr};

use crate::{
    error::ModelError,
    nearest::hint,
    objective::Objective,
    schedule::{DdpmSchedule, Spacing, TRAINING_STEPS},
};

mod ddpm;
mod dpm_solver;
mod flow;

/// The length of a coefficient row.
pub const COEFFICIENTS: usize = 9;

/// What each entry of a coefficient row multiplies.
pub mod coefficient {
    /// `x` in `x0_hat`.
    pub const X0_X: usize = 0;
    /// The model output in `x0_hat`.
    pub const X0_OUT: usize = 1;
    /// `x` in `x_next`.
    pub const NEXT_X: usize = 2;
    /// The model output in `x_next`.
    pub const NEXT_OUT: usize = 3;
    /// The history in `x_next`.
    pub const NEXT_HISTORY: usize = 4;
    /// `x` in `history_next`.
    pub const HISTORY_X: usize = 5;
    /// The model output in `history_next`.
    pub const HISTORY_OUT: usize = 6;
    /// The noise in `x_next`, before the factor of the learned variance.
    pub const NOISE: usize = 7;
    /// The variance logits in the exponent of the noise's scale.
    pub const NOISE_LOGIT: usize = 8;
}

/// A way to walk from noise to data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SolverKind {
    /// Ancestral sampling of the (respaced) DDPM chain, with the learned variance where the model has one.
    Ddpm,
    /// DDIM, deterministic at `eta` 0 and as noisy as DDPM at 1.
    Ddim,
    /// DPM-Solver++(2M), the multistep solver of second order in the data prediction.
    DpmSolverPp2M,
    /// Euler steps of the flow's ordinary differential equation.
    Euler,
    /// Heun steps of the flow's ordinary differential equation: two evaluations a step, one in the last.
    Heun,
    /// Euler–Maruyama steps of the flow's stochastic differential equation with diffusion `2s`.
    Sde,
}

impl SolverKind {
    /// Every solver, in the order they are listed to users.
    pub const ALL: [Self; 6] =
        [Self::Ddpm, Self::Ddim, Self::DpmSolverPp2M, Self::Euler, Self::Heun, Self::Sde];

    /// The name users write.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ddpm => "ddpm",
            Self::Ddim => "ddim",
            Self::DpmSolverPp2M => "dpm++2m",
            Self::Euler => "euler",
            Self::Heun => "heun",
            Self::Sde => "sde",
        }
    }

    /// The objective of the models that it samples.
    pub const fn objective(self) -> Objective {
        match self {
            Self::Ddpm | Self::Ddim | Self::DpmSolverPp2M => Objective::Ddpm,
            Self::Euler | Self::Heun | Self::Sde => Objective::Flow,
        }
    }
}

impl fmt::Display for SolverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for SolverKind {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| ModelError::UnknownSolver {
            name: name.to_owned(),
            hint: hint(name, &Self::ALL.map(Self::name)),
        })
    }
}

/// A solver with its settings, ready to be planned for a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Solver {
    /// The update rule.
    pub kind: SolverKind,
    /// The steps; for all but `ddpm` and `ddim` a plain count.
    pub spacing: Spacing,
    /// The share of DDPM's noise that `ddim` adds, in `[0, 1]`; 0 for every other solver.
    pub eta: f64,
    /// Moves the grid of `euler` and `heun` towards noise by `s' = k·s / (1 + (k − 1)·s)`; 1 leaves it, and is the
    /// only value for every other solver.
    pub shift: f64,
}

/// One call of the `step` program.
#[derive(Debug, Clone, PartialEq)]
pub struct SolverStep {
    /// The timestep as the model sees it.
    pub t: f32,
    /// The coefficients, indexed by [`coefficient`].
    pub coef: [f64; COEFFICIENTS],
}

impl SolverStep {
    /// The row as the program takes it.
    pub fn row(&self) -> [f32; COEFFICIENTS] {
        self.coef.map(|c| c as f32)
    }
}

/// The calls of the `step` program that take a sample from noise to data, in order of execution.
#[derive(Debug, Clone, PartialEq)]
pub struct SolverPlan {
    /// The calls; the model is evaluated once in each.
    pub steps: Vec<SolverStep>,
    /// Whether any step reads the history.
    pub needs_history: bool,
    /// Whether any step adds noise.
    pub needs_noise: bool,
}

impl Solver {
    /// The solver with its usual settings: no extra noise, no shift.
    pub fn new(kind: SolverKind, spacing: impl Into<Spacing>) -> Self {
        Self { kind, spacing: spacing.into(), eta: 0.0, shift: 1.0 }
    }

    /// The coefficient table for a model trained with `objective`.
    ///
    /// `learn_sigma` says whether the model's output holds variance logits; only `ddpm` uses them.
    ///
    /// # Errors
    /// - [`ModelError::SolverObjective`] for a solver of the other objective
    /// - [`ModelError::SolverOption`] for an option out of range, or one that this solver has not
    /// - [`ModelError::BadSpacing`] for no steps, for more than [`TRAINING_STEPS`], and for a spacing that gives no
    ///   schedule
    pub fn plan(&self, objective: Objective, learn_sigma: bool) -> Result<SolverPlan, ModelError> {
        self.check(objective)?;
        let steps = match self.kind {
            SolverKind::Ddpm => {
                ddpm::ancestral(&DdpmSchedule::default().respaced(&self.spacing)?, learn_sigma)
            }
            SolverKind::Ddim => ddpm::ddim(&DdpmSchedule::default().respaced(&self.spacing)?, self.eta),
            SolverKind::DpmSolverPp2M => dpm_solver::multistep_2m(&DdpmSchedule::default(), self.count()?),
            SolverKind::Euler => flow::euler(&flow::grid(self.count()?, self.shift)),
            SolverKind::Heun => flow::heun(&flow::grid(self.count()?, self.shift)),
            SolverKind::Sde => flow::euler_maruyama(&flow::sde_grid(self.count()?)),
        };
        Ok(SolverPlan {
            needs_history: steps.iter().any(|s| s.coef[coefficient::NEXT_HISTORY] != 0.0),
            needs_noise: steps.iter().any(|s| s.coef[coefficient::NOISE] != 0.0),
            steps,
        })
    }

    fn check(&self, objective: Objective) -> Result<(), ModelError> {
        if self.kind.objective() != objective {
            let usable = SolverKind::ALL.into_iter().filter(|kind| kind.objective() == objective);
            return Err(ModelError::SolverObjective {
                solver: self.kind,
                objective,
                usable: usable.map(SolverKind::name).collect(),
            });
        }
        let (eta, shift) = (self.eta, self.shift);
        let wrong = match self.kind {
            SolverKind::Ddim if !(0.0..=1.0).contains(&eta) => Some(("eta", "within 0..=1", eta)),
            SolverKind::Ddim => None,
            _ if eta != 0.0 => Some(("eta", "0: only ddim has it", eta)),
            _ => None,
        };
        let wrong = wrong.or(match self.kind {
            SolverKind::Euler | SolverKind::Heun if !(shift.is_finite() && shift > 0.0) => {
                Some(("shift", "positive and finite", shift))
            }
            SolverKind::Euler | SolverKind::Heun => None,
            _ if shift != 1.0 => Some(("shift", "1: only euler and heun have it", shift)),
            _ => None,
        });
        match wrong {
            Some((option, expected, got)) => {
                Err(ModelError::SolverOption { solver: self.kind, option, expected, got: got.to_string() })
            }
            None => Ok(()),
        }
    }

    /// The plain step count of a solver that makes its own grid.
    fn count(&self) -> Result<usize, ModelError> {
        let bad = |reason: String| ModelError::BadSpacing { spec: self.spacing.to_string(), reason };
        let least = if self.kind == SolverKind::Sde { 2 } else { 1 };
        match &self.spacing {
            Spacing::Sections(counts) => match counts[..] {
                [n] if (least..=TRAINING_STEPS).contains(&n) => Ok(n),
                [_] => Err(bad(format!("{} takes {least} to {TRAINING_STEPS} steps", self.kind))),
                _ => Err(bad(format!("{} takes one count; only ddpm and ddim have sections", self.kind))),
            },
            Spacing::Ddim(n) => {
                Err(bad(format!("{} makes its own grid; write the plain count \"{n}\"", self.kind)))
            }
        }
    }
}

/// The coefficients of one step by name, so that a derivation reads as its equation.
#[derive(Default)]
struct Update {
    /// `(x, out)` in the predicted data.
    x0: (f64, f64),
    /// `(x, out, history)` in the next sample.
    next: (f64, f64, f64),
    /// `(x, out)` in the history handed on.
    history: (f64, f64),
    /// The noise's scale and its exponent's weight of the variance logits.
    noise: (f64, f64),
}

impl Update {
    fn at(self, t: f64) -> SolverStep {
        let Self { x0, next, history, noise } = self;
        SolverStep {
            t: t as f32,
            coef: [x0.0, x0.1, next.0, next.1, next.2, history.0, history.1, noise.0, noise.1],
        }
    }
}

#[cfg(test)]
mod tests;
