//! The training engine: everything between a compiled training step and a finished run.
//!
//! It knows data, randomness, configuration, checkpoints and metrics; the graphs come from `models` and are run by
//! `runtime`. It prints nothing: what a user should read is handed to the caller's callbacks.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | the run's TOML, its overrides and checks |
//! | [`data`] | data sets, the order of images, the thread that reads ahead |
//! | [`picture`] | picture files: which there are, what they decode to |
//! | [`random`] | draws that are pure functions of seed, purpose, step and sample |
//! | [`mup`] | roles to rates and first values |
//! | [`coordinates`] | the coordinate check: sizes of activations and updates over widths |
//! | [`step`] | the compiled training step, bound to arenas |
//! | [`trainer`] | the loop |
//! | [`loss_scale`] | the factor that f16 gradients need |
//! | [`sweep`] | many runs over settings on few compiled steps; whether optima stay |
//! | [`classifier`] | the small classifier whose features measure small images |
//! | [`schedule`] | learning-rate factor and EMA decay of a step |
//! | [`checkpoint`] | directories that appear whole or not at all, and the run's lock |
//! | [`metrics`], [`tensorboard`] | what is logged |
//! | [`signals`] | Ctrl-C, SIGTERM and their like as a flag |
//! | [`error`] | what can go wrong |

pub mod checkpoint;
pub mod classifier;
pub mod config;
pub mod coordinates;
pub mod data;
pub mod error;
pub mod loss_scale;
pub mod metrics;
pub mod mup;
pub mod picture;
pub mod random;
pub mod schedule;
pub mod signals;
pub mod step;
pub mod sweep;
pub mod tensorboard;
pub mod trainer;

mod evidence;
mod model;
mod tensor_file;

pub use error::{Result, TrainError};
