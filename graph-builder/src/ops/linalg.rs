//! Matrix products.

use ndarray::{ArrayView2, Ix2};

use crate::error::{Refusal, refuse};
use crate::eval::{Array, expand, filled};
use crate::onnx::Emitter;
use crate::op::{Cost, Grad, Policy, Rules, Storage, traffic};
use crate::shape::{Shape, Type};
use crate::value::Value;

/// Matrix product of the last two axes; leading axes broadcast.
///
/// # Shapes
/// - `a`: `(…, M, K)`, `b`: `(…, K, N)`; returns `(…, M, N)`
/// # Constraints
/// - C1: two float operands of one dtype · C2: both have rank 2 or more · C3: the inner sizes agree
/// - C4: the leading axes broadcast
#[derive(Clone, Debug, PartialEq)]
pub struct MatMul;

fn split(shape: &Shape) -> (Shape, usize, usize) {
    let r = shape.rank();
    (Shape(shape.0[..r - 2].to_vec()), shape.0[r - 2], shape.0[r - 1])
}

/// The value with its last two axes exchanged.
fn swap(x: Value<'_>) -> Value<'_> {
    let r = x.shape().rank();
    let mut perm: Vec<usize> = (0..r).collect();
    perm.swap(r - 2, r - 1);
    x.transpose(&perm)
}

/// All leading axes folded into the rows.
fn rows(x: Value<'_>) -> Value<'_> {
    let shape = x.shape();
    let last = shape.0[shape.rank() - 1];
    x.reshape([shape.numel() / last, last])
}

impl Rules for MatMul {
    fn name(&self) -> &'static str {
        "MatMul"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let (a, b) = (args[0], args[1]);
        if a.dtype != b.dtype || !a.dtype.is_float() {
            return refuse("C1: two float operands of one dtype");
        }
        if a.shape.rank() < 2 || b.shape.rank() < 2 {
            return refuse("C2: operands of rank 2 or more");
        }
        let ((la, m, k), (lb, k2, n)) = (split(&a.shape), split(&b.shape));
        if k != k2 {
            return refuse("C3: inner sizes that agree");
        }
        let Some(Shape(mut dims)) = la.broadcast(&lb) else {
            return refuse("C4: leading axes that broadcast");
        };
        dims.extend([m, n]);
        Ok(Type { dtype: a.dtype, shape: Shape(dims) })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let (a, b) = (args[0], args[1]);
        let db = if b.shape().rank() == 2 && a.shape().rank() > 2 {
            // One large product instead of a batch of small ones and a sum.
            swap(rows(a)).matmul(rows(ct))
        } else {
            swap(a).matmul(ct)
        };
        vec![Grad::Value(ct.matmul(swap(b))), Grad::Value(db)]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emitter.same("MatMul", vec![]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let (lead, m, n) = split(&out.shape);
        let operand = |x: &Array| {
            let r = x.ndim();
            let mut dims = lead.0.clone();
            dims.extend(&x.shape()[r - 2..]);
            let shape = Shape(dims);
            let (rows, cols) = (x.shape()[r - 2], x.shape()[r - 1]);
            let data: Vec<f64> = expand(x, &shape).iter().copied().collect();
            (data, rows, cols)
        };
        let ((a, ra, ca), (b, rb, cb)) = (operand(args[0]), operand(args[1]));
        let mut data = Vec::with_capacity(out.shape.numel());
        for i in 0..lead.numel() {
            let view = |d: &[f64], r: usize, c: usize| -> Option<ndarray::Array2<f64>> {
                ArrayView2::from_shape(Ix2(r, c), &d[i * r * c..(i + 1) * r * c]).ok().map(|v| v.to_owned())
            };
            if let (Some(x), Some(y)) = (view(&a, ra, ca), view(&b, rb, cb)) {
                data.extend(x.dot(&y));
            }
        }
        data.resize(lead.numel() * m * n, f64::NAN);
        filled(&out.shape, data)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        let k = args[0].shape.0.last().copied().unwrap_or(0);
        let macs = (out.shape.numel() * k) as u64;
        Cost { macs, flops: 2 * macs, bytes: traffic(args, out) }
    }
}
