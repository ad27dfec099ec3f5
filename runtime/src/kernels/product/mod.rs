//! Matrix products in f32: packed panels, tiles of sums in registers, work cut by shape only.
//!
//! Each element of the answer is summed over its terms in ascending order by fused multiply-adds, whatever the
//! number of rows, columns or threads: a row's bits do not depend on its neighbours.
//!
//! # Source
//! Goto & van de Geijn, *Anatomy of High-Performance Matrix Multiplication*; the loops around the tile differ: the
//! right operand is packed whole (it fits in the last cache), rows are cut into tasks.

mod few;
mod frozen;
pub(crate) mod isa;
mod pack;
mod scratch;
pub(crate) mod tile;

use std::ops::Range;

use few::Few;
pub(crate) use frozen::Frozen;
use isa::{Isa, Vectorised, vectorised};
pub(crate) use pack::{Activation, Operand};
pub(crate) use scratch::Scratch;
use tile::{Scalars, Start, Vectors};

/// Threads to run tasks on.
pub(crate) trait Threads: Sync {
    /// Calls `task` once with each number below `count`, in any order, on several threads.
    fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync));
}

/// What is done to a part of the answer while it is still in the first cache.
pub(crate) trait Epilogue: Sync {
    /// Whether there is anything to do.
    const ACTIVE: bool;
    /// Told before the sums of columns `column..column + len` of `row` are formed: the time to ask for what
    /// [`Self::finish`] will read.
    #[inline(always)]
    fn prepare<I: Isa>(&self, _row: usize, _column: usize, _len: usize) {}
    /// Changes the sums of columns `column..` of `row`; mark it `#[inline(always)]`.
    fn finish(&self, row: usize, column: usize, sums: &mut [f32]);
}

/// The sums are the answer.
pub(crate) struct Bare;

impl Epilogue for Bare {
    const ACTIVE: bool = false;
    #[inline(always)]
    fn finish(&self, _: usize, _: usize, _: &mut [f32]) {}
}

/// `answer (rows, columns) = left · right + bias`, then the epilogue.
pub(crate) struct Product<'a, E> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) terms: usize,
    /// Its lines are the answer's rows.
    pub(crate) left: Operand<'a>,
    /// Its lines are the answer's columns.
    pub(crate) right: Operand<'a>,
    /// One value a column, that the sums begin with.
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) epilogue: E,
}

/// Rows of a task.
const TASK_ROWS: usize = 64;
/// Fewest registers of columns in a task.
const TASK_REGISTERS: usize = 12;
/// Tasks that a product is cut into where its shape allows.
const TASKS: usize = 16;
/// Terms that are packed of the right operand at a time.
const PACKED_TERMS: usize = 2048;
/// Terms of a block of the left operand.
const BLOCK_TERMS: usize = 512;
/// Elements of the right operand that stay in the second cache while rows pass by.
const BLOCK_ELEMENTS: usize = 112 * 1024;
/// Fewest rows for which packing the right operand pays.
const FEW_ROWS: usize = 16;

/// Columns in panels of one to three registers each, as even as can be.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    pub(crate) registers: usize,
    pub(crate) count: usize,
}

impl Panels {
    pub(crate) fn of(columns: usize, lanes: usize) -> Self {
        let registers = columns.div_ceil(lanes);
        Self { registers, count: registers.div_ceil(isa::MAX_VECTORS) }
    }

    /// Registers before panel `p`.
    pub(crate) fn start(self, p: usize) -> usize {
        let (base, extra) = (self.registers / self.count, self.registers % self.count);
        p * base + p.min(extra)
    }

    /// Registers of panel `p`.
    pub(crate) fn width(self, p: usize) -> usize {
        self.start(p + 1) - self.start(p)
    }
}

/// Asks for `len` elements of `data` from `first` on.
#[inline(always)]
pub(crate) fn prefetch<I: Isa>(data: &[f32], first: usize, len: usize) {
    for line in (0..len).step_by(16) {
        I::prefetch(data.as_ptr().wrapping_add(first + line));
    }
}

/// An address that several threads write disjoint parts behind.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: the tasks that share it write disjoint parts.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The address; as a method, so that closures take the whole wrapper.
    pub(crate) fn at(self) -> *mut T {
        self.0
    }
}

/// A product for its threads, into its answer.
struct Run<'a, 'b, E>(&'a Product<'b, E>, &'a dyn Threads, &'a mut [f32]);
impl<E: Epilogue> Vectorised for Run<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Run(product, threads, answer) = self;
        if product.rows <= FEW_ROWS && product.right.activation == Activation::None {
            product.run_few::<I>(threads, answer);
        } else {
            product.run_many::<I>(threads, answer);
        }
    }
}

impl<E: Epilogue> Product<'_, E> {
    /// Computes the product into `answer` (rows × columns, row-major).
    ///
    /// # Panics
    /// When a slice is shorter than its shape says.
    pub(crate) fn run(&self, threads: &dyn Threads, answer: &mut [f32]) {
        let Self { rows, columns, terms, left, right, bias, .. } = self;
        assert!(answer.len() >= rows * columns && bias.is_none_or(|b| b.len() >= *columns));
        for (operand, lines) in [(left, *rows), (right, *columns)] {
            assert!(operand.line == 1 || operand.term == 1);
            let needed = lines.saturating_sub(1) * operand.line + terms.saturating_sub(1) * operand.term + 1;
            assert!(operand.data.len() >= needed || lines * terms == 0);
        }
        if rows * columns == 0 {
            return;
        }
        vectorised(Run(self, threads, answer));
    }

    #[inline(always)]
    fn run_many<I: Isa>(&self, threads: &dyn Threads, answer: &mut [f32]) {
        let panels = Panels::of(self.columns, I::LANES);
        let answer = Shared::new(answer);
        let row_tasks = self.rows.div_ceil(TASK_ROWS);
        let pieces =
            TASKS.div_ceil(row_tasks).min((panels.registers / TASK_REGISTERS).max(1)).min(panels.count);
        let width = panels.registers * I::LANES;
        // Blocks of terms lie one after the other; of an operand that may change only one is held at a time.
        let blocks = || {
            (0..self.terms.max(1))
                .step_by(PACKED_TERMS)
                .map(|first| first..(first + PACKED_TERMS).min(self.terms))
        };
        let pack = |terms: Range<usize>, to: Shared<f32>| {
            threads.each(panels.count, &|p| {
                vectorised(Pack { product: self, panels, packed: to, p, terms: terms.clone() });
            });
        };
        let right = &self.right;
        let whole = (right.term == 1 && right.line == self.terms && right.activation == Activation::None)
            .then(|| {
                frozen::packed(right.data, self.columns, self.terms, || {
                    let mut all = Scratch::new(width * self.terms);
                    for terms in blocks() {
                        let first = terms.start;
                        pack(terms, Shared::new(&mut all[width * first..]));
                    }
                    all
                })
            })
            .flatten();
        let mut room = Scratch::new(if whole.is_some() { 0 } else { width * self.terms.min(PACKED_TERMS) });
        for terms in blocks() {
            let packed = if let Some(all) = &whole {
                Shared(all[width * terms.start..].as_ptr().cast_mut())
            } else {
                pack(terms.clone(), Shared::new(&mut room));
                Shared::new(&mut room)
            };
            threads.each(row_tasks * pieces, &|task| {
                let (row, piece) = (task / pieces * TASK_ROWS, task % pieces);
                vectorised(Task {
                    product: self,
                    panels,
                    packed: packed.at(),
                    answer,
                    rows: row..(row + TASK_ROWS).min(self.rows),
                    piece: piece * panels.count / pieces..(piece + 1) * panels.count / pieces,
                    terms: terms.clone(),
                });
            });
        }
    }

    /// Few rows: every element of the right operand is used a few times only, so it is read where it lies.
    #[inline(always)]
    fn run_few<I: Isa>(&self, threads: &dyn Threads, answer: &mut [f32]) {
        let answer = Shared::new(answer);
        // Enough columns in a task to be worth a thread's while, whole registers.
        let step = (64 * 1024 / self.terms.max(1)).clamp(3 * isa::MAX_LANES, 1024) / 48 * 48;
        let tasks = self.columns.div_ceil(step);
        threads.each(tasks, &|task| {
            let columns = task * step..((task + 1) * step).min(self.columns);
            vectorised(Few { product: self, answer, columns });
        });
    }
}

/// Packing of one panel of the right operand.
struct Pack<'a, 'b, E> {
    product: &'a Product<'b, E>,
    panels: Panels,
    packed: Shared<f32>,
    p: usize,
    terms: Range<usize>,
}

impl<E: Epilogue> Vectorised for Pack<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let (start, width) = (self.panels.start(self.p) * I::LANES, self.panels.width(self.p) * I::LANES);
        let lines = start..(start + width).min(self.product.columns);
        let count = self.terms.len();
        // SAFETY: the panels lie one after the other in the scratch; each is packed by one task.
        let to =
            unsafe { std::slice::from_raw_parts_mut(self.packed.at().add(start * count), width * count) };
        self.product.right.pack::<I>(lines, self.terms, width, to);
    }
}

/// Some rows and panels of the answer, over the packed terms.
struct Task<'a, 'b, E> {
    product: &'a Product<'b, E>,
    panels: Panels,
    packed: *const f32,
    answer: Shared<f32>,
    rows: Range<usize>,
    piece: Range<usize>,
    terms: Range<usize>,
}

impl<E: Epilogue> Vectorised for Task<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { product, panels, packed, answer, rows, piece, terms } = self;
        let stride = product.columns;
        let packed_terms = terms.len();
        let bands = rows.len().div_ceil(I::ROWS);
        let mut left = Scratch::new(bands * I::ROWS * BLOCK_TERMS.min(packed_terms));
        let mut block = terms.start;
        loop {
            // Blocks as even as can be.
            let rest = terms.end - block;
            let size = if rest == 0 { 0 } else { rest.div_ceil(rest.div_ceil(BLOCK_TERMS)) };
            let last = block + size == product.terms;
            product.left.pack_bands::<I>(rows.clone(), block..block + size, I::ROWS, &mut left);
            let group = (BLOCK_ELEMENTS / (size.max(1) * 3 * I::LANES)).max(1);
            for start in piece.clone().step_by(group) {
                for band in 0..bands {
                    let first = rows.start + band * I::ROWS;
                    let height = (rows.end - first).min(I::ROWS);
                    let scalars =
                        Scalars { at: left[band * I::ROWS * size..].as_ptr(), row: 1, term: I::ROWS };
                    for p in start..(start + group).min(piece.end) {
                        let (registers, column) = (panels.width(p), panels.start(p) * I::LANES);
                        let width = (registers * I::LANES).min(product.columns - column);
                        // SAFETY: the panel begins at `column · packed_terms`; tasks own disjoint tiles.
                        unsafe {
                            let vectors = Vectors {
                                at: packed.add(
                                    column * packed_terms + (block - terms.start) * registers * I::LANES,
                                ),
                                term: registers * I::LANES,
                            };
                            let at = answer.at().add(first * stride + column);
                            if E::ACTIVE && last {
                                for row in 0..height {
                                    product.epilogue.prepare::<I>(first + row, column, width);
                                }
                            }
                            let begin = match product.bias {
                                _ if block > 0 => Start::Resume,
                                Some(bias) => Start::Bias(bias.as_ptr().add(column)),
                                None => Start::Zero,
                            };
                            let shape = (height, width);
                            tile::any::<I, true>(shape, registers, size, scalars, vectors, begin, at, stride);
                            if E::ACTIVE && last {
                                for row in 0..height {
                                    let sums = std::slice::from_raw_parts_mut(at.add(row * stride), width);
                                    product.epilogue.finish(first + row, column, sums);
                                }
                            }
                        }
                    }
                }
            }
            block += size;
            if block >= terms.end {
                break;
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
