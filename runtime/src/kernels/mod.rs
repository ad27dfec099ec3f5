//! Native kernels: the ops of the domain `mudit`, registered with ONNX Runtime, and the loops of the update.
//!
//! A model that uses a `mudit` op carries a function body for it, so it runs anywhere; in a session of this crate
//! the kernel of the same name runs instead. A kernel's result depends neither on the number of threads nor on
//! the machine's vector width.
#![allow(
    unsafe_code,
    reason = "hands disjoint parts of an output to ONNX Runtime's threads; uses wide registers"
)]
#![allow(clippy::inline_always, reason = "a loop body must be compiled into each instruction set's function")]

pub(crate) mod adamw;
mod gelu;
mod operator;
mod rows;
mod simd;

use std::sync::atomic::{AtomicU64, Ordering};

use ort::operator::OperatorDomain;

use operator::NativeOp;

/// Name of the domain of the native ops.
pub const DOMAIN: &str = "mudit";

/// The native ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// `(x, ct) → dx`: derivative of the tanh form of GELU.
    GeluGrad,
    /// `(y, ct) → dx`: derivative of softmax over the last axis, from its answer.
    SoftmaxGrad,
    /// `(x, ct; epsilon) → dx`: derivative of layer norm over the last axis without affine part.
    LayerNormGrad,
    /// `(x (N,T,D), shift (N,1,D), scale (N,1,D); epsilon) → (N,T,D)`: `LN(x) (1 + scale) + shift`.
    LayerNormModulate,
    /// `(x (N,T,D), gate (N,1,D), y (N,T,D)) → (N,T,D)`: `x + gate y`.
    GateResidual,
}

impl Op {
    pub(crate) const ALL: [Self; 5] =
        [Self::GeluGrad, Self::SoftmaxGrad, Self::LayerNormGrad, Self::LayerNormModulate, Self::GateResidual];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::GeluGrad => "GeluGrad",
            Self::SoftmaxGrad => "SoftmaxGrad",
            Self::LayerNormGrad => "LayerNormGrad",
            Self::LayerNormModulate => "LayerNormModulate",
            Self::GateResidual => "GateResidual",
        }
    }

    /// Number of inputs, all f32.
    pub(crate) fn arity(self) -> usize {
        match self {
            Self::GeluGrad | Self::SoftmaxGrad | Self::LayerNormGrad => 2,
            Self::LayerNormModulate | Self::GateResidual => 3,
        }
    }

    /// Whether the op has the attribute `epsilon`.
    pub(crate) fn has_epsilon(self) -> bool {
        matches!(self, Self::LayerNormGrad | Self::LayerNormModulate)
    }
}

static CALLS: [AtomicU64; Op::ALL.len()] = [const { AtomicU64::new(0) }; Op::ALL.len()];

/// Names of the ops that have a native kernel.
pub fn names() -> [&'static str; 5] {
    Op::ALL.map(Op::name)
}

/// How often the kernel of an op has run in this process; 0 for a name without one.
pub fn calls(name: &str) -> u64 {
    Op::ALL.iter().position(|op| op.name() == name).map_or(0, |i| CALLS[i].load(Ordering::Relaxed))
}

fn count(op: Op) {
    CALLS[op as usize].fetch_add(1, Ordering::Relaxed);
}

/// The domain with all kernels, for one session.
pub(crate) fn domain() -> ort::Result<OperatorDomain> {
    Op::ALL.into_iter().try_fold(OperatorDomain::new(DOMAIN)?, |domain, op| domain.add(NativeOp(op)))
}

#[cfg(test)]
mod tests;
