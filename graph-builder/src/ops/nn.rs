//! Normalisations that ONNX has as ops; their gradients are fused ops of our own.

use ndarray::{Axis, Zip};

use crate::builder::Value;
use crate::error::{Refusal, refuse};
use crate::eval::Array;
use crate::onnx::{Attribute, Emitter};
use crate::op::{Cost, Grad, Rules};
use crate::shape::Type;

/// One float operand of rank 1 or more.
pub(crate) fn last_axis_operand(ty: &Type) -> Result<Type, Refusal> {
    if !ty.dtype.is_float() {
        return refuse("C1: a float operand");
    }
    if ty.shape.rank() == 0 { refuse("C2: rank 1 or more") } else { Ok(ty.clone()) }
}

/// Applies `f` to every row of the last axis.
pub(crate) fn map_rows(x: &Array, f: impl Fn(&[f64]) -> Vec<f64>) -> Array {
    let mut answer = x.clone();
    let last = Axis(x.ndim() - 1);
    Zip::from(answer.lanes_mut(last)).and(x.lanes(last)).for_each(|mut out, row| {
        let values = f(&row.to_vec());
        out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
    });
    answer
}

/// Mean and `1/√(var + ε)` of a row, biased variance.
pub(crate) fn moments(row: &[f64], epsilon: f64) -> (f64, f64) {
    let n = row.len() as f64;
    let mean = row.iter().sum::<f64>() / n;
    let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

/// Softmax over the last axis: `y = eˣ / Σ eˣ`.
///
/// # Constraints
/// - C1: a float operand · C2: rank 1 or more
#[derive(Clone, Debug, PartialEq)]
pub struct Softmax;

impl Rules for Softmax {
    fn name(&self) -> &'static str {
        "Softmax"
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        last_axis_operand(args[0])
    }
    fn vjp<'g>(&self, _: &[Value<'g>], out: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(out.softmax_grad(ct))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emitter.same("Softmax", vec![Attribute::int("axis", -1)]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        map_rows(args[0], |row| {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let e: Vec<f64> = row.iter().map(|v| (v - max).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|v| v / sum).collect()
        })
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(5, args, out)
    }
}

/// Layer normalisation over the last axis without an affine map: `y = (x − mean) / √(var + ε)`, biased variance.
///
/// # Constraints
/// - C1: a float operand · C2: rank 1 or more
/// # Source
/// ONNX LayerNormalization, opset 17, with a scale of ones.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNorm {
    /// Added to the variance.
    pub epsilon: f64,
}

impl Rules for LayerNorm {
    fn name(&self) -> &'static str {
        "LayerNormalization"
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        last_axis_operand(args[0])
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(args[0].layer_norm_grad(ct, self.epsilon))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let ty = emitter.arg_type(0).clone();
        let d = ty.shape.0[ty.shape.rank() - 1];
        let ones = emitter.ones(ty.dtype, d);
        let x = emitter.arg(0).to_owned();
        emitter.node(
            "LayerNormalization",
            &[&x, &ones],
            vec![Attribute::int("axis", -1), Attribute::float("epsilon", self.epsilon)],
        );
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        map_rows(args[0], |row| {
            let (mean, rstd) = moments(row, self.epsilon);
            row.iter().map(|v| (v - mean) * rstd).collect()
        })
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(8, args, out)
    }
}
