//! Reductions; the reduced axes stay with size 1.

use ndarray::Axis;

use crate::error::{Refusal, refuse};
use crate::eval::Array;
use crate::onnx::{Attribute, Emitter};
use crate::op::{Cost, Grad, Policy, Rules, Storage, traffic};
use crate::shape::{Shape, Type};
use crate::value::Value;

fn infer(axes: &[usize], args: &[&Type]) -> Result<Type, Refusal> {
    if !args[0].dtype.is_float() {
        return refuse("C1: a float operand");
    }
    let mut dims = args[0].shape.0.clone();
    if axes.iter().any(|&a| a >= dims.len()) || axes.windows(2).any(|w| w[0] >= w[1]) {
        return refuse(format!("C2: rising axes inside the rank, not {axes:?}"));
    }
    for &a in axes {
        dims[a] = 1;
    }
    Ok(Type { dtype: args[0].dtype, shape: Shape(dims) })
}

fn emit(onnx: &str, axes: &[usize], emitter: &mut Emitter<'_>) {
    let rank = emitter.arg_type(0).shape.rank() as i64;
    let axes: Vec<i64> = axes.iter().map(|&a| a as i64 - rank).collect();
    let axes = emitter.int_list(&axes);
    let x = emitter.arg(0).to_owned();
    emitter.node(onnx, &[&x, &axes], vec![Attribute::int("keepdims", 1)]);
}

fn eval_sum(axes: &[usize], x: &Array) -> Array {
    axes.iter().fold(x.clone(), |acc, &a| acc.sum_axis(Axis(a)).insert_axis(Axis(a)))
}

fn cost(args: &[&Type], out: &Type) -> Cost {
    Cost { macs: 0, flops: args[0].shape.numel() as u64, bytes: traffic(args, out) }
}

/// Number of elements that go into one.
fn count(axes: &[usize], shape: &Shape) -> usize {
    axes.iter().map(|&a| shape.0[a]).product()
}

/// Sum over some axes.
///
/// # Constraints
/// - C1: a float operand · C2: rising axes inside the rank
#[derive(Clone, Debug, PartialEq)]
pub struct Sum {
    /// Axes to sum over, rising.
    pub axes: Vec<usize>,
}

impl Rules for Sum {
    fn name(&self) -> &'static str {
        "ReduceSum"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        infer(&self.axes, args)
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct.broadcast(args[0].shape()))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emit("ReduceSum", &self.axes, emitter);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        eval_sum(&self.axes, args[0])
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        cost(args, out)
    }
}

/// Mean over some axes.
///
/// # Constraints
/// - C1: a float operand · C2: rising axes inside the rank
#[derive(Clone, Debug, PartialEq)]
pub struct Mean {
    /// Axes to average over, rising.
    pub axes: Vec<usize>,
}

impl Rules for Mean {
    fn name(&self) -> &'static str {
        "ReduceMean"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        infer(&self.axes, args)
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let shape = args[0].shape();
        let n = count(&self.axes, &shape) as f64;
        vec![Grad::Value((ct * (1.0 / n)).broadcast(shape))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emit("ReduceMean", &self.axes, emitter);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        let n = self.axes.iter().map(|&a| args[0].shape()[a]).product::<usize>() as f64;
        eval_sum(&self.axes, args[0]) / n
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        cost(args, out)
    }
}
