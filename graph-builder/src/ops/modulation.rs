//! The conditioning of adaLN: modulated layer norm and gated residual, with their gradients.

use ndarray::{Axis, Zip};

use crate::error::{Refusal, refuse};
use crate::eval::{Array, bundle, expand};
use crate::onnx::{Attribute, Emitter, FunctionBody};
use crate::op::{Cost, Grad, Policy, Rules, Storage, traffic};
use crate::ops::nn::{layer_norm, layer_norm_grad, layer_norm_grad_nodes, normalised};
use crate::shape::{Shape, Type};
use crate::value::Value;

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

/// The two results of an op.
pub(crate) fn pair(value: Value<'_>) -> [Value<'_>; 2] {
    let results = value.results();
    [0, 1].map(|i| results.get(i).copied().unwrap_or(value))
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

impl Rules for LayerNormModulate {
    fn name(&self) -> &'static str {
        "LayerNormModulate"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        conditioned(args[0], &args[1..])
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let grad = args[0].layer_norm_modulate_grad(args[2], ct, None, self.epsilon);
        grad.results().into_iter().map(Grad::Value).collect()
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let inputs = ["x", "shift", "scale"];
        let mut f = FunctionBody::new("LayerNormModulate", &inputs, &["epsilon"]).of(emitter.dtype());
        let [x, shift, scale] = inputs.map(|v| f.wide(v));
        let last = f.int_list(&[-1]);
        let one = f.scalar(1.0);
        let (normal, _) = normalised(&mut f, &x, &last);
        let scale1 = f.node("Add", &[&scale, &one]);
        let scaled = f.node("Mul", &[&normal, &scale1]);
        f.rounded_result("Add", &[&scaled, &shift]);
        emitter.native(f, vec![Attribute::float("epsilon", self.epsilon)]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        Zip::from(&layer_norm(args[0], self.epsilon))
            .and(&expand(args[1], &out.shape))
            .and(&expand(args[2], &out.shape))
            .map_collect(|n, shift, scale| n * (1.0 + scale) + shift)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(10, args, out)
    }
}

/// Gradient of [`LayerNormModulate`]: `dx = LN'(x)ᵀ(ct ⊙ (1 + scale))`, `dshift = Σ_T ct`, `dscale = Σ_T ct ⊙ LN(x)`.
///
/// A fourth operand, the cotangent that reaches `x` past the branch, is added to `dx`.
///
/// # Shapes
/// - `x`, `ct`: `(N, T, D)`, `scale`: `(N, 1, D)`, optional `residual`: `(N, T, D)`
/// - three results: `dx` `(N, T, D)`, `dshift` and `dscale` `(N, 1, D)`
/// # Constraints
/// - C1: one float dtype, rank 3 · C2: `scale` is `(N, 1, D)` · C3: `ct` and `residual` have the type of `x`
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNormModulateGrad {
    /// Added to the variance.
    pub epsilon: f64,
}

impl Rules for LayerNormModulateGrad {
    fn name(&self) -> &'static str {
        "LayerNormModulateGrad"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args[2..].iter().any(|t| *t != args[0]) {
            return refuse("C3: cotangents of the type of x");
        }
        let x = conditioned(args[0], &args[1..2])?;
        Ok(Type::new(x.dtype, [x.shape.numel() + 2 * args[1].shape.numel()]))
    }
    fn results(&self, args: &[&Type], _: &Type) -> Vec<Shape> {
        [0, 1, 1].map(|i| args[i].shape.clone()).into()
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None; args.len()]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let residual = emitter.arity() == 4;
        let (inputs, variant): (&[&str], _) = if residual {
            (&["x", "scale", "ct", "residual"], "Residual")
        } else {
            (&["x", "scale", "ct"], "")
        };
        let f = FunctionBody::new("LayerNormModulateGrad", inputs, &["epsilon"]);
        let mut f = f.of(emitter.dtype()).variant(variant);
        let [x, scale, ct] = ["x", "scale", "ct"].map(|v| f.wide(v));
        let (last, tokens, one) = (f.int_list(&[-1]), f.int_list(&[1]), f.scalar(1.0));
        let (normal, deviation) = normalised(&mut f, &x, &last);
        let scale1 = f.node("Add", &[&scale, &one]);
        let scaled = f.node("Mul", &[&ct, &scale1]);
        let rest = layer_norm_grad_nodes(&mut f, &normal, &scaled, &last);
        if residual {
            let dx = f.node("Div", &[&rest, &deviation]);
            let residual = f.wide("residual");
            f.rounded_result("Add", &[&residual, &dx]);
        } else {
            f.rounded_result("Div", &[&rest, &deviation]);
        }
        f.rounded_result("ReduceSum", &[&ct, &tokens]);
        let weighted = f.node("Mul", &[&ct, &normal]);
        f.rounded_result("ReduceSum", &[&weighted, &tokens]);
        emitter.native(f, vec![Attribute::float("epsilon", self.epsilon)]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        let (x, ct) = (args[0], args[2]);
        let scale = expand(args[1], &Shape::from(x.shape()));
        let scaled = Zip::from(ct).and(&scale).map_collect(|ct, scale| ct * (1.0 + scale));
        let mut dx = layer_norm_grad(x, &scaled, self.epsilon);
        if let Some(residual) = args.get(3) {
            dx += *residual;
        }
        bundle(&[dx, ct.sum_axis(Axis(1)), (ct * &layer_norm(x, self.epsilon)).sum_axis(Axis(1))])
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        // Scaling, layer norm's gradient, and a sum, a product and a sum for the rows.
        let per_element = 1 + 14 + 3 + u64::from(args.len() == 4);
        Cost { macs: 0, flops: per_element * args[0].shape.numel() as u64, bytes: traffic(args, out) }
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
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args[2] != args[0] {
            return refuse("C3: a branch of the type of x");
        }
        conditioned(args[0], &args[1..2])
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let [dy, dgate] = pair(args[1].gate_residual_grad(args[2], ct));
        vec![Grad::Value(ct), Grad::Value(dgate), Grad::Value(dy)]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let inputs = ["x", "gate", "y"];
        let mut f = FunctionBody::new("GateResidual", &inputs, &[]).of(emitter.dtype());
        let [x, gate, y] = inputs.map(|v| f.wide(v));
        let gated = f.node("Mul", &[&gate, &y]);
        f.rounded_result("Add", &[&x, &gated]);
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

/// Gradient of [`GateResidual`]: `dy = gate ⊙ ct`, `dgate = Σ_T ct ⊙ y`; that of `x` is `ct` itself.
///
/// # Shapes
/// - `gate`: `(N, 1, D)`, `y`, `ct`: `(N, T, D)`; two results: `dy` `(N, T, D)` and `dgate` `(N, 1, D)`
/// # Constraints
/// - C1: one float dtype, rank 3 · C2: `gate` is `(N, 1, D)` · C3: `ct` has the type of `y`
#[derive(Clone, Debug, PartialEq)]
pub struct GateResidualGrad;

impl Rules for GateResidualGrad {
    fn name(&self) -> &'static str {
        "GateResidualGrad"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args[2] != args[1] {
            return refuse("C3: a cotangent of the type of the branch");
        }
        let y = conditioned(args[1], &args[..1])?;
        Ok(Type::new(y.dtype, [y.shape.numel() + args[0].shape.numel()]))
    }
    fn results(&self, args: &[&Type], _: &Type) -> Vec<Shape> {
        vec![args[1].shape.clone(), args[0].shape.clone()]
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None; 3]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let inputs = ["gate", "y", "ct"];
        let mut f = FunctionBody::new("GateResidualGrad", &inputs, &[]).of(emitter.dtype());
        let [gate, y, ct] = inputs.map(|v| f.wide(v));
        let tokens = f.int_list(&[1]);
        f.rounded_result("Mul", &[&gate, &ct]);
        let weighted = f.node("Mul", &[&ct, &y]);
        f.rounded_result("ReduceSum", &[&weighted, &tokens]);
        emitter.native(f, vec![]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        let gate = expand(args[0], &Shape::from(args[1].shape()));
        bundle(&[&gate * args[2], (args[1] * args[2]).sum_axis(Axis(1))])
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost { macs: 0, flops: 3 * args[1].shape.numel() as u64, bytes: traffic(args, out) }
    }
}
