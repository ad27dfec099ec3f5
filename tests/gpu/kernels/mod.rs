//! mudit's kernels on a GPU, or on what stands for one: the fused ops, noise and the update, through the queue that
//! sessions and training use.

pub(crate) mod memory;
pub(crate) mod ops;
pub(crate) mod random;
pub(crate) mod sessions;
pub(crate) mod update;
