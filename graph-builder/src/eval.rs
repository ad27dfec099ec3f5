//! The reference interpreter: plain loops in f64. Slow, and the truth that everything else is compared with.

use std::collections::BTreeMap;

use ndarray::{ArrayD, IxDyn};

use crate::error::{GraphError, Result};
use crate::graph::Graph;
use crate::op::Op;
use crate::shape::{Shape, Type};

/// A value of the interpreter; integers and truth values are held as f64 too.
pub type Array = ArrayD<f64>;

/// The array copied up to `shape`; shapes were checked when the graph was built.
pub(crate) fn expand(x: &Array, shape: &Shape) -> Array {
    x.broadcast(IxDyn(shape.dims()))
        .map_or_else(|| ArrayD::from_elem(IxDyn(shape.dims()), f64::NAN), |v| v.to_owned())
}

/// An array of `shape` with these values, row-major.
pub(crate) fn filled(shape: &Shape, values: impl IntoIterator<Item = f64>) -> Array {
    let mut array = ArrayD::zeros(IxDyn(shape.dims()));
    array.iter_mut().zip(values).for_each(|(a, v)| *a = v);
    array
}

/// The value of an op with several results: all their elements, one result after the other.
pub(crate) fn bundle(results: &[Array]) -> Array {
    results.iter().flat_map(|r| r.iter().copied()).collect::<ndarray::Array1<f64>>().into_dyn()
}

impl Graph {
    /// Values of all outputs, in order, for the given inputs and parameters (by name).
    ///
    /// # Errors
    /// [`GraphError::Feed`] when a value is missing or has another shape.
    pub fn eval(&self, feeds: &BTreeMap<String, Array>) -> Result<Vec<Array>> {
        let mut left = self.use_counts();
        let live = self.live();
        let mut values: Vec<Option<Array>> = vec![None; self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate().filter(|(i, _)| live[*i]) {
            let value = match &node.op {
                Op::Input(leaf) => self.feed(feeds, &leaf.name, &node.ty)?,
                Op::Parameter(leaf) => self.feed(feeds, &leaf.name, &node.ty)?,
                op => {
                    let args: Vec<&Array> =
                        node.args.iter().filter_map(|a| values[a.index()].as_ref()).collect();
                    op.rules().eval(&args, &node.ty)
                }
            };
            for a in &node.args {
                left[a.index()] -= 1;
                if left[a.index()] == 0 {
                    values[a.index()] = None;
                }
            }
            values[i] = Some(value);
        }
        Ok(self.outputs.iter().filter_map(|(_, id)| values[id.index()].clone()).collect())
    }

    fn feed(&self, feeds: &BTreeMap<String, Array>, name: &str, ty: &Type) -> Result<Array> {
        match feeds.get(name) {
            Some(value) if value.shape() == ty.shape.dims() => Ok(value.clone()),
            other => Err(GraphError::Feed {
                graph: self.name.clone(),
                name: name.into(),
                expected: ty.to_string(),
                got: other.map_or("nothing".into(), |v| format!("shape {:?}", v.shape())),
            }),
        }
    }
}
