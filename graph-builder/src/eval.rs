//! The reference interpreter: plain loops in f64. Slow, and the truth that everything else is compared with.

use std::collections::BTreeMap;

use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};

use crate::error::{GraphError, Result};
use crate::graph::Graph;
use crate::op::Op;
use crate::shape::{DType, Shape, Type};

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

/// The type with as many digits as the interpreter has, where it is a float.
fn real(dtype: DType) -> DType {
    if dtype.is_float() { DType::F32 } else { dtype }
}

/// The nearest number of the element type, ties to even; beyond its range infinity. Others as they are.
///
/// By way of f32, in which every kernel computes.
fn round(dtype: DType, v: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(v as f32),
        DType::F16 => f16::from_f32(v as f32).to_f64(),
        DType::Bf16 => bf16::from_f32(v as f32).to_f64(),
        DType::I64 | DType::Bool => v,
    }
}

/// What a fused op holds inside in its operands' type because it goes into a matrix product: rounded where the type is
/// narrower than f32.
pub(crate) fn operand(dtype: DType, x: Array) -> Array {
    if matches!(dtype, DType::F16 | DType::Bf16) { x.mapv_into(|v| round(dtype, v)) } else { x }
}

impl Graph {
    /// Values of all outputs, in order, for the given inputs and parameters (by name), in f64 throughout: conversions
    /// between float types change nothing.
    ///
    /// # Errors
    /// [`GraphError::Feed`] when a value is missing or has another shape.
    pub fn eval(&self, feeds: &BTreeMap<String, Array>) -> Result<Vec<Array>> {
        self.eval_as(feeds, |ty| Type { dtype: real(ty.dtype), ..ty.clone() }, |_, value| value)
    }

    /// [`Graph::eval`] as hardware rounds: every value is rounded to its element type, f16 overflows to infinity. A
    /// fused op rounds what its kernel rounds: its answer, and what goes into a matrix product; its sums are wider.
    ///
    /// # Errors
    /// As [`Graph::eval`].
    pub fn eval_rounded(&self, feeds: &BTreeMap<String, Array>) -> Result<Vec<Array>> {
        self.eval_as(feeds, Type::clone, |dtype, value| value.mapv_into(|v| round(dtype, v)))
    }

    fn eval_as(
        &self,
        feeds: &BTreeMap<String, Array>,
        seen: impl Fn(&Type) -> Type,
        finish: impl Fn(DType, Array) -> Array,
    ) -> Result<Vec<Array>> {
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
                    op.rules().eval(&args, &seen(&node.ty))
                }
            };
            for a in &node.args {
                left[a.index()] -= 1;
                if left[a.index()] == 0 {
                    values[a.index()] = None;
                }
            }
            values[i] = Some(finish(node.ty.dtype, value));
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

#[cfg(test)]
mod tests {
    use ndarray::arr1;

    use super::*;
    use crate::{Builder, Precision};

    #[test]
    fn values_are_rounded_to_their_types() {
        let b = Builder::new("rounding");
        let x = b.input("x", Type::f32([3]));
        for dtype in [DType::F16, DType::Bf16] {
            b.output(&dtype.to_string(), x.cast(dtype));
        }
        b.output("f32", x * 1.0);
        let graph = b.finish().unwrap();
        let x = arr1(&[1.0 + 3.0 / 1024.0 / 2.0, 70_000.0, 0.1]).into_dyn();
        let feeds = BTreeMap::from([("x".to_owned(), x.clone())]);
        assert_eq!(graph.eval(&feeds).unwrap(), [x.clone(), x.clone(), x]);
        let rounded = graph.eval_rounded(&feeds).unwrap();
        // A tie goes to the even neighbour; f16 ends at 65504.
        assert_eq!(rounded[0], arr1(&[1.0 + 2.0 / 1024.0, f64::INFINITY, 0.099_975_585_937_5]).into_dyn());
        assert_eq!(rounded[1], arr1(&[1.0, 70_144.0, 0.100_097_656_25]).into_dyn());
        assert_eq!(rounded[2][0], 1.0 + 3.0 / 2048.0);
        assert_eq!(rounded[2][2], f64::from(0.1_f32));
    }

    #[test]
    fn what_goes_into_a_product_is_rounded_inside_a_fused_op() {
        let b = Builder::new("inside");
        let x = b.input("x", Type::f32([1, 2]));
        let [w, bias] =
            [("w", vec![1, 2]), ("b", vec![1])].map(|(name, shape)| b.input(name, Type::f32(shape)));
        b.output("y", x.activated_linear(crate::Activation::Gelu, w, bias));
        let graph = b.finish().unwrap().in_precision(Precision::Bf16).unwrap();
        let at = |values: &[f64], shape: &[usize]| Array::from_shape_vec(shape, values.to_vec()).unwrap();
        let feeds = BTreeMap::from([
            ("x".to_owned(), at(&[0.5, -0.5], &[1, 2])),
            ("w".to_owned(), at(&[1.0, 1.0], &[1, 2])),
            ("b".to_owned(), at(&[0.0], &[1])),
        ]);
        let gelu = [0.5, -0.5].map(|x| round(DType::Bf16, crate::ops::elementwise::gelu(x)));
        let want = round(DType::Bf16, gelu[0] + gelu[1]);
        assert_eq!(graph.eval_rounded(&feeds).unwrap()[0].sum(), want);
    }
}
