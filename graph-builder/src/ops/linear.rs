//! Linear layers, their two gradients, and the layer at the end of a gated branch.

use ndarray::{Array2, Axis};

use crate::error::{Refusal, refuse};
use crate::eval::{Array, bundle, expand, filled, operand};
use crate::onnx::{Attribute, Emitter, FunctionBody};
use crate::op::{Cost, Grad, Policy, Rules, Storage, traffic};
use crate::ops::activation::{Activation, GELU_GRAD_FLOPS, gelu_grad, gelu_slope_nodes};
use crate::ops::modulation::pair;
use crate::shape::{DType, Shape, Type};
use crate::value::Value;

/// Size of the last axis.
fn width(ty: &Type) -> usize {
    ty.shape.0.last().copied().unwrap_or(1)
}

/// The shape with another last axis.
fn resized(shape: &Shape, width: usize) -> Shape {
    let mut dims = shape.0.clone();
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    Shape(dims)
}

fn one_float_dtype(args: &[&Type]) -> Result<DType, Refusal> {
    let dtype = args[0].dtype;
    if !dtype.is_float() || args.iter().any(|a| a.dtype != dtype) {
        return refuse("C1: operands of one float dtype");
    }
    Ok(dtype)
}

/// Type of `act(x) Wᵀ + b`.
fn infer_linear(args: &[&Type]) -> Result<Type, Refusal> {
    let dtype = one_float_dtype(args)?;
    let (x, weight, bias) = (args[0], args[1], args[2]);
    if x.shape.rank() < 2 || weight.shape.rank() != 2 || bias.shape.rank() != 1 {
        return refuse("C2: rows, a matrix and a vector");
    }
    let (n, k) = (weight.shape.0[0], weight.shape.0[1]);
    if width(x) != k || bias.shape.0[0] != n {
        return refuse(format!("C3: rows of {k} and a bias of {n}"));
    }
    Ok(Type { dtype, shape: resized(&x.shape, n) })
}

/// The value as a matrix of its last axis.
fn matrix(x: &Array) -> Array2<f64> {
    let width = x.shape().last().copied().unwrap_or(1);
    let rows = x.len() / width.max(1);
    let values = x.iter().copied().collect();
    Array2::from_shape_vec((rows, width), values)
        .unwrap_or_else(|_| Array2::from_elem((rows, width), f64::NAN))
}

fn eval_linear(activation: Activation, args: &[&Array], out: &Type) -> Array {
    let x = operand(out.dtype, activation.eval(args[0]));
    let product = matrix(&x).dot(&matrix(args[1]).t());
    let sum = product + &matrix(args[2]);
    filled(&out.shape, sum)
}

/// Nodes for `act(x) Wᵀ + b`.
fn linear_nodes(f: &mut FunctionBody, activation: Activation, x: &str) -> [String; 2] {
    let x = activation.node(f, x);
    let turned = f.node_with("Transpose", &["weight"], vec![Attribute::ints("perm", vec![1, 0])]);
    [f.node("MatMul", &[&x, &turned]), "bias".to_owned()]
}

/// Work of the product of `x` with a weight of `n` rows, and `flops` more operations.
fn product_cost(x: &Type, n: usize, flops: u64, args: &[&Type], out: &Type) -> Cost {
    let macs = (x.shape.numel() * n) as u64;
    Cost { macs, flops: 2 * macs + flops, bytes: traffic(args, out) }
}

/// Operations of the activation and of adding the bias.
fn edge_flops(activation: Activation, x: &Type, n: usize) -> u64 {
    activation.flops() * x.shape.numel() as u64 + (x.shape.numel() / width(x).max(1) * n) as u64
}

/// A linear layer: `act(x) Wᵀ + b`.
///
/// # Shapes
/// - `x`: `(…, K)`, `weight`: `(N, K)`, `bias`: `(N)`; returns `(…, N)`
/// # Constraints
/// - C1: one float dtype · C2: `x` of rank 2 or more, a matrix and a vector · C3: `K` and `N` agree
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// Applied to `x` first.
    pub activation: Activation,
}

/// The cotangents of `x`, `weight` and `bias` of a linear layer.
fn linear_grads<'g>(activation: Activation, [x, weight]: [Value<'g>; 2], ct: Value<'g>) -> [Value<'g>; 3] {
    let before = (activation == Activation::Gelu).then_some(x);
    let [dweight, dbias] = pair(ct.linear_grad_weight(activation, x));
    [ct.linear_grad_input(weight, before), dweight, dbias]
}

impl Rules for Linear {
    fn name(&self) -> &'static str {
        "Linear"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        infer_linear(args)
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        linear_grads(self.activation, [args[0], args[1]], ct).map(Grad::Value).into()
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let f = FunctionBody::new("Linear", &["x", "weight", "bias"], &["activation"]);
        let mut f = f.of(emitter.dtype());
        let [product, bias] = linear_nodes(&mut f, self.activation, "x");
        f.result("Add", &[&product, &bias]);
        emitter.native(f.variant(self.activation.variant()), vec![self.activation.attribute()]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        eval_linear(self.activation, args, out)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        let n = width(out);
        product_cost(args[0], n, edge_flops(self.activation, args[0], n), args, out)
    }
}

/// The gradient of [`Linear`] in its operand: `ct W`, and with GELU in front `gelu'(h) ⊙ ct W`.
///
/// # Shapes
/// - `ct`: `(…, N)`, `weight`: `(N, K)`, with GELU `h`: `(…, K)`; returns `(…, K)`
/// # Constraints
/// - C1: one float dtype · C2: `ct` of rank 2 or more, a matrix of `N` rows · C3: `h` has the answer's shape
#[derive(Clone, Debug, PartialEq)]
pub struct LinearGradInput {
    /// What the layer applied to `h`.
    pub activation: Activation,
}

impl Rules for LinearGradInput {
    fn name(&self) -> &'static str {
        "LinearGradInput"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let dtype = one_float_dtype(args)?;
        let (ct, weight) = (args[0], args[1]);
        if ct.shape.rank() < 2 || weight.shape.rank() != 2 || weight.shape.0[0] != width(ct) {
            return refuse(format!("C2: rows and a matrix of {} rows", width(ct)));
        }
        let shape = resized(&ct.shape, weight.shape.0[1]);
        if args.get(2).is_some_and(|h| h.shape != shape) {
            return refuse(format!("C3: a layer's operand of shape {shape}"));
        }
        Ok(Type { dtype, shape })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None; args.len()]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let gelu = self.activation == Activation::Gelu;
        let inputs: &[&str] = if gelu { &["ct", "weight", "h"] } else { &["ct", "weight"] };
        let mut f = FunctionBody::new("LinearGradInput", inputs, &["activation"]).of(emitter.dtype());
        if gelu {
            let product = f.node("MatMul", &["ct", "weight"]);
            let (product, h) = (f.wide(&product), f.wide("h"));
            let slope = gelu_slope_nodes(&mut f, &h);
            f.rounded_result("Mul", &[&slope, &product]);
        } else {
            f.result("MatMul", &["ct", "weight"]);
        }
        emitter.native(f.variant(self.activation.variant()), vec![self.activation.attribute()]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let product = filled(&out.shape, matrix(args[0]).dot(&matrix(args[1])));
        args.get(2).map_or_else(|| product.clone(), |h| gelu_grad(h, &product))
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        let slope = if args.len() == 3 { GELU_GRAD_FLOPS } else { 0 };
        product_cost(args[0], width(out), slope * out.shape.numel() as u64, args, out)
    }
}

/// The gradients of [`Linear`] in weight and bias: `dW = ctᵀ act(x)`, `db = Σ ct` over all rows.
///
/// # Shapes
/// - `ct`: `(…, N)`, `x`: `(…, K)`; two results: `(N, K)` and `(N)`
/// # Constraints
/// - C1: one float dtype · C2: rank 2 or more, and axes that agree but for the last
#[derive(Clone, Debug, PartialEq)]
pub struct LinearGradWeight {
    /// What the layer applied to `x`.
    pub activation: Activation,
}

impl Rules for LinearGradWeight {
    fn name(&self) -> &'static str {
        "LinearGradWeight"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let dtype = one_float_dtype(args)?;
        let (n, k) = (width(args[0]), width(args[1]));
        if args[0].shape.rank() < 2 || resized(&args[0].shape, k) != args[1].shape {
            return refuse("C2: as many rows of both");
        }
        Ok(Type::new(dtype, [n * k + n]))
    }
    fn results(&self, args: &[&Type], _: &Type) -> Vec<Shape> {
        let (n, k) = (width(args[0]), width(args[1]));
        vec![Shape::from([n, k]), Shape::from([n])]
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None, Grad::None]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let f = FunctionBody::new("LinearGradWeight", &["ct", "x"], &["activation"]);
        let mut f = f.of(emitter.dtype());
        let x = self.activation.node(&mut f, "x");
        let [ct, x] = ["ct", &x].map(|v| f.node_with("Flatten", &[v], vec![Attribute::int("axis", -1)]));
        f.result_with("Gemm", &[&ct, &x], vec![Attribute::int("transA", 1)]);
        let (ct, rows) = (f.wide(&ct), f.int_list(&[0]));
        f.rounded_result_with("ReduceSum", &[&ct, &rows], vec![Attribute::int("keepdims", 0)]);
        emitter.native(f.variant(self.activation.variant()), vec![self.activation.attribute()]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let x = operand(out.dtype, self.activation.eval(args[1]));
        let (ct, x) = (matrix(args[0]), matrix(&x));
        bundle(&[ct.t().dot(&x).into_dyn(), ct.sum_axis(Axis(0)).into_dyn()])
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        // The activation was counted in the forward pass; computing it again is the kernel's choice.
        product_cost(args[0], width(args[1]), args[0].shape.numel() as u64, args, out)
    }
}

/// The linear layer that ends a gated residual branch: `x + gate · (act(a) Wᵀ + b)`.
///
/// # Shapes
/// - `x`: `(B, T, N)`, `gate`: `(B, 1, N)`, `a`: `(B, T, K)`, `weight`: `(N, K)`, `bias`: `(N)`; returns `(B, T, N)`
/// # Constraints
/// - C1: one float dtype · C2: `a` of rank 2 or more, a matrix and a vector · C3: `K` and `N` agree
/// - C4: `x` is `(B, T, N)` as the layer's answer, `gate` is `(B, 1, N)`
#[derive(Clone, Debug, PartialEq)]
pub struct LinearGateResidual {
    /// Applied to `a` first.
    pub activation: Activation,
}

impl Rules for LinearGateResidual {
    fn name(&self) -> &'static str {
        "LinearGateResidual"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        one_float_dtype(args)?;
        let branch = infer_linear(&args[2..])?;
        let fits = match branch.shape.dims() {
            [b, _, n] => args[0] == &branch && args[1].shape.dims() == [*b, 1, *n],
            _ => false,
        };
        if fits { Ok(branch) } else { refuse(format!("C4: x of {branch} and a gate a sample")) }
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let [gate, a, weight, bias] = [1, 2, 3, 4].map(|i| args[i]);
        let branch = a.activated_linear(self.activation, weight, bias);
        let [dbranch, dgate] = pair(gate.gate_residual_grad(branch, ct));
        let [da, dweight, dbias] = linear_grads(self.activation, [a, weight], dbranch);
        [ct, dgate, da, dweight, dbias].map(Grad::Value).into()
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let inputs = ["x", "gate", "a", "weight", "bias"];
        let mut f = FunctionBody::new("LinearGateResidual", &inputs, &["activation"]).of(emitter.dtype());
        let [product, bias] = linear_nodes(&mut f, self.activation, "a");
        let [product, bias, gate, x] = [&product, &bias, "gate", "x"].map(|v| f.wide(v));
        let branch = f.node("Add", &[&product, &bias]);
        let gated = f.node("Mul", &[&gate, &branch]);
        f.rounded_result("Add", &[&x, &gated]);
        emitter.native(f.variant(self.activation.variant()), vec![self.activation.attribute()]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        args[0] + expand(args[1], &out.shape) * eval_linear(self.activation, &args[2..], out)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        let n = width(out);
        let flops = edge_flops(self.activation, args[2], n) + 2 * out.shape.numel() as u64;
        product_cost(args[2], n, flops, args, out)
    }
}
