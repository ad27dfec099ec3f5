//! The proofs that need no accelerator: one binary, one module a subject.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a proof fails by panicking")]

mod gradients;
mod layering;
mod models;
mod onnx_golden;
mod op_constraints;
mod op_cost;
mod op_gradient;
mod op_parity;
mod op_rows;
mod op_table;
mod passes;
mod parity;
mod random_graph;
mod tiny;
