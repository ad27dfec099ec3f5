//! Table look-up.

use ndarray::{ArrayD, Axis, IxDyn};

use crate::error::{Refusal, refuse};
use crate::eval::Array;
use crate::onnx::{Attribute, Emitter};
use crate::op::{Cost, Grad, Policy, Rules, Storage};
use crate::shape::{DType, Shape, Type};
use crate::value::Value;

/// Rows of a table.
///
/// The gradient of the table is a product with the one-hot matrix of the indices: a plain matrix product sums
/// repeated rows in a fixed order, which a scatter does not promise.
///
/// # Shapes
/// - `table`: `(V, …)`, `indices`: `(N)`; returns `(N, …)`
/// # Constraints
/// - C1: `indices` are i64 of rank 1 · C2: `table` has rank 1 or more
/// - indices are in `0..V`; ONNX Runtime refuses others when the program runs
#[derive(Clone, Debug, PartialEq)]
pub struct Gather;

impl Rules for Gather {
    fn name(&self) -> &'static str {
        "Gather"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args[1].dtype != DType::I64 || args[1].shape.rank() != 1 {
            return refuse("C1: i64 indices of rank 1");
        }
        if args[0].shape.rank() == 0 {
            return refuse("C2: a table of rank 1 or more");
        }
        let mut dims = args[0].shape.0.clone();
        dims[0] = args[1].shape.0[0];
        Ok(Type { dtype: args[0].dtype, shape: Shape(dims) })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let (table, indices) = (args[0].ty(), args[1]);
        let (v, n) = (table.shape.0[0], indices.dim(0));
        let row: usize = table.shape.0[1..].iter().product();
        let numbers = (0..v).map(|i| i as f64).collect::<Vec<_>>();
        let numbers = ct.builder().constant(DType::I64, [v, 1], numbers);
        let one_hot = numbers.equal(indices.reshape([1, n])).cast(table.dtype); // (V, N)
        vec![Grad::Value(one_hot.matmul(ct.reshape([n, row])).reshape(table.shape)), Grad::Zero]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emitter.same("Gather", vec![Attribute::int("axis", 0)]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let mut answer = ArrayD::from_elem(IxDyn(out.shape.dims()), f64::NAN);
        for (mut row, &i) in answer.axis_iter_mut(Axis(0)).zip(args[1].iter()) {
            if i >= 0.0 && (i as usize) < args[0].shape()[0] {
                row.assign(&args[0].index_axis(Axis(0), i as usize));
            }
        }
        answer
    }
    fn cost(&self, _: &[&Type], out: &Type) -> Cost {
        Cost { macs: 0, flops: 0, bytes: 2 * out.bytes() as u64 }
    }
}
