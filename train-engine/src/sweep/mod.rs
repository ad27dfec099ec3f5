//! Sweeps: many short runs over settings and sizes, on as few compiled steps as there are shapes.
//!
//! A sweep lives in a folder: `trials.jsonl` (what is to be run), `journal/*.jsonl` (what happened, one append-only file
//! a worker, merged when read) and `locks/` (who runs what). Workers on one folder, on one machine or many, need no
//! other way to talk: a trial is claimed by an advisory lock that dies with its process, its result is one synced line,
//! and whoever holds the lock looks into the journals again before it starts. A worker that is killed loses the trial
//! it was in and no other.
//!
//! | module | holds |
//! |---|---|
//! | [`spec`] | the sweep's TOML |
//! | [`plan`] | its trials and their cost |
//! | [`journal`] | events, locks |
//! | [`worker`] | running what is left |
//! | [`results`] | curves over one setting, optima |
//! | [`verdict`] | whether an optimum stays: Algorithms 1–3 |

pub mod journal;
pub mod plan;
pub mod results;
pub mod spec;
pub mod verdict;
pub mod worker;

pub use journal::{Event, Journals, Status, TrialResult};
pub use plan::{Plan, Trial};
pub use spec::SweepSpec;
pub use worker::{Summary, Work};
