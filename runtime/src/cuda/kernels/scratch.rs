//! Memory of what is enqueued, used again by what is enqueued later on the same stream.

use std::sync::{Arc, Mutex, PoisonError};

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
    /// Bytes that nobody else has until the memory is given back.
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

/// Memory that queues lend, one piece a queue, the one that was given back last: a queue at a time always has the same.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Vec<Scratch>>);

impl Pool {
    pub(super) fn lend(&self) -> Scratch {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// All of it may be handed out again: what used it comes earlier on the stream than what will.
    pub(super) fn give_back(&self, mut scratch: Scratch) {
        scratch.at = (0, 0);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }
}
