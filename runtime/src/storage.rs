//! Aligned host memory that never moves: what arenas and bindings are made of.
#![allow(unsafe_code, reason = "owns memory whose address ONNX Runtime keeps between runs")]

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use bytemuck::Zeroable;

use crate::error::{Result, RuntimeError};
use crate::huge_pages;

/// Alignment of every storage and of every arena entry, in bytes: one cache line, one AVX-512 register.
pub(crate) const ALIGNMENT: usize = 64;

/// A fixed number of zero-initialised elements at a fixed address.
///
/// Unlike a `Vec`, every slice is derived anew from the one root pointer, so an address handed to ONNX Runtime
/// stays valid next to the slices that safe code takes while no run is in progress.
pub(crate) struct Storage<T> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: `Storage` owns its memory exclusively, like `Box<[T]>`.
unsafe impl<T: Send> Send for Storage<T> {}
// SAFETY: shared access only reads, like `Box<[T]>`.
unsafe impl<T: Sync> Sync for Storage<T> {}

impl<T: Zeroable + Copy> Storage<T> {
    /// `len` zeros; `what` names the memory in the error when it cannot be had.
    pub(crate) fn zeros(len: usize, what: &str) -> Result<Self> {
        let out_of_memory =
            || RuntimeError::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()), what: what.to_owned() };
        let layout = Self::memory(len).ok_or_else(out_of_memory)?;
        // SAFETY: `memory` never gives a layout of size zero. Large memory is advised on before it is written.
        let start = unsafe {
            if layout.size() < huge_pages::WORTHWHILE {
                alloc_zeroed(layout)
            } else {
                let start = alloc(layout);
                if !start.is_null() {
                    huge_pages::advise(start, layout.size());
                    start.write_bytes(0, layout.size());
                }
                start
            }
        };
        Ok(Self { start: NonNull::new(start.cast()).ok_or_else(out_of_memory)?, len })
    }

    /// The elements.
    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: `start` points to `len` initialised elements that this storage owns; zero bits are a valid `T`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The elements, writable.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Storage<T> {
    /// Address of the first element.
    pub(crate) fn start(&self) -> NonNull<T> {
        self.start
    }

    fn memory(len: usize) -> Option<Layout> {
        let bytes = len.checked_mul(size_of::<T>())?.max(ALIGNMENT);
        let alignment = if bytes < huge_pages::WORTHWHILE { ALIGNMENT } else { huge_pages::SIZE };
        Layout::from_size_align(bytes, alignment).ok()
    }
}

impl<T> Drop for Storage<T> {
    fn drop(&mut self) {
        if let Some(layout) = Self::memory(self.len) {
            // SAFETY: allocated in `zeros` with the same layout.
            unsafe { dealloc(self.start.as_ptr().cast(), layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zeroed_aligned_and_refuses_absurd_sizes() {
        let mut s = Storage::<f32>::zeros(33, "a test").unwrap();
        assert!((s.start().as_ptr() as usize).is_multiple_of(ALIGNMENT));
        assert!(s.as_slice().iter().all(|&x| x == 0.0));
        s.as_mut_slice()[32] = 1.0;
        assert_eq!(s.as_slice()[32], 1.0);
        assert!(Storage::<f32>::zeros(0, "a test").unwrap().as_slice().is_empty());
        let refused = Storage::<f32>::zeros(usize::MAX / 2, "a test").map(|_| ()).unwrap_err();
        assert!(matches!(refused, RuntimeError::OutOfMemory { .. }));
    }
}
