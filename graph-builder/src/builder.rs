//! What a model author holds: [`Builder`], [`Scope`] and the copyable [`Value`].
//!
//! Operators cannot return `Result`, so the builder keeps the first error with the author's scope and source
//! line; later ops go quiet and [`Builder::finish`] returns it.

use std::cell::RefCell;
use std::panic::Location;
use std::sync::Arc;

use crate::error::{GraphError, Place, Result};
use crate::graph::{Dim, Graph, Init, PARAMETER_DTYPE, Parameter, ValueId};
use crate::op::Op;
use crate::ops::leaf::{Constant, Input, ParameterRef};
use crate::shape::{DType, Shape, Type};
use crate::value::Value;

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
        let (name, dims, dtype) = (self.at(name).path, dims.to_vec(), PARAMETER_DTYPE);
        let parameter = Parameter { name, dims, init, trainable, dtype };
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
        let ty = Type::new(parameter.dtype, parameter.shape());
        self.builder.push(ParameterRef { index, name: parameter.name, ty }.into(), &[])
    }
}
