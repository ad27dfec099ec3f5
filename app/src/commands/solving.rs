//! Options of every command that samples a checkpoint.

use clap::Args;
use models::{Guidance, Model, Solver, SolverKind, Spacing};

use crate::Usage;
use crate::built::BuiltEngine;
use crate::sampler::{channels, default_sampler, default_steps};

/// Which solver, how many steps, how much guidance.
#[derive(Clone, Debug, Args)]
pub(super) struct Solving {
    /// ddpm, ddim, dpm++2m (DDPM models); euler, heun, sde (flow models). Default: ddpm or euler.
    #[arg(long, alias = "solver")]
    sampler: Option<SolverKind>,
    /// Number of steps, or a spacing such as `ddim50` or `10,20,30`. Default 250 for ddpm, else 50.
    #[arg(long)]
    steps: Option<Spacing>,
    /// Noise of ddim, from 0 (none) to 1.
    #[arg(long, default_value_t = 0.0)]
    eta: f64,
    /// Time shift of flow solvers.
    #[arg(long, default_value_t = 1.0)]
    shift: f64,
    /// Scale of classifier-free guidance; 1 is none.
    #[arg(long, default_value_t = 1.5, visible_alias = "guidance", aliases = ["cfg-scale", "guidance-scale"])]
    pub(super) cfg: f64,
    /// Channels that guidance changes: a number or `all`. Default 3 for DDPM models as in the reference, else all.
    #[arg(long, value_parser = channels, aliases = ["guided-channels", "guidance-channels"])]
    cfg_channels: Option<Guidance>,
}

impl Solving {
    /// The solver for a model.
    pub(super) fn solver(&self, model: &Model) -> Solver {
        let kind = self.sampler.unwrap_or(default_sampler(model.objective));
        let steps = self.steps.clone().unwrap_or(Spacing::even(default_steps(kind)));
        Solver { eta: self.eta, shift: self.shift, ..Solver::new(kind, steps) }
    }

    /// The channels that guidance changes.
    ///
    /// # Errors
    /// Guidance is no number, or is asked for and the model has no null class.
    pub(super) fn guided(&self, model: &Model) -> anyhow::Result<Guidance> {
        if !self.cfg.is_finite() {
            return Err(Usage(format!("--cfg must be a finite number, not {}", self.cfg)).into());
        }
        if self.cfg != 1.0 && !model.conditioning().has_null() {
            return Err(
                Usage("the model has no null class, so it cannot be guided: use --cfg 1".into()).into()
            );
        }
        Ok(self.cfg_channels.unwrap_or(Guidance::usual(model.objective)))
    }

    /// The channels that guidance changes in an engine.
    ///
    /// # Errors
    /// As [`Self::guided`]; other channels are asked for.
    pub(super) fn guided_by(&self, engine: &BuiltEngine) -> anyhow::Result<Guidance> {
        self.guided(engine.model())?;
        if let Some(asked) = self.cfg_channels {
            engine.check_guided(asked)?;
        }
        Ok(engine.guided())
    }
}
