//! Fused ops of the domain `mudit`: each carries a function body in plain ONNX, so that the file runs anywhere,
//! and the runtime registers a native kernel of the same name.

use ndarray::Zip;

use crate::builder::Value;
use crate::error::{Refusal, refuse};
use crate::eval::{Array, expand};
use crate::onnx::{Attribute, Emitter, FunctionBody};
use crate::op::{Cost, Grad, Rules};
use crate::ops::elementwise::{GELU_CUBIC, GELU_SLOPE};
use crate::ops::nn::{last_axis_operand, moments};
use crate::shape::Type;

/// C1: two float operands of one type.
fn twins(args: &[&Type]) -> Result<Type, Refusal> {
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

/// Gradient of tanh-GELU: `ct · (½(1 + τ) + ½x(1 − τ²)·√(2/π)(1 + 3·0.044715x²))`, `τ = tanh(√(2/π)(x + 0.044715x³))`.
///
/// # Shapes
/// - `x`, `ct`: one shape; returns that shape
/// # Constraints
/// - C1: two float operands of one dtype and shape
#[derive(Clone, Debug, PartialEq)]
pub struct GeluGrad;

impl Rules for GeluGrad {
    fn name(&self) -> &'static str {
        "GeluGrad"
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        twins(args)
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None, Grad::None]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("GeluGrad", &["x", "ct"], &[]);
        let (half, one) = (f.scalar(0.5), f.scalar(1.0));
        let (slope, cubic, cubic3) = (
            f.scalar(GELU_SLOPE),
            f.scalar(GELU_SLOPE * GELU_CUBIC),
            f.scalar(3.0 * GELU_SLOPE * GELU_CUBIC),
        );
        let square = f.node("Mul", &["x", "x"]);
        let bent = f.node("Mul", &[&square, &cubic]);
        let bent = f.node("Add", &[&bent, &slope]);
        let inner = f.node("Mul", &["x", &bent]);
        let tanh = f.node("Tanh", &[&inner]);
        let tanh1 = f.node("Add", &[&tanh, &one]);
        let left = f.node("Mul", &[&tanh1, &half]);
        let tanh2 = f.node("Mul", &[&tanh, &tanh]);
        let sech2 = f.node("Sub", &[&one, &tanh2]);
        let slope_in = f.node("Mul", &[&square, &cubic3]);
        let slope_in = f.node("Add", &[&slope_in, &slope]);
        let right = f.node("Mul", &[&sech2, &slope_in]);
        let right = f.node("Mul", &[&right, "x"]);
        let right = f.node("Mul", &[&right, &half]);
        let slope_out = f.node("Add", &[&left, &right]);
        f.result("Mul", &[&slope_out, "ct"]);
        emitter.native(f, vec![]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        Zip::from(args[0]).and(args[1]).map_collect(|&x, &ct| {
            let tanh = (GELU_SLOPE * (x + GELU_CUBIC * x * x * x)).tanh();
            let inner = GELU_SLOPE * (1.0 + 3.0 * GELU_CUBIC * x * x);
            ct * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner)
        })
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(16, args, out)
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
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        twin_rows(args)
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None, Grad::None]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("SoftmaxGrad", &["y", "ct"], &[]);
        let weighted = f.node("Mul", &["y", "ct"]);
        let last = f.int_list(&[-1]);
        let sum = f.node("ReduceSum", &[&weighted, &last]);
        let centred = f.node("Sub", &["ct", &sum]);
        f.result("Mul", &["y", &centred]);
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

/// Nodes for `x̂ = (x − mean) / √(var + ε)` over the axes `last`, and for the root; ε is the function's attribute.
fn normalised(f: &mut FunctionBody, last: &str) -> (String, String) {
    let epsilon = f.scalar_attribute("epsilon");
    let mean = f.node("ReduceMean", &["x", last]);
    let centred = f.node("Sub", &["x", &mean]);
    let square = f.node("Mul", &[&centred, &centred]);
    let variance = f.node("ReduceMean", &[&square, last]);
    let variance = f.node("Add", &[&variance, &epsilon]);
    let deviation = f.node("Sqrt", &[&variance]);
    (f.node("Div", &[&centred, &deviation]), deviation)
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
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        twin_rows(args)
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None, Grad::None]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("LayerNormGrad", &["x", "ct"], &["epsilon"]);
        let last = f.int_list(&[-1]);
        let (normal, deviation) = normalised(&mut f, &last);
        let ct_mean = f.node("ReduceMean", &["ct", &last]);
        let weighted = f.node("Mul", &["ct", &normal]);
        let dot = f.node("ReduceMean", &[&weighted, &last]);
        let along = f.node("Mul", &[&normal, &dot]);
        let rest = f.node("Sub", &["ct", &ct_mean]);
        let rest = f.node("Sub", &[&rest, &along]);
        f.result("Div", &[&rest, &deviation]);
        emitter.native(f, vec![Attribute::float("epsilon", self.epsilon)]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        map_row_pairs(args[0], args[1], |x, ct| {
            let (mean, rstd) = moments(x, self.epsilon);
            let n = x.len() as f64;
            let ct_mean = ct.iter().sum::<f64>() / n;
            let dot = x.iter().zip(ct).map(|(x, c)| (x - mean) * rstd * c).sum::<f64>() / n;
            x.iter().zip(ct).map(|(x, c)| rstd * (c - ct_mean - (x - mean) * rstd * dot)).collect()
        })
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(14, args, out)
    }
}

/// Conditioned layer norm of adaLN: `LN(x) · (1 + scale) + shift`.
///
/// # Shapes
/// - `x`: `(N, T, D)`, `shift`, `scale`: `(N, 1, D)`; returns `(N, T, D)`
/// # Constraints
/// - C1: one float dtype, rank 3 · C2: `shift` and `scale` are `(N, 1, D)`
/// # Source
/// DiT, section 3.2 (adaLN).
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNormModulate {
    /// Added to the variance.
    pub epsilon: f64,
}

/// C1: one dtype, rank 3; C2: `rows` are `(N, 1, D)`.
fn conditioned(x: &Type, rows: &[&Type]) -> Result<Type, Refusal> {
    if !x.dtype.is_float() || x.shape.rank() != 3 || rows.iter().any(|r| r.dtype != x.dtype) {
        return refuse("C1: operands of one float dtype and rank 3");
    }
    let expected = [x.shape.0[0], 1, x.shape.0[2]];
    if rows.iter().any(|r| r.shape.dims() != expected) {
        return refuse(format!("C2: conditioning of shape {expected:?}"));
    }
    Ok(x.clone())
}

impl Rules for LayerNormModulate {
    fn name(&self) -> &'static str {
        "LayerNormModulate"
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        conditioned(args[0], &args[1..])
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let (x, scale) = (args[0], args[2]);
        let dx = x.layer_norm_grad(ct * (1.0 + scale), self.epsilon);
        vec![Grad::Value(dx), Grad::Value(ct), Grad::Value(ct * x.layer_norm(self.epsilon))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("LayerNormModulate", &["x", "shift", "scale"], &["epsilon"]);
        let last = f.int_list(&[-1]);
        let one = f.scalar(1.0);
        let (normal, _) = normalised(&mut f, &last);
        let scale1 = f.node("Add", &["scale", &one]);
        let scaled = f.node("Mul", &[&normal, &scale1]);
        f.result("Add", &[&scaled, "shift"]);
        emitter.native(f, vec![Attribute::float("epsilon", self.epsilon)]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let normal = crate::ops::nn::map_rows(args[0], |row| {
            let (mean, rstd) = moments(row, self.epsilon);
            row.iter().map(|v| (v - mean) * rstd).collect()
        });
        Zip::from(&normal)
            .and(&expand(args[1], &out.shape))
            .and(&expand(args[2], &out.shape))
            .map_collect(|n, shift, scale| n * (1.0 + scale) + shift)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(10, args, out)
    }
}

/// Gated residual branch of adaLN: `x + gate · y`.
///
/// # Shapes
/// - `x`, `y`: `(N, T, D)`, `gate`: `(N, 1, D)`; returns `(N, T, D)`
/// # Constraints
/// - C1: one float dtype, rank 3 · C2: `gate` is `(N, 1, D)` · C3: `y` has the type of `x`
/// # Source
/// DiT, section 3.2 (adaLN-Zero).
#[derive(Clone, Debug, PartialEq)]
pub struct GateResidual;

impl Rules for GateResidual {
    fn name(&self) -> &'static str {
        "GateResidual"
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args[2] != args[0] {
            return refuse("C3: a branch of the type of x");
        }
        conditioned(args[0], &args[1..2])
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct), Grad::Value(ct * args[2]), Grad::Value(ct * args[1])]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("GateResidual", &["x", "gate", "y"], &[]);
        let gated = f.node("Mul", &["gate", "y"]);
        f.result("Add", &["x", &gated]);
        emitter.native(f, vec![]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        Zip::from(args[0])
            .and(&expand(args[1], &out.shape))
            .and(args[2])
            .map_collect(|x, gate, y| x + gate * y)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(2, args, out)
    }
}
