//! Where kernels are enqueued, and what a launch is made of.

use super::Source;
use crate::error::Result;

/// An address in the memory that a queue's kernels see. 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// The address of no argument.
    pub const NONE: Self = Self(0);

    /// This many bytes further on.
    #[must_use]
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// The arguments of a launch, in the order of the kernel's parameters.
#[derive(Clone, Debug, Default)]
pub struct Arguments {
    /// All arguments, each from a new word on.
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Arguments {
    /// Appends the bytes of a value, whose alignment in the kernel is at most that of a word.
    #[must_use]
    pub fn with<T: bytemuck::NoUninit>(mut self, value: T) -> Self {
        self.starts.push(self.words.len());
        for part in bytemuck::bytes_of(&value).chunks(size_of::<u64>()) {
            let mut word = [0; size_of::<u64>()];
            word[..part.len()].copy_from_slice(part);
            self.words.push(u64::from_ne_bytes(word));
        }
        self
    }

    /// Appends an address.
    #[must_use]
    pub fn address(self, at: Address) -> Self {
        self.with(at.0)
    }

    /// The addresses of the arguments, as the driver takes them; valid while `self` stands still.
    pub fn pointers(&mut self) -> Vec<*mut std::ffi::c_void> {
        let words = self.words.as_mut_ptr();
        self.starts.iter().map(|&start| words.wrapping_add(start).cast()).collect()
    }
}

/// One launch of a kernel.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The file that the kernel is in.
    pub source: &'static Source,
    /// The kernel.
    pub kernel: &'a str,
    /// Number of blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory beside the kernel's own.
    pub shared_bytes: u32,
    /// The arguments.
    pub arguments: Arguments,
}

/// A product of matrices stored row after row: `out (m, n) = a (m, k) · b (k, n)`, plus `bias (n)` in every row.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Element type of all of them; sums are f32.
    pub dtype: graph_builder::DType,
    /// Rows of the answer.
    pub m: usize,
    /// Columns of the answer.
    pub n: usize,
    /// Terms of a sum.
    pub k: usize,
    /// The left matrix, and whether `(k, m)` is stored.
    pub a: (Address, bool),
    /// The right matrix, and whether `(n, k)` is stored.
    pub b: (Address, bool),
    /// Added to every row, or [`Address::NONE`].
    pub bias: Address,
    /// The answer.
    pub out: Address,
}

/// An order of work on one device; what is enqueued runs after what was enqueued before.
pub trait Queue {
    /// Enqueues a kernel.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`](crate::RuntimeError::Kernel) when it cannot be compiled or launched.
    fn launch(&self, launch: Launch<'_>) -> Result<()>;

    /// Enqueues a product.
    ///
    /// # Errors
    /// As [`Queue::launch`].
    fn multiply(&self, product: &Product) -> Result<()>;

    /// Enqueues a copy of `bytes` bytes.
    ///
    /// # Errors
    /// As [`Queue::launch`].
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Memory for what is enqueued until the queue is dropped; its address is a multiple of 16.
    ///
    /// # Errors
    /// [`RuntimeError::OutOfMemory`](crate::RuntimeError::OutOfMemory).
    fn scratch(&self, bytes: usize) -> Result<Address>;
}
