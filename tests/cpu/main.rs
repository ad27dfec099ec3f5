//! The proofs that need no accelerator: one binary, one module a subject.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a proof fails by panicking")]

mod app;
mod engines;
mod fid_command;
mod fid_extractors;
mod fid_inputs;
mod fid_metrics;
mod fid_networks;
mod fid_speed;
mod file_errors;
mod fused_rows;
mod gradients;
mod kernels;
mod layering;
mod machine_errors;
mod models;
mod onnx_golden;
mod op_constraints;
mod op_cost;
mod op_gradient;
mod op_parity;
mod op_rows;
mod op_table;
mod parity;
mod passes;
mod process;
mod random_graph;
mod recompute;
mod resume;
mod runs;
mod sampling;
mod scene;
mod tiny;
mod tiny_run;
mod training;
mod usage_errors;
