//! Linear layers: `act(x) Wᵀ + b`, its two gradients, and the gated residual form.

use super::gelu;
use super::product::isa::{Isa, Vectorised, vectorised};
use super::product::{Activation, Bare, Epilogue, Operand, Product, Scratch, Shared, Threads, prefetch};

/// Rows, inputs and outputs of a layer.
#[derive(Clone, Copy)]
pub(crate) struct Layer {
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Applied to the layer's input first.
    pub(crate) activation: Activation,
}

impl Layer {
    /// `y (rows, outputs) = act(x) Wᵀ + b`.
    pub(crate) fn forward(
        self,
        threads: &dyn Threads,
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        y: &mut [f32],
    ) {
        self.forward_with(threads, x, weight, bias, Bare, y);
    }

    /// `y = residual + gate ⊙ (act(x) Wᵀ + b)`; `tokens` rows share a row of `gate`.
    pub(crate) fn forward_gated(
        self,
        threads: &dyn Threads,
        (x, weight, bias): (&[f32], &[f32], &[f32]),
        (residual, gate, tokens): (&[f32], &[f32], usize),
        y: &mut [f32],
    ) {
        let epilogue = GateResidual { residual, gate, tokens, width: self.outputs };
        self.forward_with(threads, x, weight, bias, epilogue, y);
    }

    fn forward_with(
        self,
        threads: &dyn Threads,
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        epilogue: impl Epilogue,
        y: &mut [f32],
    ) {
        Product {
            rows: self.rows,
            columns: self.outputs,
            terms: self.inputs,
            left: Operand::lines(x, self.inputs).activated(self.activation),
            right: Operand::lines(weight, self.inputs),
            bias: Some(bias),
            epilogue,
        }
        .run(threads, y);
    }

    /// `dx (rows, inputs) = (ct W) ⊙ act'(x)`; `x` is only read when there is an activation.
    pub(crate) fn grad_input(
        self,
        threads: &dyn Threads,
        ct: &[f32],
        weight: &[f32],
        x: &[f32],
        dx: &mut [f32],
    ) {
        let left = Operand::lines(ct, self.outputs);
        let right = Operand::columns(weight, self.inputs);
        let (rows, columns, terms) = (self.rows, self.inputs, self.outputs);
        match self.activation {
            Activation::None => {
                Product { rows, columns, terms, left, right, bias: None, epilogue: Bare }.run(threads, dx);
            }
            Activation::Gelu => {
                let epilogue = GeluSlope { x, width: self.inputs };
                Product { rows, columns, terms, left, right, bias: None, epilogue }.run(threads, dx);
            }
        }
    }

    /// `dw (outputs, inputs) = ctᵀ act(x)` and `db (outputs)`, the column sums of `ct`.
    pub(crate) fn grad_weight(
        self,
        threads: &dyn Threads,
        ct: &[f32],
        x: &[f32],
        dw: &mut [f32],
        db: &mut [f32],
    ) {
        let (ct_columns, x_columns) =
            (Operand::columns(ct, self.outputs), Operand::columns(x, self.inputs).activated(self.activation));
        let (terms, bias, epilogue) = (self.rows, None, Bare);
        if self.outputs >= self.inputs {
            let (rows, columns, left, right) = (self.outputs, self.inputs, ct_columns, x_columns);
            Product { rows, columns, terms, left, right, bias, epilogue }.run(threads, dw);
        } else {
            // The right operand is packed whole and read again for all rows: the narrow one is the better.
            let (rows, columns, left, right) = (self.inputs, self.outputs, x_columns, ct_columns);
            let mut across = Scratch::new(rows * columns);
            Product { rows, columns, terms, left, right, bias, epilogue }.run(threads, &mut across);
            transpose(threads, &across, rows, columns, dw);
        }
        column_sums(threads, ct, self.outputs, db);
    }
}

/// `to (columns, rows)` = `from (rows, columns)` transposed.
fn transpose(threads: &dyn Threads, from: &[f32], rows: usize, columns: usize, to: &mut [f32]) {
    /// Rows of the answer that a task writes.
    const PIECE: usize = 48;
    struct Piece<'a> {
        from: &'a [f32],
        rows: usize,
        columns: usize,
        first: usize,
        to: &'a mut [f32],
    }
    impl Vectorised for Piece<'_> {
        type Output = ();
        #[inline(always)]
        fn run<I: Isa>(self) {
            let Self { from, rows, columns, first, to } = self;
            // Its lines are the answer's columns: packing them in one panel writes the answer row by row.
            Operand::lines(from, columns).pack::<I>(0..rows, first..first + to.len() / rows, rows, to);
        }
    }
    let target = Shared::new(to);
    threads.each(columns.div_ceil(PIECE), &|piece| {
        let first = piece * PIECE;
        let len = PIECE.min(columns - first) * rows;
        // SAFETY: pieces do not overlap and lie inside `to`.
        let to = unsafe { std::slice::from_raw_parts_mut(target.at().add(first * rows), len) };
        vectorised(Piece { from, rows, columns, first, to });
    });
}

/// Sums of the columns of `x` (rows, `width`), rows in ascending order.
fn column_sums(threads: &dyn Threads, x: &[f32], width: usize, sums: &mut [f32]) {
    /// Columns of a task.
    const PIECE: usize = 64;
    struct Piece<'a> {
        x: &'a [f32],
        width: usize,
        first: usize,
        sums: &'a mut [f32],
    }
    impl Vectorised for Piece<'_> {
        type Output = ();
        #[inline(always)]
        fn run<I: Isa>(self) {
            let Self { x, width, first, sums } = self;
            if let Ok(sums) = <&mut [f32; PIECE]>::try_from(&mut *sums) {
                let mut total = [0.0_f32; PIECE];
                for row in x.chunks_exact(width) {
                    let row = &row[first..first + PIECE];
                    for (total, x) in total.iter_mut().zip(row) {
                        *total += x;
                    }
                }
                *sums = total;
            } else {
                sums.fill(0.0);
                for row in x.chunks_exact(width) {
                    for (total, x) in sums.iter_mut().zip(&row[first..]) {
                        *total += x;
                    }
                }
            }
        }
    }
    let target = Shared::new(sums);
    threads.each(width.div_ceil(PIECE), &|piece| {
        let first = piece * PIECE;
        let len = PIECE.min(width - first);
        // SAFETY: pieces do not overlap and lie inside `sums`, which has `width` elements.
        let sums = unsafe { std::slice::from_raw_parts_mut(target.at().add(first), len) };
        vectorised(Piece { x, width, first, sums });
    });
}

struct GeluSlope<'a> {
    x: &'a [f32],
    width: usize,
}

impl Epilogue for GeluSlope<'_> {
    const ACTIVE: bool = true;
    #[inline(always)]
    fn prepare<I: Isa>(&self, row: usize, column: usize, len: usize) {
        prefetch::<I>(self.x, row * self.width + column, len);
    }
    #[inline(always)]
    fn finish(&self, row: usize, column: usize, sums: &mut [f32]) {
        let x = &self.x[row * self.width + column..][..sums.len()];
        gelu::apply_grad(x, sums);
    }
}

struct GateResidual<'a> {
    residual: &'a [f32],
    gate: &'a [f32],
    tokens: usize,
    width: usize,
}

impl Epilogue for GateResidual<'_> {
    const ACTIVE: bool = true;
    #[inline(always)]
    fn prepare<I: Isa>(&self, row: usize, column: usize, len: usize) {
        prefetch::<I>(self.residual, row * self.width + column, len);
    }
    #[inline(always)]
    fn finish(&self, row: usize, column: usize, sums: &mut [f32]) {
        let residual = &self.residual[row * self.width + column..][..sums.len()];
        let gate = &self.gate[row / self.tokens * self.width + column..][..sums.len()];
        for ((sum, residual), gate) in sums.iter_mut().zip(residual).zip(gate) {
            *sum = residual + gate * *sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::product::tests::{Alone, noise};

    const LAYER: Layer = Layer { rows: 34, inputs: 70, outputs: 52, activation: Activation::Gelu };

    fn gelu_of(x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        gelu::apply(&mut y);
        y
    }

    #[test]
    fn a_gated_layer_is_the_layer_then_the_gate() {
        let plain = Layer { activation: Activation::None, ..LAYER };
        let (x, weight, bias) = (noise(34 * 70, 1), noise(52 * 70, 2), noise(52, 3));
        let (residual, gate) = (noise(34 * 52, 4), noise(2 * 52, 5));
        let (mut inner, mut gated) = (vec![0.0; 34 * 52], vec![0.0; 34 * 52]);
        plain.forward(&Alone, &gelu_of(&x), &weight, &bias, &mut inner);
        LAYER.forward_gated(&Alone, (&x, &weight, &bias), (&residual, &gate, 17), &mut gated);
        for (i, gated) in gated.iter().enumerate() {
            let gate = gate[i / 52 / 17 * 52 + i % 52];
            assert_eq!(*gated, residual[i] + gate * inner[i]);
        }
    }

    #[test]
    fn the_gradients_are_products_with_the_slope() {
        let plain = Layer { activation: Activation::None, ..LAYER };
        let (x, weight, ct) = (noise(34 * 70, 6), noise(52 * 70, 7), noise(34 * 52, 8));
        let (mut inner, mut want, mut dx) = (vec![0.0; 34 * 70], vec![0.0; 34 * 70], vec![0.0; 34 * 70]);
        plain.grad_input(&Alone, &ct, &weight, &[], &mut inner);
        gelu::gelu_grad(&x, &inner, &mut want);
        LAYER.grad_input(&Alone, &ct, &weight, &x, &mut dx);
        assert_eq!(dx, want);

        let (mut dw, mut db, mut dw_plain, mut db_plain) =
            (vec![0.0; 52 * 70], vec![0.0; 52], vec![0.0; 52 * 70], vec![0.0; 52]);
        LAYER.grad_weight(&Alone, &ct, &x, &mut dw, &mut db);
        plain.grad_weight(&Alone, &ct, &gelu_of(&x), &mut dw_plain, &mut db_plain);
        assert_eq!((dw, &db), (dw_plain, &db_plain));
        for (column, db) in db.iter().enumerate() {
            let exact: f64 = (0..34).map(|row| f64::from(ct[row * 52 + column])).sum();
            assert!((f64::from(*db) - exact).abs() < 1e-5);
        }
    }
}
