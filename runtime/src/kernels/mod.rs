//! Native kernels: the ops of the domain `mudit`, registered with ONNX Runtime, and the loops of the update.
//!
//! A model that uses a `mudit` op carries a function body for it, so it runs anywhere; in a session of this crate
//! the kernel of the same name runs instead. A kernel's result does not depend on the number of threads, and a
//! sample's result not on the other samples of the batch.
#![allow(
    unsafe_code,
    reason = "hands disjoint parts of an output to ONNX Runtime's threads; uses wide registers"
)]
#![allow(clippy::inline_always, reason = "a loop body must be compiled into each instruction set's function")]
#![allow(clippy::too_many_arguments, reason = "the innermost loops take addresses and strides")]

pub(crate) mod adamw;
mod attention;
mod gelu;
mod linear;
mod modulation;
pub(crate) mod operator;
mod patch;
pub(crate) mod product;
mod rows;
mod signature;
mod simd;

use std::sync::atomic::{AtomicU64, Ordering};

use graph_builder::{DType, NativeName};
use ort::operator::OperatorDomain;

use operator::NativeOp;
pub(crate) use product::Activation;
pub use signature::Source as AttributeSource;
pub(crate) use signature::{Attributes, Op};

/// Name of the domain of the native ops.
pub const DOMAIN: &str = "mudit";

static CALLS: [AtomicU64; Op::ALL.len()] = [const { AtomicU64::new(0) }; Op::ALL.len()];

/// Names of the ops that have a native kernel.
pub fn names() -> [&'static str; Op::ALL.len()] {
    Op::ALL.map(Op::name)
}

/// How often the kernel of an op has run in this process; 0 for a name without one.
pub fn calls(name: &str) -> u64 {
    Op::ALL.iter().position(|op| op.name() == name).map_or(0, |i| CALLS[i].load(Ordering::Relaxed))
}

/// The instruction set that the matrix products use on this machine.
pub fn instruction_set() -> &'static str {
    product::isa::name()
}

pub(crate) fn count(op: Op) {
    CALLS[op as usize].fetch_add(1, Ordering::Relaxed);
}

/// The domain with all kernels, for one session.
pub(crate) fn domain() -> ort::Result<OperatorDomain> {
    let named = |op: Op| NativeName::of(op.name(), DType::F32).map(move |name| NativeOp::new(op, name));
    Op::ALL.into_iter().flat_map(named).try_fold(OperatorDomain::new(DOMAIN)?, OperatorDomain::add)
}

#[cfg(test)]
mod tests;
