//! Products of few rows: the right operand is read where it lies, for each of its elements is used a few times only.

use std::ops::Range;

use super::isa::{self, Isa, Vectorised};
use super::tile::{self, Scalars, Start, Vectors};
use super::{Activation, Epilogue, Product, Scratch, Shared, prefetch};
use crate::kernels::gelu;

/// Terms that are summed before the next are asked for, where the operand is read as it lies.
const FEW_TERMS: usize = 64;
/// Some columns of an answer of few rows.
pub(super) struct Few<'a, 'b, E> {
    pub(super) product: &'a Product<'b, E>,
    pub(super) answer: Shared<f32>,
    pub(super) columns: Range<usize>,
}

impl<E: Epilogue> Vectorised for Few<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        if self.product.right.term == 1 {
            self.run_lines::<I>();
        } else {
            self.run_columns::<I>();
        }
    }
}

impl<E: Epilogue> Few<'_, '_, E> {
    /// The right operand's lines have their terms side by side: its elements are the scalars, the rows fill registers.
    #[inline(always)]
    fn run_lines<I: Isa>(&self) {
        let Product { rows, terms, left, right, .. } = *self.product;
        let stride = self.product.columns;
        let registers = rows.div_ceil(I::LANES).min(isa::MAX_VECTORS);
        let width = registers * I::LANES;
        for first_row in (0..rows).step_by(width) {
            let height = (rows - first_row).min(width);
            let mut packed = Scratch::new(width * terms);
            left.pack::<I>(first_row..first_row + height, 0..terms, width, &mut packed);
            let mut sums: tile::TileRoom = [0.0; isa::MAX_ROWS * isa::MAX_VECTORS * isa::MAX_LANES];
            for column in self.columns.clone().step_by(I::ROWS) {
                let lines = (self.columns.end - column).min(I::ROWS);
                // The last lines are computed over again where fewer than a tile are left.
                let base = (column + lines).saturating_sub(I::ROWS);
                if lines < I::ROWS && stride < I::ROWS {
                    self.plainly(first_row..first_row + height, column..column + lines);
                    continue;
                }
                for (i, row) in sums.chunks_exact_mut(width).take(I::ROWS).enumerate() {
                    row.fill(self.product.bias.map_or(0.0, |bias| bias[base + i]));
                }
                // The next lines are asked for while these are summed: a new line is not where the processor looks.
                for first in (0..terms).step_by(FEW_TERMS) {
                    let count = (terms - first).min(FEW_TERMS);
                    for i in 0..I::ROWS {
                        prefetch::<I>(right.data, (base + I::ROWS + i) * right.line + first, count);
                    }
                    // SAFETY: the lines base..base + ROWS are inside the operand, the scratch holds a tile.
                    unsafe {
                        let at = right.data.as_ptr().add(base * right.line + first);
                        let scalars = Scalars { at, row: right.line, term: 1 };
                        let vectors = Vectors { at: packed.as_ptr().add(first * width), term: width };
                        let to = sums.as_mut_ptr();
                        tile::full::<I, false>(registers, count, scalars, vectors, Start::Resume, to, width);
                    }
                }
                for row in 0..height {
                    let mut out = [0.0_f32; isa::MAX_ROWS];
                    for i in 0..lines {
                        out[i] = sums[(column - base + i) * width + row];
                    }
                    self.put(first_row + row, column, &mut out[..lines]);
                }
            }
        }
    }

    /// The right operand's terms have their columns side by side: they fill registers as they lie.
    #[inline(always)]
    fn run_columns<I: Isa>(&self) {
        let Product { rows, terms, left, right, bias, .. } = *self.product;
        let stride = self.product.columns;
        let mut packed = Scratch::new(rows.next_multiple_of(I::ROWS) * terms);
        for first in (0..rows).step_by(I::ROWS) {
            left.pack::<I>(
                first..(first + I::ROWS).min(rows),
                0..terms,
                I::ROWS,
                &mut packed[first * terms..],
            );
        }
        let whole = self.columns.len() / I::LANES;
        let mut register = 0;
        while register < whole {
            let registers = (whole - register).min(isa::MAX_VECTORS);
            let column = self.columns.start + register * I::LANES;
            for first in (0..rows).step_by(I::ROWS) {
                let height = (rows - first).min(I::ROWS);
                let scalars = Scalars { at: packed[first * terms..].as_ptr(), row: 1, term: I::ROWS };
                // SAFETY: whole registers of columns are inside the operand and the answer.
                unsafe {
                    let vectors = Vectors { at: right.data.as_ptr().add(column), term: right.term };
                    let at = self.answer.at().add(first * stride + column);
                    let begin = bias.map_or(Start::Zero, |bias| Start::Bias(bias.as_ptr().add(column)));
                    let shape = (height, registers * I::LANES);
                    tile::any::<I, true>(shape, registers, terms, scalars, vectors, begin, at, stride);
                    if E::ACTIVE {
                        for row in 0..height {
                            let sums = std::slice::from_raw_parts_mut(at.add(row * stride), shape.1);
                            self.product.epilogue.finish(first + row, column, sums);
                        }
                    }
                }
            }
            register += registers;
        }
        self.plainly(0..rows, self.columns.start + whole * I::LANES..self.columns.end);
    }

    /// Left-over columns, element by element in the same order of terms.
    #[inline(always)]
    fn plainly(&self, rows: Range<usize>, columns: Range<usize>) {
        let Product { terms, left, right, bias, .. } = *self.product;
        for row in rows {
            for column in columns.clone() {
                let mut sum = [bias.map_or(0.0, |bias| bias[column])];
                for k in 0..terms {
                    let mut a = [left.data[row * left.line + k * left.term]];
                    if left.activation == Activation::Gelu {
                        gelu::apply(&mut a);
                    }
                    sum[0] = a[0].mul_add(right.data[column * right.line + k * right.term], sum[0]);
                }
                self.put(row, column, &mut sum);
            }
        }
    }

    #[inline(always)]
    fn put(&self, row: usize, column: usize, sums: &mut [f32]) {
        if E::ACTIVE {
            self.product.epilogue.finish(row, column, sums);
        }
        // SAFETY: the task owns these columns of every row.
        unsafe {
            let to = self.answer.at().add(row * self.product.columns + column);
            std::ptr::copy_nonoverlapping(sums.as_ptr(), to, sums.len());
        }
    }
}
