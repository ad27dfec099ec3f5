//! Normalisations that ONNX has as ops, and their gradients, which are fused ops of our own.

use ndarray::{Axis, Zip};

use crate::error::{Refusal, refuse};
use crate::eval::Array;
use crate::onnx::{Attribute, Emitter, FunctionBody};
use crate::op::{Cost, Grad, Policy, Rules, Storage};
use crate::shape::Type;
use crate::value::Value;

/// One float operand of rank 1 or more.
pub(crate) fn last_axis_operand(ty: &Type) -> Result<Type, Refusal> {
    if !ty.dtype.is_float() {
        return refuse("C1: a float operand");
    }
    if ty.shape.rank() == 0 { refuse("C2: rank 1 or more") } else { Ok(ty.clone()) }
}

/// Applies `f` to every row of the last axis.
fn map_rows(x: &Array, f: impl Fn(&[f64]) -> Vec<f64>) -> Array {
    let mut answer = x.clone();
    let last = Axis(x.ndim() - 1);
    Zip::from(answer.lanes_mut(last)).and(x.lanes(last)).for_each(|mut out, row| {
        let values = f(&row.to_vec());
        out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
    });
    answer
}

/// Mean and `1/√(var + ε)` of a row, biased variance.
fn moments(row: &[f64], epsilon: f64) -> (f64, f64) {
    let n = row.len() as f64;
    let mean = row.iter().sum::<f64>() / n;
    let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

/// C1: two float operands of one type.
pub(crate) fn twins(args: &[&Type]) -> Result<Type, Refusal> {
    if args[0] != args[1] || !args[0].dtype.is_float() {
        return refuse("C1: two float operands of one dtype and shape");
    }
    Ok(args[0].clone())
}

/// C1: two float operands of one type; C2: with rows.
fn twin_rows(args: &[&Type]) -> Result<Type, Refusal> {
    last_axis_operand(&twins(args)?)
}

/// Applies `f` to each pair of rows of the last axis.
fn map_row_pairs(a: &Array, b: &Array, f: impl Fn(&[f64], &[f64]) -> Vec<f64>) -> Array {
    let mut answer = a.clone();
    let last = ndarray::Axis(a.ndim() - 1);
    Zip::from(answer.lanes_mut(last)).and(a.lanes(last)).and(b.lanes(last)).for_each(|mut out, a, b| {
        out.iter_mut().zip(f(&a.to_vec(), &b.to_vec())).for_each(|(o, v)| *o = v);
    });
    answer
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
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
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

/// Gradient of softmax over the last axis: `y ⊙ (ct − Σ ct ⊙ y)`.
///
/// # Shapes
/// - `y` (the softmax), `ct`: one shape; returns that shape
/// # Constraints
/// - C1: two float operands of one dtype and shape · C2: rank 1 or more
#[derive(Clone, Debug, PartialEq)]
pub struct SoftmaxGrad;

impl Rules for SoftmaxGrad {
    fn name(&self) -> &'static str {
        "SoftmaxGrad"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        twin_rows(args)
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None, Grad::None]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("SoftmaxGrad", &["y", "ct"], &[]).of(emitter.dtype());
        let [y, ct] = ["y", "ct"].map(|v| f.wide(v));
        let weighted = f.node("Mul", &[&y, &ct]);
        let last = f.int_list(&[-1]);
        let sum = f.node("ReduceSum", &[&weighted, &last]);
        let centred = f.node("Sub", &[&ct, &sum]);
        f.rounded_result("Mul", &[&y, &centred]);
        emitter.native(f, vec![]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        map_row_pairs(args[0], args[1], |y, ct| {
            let dot: f64 = y.iter().zip(ct).map(|(y, c)| y * c).sum();
            y.iter().zip(ct).map(|(y, c)| y * (c - dot)).collect()
        })
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(4, args, out)
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
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
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
        layer_norm(args[0], self.epsilon)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(8, args, out)
    }
}

/// Nodes for `x̂ = (x − mean) / √(var + ε)` over the axes `last`, and for the root; `x` is f32, ε is the function's
/// attribute.
pub(crate) fn normalised(f: &mut FunctionBody, x: &str, last: &str) -> (String, String) {
    let epsilon = f.scalar_attribute("epsilon");
    let mean = f.node("ReduceMean", &[x, last]);
    let centred = f.node("Sub", &[x, &mean]);
    let square = f.node("Mul", &[&centred, &centred]);
    let variance = f.node("ReduceMean", &[&square, last]);
    let variance = f.node("Add", &[&variance, &epsilon]);
    let deviation = f.node("Sqrt", &[&variance]);
    (f.node("Div", &[&centred, &deviation]), deviation)
}

/// Nodes for `ct − mean(ct) − x̂·mean(ct ⊙ x̂)` over the axes `last`: layer norm's gradient times the deviation.
pub(crate) fn layer_norm_grad_nodes(f: &mut FunctionBody, normal: &str, ct: &str, last: &str) -> String {
    let ct_mean = f.node("ReduceMean", &[ct, last]);
    let weighted = f.node("Mul", &[ct, normal]);
    let dot = f.node("ReduceMean", &[&weighted, last]);
    let along = f.node("Mul", &[normal, &dot]);
    let rest = f.node("Sub", &[ct, &ct_mean]);
    f.node("Sub", &[&rest, &along])
}

/// `(x − mean) / √(var + ε)` of every row.
pub(crate) fn layer_norm(x: &Array, epsilon: f64) -> Array {
    map_rows(x, |row| {
        let (mean, rstd) = moments(row, epsilon);
        row.iter().map(|v| (v - mean) * rstd).collect()
    })
}

/// The gradient of [`layer_norm`].
pub(crate) fn layer_norm_grad(x: &Array, ct: &Array, epsilon: f64) -> Array {
    map_row_pairs(x, ct, |x, ct| {
        let (mean, rstd) = moments(x, epsilon);
        let n = x.len() as f64;
        let ct_mean = ct.iter().sum::<f64>() / n;
        let dot = x.iter().zip(ct).map(|(x, c)| (x - mean) * rstd * c).sum::<f64>() / n;
        x.iter().zip(ct).map(|(x, c)| rstd * (c - ct_mean - (x - mean) * rstd * dot)).collect()
    })
}

/// Gradient of layer normalisation without affine map: `r(ct − mean(ct) − x̂·mean(ct ⊙ x̂))`, `x̂ = (x − mean)·r`.
///
/// # Shapes
/// - `x`, `ct`: one shape; returns that shape
/// # Constraints
/// - C1: two float operands of one dtype and shape · C2: rank 1 or more
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNormGrad {
    /// Added to the variance.
    pub epsilon: f64,
}

impl Rules for LayerNormGrad {
    fn name(&self) -> &'static str {
        "LayerNormGrad"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        twin_rows(args)
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None, Grad::None]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("LayerNormGrad", &["x", "ct"], &["epsilon"]).of(emitter.dtype());
        let [x, ct] = ["x", "ct"].map(|v| f.wide(v));
        let last = f.int_list(&[-1]);
        let (normal, deviation) = normalised(&mut f, &x, &last);
        let rest = layer_norm_grad_nodes(&mut f, &normal, &ct, &last);
        f.rounded_result("Div", &[&rest, &deviation]);
        emitter.native(f, vec![Attribute::float("epsilon", self.epsilon)]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        layer_norm_grad(args[0], args[1], self.epsilon)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(14, args, out)
    }
}
