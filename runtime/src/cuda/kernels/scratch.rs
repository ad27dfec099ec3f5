//! Memory of what is enqueued, used again by what is enqueued later.

use std::sync::Arc;

use super::queue::Address;
use crate::cuda::{DeviceMemory, Gpu};
use crate::error::Result;

/// Requests begin at a multiple of this.
const ALIGNMENT: usize = 256;
/// Smallest block that is asked of the driver.
const BLOCK: usize = 4 << 20;

/// Blocks of a GPU's memory, handed out from the first one on. They never shrink: a recorded CUDA graph keeps their
/// addresses, and the same requests in the same order get the same addresses once they all fit.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    blocks: Vec<DeviceMemory>,
    /// The block in use, and the bytes of it that are taken.
    at: (usize, usize),
}

impl Scratch {
    /// Everything may be handed out again: what used it comes earlier on the stream than what will.
    pub(super) fn restart(&mut self) {
        self.at = (0, 0);
    }

    /// Bytes that nobody else has until [`Scratch::restart`].
    pub(super) fn take(&mut self, gpu: &Arc<Gpu>, bytes: usize) -> Result<Address> {
        let bytes = bytes.max(1).next_multiple_of(ALIGNMENT);
        let (mut block, mut used) = self.at;
        while self.blocks.get(block).is_some_and(|b| b.bytes() - used < bytes) {
            (block, used) = (block + 1, 0);
        }
        if block == self.blocks.len() {
            self.blocks.push(DeviceMemory::uninitialised(
                gpu,
                bytes.max(BLOCK),
                "kernels' intermediate values",
            )?);
        }
        self.at = (block, used + bytes);
        Ok(Address(self.blocks[block].address()).offset(used))
    }
}
