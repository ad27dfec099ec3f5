//! Diffusion models and their mathematics: families of networks, objectives, noise schedules and solver coefficients, and the
//! graphs built from them.
//!
//! | module | holds |
//! |---|---|
//! | [`model`] | [`Model`]: network, objective, parameterisation; `config.json`, presets by name |
//! | [`network`] | [`Network`]: the families behind one enum, and what other rooms ask of them |
//! | [`condition`] | [`Conditioning`]: what a model is conditioned on, its inputs, its null |
//! | [`schedule`] | [`DdpmSchedule`]: the linear-beta tables in `f64` and their respacing |
//! | [`solver`] | [`Solver`]: coefficient tables that make one `step` program serve every sampler |
//! | [`dit`] | the diffusion transformer: keys, published sizes, and the network block by block as in the paper |
//! | [`objective`] | [`Objective`]: the DDPM and flow-matching losses |
//! | [`programs`] | the six programs: `denoise`, `denoise-cfg`, `step`, `step-rows`, `loss`, `train-step` |
//! | [`class_names`] | which class a name or a number means |
//! | [`classifier`] | a small classifier of small images, for its features |
//! | [`inception`] | the feature network of the Fréchet Inception distance |
//! | [`error`] | [`ModelError`], the one error of this crate |
//!
//! This room knows graphs and numbers. It knows no device, no session and no training loop.

pub mod class_names;
pub mod classifier;
pub mod condition;
pub mod dit;
pub mod error;
mod fields;
pub mod inception;
mod layers;
pub mod model;
mod nearest;
pub mod network;
pub mod objective;
pub mod programs;
pub mod schedule;
pub mod solver;

pub use condition::{Classes, Conditioning, Port};
pub use error::ModelError;
pub use model::{InitScheme, Model, MupConfig};
pub use network::{Latent, Network};
pub use objective::Objective;
pub use programs::{
    Guidance, HYPERPARAMETERS, LOSS_SCALE, ProgramKind, ProgramSpec, Recompute, has_loss_scale,
};
pub use schedule::{DdpmSchedule, Spacing, TRAINING_STEPS};
pub use solver::{COEFFICIENTS, Solver, SolverKind, SolverPlan, SolverStep};
