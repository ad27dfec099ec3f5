//! Diffusion transformers and their mathematics: model configurations, noise schedules and solver coefficients,
//! and the graphs built from them.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`DitConfig`]: the official constructor names, the twelve published presets, `config.json` |
//! | [`schedule`] | [`DdpmSchedule`]: the linear-beta tables in `f64` and their respacing |
//! | [`solver`] | [`Solver`]: coefficient tables that make one `step` program serve every sampler |
//! | [`dit`] | the transformer, block by block as in the paper |
//! | `objective` | the DDPM and flow-matching losses |
//! | [`programs`] | the six programs: `denoise`, `denoise-cfg`, `step`, `step-rows`, `loss`, `train-step` |
//! | [`class_names`] | which class a name or a number means |
//! | [`classifier`] | a small classifier of small images, for its features |
//! | [`inception`] | the feature network of the Fréchet Inception distance |
//! | [`error`] | [`ModelError`], the one error of this crate |
//!
//! This room knows graphs and numbers. It knows no device, no session and no training loop.

pub mod class_names;
pub mod classifier;
pub mod config;
pub mod dit;
pub mod error;
pub mod inception;
mod layers;
mod nearest;
mod objective;
pub mod programs;
pub mod schedule;
pub mod solver;

pub use config::{DitConfig, InitScheme, MupConfig, Objective};
pub use error::ModelError;
pub use programs::{
    Guidance, HYPERPARAMETERS, LOSS_SCALE, ProgramKind, Recompute, has_loss_scale, optimised_program,
    program, program_for,
};
pub use schedule::{DdpmSchedule, Spacing, TRAINING_STEPS};
pub use solver::{COEFFICIENTS, Solver, SolverKind, SolverPlan, SolverStep};
