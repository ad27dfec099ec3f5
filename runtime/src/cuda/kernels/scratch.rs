//! Memory of what is enqueued, used again by what is enqueued later on the same stream.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use graph_builder::{NativeCall, OnnxProgram};

use super::native::{NativeOp, Place};
use super::products::MOST_WORKSPACE;
use super::queue::{Address, Launch, Product, Queue};
use crate::cuda::{DeviceMemory, Gpu};
use crate::error::{Result, RuntimeError};

/// Requests begin at a multiple of this.
const ALIGNMENT: usize = 256;
/// Smallest block that is asked of the driver.
const BLOCK: usize = 4 << 20;

/// Which blocks there are, and which part of them is taken. Requests go to the first block from the current one on that has
/// room, or to a new one.
#[derive(Debug, Default)]
struct Places {
    sizes: Vec<usize>,
    /// The block in use, and the bytes of it that are taken.
    at: (usize, usize),
}

impl Places {
    /// Block and offset for so many bytes; the block may be the one after the last, which then has to be made.
    fn take(&mut self, bytes: usize) -> (usize, usize) {
        let bytes = bytes.max(1).next_multiple_of(ALIGNMENT);
        let (mut block, mut used) = self.at;
        while self.sizes.get(block).is_some_and(|size| size - used < bytes) {
            (block, used) = (block + 1, 0);
        }
        if block == self.sizes.len() {
            self.sizes.push(bytes.max(BLOCK));
        }
        self.at = (block, used + bytes);
        (block, used)
    }
}

/// Blocks of a GPU's memory, handed out from the first one on. They never shrink: a recorded CUDA graph keeps their
/// addresses, and the same requests in the same order get the same addresses once they all fit.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    places: Places,
    blocks: Vec<DeviceMemory>,
}

impl Scratch {
    /// Bytes that nobody else has until the memory is given back.
    pub(super) fn take(&mut self, gpu: &Arc<Gpu>, bytes: usize) -> Result<Address> {
        let (before, at) = (self.places.sizes.len(), self.places.at);
        let (block, used) = self.places.take(bytes);
        if block == self.blocks.len() {
            let size = self.places.sizes[block];
            match DeviceMemory::uninitialised(gpu, size, "kernels' intermediate values") {
                Ok(memory) => self.blocks.push(memory),
                Err(error) => {
                    self.places.sizes.truncate(before);
                    self.places.at = at;
                    return Err(error);
                }
            }
        }
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
        scratch.places.at = (0, 0);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }
}

/// Bytes of a GPU's memory that this crate's kernels need beside the operands and answers of a program's ops, once it has
/// run. The workspace of a matrix product counts with the most that it may be.
///
/// # Errors
/// [`RuntimeError::Load`] for a program that is no model; [`RuntimeError::InvalidValue`] for operands that a kernel cannot
/// take.
pub fn scratch_bytes(program: &OnnxProgram) -> Result<usize> {
    let (mut places, mut failed) = (Places::default(), Ok(()));
    let mut see = |call: &NativeCall<'_>| {
        let planned = NativeOp::new(call.op(), call.dtype(), call).and_then(|op| {
            places.at = (0, 0);
            let planned =
                Planned { places: RefCell::new(std::mem::take(&mut places)), workspace: false.into() };
            let shapes = call.shapes().iter().map(|s| s.dims().iter().map(|&d| d as i64).collect::<Vec<_>>());
            let inputs: Vec<Place> = shapes.map(|shape| Place { shape, at: NOWHERE }).collect();
            let shapes: Vec<&[i64]> = inputs.iter().map(|p| &*p.shape).collect();
            let outputs = vec![NOWHERE; op.shapes(&shapes).map_or(0, |answers| answers.len())];
            let done = op.enqueue(&planned, &inputs, &outputs);
            places = planned.places.into_inner();
            done
        });
        if failed.is_ok() {
            failed = planned;
        }
    };
    let read = program.each_native_call(&mut see);
    read.map_err(|e| RuntimeError::Load { program: program.name.clone(), reason: e.to_string() })?;
    failed.map(|()| places.sizes.iter().sum())
}

/// Stands for an operand's address where nothing is computed.
const NOWHERE: Address = Address(ALIGNMENT as u64);

/// A queue that computes nothing, and notes the memory that it would hand out.
struct Planned {
    places: RefCell<Places>,
    /// Whether a product of this op has asked for its memory, which the next one uses again.
    workspace: std::cell::Cell<bool>,
}

impl Queue for Planned {
    fn launch(&self, _: Launch<'_>) -> Result<()> {
        Ok(())
    }

    fn multiply(&self, _: &Product) -> Result<()> {
        if !self.workspace.replace(true) {
            self.scratch(MOST_WORKSPACE)?;
        }
        Ok(())
    }

    fn copy(&self, _: Address, _: Address, _: usize) -> Result<()> {
        Ok(())
    }

    fn scratch(&self, bytes: usize) -> Result<Address> {
        self.places.borrow_mut().take(bytes);
        Ok(NOWHERE)
    }
}

#[cfg(test)]
mod tests {
    use graph_builder::{Activation, Builder, Type, Weights};

    use super::*;

    const WIDTH: usize = 1 << 10;

    const ROWS: usize = 8 << 10;

    /// Of a program that puts `count` layers behind an activation side by side.
    fn bytes(activation: Activation, count: usize) -> usize {
        let b = Builder::new("scratch");
        let x = b.input("x", Type::f32([ROWS, WIDTH]));
        let [w, bias] =
            [("w", vec![WIDTH, WIDTH]), ("b", vec![WIDTH])].map(|(n, s)| b.input(n, Type::f32(s)));
        b.output("x2", x * 2.0);
        for i in 0..count {
            let x = x * f64::from(i as u32 + 3);
            b.output(&format!("y{i}"), x.activated_linear(activation, w, bias));
        }
        scratch_bytes(&b.finish().unwrap().emit(Weights::Inputs).unwrap()).unwrap()
    }

    #[test]
    fn a_programs_ops_use_the_same_memory_one_after_the_other() {
        // The copy of the values after the activation, and the product's workspace, each in a block of its own.
        let want = ROWS * WIDTH * 4 + MOST_WORKSPACE;
        assert_eq!([1, 3].map(|count| bytes(Activation::Gelu, count)), [want; 2]);
        assert_eq!(bytes(Activation::None, 2), MOST_WORKSPACE);
        assert_eq!(bytes(Activation::None, 0), 0);
    }

    #[test]
    fn blocks_stay_and_requests_find_room_from_the_first_one_on() {
        let mut places = Places::default();
        assert_eq!([1, 1000, BLOCK].map(|n| places.take(n)), [(0, 0), (0, 256), (1, 0)]);
        places.at = (0, 0);
        assert_eq!([BLOCK + 1, 1].map(|n| places.take(n)), [(2, 0), (3, 0)]);
        assert_eq!(places.sizes, [BLOCK, BLOCK, BLOCK + ALIGNMENT, BLOCK]);
    }
}
