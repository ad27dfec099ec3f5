//! What a model author holds: [`Builder`], [`Scope`] and the copyable [`Value`].
//!
//! Operators cannot return `Result`, so the builder keeps the first error with the author's scope and source
//! line; later ops go quiet and [`Builder::finish`] returns it.

use std::cell::RefCell;
use std::ops;
use std::panic::Location;
use std::sync::Arc;

use crate::error::{GraphError, Place, Result};
use crate::graph::{Dim, Graph, Init, PARAMETER_DTYPE, Parameter, ValueId};
use crate::op::Op;
use crate::ops::elementwise as ew;
use crate::ops::fused;
use crate::ops::index::Gather;
use crate::ops::layout::{Broadcast, Concat, Pad, Reshape, Slice, Transpose};
use crate::ops::leaf::{Constant, Input, ParameterRef};
use crate::ops::linalg::MatMul;
use crate::ops::nn::{LayerNorm, Softmax};
use crate::ops::reduce::{Mean, Sum};
use crate::shape::{DType, Shape, Type};

struct State {
    graph: Graph,
    error: Option<GraphError>,
    scope: String,
    /// Place of the forward node whose gradient is being built.
    backward_of: Option<Place>,
}

/// Builds one graph. Consumed by [`Builder::finish`], so no [`Value`] can outlive it.
pub struct Builder {
    state: RefCell<State>,
}

/// A value of the graph under construction: an id and its builder.
#[derive(Clone, Copy)]
#[must_use]
pub struct Value<'g> {
    pub(crate) id: ValueId,
    builder: &'g Builder,
}

impl std::fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "%{} : {}", self.id.0, self.ty())
    }
}

/// A place in the parameter tree; its path becomes parameter names and labels nodes.
#[derive(Clone)]
pub struct Scope<'g> {
    builder: &'g Builder,
    path: String,
}

impl Builder {
    /// A builder of an empty graph called `name`.
    pub fn new(name: impl Into<String>) -> Self {
        Self::from_graph(Graph::new(name))
    }

    /// Continues a graph: passes rebuild through this.
    pub(crate) fn from_graph(graph: Graph) -> Self {
        Self { state: RefCell::new(State { graph, error: None, scope: String::new(), backward_of: None }) }
    }

    /// The top of the parameter tree.
    pub fn root(&self) -> Scope<'_> {
        Scope { builder: self, path: String::new() }
    }

    /// Declares a graph input.
    #[track_caller]
    pub fn input(&self, name: &str, ty: Type) -> Value<'_> {
        let taken = self.with_graph(|g| g.inputs().any(|(n, _)| n == name).then(|| g.name.clone()));
        if let Some(graph) = taken {
            self.fail(GraphError::DuplicateName { graph, kind: "input", name: name.into() });
        }
        self.push(Input { name: name.into(), ty }.into(), &[])
    }

    /// A scalar constant.
    #[track_caller]
    pub fn scalar(&self, value: f64) -> Value<'_> {
        self.constant(DType::F32, [0; 0], vec![value])
    }

    /// A constant of the given type; a single value fills the whole shape.
    #[track_caller]
    pub fn constant(&self, dtype: DType, shape: impl Into<Shape>, data: impl Into<Arc<[f64]>>) -> Value<'_> {
        self.push(Constant { ty: Type::new(dtype, shape), data: data.into() }.into(), &[])
    }

    /// Names and values of all trainable parameters in order of declaration.
    pub fn trainable(&self) -> Vec<(String, Value<'_>)> {
        let found: Vec<(String, ValueId)> = self.with_graph(|g| {
            let leaves = g.nodes.iter().enumerate().filter_map(|(i, n)| match &n.op {
                Op::Parameter(p) if g.parameters[p.index].trainable => {
                    Some((p.name.clone(), ValueId(i as u32)))
                }
                _ => None,
            });
            leaves.collect()
        });
        found.into_iter().map(|(name, id)| (name, self.value(id))).collect()
    }

    /// Names `value` as a graph output.
    pub fn output(&self, name: &str, value: Value<'_>) {
        let mut state = self.state.borrow_mut();
        if state.graph.outputs.iter().any(|(n, _)| n == name) {
            let graph = state.graph.name.clone();
            state.error.get_or_insert(GraphError::DuplicateName { graph, kind: "output", name: name.into() });
        }
        state.graph.outputs.push((name.into(), value.id));
    }

    /// The finished, verified graph, or the first error of its construction.
    pub fn finish(self) -> Result<Graph> {
        let state = self.state.into_inner();
        if let Some(error) = state.error {
            return Err(error);
        }
        crate::verify::verify(&state.graph, "build")?;
        Ok(state.graph)
    }

    /// A handle on an existing node.
    pub(crate) fn value(&self, id: ValueId) -> Value<'_> {
        Value { id, builder: self }
    }

    pub(crate) fn with_graph<T>(&self, read: impl FnOnce(&Graph) -> T) -> T {
        read(&self.state.borrow().graph)
    }

    pub(crate) fn fail(&self, error: GraphError) {
        self.state.borrow_mut().error.get_or_insert(error);
    }

    pub(crate) fn failed(&self) -> bool {
        self.state.borrow().error.is_some()
    }

    /// Labels the nodes built by `build` as the gradient of the node at `place`.
    pub(crate) fn backward<T>(&self, place: Place, build: impl FnOnce() -> T) -> T {
        self.state.borrow_mut().backward_of = Some(place);
        let answer = build();
        self.state.borrow_mut().backward_of = None;
        answer
    }

    #[track_caller]
    pub(crate) fn push(&self, op: Op, args: &[Value<'_>]) -> Value<'_> {
        let caller = Location::caller();
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let backward = state.backward_of.is_some();
        let place = state.backward_of.clone().unwrap_or_else(|| Place {
            scope: state.scope.clone(),
            file: caller.file(),
            line: caller.line(),
        });
        if state.error.is_none() {
            match state.graph.push(op, args.iter().map(|v| v.id).collect(), place, backward) {
                Ok(id) => return Value { id, builder: self },
                Err(error) => state.error = Some(error),
            }
        }
        // A poisoned value: later calls go quiet, `dim` answers 1.
        Value { id: ValueId(u32::MAX), builder: self }
    }
}

impl<'g> Scope<'g> {
    /// The child scope `name`, for parameter names only.
    #[must_use]
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Self { builder: self.builder, path }
    }

    /// Builds in the child scope `name`: its parameters and its nodes carry the path.
    pub fn within<T>(&self, name: impl std::fmt::Display, build: impl FnOnce(&Self) -> T) -> T {
        let child = self.at(name);
        let outer = std::mem::replace(&mut self.builder.state.borrow_mut().scope, child.path.clone());
        let answer = build(&child);
        self.builder.state.borrow_mut().scope = outer;
        answer
    }

    /// The builder, for constants and inputs.
    pub fn builder(&self) -> &'g Builder {
        self.builder
    }

    /// Declares a trainable parameter, or finds the one declared before under the same name.
    #[track_caller]
    pub fn param(&self, name: &str, dims: &[Dim], init: Init) -> Value<'g> {
        self.declare(name, dims, init, true)
    }

    /// Declares a parameter that is saved with the others and never trained.
    #[track_caller]
    pub fn frozen(&self, name: &str, dims: &[Dim], init: Init) -> Value<'g> {
        self.declare(name, dims, init, false)
    }

    #[track_caller]
    fn declare(&self, name: &str, dims: &[Dim], init: Init, trainable: bool) -> Value<'g> {
        let parameter = Parameter { name: self.at(name).path, dims: dims.to_vec(), init, trainable };
        let found = self.builder.with_graph(|g| g.parameters.iter().position(|p| p.name == parameter.name));
        let index = if let Some(index) = found {
            let before = self.builder.with_graph(|g| g.parameters[index].clone());
            if before != parameter {
                let caller = Location::caller();
                self.builder.fail(GraphError::Parameter {
                    name: parameter.name.clone(),
                    place: Place { scope: self.path.clone(), file: caller.file(), line: caller.line() },
                    before: before.declaration(),
                    now: parameter.declaration(),
                });
            }
            let known = self.builder.with_graph(|g| {
                g.nodes.iter().position(|n| matches!(&n.op, Op::Parameter(p) if p.index == index))
            });
            if let Some(node) = known {
                return self.builder.value(ValueId(node as u32));
            }
            index
        } else {
            let mut state = self.builder.state.borrow_mut();
            state.graph.parameters.push(parameter.clone());
            state.graph.parameters.len() - 1
        };
        let ty = Type::new(PARAMETER_DTYPE, parameter.shape());
        self.builder.push(ParameterRef { index, name: parameter.name, ty }.into(), &[])
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
    fn unary(self, op: impl Into<Op>) -> Self {
        self.builder.push(op.into(), &[self])
    }

    #[track_caller]
    fn binary(self, op: impl Into<Op>, other: Self) -> Self {
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

    /// `N` equal slices of one axis; a size that `N` does not divide is refused as a slice beyond the end.
    #[track_caller]
    pub fn chunk<const N: usize>(self, axis: usize) -> [Self; N] {
        let size = self.dim(axis).div_ceil(N);
        let mut parts = [self; N];
        for (i, part) in parts.iter_mut().enumerate() {
            *part = self.slice(axis, i * size, (i + 1) * size);
        }
        parts
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

    /// Derivative of [`Value::gelu`] at `self`, times the cotangent `ct`. It has no derivative of its own.
    #[track_caller]
    pub fn gelu_grad(self, ct: Self) -> Self {
        self.binary(fused::GeluGrad, ct)
    }

    /// The operand's cotangent of a softmax whose answer is `self`. It has no derivative of its own.
    #[track_caller]
    pub fn softmax_grad(self, ct: Self) -> Self {
        self.binary(fused::SoftmaxGrad, ct)
    }

    /// The operand's cotangent of [`Value::layer_norm`] at `self`. It has no derivative of its own.
    #[track_caller]
    pub fn layer_norm_grad(self, ct: Self, epsilon: f64) -> Self {
        self.binary(fused::LayerNormGrad { epsilon }, ct)
    }

    /// `LN(self) · (1 + scale) + shift` as one op; the passes find it in the long form too.
    #[track_caller]
    pub fn layer_norm_modulate(self, shift: Self, scale: Self, epsilon: f64) -> Self {
        self.builder.push(fused::LayerNormModulate { epsilon }.into(), &[self, shift, scale])
    }

    /// `self + gate · y` as one op; the passes find it in the long form too.
    #[track_caller]
    pub fn gate_residual(self, gate: Self, y: Self) -> Self {
        self.builder.push(fused::GateResidual.into(), &[self, gate, y])
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
