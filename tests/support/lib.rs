//! What the proofs share: the table of ops, repeatable values, numerical derivatives, tolerances, and programs run under a time limit.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a proof fails by panicking"
)]

pub mod difference;
pub mod draws;
pub mod execution;
mod fused_rows;
pub mod op_rows;
pub mod op_table;
pub mod pictures;
pub mod tolerance;

pub use graph_builder::eval::Array;

/// Values by input, parameter or output name.
pub type Feeds = std::collections::BTreeMap<String, Array>;
