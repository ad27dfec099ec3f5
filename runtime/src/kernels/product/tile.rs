//! The innermost loop: a tile of sums held in registers.

use super::isa::{Isa, MAX_LANES, MAX_ROWS, MAX_VECTORS};

/// What a tile's sums begin with.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    /// Nothing.
    Zero,
    /// What stands in the answer: the sum over earlier terms.
    Resume,
    /// One value a column.
    Bias(*const f32),
}

/// The operand that is spread over a register, one element at a time: element (row i, term k) lies at
/// `at + i · row + k · term`.
#[derive(Clone, Copy)]
pub(crate) struct Scalars {
    pub(crate) at: *const f32,
    pub(crate) row: usize,
    pub(crate) term: usize,
}

/// The operand that fills registers: columns j.. of term k lie at `at + k · term + j`.
#[derive(Clone, Copy)]
pub(crate) struct Vectors {
    pub(crate) at: *const f32,
    pub(crate) term: usize,
}

/// `answer[i][j] = start + Σ_k scalars[i][k] · vectors[k][j]` for `MR` rows and `NV` registers of columns, terms in
/// ascending order.
///
/// # Safety
/// All that the two operands and the answer name is readable, and the answer writable.
#[inline(always)]
unsafe fn tile<I: Isa, const MR: usize, const NV: usize, const UNIT: bool>(
    terms: usize,
    scalars: Scalars,
    vectors: Vectors,
    start: Start,
    answer: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[I::zero(); NV]; MR];
        match start {
            Start::Zero => {}
            Start::Resume => {
                for (i, row) in sums.iter_mut().enumerate() {
                    for (j, sum) in row.iter_mut().enumerate() {
                        *sum = I::load(answer.add(i * stride + j * I::LANES));
                    }
                }
            }
            Start::Bias(bias) => {
                for j in 0..NV {
                    let column = I::load(bias.add(j * I::LANES));
                    for row in &mut sums {
                        row[j] = column;
                    }
                }
            }
        }
        // Lines of the vectors' stream that are asked for ahead of their use.
        let ahead = 8 * vectors.term;
        let (mut s, mut v) = (scalars.at, vectors.at);
        for _ in 0..terms {
            let mut columns = [I::zero(); NV];
            for (j, column) in columns.iter_mut().enumerate() {
                *column = I::load(v.add(j * I::LANES));
                I::prefetch(v.wrapping_add(ahead + j * I::LANES));
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let scalar = I::splat(*s.add(if UNIT { i } else { i * scalars.row }));
                for (sum, column) in row.iter_mut().zip(columns) {
                    *sum = I::multiply_add(scalar, column, *sum);
                }
            }
            s = s.add(scalars.term);
            v = v.add(vectors.term);
        }
        for (i, row) in sums.into_iter().enumerate() {
            for (j, sum) in row.into_iter().enumerate() {
                I::store(answer.add(i * stride + j * I::LANES), sum);
            }
        }
    }
}

/// A tile of `I::ROWS` rows and `registers` (1 to 3) registers of columns.
///
/// # Safety
/// As the tile's; with `UNIT` the rows of the scalars lie side by side.
#[inline(always)]
pub(crate) unsafe fn full<I: Isa, const UNIT: bool>(
    registers: usize,
    terms: usize,
    scalars: Scalars,
    vectors: Vectors,
    start: Start,
    answer: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if I::ROWS == 8 {
            match registers {
                1 => tile::<I, 8, 1, UNIT>(terms, scalars, vectors, start, answer, stride),
                2 => tile::<I, 8, 2, UNIT>(terms, scalars, vectors, start, answer, stride),
                _ => tile::<I, 8, 3, UNIT>(terms, scalars, vectors, start, answer, stride),
            }
        } else {
            match registers {
                1 => tile::<I, 4, 1, UNIT>(terms, scalars, vectors, start, answer, stride),
                2 => tile::<I, 4, 2, UNIT>(terms, scalars, vectors, start, answer, stride),
                _ => tile::<I, 4, 3, UNIT>(terms, scalars, vectors, start, answer, stride),
            }
        }
    }
}

/// Room for one tile.
pub(crate) type TileRoom = [f32; MAX_ROWS * MAX_VECTORS * MAX_LANES];

/// As [`full`] for a tile of which only `rows` × `columns` belong to the answer; the operands are padded.
///
/// # Safety
/// As [`full`], the answer only for `rows` × `columns`, a bias for `columns`.
#[inline(always)]
unsafe fn partial<I: Isa, const UNIT: bool>(
    (rows, columns): (usize, usize),
    registers: usize,
    terms: usize,
    scalars: Scalars,
    vectors: Vectors,
    start: Start,
    answer: *mut f32,
    stride: usize,
) {
    let width = registers * I::LANES;
    let mut scratch: TileRoom = [0.0; MAX_ROWS * MAX_VECTORS * MAX_LANES];
    let at = scratch.as_mut_ptr();
    // SAFETY: the caller's promise; the scratch holds a full tile.
    unsafe {
        for i in 0..rows {
            match start {
                Start::Zero => {}
                Start::Resume => {
                    std::ptr::copy_nonoverlapping(answer.add(i * stride), at.add(i * width), columns);
                }
                Start::Bias(bias) => std::ptr::copy_nonoverlapping(bias, at.add(i * width), columns),
            }
        }
        full::<I, UNIT>(registers, terms, scalars, vectors, Start::Resume, at, width);
        for i in 0..rows {
            std::ptr::copy_nonoverlapping(at.add(i * width), answer.add(i * stride), columns);
        }
    }
}

/// [`full`] or [`partial`], as the shape asks.
///
/// # Safety
/// As [`partial`].
#[inline(always)]
pub(crate) unsafe fn any<I: Isa, const UNIT: bool>(
    shape: (usize, usize),
    registers: usize,
    terms: usize,
    scalars: Scalars,
    vectors: Vectors,
    start: Start,
    answer: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if shape == (I::ROWS, registers * I::LANES) {
            full::<I, UNIT>(registers, terms, scalars, vectors, start, answer, stride);
        } else {
            partial::<I, UNIT>(shape, registers, terms, scalars, vectors, start, answer, stride);
        }
    }
}
