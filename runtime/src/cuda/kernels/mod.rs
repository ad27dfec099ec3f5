//! CUDA kernels: their sources, compiled by NVRTC for one architecture and kept on disk.
//!
//! Compiling needs NVRTC and no GPU. Each source stands alone but for two common files: `device.cuh`, which holds all
//! inline assembly, and `types.cuh`. Kernels are named `<kernel>_<element type>`.

mod compile;
mod gpu_queue;
mod loaded;
mod native;
mod noise;
pub(crate) mod operator;
mod products;
mod queue;
mod scratch;
mod update;

use std::fmt;
use std::str::FromStr;

use graph_builder::{DType, NativeCall, NativeKernel};

use crate::error::RuntimeError;
use crate::kernels::Op;

pub use compile::{Compiled, Compiler, KernelInfo};
pub use gpu_queue::GpuQueue;
pub(crate) use loaded::Loaded;
pub use native::{NativeOp, Place};
pub use noise::{NormalStream, draw_normal};
pub use queue::{Address, Arguments, Launch, Product, Queue};
pub use scratch::scratch_bytes;
pub use update::{Control, Piece, Segment, UpdatePlaces, UpdatePlan};

pub use crate::kernels::AttributeSource;

/// Whether a use of a `mudit` op has a CUDA kernel, and whether that takes its operands.
pub fn kernel_for(call: &NativeCall<'_>) -> NativeKernel {
    let ours = Op::ALL.iter().any(|op| op.name() == call.op());
    if !ours || !matches!(call.dtype(), DType::F32 | DType::Bf16 | DType::F16) {
        return NativeKernel::Body;
    }
    let shapes: Vec<Vec<i64>> =
        call.shapes().iter().map(|shape| shape.dims().iter().map(|&d| d as i64).collect()).collect();
    let shapes: Vec<&[i64]> = shapes.iter().map(Vec::as_slice).collect();
    match NativeOp::new(call.op(), call.dtype(), call) {
        Ok(op) => op.refusal(&shapes).map_or(NativeKernel::Own, NativeKernel::Unfit),
        Err(e) => NativeKernel::Unfit(e.to_string()),
    }
}

impl AttributeSource for NativeCall<'_> {
    fn float(&self, name: &str) -> Option<f32> {
        Self::float(self, name)
    }
    fn int(&self, name: &str) -> Option<i64> {
        Self::int(self, name)
    }
    fn text(&self, name: &str) -> Option<String> {
        Self::text(self, name)
    }
}

/// An architecture of GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Architecture {
    /// Compute capability: 80 for 8.0.
    capability: u32,
}

impl Architecture {
    /// A100.
    pub const SM_80: Self = Self { capability: 80 };
    /// H100 and H200.
    pub const SM_90: Self = Self { capability: 90 };

    /// The architecture of a compute capability.
    ///
    /// # Errors
    /// [`RuntimeError::InvalidValue`] below 8.0: the kernels need its matrix products and copies.
    pub fn of(major: u32, minor: u32) -> Result<Self, RuntimeError> {
        let capability = major * 10 + minor;
        // What is sold goes up to 12.x; a number with more digits is a slip.
        if (80..200).contains(&capability) && minor < 10 {
            return Ok(Self { capability });
        }
        Err(RuntimeError::InvalidValue {
            what: "compute capability".to_owned(),
            expected: "8.0 or more, below 20.0".to_owned(),
            got: format!("{major}.{minor}"),
        })
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}", self.capability)
    }
}

impl FromStr for Architecture {
    type Err = RuntimeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.strip_prefix("sm_").and_then(|n| n.parse::<u32>().ok());
        let wrong = || RuntimeError::InvalidValue {
            what: "architecture".to_owned(),
            expected: "sm_80, sm_90 or a later one".to_owned(),
            got: format!("`{text}`"),
        };
        number.and_then(|n| Self::of(n / 10, n % 10).ok()).ok_or_else(wrong)
    }
}

/// What every source begins with.
pub const COMMON: [(&str, &str); 2] =
    [("device.cuh", include_str!("device.cuh")), ("types.cuh", include_str!("types.cuh"))];

/// A source file of kernels.
#[derive(Debug)]
pub struct Source {
    /// The file's name.
    pub name: &'static str,
    /// Its text, without [`COMMON`].
    pub text: &'static str,
    /// Options of the compiler beside the architecture.
    pub options: &'static [&'static str],
    /// The kernels in it.
    pub kernels: &'static [&'static str],
}

macro_rules! source {
    ($name:literal, $options:expr, $kernels:expr) => {
        Source { name: $name, text: include_str!($name), options: &$options, kernels: &$kernels }
    };
}

/// The update: gradient norm, clip, AdamW, moving average and the copy in the compute type.
pub static UPDATE: Source = source!(
    "update.cu",
    // The host's update has no fused multiply-add, and the bits shall be the same.
    ["--fmad=false"],
    [
        "update_squares_f32",
        "update_squares_bf16",
        "update_squares_f16",
        "update_decide",
        "update_f32_bf16",
        "update_bf16_bf16",
        "update_f16_bf16",
        "update_f32_f16",
        "update_bf16_f16",
        "update_f16_f16",
        "accumulate_f32",
        "accumulate_bf16",
        "accumulate_f16",
    ]
);

/// Normal draws of counter-based streams.
pub static RANDOM: Source = source!(
    "random.cu",
    ["--fmad=false"],
    ["random_words", "random_normal_f32", "random_normal_bf16", "random_normal_f16"]
);

/// Layer norm, modulation, gates, softmax and sums, row by row.
pub static ROWS: Source = source!(
    "rows.cu",
    [],
    [
        "layer_norm_modulate_f32",
        "layer_norm_modulate_bf16",
        "layer_norm_modulate_f16",
        "layer_norm_grad_f32",
        "layer_norm_grad_bf16",
        "layer_norm_grad_f16",
        "layer_norm_modulate_grad_f32",
        "layer_norm_modulate_grad_bf16",
        "layer_norm_modulate_grad_f16",
        "gate_residual_f32",
        "gate_residual_bf16",
        "gate_residual_f16",
        "gate_residual_grad_f32",
        "gate_residual_grad_bf16",
        "gate_residual_grad_f16",
        "softmax_grad_f32",
        "softmax_grad_bf16",
        "softmax_grad_f16",
        "column_sums_f32",
        "column_sums_bf16",
        "column_sums_f16",
        "add_shares_f32",
        "add_shares_bf16",
        "add_shares_f16",
    ]
);

/// GELU, its derivative, and patches.
pub static ELEMENTS: Source = source!(
    "elements.cu",
    [],
    [
        "gelu_f32",
        "gelu_bf16",
        "gelu_f16",
        "gelu_grad_f32",
        "gelu_grad_bf16",
        "gelu_grad_f16",
        "patchify_f32",
        "patchify_bf16",
        "patchify_f16",
        "unpatchify_f32",
        "unpatchify_bf16",
        "unpatchify_f16",
    ]
);

/// Attention and its gradient on the matrix units, for head sizes up to 64 and up to 80.
pub static ATTENTION: Source = source!(
    "attention.cu",
    [],
    [
        "attention_bf16_64",
        "attention_grad_queries_bf16_64",
        "attention_grad_keys_bf16_64",
        "attention_bf16_80",
        "attention_grad_queries_bf16_80",
        "attention_grad_keys_bf16_80",
        "attention_f16_64",
        "attention_grad_queries_f16_64",
        "attention_grad_keys_f16_64",
        "attention_f16_80",
        "attention_grad_queries_f16_80",
        "attention_grad_keys_f16_80",
    ]
);

/// Attention and its gradient for what [`ATTENTION`] does not take: f32, and head sizes that are no multiple of 8.
pub static ATTENTION_PLAIN: Source = source!(
    "attention_plain.cu",
    [],
    [
        "attention_plain_f32",
        "attention_plain_grad_queries_f32",
        "attention_plain_grad_keys_f32",
        "attention_plain_bf16",
        "attention_plain_grad_queries_bf16",
        "attention_plain_grad_keys_bf16",
        "attention_plain_f16",
        "attention_plain_grad_queries_f16",
        "attention_plain_grad_keys_f16",
    ]
);

/// All sources.
pub static SOURCES: [&Source; 6] = [&UPDATE, &RANDOM, &ROWS, &ELEMENTS, &ATTENTION, &ATTENTION_PLAIN];

#[cfg(test)]
mod tests;
