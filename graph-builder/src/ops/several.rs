//! Ops about the graph rather than about numbers: several results of one op, and the order of execution.
//!
//! The value of an op with several results is all their elements, one result after the other; [`Part`] takes one
//! out. In ONNX the op has as many outputs, and the parts are their names.

use crate::error::{Refusal, refuse};
use crate::eval::{Array, bundle, filled};
use crate::onnx::{Attribute, Emitter, FunctionBody};
use crate::op::{Cost, Grad, Policy, Rules, Storage};
use crate::shape::{Shape, Type};
use crate::value::Value;

/// One result of an op that has several.
///
/// The operand is an op with several results, and this is one of them: [`Value::results`] makes no other, and the
/// graph's verification sees to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Which result.
    pub index: usize,
    /// Where its elements begin in the operand.
    pub offset: usize,
    /// Its shape.
    pub shape: Shape,
}

impl Rules for Part {
    fn name(&self) -> &'static str {
        "Part"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let end = self.offset + self.shape.numel();
        if args[0].shape.rank() != 1 || args[0].shape.numel() < end {
            return refuse(format!("several results, {end} elements or more"));
        }
        Ok(Type { dtype: args[0].dtype, shape: self.shape.clone() })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let (n, all) = (self.shape.numel(), args[0].dim(0));
        vec![Grad::Value(ct.reshape([n]).pad(0, self.offset, all - self.offset - n))]
    }
    fn emit(&self, _: &mut Emitter<'_>) {} // the name of one of the operand's outputs
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        filled(&out.shape, args[0].iter().skip(self.offset).copied())
    }
    fn cost(&self, _: &[&Type], _: &Type) -> Cost {
        Cost::default()
    }
}

/// Equal pieces of one axis, in order, as several results.
///
/// # Constraints
/// - C1: the axis is inside the rank · C2: `count` divides its size
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// The axis that is cut.
    pub axis: usize,
    /// Number of pieces.
    pub count: usize,
}

impl Rules for Split {
    fn name(&self) -> &'static str {
        "Split"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let Some(size) = args[0].shape.0.get(self.axis) else {
            return refuse(format!("C1: an axis inside the rank, not {}", self.axis));
        };
        if self.count == 0 || !size.is_multiple_of(self.count) {
            return refuse(format!("C2: an axis of a multiple of {}, not {size}", self.count));
        }
        Ok(if self.count == 1 { args[0].clone() } else { Type::new(args[0].dtype, [args[0].shape.numel()]) })
    }
    fn results(&self, args: &[&Type], _: &Type) -> Vec<Shape> {
        let mut piece = args[0].shape.clone();
        piece.0[self.axis] /= self.count;
        vec![piece; self.count]
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let mut piece = args[0].shape();
        piece.0[self.axis] /= self.count;
        let n = piece.numel();
        let ct = ct.reshape([n * self.count]);
        let piece_at = |i: usize| ct.slice(0, i * n, (i + 1) * n).reshape(piece.clone());
        let others: Vec<Value<'g>> = (1..self.count).map(piece_at).collect();
        vec![Grad::Value(piece_at(0).concat(&others, self.axis))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let attributes = [("axis", self.axis), ("num_outputs", self.count)];
        emitter.same("Split", attributes.map(|(name, v)| Attribute::int(name, v as i64)).into());
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let pieces =
            args[0].axis_chunks_iter(ndarray::Axis(self.axis), args[0].shape()[self.axis] / self.count);
        let all = bundle(&pieces.map(|piece| piece.to_owned()).collect::<Vec<_>>());
        filled(&out.shape, all)
    }
    fn cost(&self, _: &[&Type], out: &Type) -> Cost {
        Cost { macs: 0, flops: 0, bytes: 2 * out.bytes() as u64 }
    }
}

/// The first operand, but not before the second is there: recomputation waits for the backward pass with it.
///
/// In plain ONNX it is the identity, so a runtime without the native kernel may compute it early.
///
/// # Shapes
/// - `x`, `token`: any; returns `x`
/// # Constraints
/// - C1: two float operands
#[derive(Clone, Debug, PartialEq)]
pub struct After;

impl Rules for After {
    fn name(&self) -> &'static str {
        "After"
    }
    fn policy(&self) -> Policy {
        Policy::First
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args.iter().any(|a| !a.dtype.is_float()) {
            return refuse("C1: two float operands");
        }
        Ok(args[0].clone())
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct), Grad::Zero]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("After", &["x", "token"], &[]).of(emitter.dtype());
        f.result("Identity", &["x"]);
        emitter.native(f, vec![]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        args[0].clone()
    }
    fn cost(&self, _: &[&Type], _: &Type) -> Cost {
        Cost::default()
    }
}
