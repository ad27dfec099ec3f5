//! Ops that move elements and compute nothing.

use ndarray::{ArrayD, Axis, IxDyn, Slice as Range};

use crate::error::{Refusal, refuse};
use crate::eval::{Array, expand, filled};
use crate::onnx::{Attribute, Emitter};
use crate::op::{Cost, Grad, Policy, Rules, Storage};
use crate::shape::{Shape, Type};
use crate::value::Value;

/// The same elements in another shape, row-major.
///
/// # Constraints
/// - C1: as many elements as the operand
#[derive(Clone, Debug, PartialEq)]
pub struct Reshape {
    /// Shape of the answer.
    pub shape: Shape,
}

impl Rules for Reshape {
    fn name(&self) -> &'static str {
        "Reshape"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::View
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args[0].shape.numel() != self.shape.numel() {
            return refuse(format!("C1: {} elements for {}", self.shape.numel(), self.shape));
        }
        Ok(Type { dtype: args[0].dtype, shape: self.shape.clone() })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct.reshape(args[0].shape()))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let dims = emitter.int_list(&self.shape.0.iter().map(|&d| d as i64).collect::<Vec<_>>());
        let x = emitter.arg(0).to_owned();
        emitter.node("Reshape", &[&x, &dims], vec![]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        filled(&self.shape, args[0].iter().copied())
    }
    fn cost(&self, _: &[&Type], _: &Type) -> Cost {
        Cost::default()
    }
}

/// Axes in another order: axis `i` of the answer is axis `perm[i]` of the operand.
///
/// # Constraints
/// - C1: `perm` is a permutation of the operand's axes
#[derive(Clone, Debug, PartialEq)]
pub struct Transpose {
    /// Where each axis of the answer comes from.
    pub perm: Vec<usize>,
}

impl Rules for Transpose {
    fn name(&self) -> &'static str {
        "Transpose"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let mut sorted = self.perm.clone();
        sorted.sort_unstable();
        if sorted != (0..args[0].shape.rank()).collect::<Vec<_>>() {
            return refuse(format!("C1: a permutation of the axes, not {:?}", self.perm));
        }
        let dims = self.perm.iter().map(|&a| args[0].shape.0[a]).collect();
        Ok(Type { dtype: args[0].dtype, shape: Shape(dims) })
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let mut inverse = vec![0; self.perm.len()];
        self.perm.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
        vec![Grad::Value(ct.transpose(&inverse))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let perm = self.perm.iter().map(|&a| a as i64).collect();
        emitter.same("Transpose", vec![Attribute::ints("perm", perm)]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        args[0].clone().permuted_axes(IxDyn(&self.perm)).as_standard_layout().into_owned()
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(0, args, out)
    }
}

/// Copies along axes of size 1, and along new leading axes.
///
/// # Constraints
/// - C1: the operand's shape broadcasts to `shape` and leaves it as it is
#[derive(Clone, Debug, PartialEq)]
pub struct Broadcast {
    /// Shape of the answer.
    pub shape: Shape,
}

impl Rules for Broadcast {
    fn name(&self) -> &'static str {
        "Expand"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args[0].shape.broadcast(&self.shape).as_ref() != Some(&self.shape) {
            return refuse(format!("C1: a shape that broadcasts to {}", self.shape));
        }
        Ok(Type { dtype: args[0].dtype, shape: self.shape.clone() })
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct)] // the driver sums the copies
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let dims = emitter.int_list(&self.shape.0.iter().map(|&d| d as i64).collect::<Vec<_>>());
        let x = emitter.arg(0).to_owned();
        emitter.node("Expand", &[&x, &dims], vec![]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        expand(args[0], &self.shape)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(0, args, out)
    }
}

/// Elements `start..end` of one axis.
///
/// # Constraints
/// - C1: the axis is inside the rank · C2: `start < end ≤ size`
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// The axis that is cut.
    pub axis: usize,
    /// First element.
    pub start: usize,
    /// One past the last element.
    pub end: usize,
}

impl Rules for Slice {
    fn name(&self) -> &'static str {
        "Slice"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let mut dims = args[0].shape.0.clone();
        let Some(size) = dims.get(self.axis).copied() else {
            return refuse(format!("C1: an axis inside the rank, not {}", self.axis));
        };
        if self.start >= self.end || self.end > size {
            return refuse(format!("C2: a range inside 0..{size}, not {}..{}", self.start, self.end));
        }
        dims[self.axis] = self.end - self.start;
        Ok(Type { dtype: args[0].dtype, shape: Shape(dims) })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct.pad(self.axis, self.start, args[0].dim(self.axis) - self.end))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let starts = emitter.int_list(&[self.start as i64]);
        let ends = emitter.int_list(&[self.end as i64]);
        let axes = emitter.int_list(&[self.axis as i64]);
        let x = emitter.arg(0).to_owned();
        emitter.node("Slice", &[&x, &starts, &ends, &axes], vec![]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        args[0].slice_axis(Axis(self.axis), Range::from(self.start..self.end)).to_owned()
    }
    fn cost(&self, _: &[&Type], out: &Type) -> Cost {
        Cost { macs: 0, flops: 0, bytes: 2 * out.bytes() as u64 }
    }
}

/// Operands one after the other along one axis.
///
/// # Constraints
/// - C1: one operand or more, of one dtype · C2: the axis is inside the rank · C3: all other axes agree
#[derive(Clone, Debug, PartialEq)]
pub struct Concat {
    /// The axis that grows.
    pub axis: usize,
}

impl Rules for Concat {
    fn name(&self) -> &'static str {
        "Concat"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let Some((first, rest)) = args.split_first() else {
            return refuse("C1: one operand or more");
        };
        let mut dims = first.shape.0.clone();
        if self.axis >= dims.len() {
            return refuse(format!("C2: an axis inside the rank, not {}", self.axis));
        }
        for ty in rest {
            if ty.dtype != first.dtype {
                return refuse("C1: operands of one dtype");
            }
            let same = ty.shape.rank() == dims.len()
                && (0..dims.len()).all(|i| i == self.axis || ty.shape.0[i] == first.shape.0[i]);
            if !same {
                return refuse(format!("C3: shapes that agree but on axis {}", self.axis));
            }
            dims[self.axis] += ty.shape.0[self.axis];
        }
        Ok(Type { dtype: first.dtype, shape: Shape(dims) })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let mut start = 0;
        args.iter()
            .map(|a| {
                let end = start + a.dim(self.axis);
                let part = ct.slice(self.axis, start, end);
                start = end;
                Grad::Value(part)
            })
            .collect()
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emitter.same("Concat", vec![Attribute::int("axis", self.axis as i64)]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let mut answer = ArrayD::zeros(IxDyn(out.shape.dims()));
        let mut start = 0;
        for a in args {
            let end = start + a.shape()[self.axis];
            answer.slice_axis_mut(Axis(self.axis), Range::from(start..end)).assign(a);
            start = end;
        }
        answer
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(0, args, out)
    }
}

/// Zeros before and after along one axis: the gradient of a slice.
///
/// # Constraints
/// - C1: a float operand · C2: the axis is inside the rank
#[derive(Clone, Debug, PartialEq)]
pub struct Pad {
    /// The axis that grows.
    pub axis: usize,
    /// Zeros before the first element.
    pub before: usize,
    /// Zeros after the last element.
    pub after: usize,
}

impl Rules for Pad {
    fn name(&self) -> &'static str {
        "Pad"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if !args[0].dtype.is_float() {
            return refuse("C1: a float operand");
        }
        let mut dims = args[0].shape.0.clone();
        let Some(size) = dims.get_mut(self.axis) else {
            return refuse(format!("C2: an axis inside the rank, not {}", self.axis));
        };
        *size += self.before + self.after;
        Ok(Type { dtype: args[0].dtype, shape: Shape(dims) })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct.slice(self.axis, self.before, self.before + args[0].dim(self.axis)))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let rank = emitter.arg_type(0).shape.rank();
        let mut pads = vec![0_i64; 2 * rank];
        pads[self.axis] = self.before as i64;
        pads[rank + self.axis] = self.after as i64;
        let pads = emitter.int_list(&pads);
        let x = emitter.arg(0).to_owned();
        emitter.node("Pad", &[&x, &pads], vec![]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let mut answer = ArrayD::zeros(IxDyn(out.shape.dims()));
        let end = self.before + args[0].shape()[self.axis];
        answer.slice_axis_mut(Axis(self.axis), Range::from(self.before..end)).assign(args[0]);
        answer
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(0, args, out)
    }
}
