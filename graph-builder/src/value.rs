//! The copyable handle on a value, with one method an op.

mod fused;
mod image;

use std::ops;

use crate::builder::Builder;
use crate::graph::ValueId;
use crate::op::Op;
use crate::ops::elementwise as ew;
use crate::ops::index::Gather;
use crate::ops::layout::{Broadcast, Concat, Pad, Reshape, Slice, Transpose};
use crate::ops::linalg::MatMul;
use crate::ops::nn::{LayerNorm, Softmax};
use crate::ops::reduce::{Mean, Sum};
use crate::ops::several::{Part, Split};
use crate::shape::{DType, Shape, Type};

/// A value of the graph under construction: an id and its builder.
#[derive(Clone, Copy)]
#[must_use]
pub struct Value<'g> {
    pub(crate) id: ValueId,
    pub(crate) builder: &'g Builder,
}

impl std::fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "%{} : {}", self.id.0, self.ty())
    }
}

impl<'g> Value<'g> {
    /// The builder that the value belongs to.
    pub fn builder(self) -> &'g Builder {
        self.builder
    }

    /// Element type and shape; a scalar f32 once construction has failed.
    pub fn ty(self) -> Type {
        self.builder
            .with_graph(|g| g.nodes.get(self.id.index()).map(|n| n.ty.clone()))
            .unwrap_or(Type::f32([]))
    }

    /// Axis sizes.
    pub fn shape(self) -> Shape {
        self.ty().shape
    }

    /// Size of axis `i`; 1 once construction has failed.
    pub fn dim(self, i: usize) -> usize {
        self.shape().0.get(i).copied().unwrap_or(1)
    }

    #[track_caller]
    pub(crate) fn unary(self, op: impl Into<Op>) -> Self {
        self.builder.push(op.into(), &[self])
    }

    #[track_caller]
    pub(crate) fn binary(self, op: impl Into<Op>, other: Self) -> Self {
        self.builder.push(op.into(), &[self, other])
    }

    /// `eˣ`.
    #[track_caller]
    pub fn exp(self) -> Self {
        self.unary(ew::Exp)
    }

    /// Natural logarithm.
    #[track_caller]
    pub fn log(self) -> Self {
        self.unary(ew::Log)
    }

    /// Square root.
    #[track_caller]
    pub fn sqrt(self) -> Self {
        self.unary(ew::Sqrt)
    }

    /// Sine; radians.
    #[track_caller]
    pub fn sin(self) -> Self {
        self.unary(ew::Sin)
    }

    /// Cosine; radians.
    #[track_caller]
    pub fn cos(self) -> Self {
        self.unary(ew::Cos)
    }

    /// Hyperbolic tangent.
    #[track_caller]
    pub fn tanh(self) -> Self {
        self.unary(ew::Tanh)
    }

    /// Logistic function.
    #[track_caller]
    pub fn sigmoid(self) -> Self {
        self.unary(ew::Sigmoid)
    }

    /// `x · sigmoid(x)`.
    #[track_caller]
    pub fn silu(self) -> Self {
        self * self.sigmoid()
    }

    /// GELU with the tanh approximation.
    #[track_caller]
    pub fn gelu(self) -> Self {
        self.unary(ew::Gelu)
    }

    /// `max(x, 0)`.
    #[track_caller]
    pub fn relu(self) -> Self {
        self.unary(ew::Relu)
    }

    /// `x²`.
    #[track_caller]
    pub fn square(self) -> Self {
        self * self
    }

    /// Identity whose gradient is zero.
    #[track_caller]
    pub fn stop_gradient(self) -> Self {
        self.unary(ew::StopGradient)
    }

    /// Conversion to another element type; floats are truncated towards zero on their way to integers.
    #[track_caller]
    pub fn cast(self, to: DType) -> Self {
        self.unary(ew::Cast { to })
    }

    /// Elementwise larger of the two.
    #[track_caller]
    pub fn maximum(self, other: Self) -> Self {
        self.binary(ew::Maximum, other)
    }

    /// `self < other`, a truth value.
    #[track_caller]
    pub fn less(self, other: Self) -> Self {
        self.binary(ew::Less, other)
    }

    /// `self = other`, a truth value.
    #[track_caller]
    pub fn equal(self, other: Self) -> Self {
        self.binary(ew::Equal, other)
    }

    /// `self` where it is true picks from `a`, elsewhere from `b`.
    #[track_caller]
    pub fn select(self, a: Self, b: Self) -> Self {
        self.builder.push(ew::Select.into(), &[self, a, b])
    }

    /// Sum over `axes`, which stay with size 1.
    #[track_caller]
    pub fn sum(self, axes: &[usize]) -> Self {
        self.unary(Sum { axes: axes.to_vec() })
    }

    /// Mean over `axes`, which stay with size 1.
    #[track_caller]
    pub fn mean(self, axes: &[usize]) -> Self {
        self.unary(Mean { axes: axes.to_vec() })
    }

    /// The same elements in another shape, row-major.
    #[track_caller]
    pub fn reshape(self, shape: impl Into<Shape>) -> Self {
        self.unary(Reshape { shape: shape.into() })
    }

    /// Axes in another order: axis `i` of the answer is axis `perm[i]`.
    #[track_caller]
    pub fn transpose(self, perm: &[usize]) -> Self {
        self.unary(Transpose { perm: perm.to_vec() })
    }

    /// Copies along axes of size 1 (and new leading axes) up to `shape`.
    #[track_caller]
    pub fn broadcast(self, shape: impl Into<Shape>) -> Self {
        self.unary(Broadcast { shape: shape.into() })
    }

    /// Elements `start..end` of one axis.
    #[track_caller]
    pub fn slice(self, axis: usize, start: usize, end: usize) -> Self {
        self.unary(Slice { axis, start, end })
    }

    /// `N` equal pieces of one axis, in order; a size that `N` does not divide is refused.
    #[track_caller]
    pub fn chunk<const N: usize>(self, axis: usize) -> [Self; N] {
        let results = self.split(axis, N).results();
        std::array::from_fn(|i| results.get(i).copied().unwrap_or(self))
    }

    /// `count` equal pieces of one axis as one op; [`Value::results`] are the pieces.
    #[track_caller]
    pub fn split(self, axis: usize, count: usize) -> Self {
        self.unary(Split { axis, count })
    }

    /// The results of an op that has several, in order; of any other op its answer.
    #[track_caller]
    pub fn results(self) -> Vec<Self> {
        let shapes = self.builder.with_graph(|g| g.nodes.get(self.id.index()).map(|_| g.results(self.id)));
        let shapes = shapes.unwrap_or_default();
        if shapes.len() <= 1 {
            return vec![self];
        }
        let mut offset = 0;
        let parts = shapes.into_iter().enumerate().map(|(index, shape)| {
            let part = Part { index, offset, shape };
            offset += part.shape.numel();
            self.unary(part)
        });
        parts.collect()
    }

    /// `self` and `others` one after the other along `axis`.
    #[track_caller]
    pub fn concat(self, others: &[Self], axis: usize) -> Self {
        let all: Vec<Self> = std::iter::once(self).chain(others.iter().copied()).collect();
        self.builder.push(Concat { axis }.into(), &all)
    }

    /// Zeros before and after along `axis`.
    #[track_caller]
    pub fn pad(self, axis: usize, before: usize, after: usize) -> Self {
        self.unary(Pad { axis, before, after })
    }

    /// Matrix product of the last two axes; leading axes broadcast.
    #[track_caller]
    pub fn matmul(self, other: Self) -> Self {
        self.binary(MatMul, other)
    }

    /// Rows `indices` of the table `self`.
    #[track_caller]
    pub fn gather(self, indices: Self) -> Self {
        self.binary(Gather, indices)
    }

    /// Softmax over the last axis.
    #[track_caller]
    pub fn softmax(self) -> Self {
        self.unary(Softmax)
    }

    /// Layer normalisation over the last axis, no affine map, biased variance.
    #[track_caller]
    pub fn layer_norm(self, epsilon: f64) -> Self {
        self.unary(LayerNorm { epsilon })
    }
}

macro_rules! operators {
    ($($trait:ident $method:ident $op:ident),+) => {$(
        impl<'g> ops::$trait for Value<'g> {
            type Output = Self;
            #[track_caller]
            fn $method(self, other: Self) -> Self { self.binary(ew::$op, other) }
        }
        impl<'g> ops::$trait<f64> for Value<'g> {
            type Output = Self;
            #[track_caller]
            fn $method(self, other: f64) -> Self { self.binary(ew::$op, self.builder.scalar(other)) }
        }
        impl<'g> ops::$trait<Value<'g>> for f64 {
            type Output = Value<'g>;
            #[track_caller]
            fn $method(self, other: Value<'g>) -> Value<'g> { other.builder.scalar(self).binary(ew::$op, other) }
        }
    )+};
}
operators!(Add add Add, Sub sub Sub, Mul mul Mul, Div div Div);

impl ops::Neg for Value<'_> {
    type Output = Self;
    #[track_caller]
    fn neg(self) -> Self {
        self.unary(ew::Neg)
    }
}
