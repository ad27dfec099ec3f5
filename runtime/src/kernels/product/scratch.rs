//! Room for packed panels, kept by each thread between products.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// One cache line, so that panels begin on one.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "read through a slice of all lines")] [f32; 16]);

thread_local! {
    /// Free buffers of this thread; a product inside another takes a second one.
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of unspecified content, aligned to a cache line; it goes back to its thread when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    lines: Vec<Line>,
    len: usize,
}

impl Scratch {
    /// Room for `len` elements.
    pub(crate) fn new(len: usize) -> Self {
        let mut lines = FREE.with_borrow_mut(|free| {
            // The smallest that is large enough, else the largest to grow.
            free.sort_by_key(Vec::len);
            let fits = free.iter().position(|b| b.len() * 16 >= len);
            fits.or(free.len().checked_sub(1)).map(|i| free.remove(i)).unwrap_or_default()
        });
        if lines.len() * 16 < len {
            lines = vec![Line([0.0; 16]); len.div_ceil(16)];
        }
        Self { lines, len }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        FREE.with_borrow_mut(|free| free.push(lines));
    }
}

impl Deref for Scratch {
    type Target = [f32];
    #[inline(always)]
    fn deref(&self) -> &[f32] {
        // SAFETY: a `Line` is sixteen f32 in a row, and there are at least `len`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Scratch {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}
