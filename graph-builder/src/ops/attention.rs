//! Multi-head self-attention as one op, and its gradient, which computes the weights again instead of keeping them.

use ndarray::{Array2, Axis};

use crate::error::{Refusal, refuse};
use crate::eval::{Array, operand};
use crate::onnx::{Attribute, Emitter, FunctionBody};
use crate::op::{Cost, Grad, Policy, Rules, Storage, traffic};
use crate::shape::{DType, Shape, Type};
use crate::value::Value;

/// Multi-head self-attention: `softmax(q kᵀ · scale) v` for each head, heads side by side.
///
/// # Shapes
/// - `qkv`: `(N, T, 3·D)`, features ordered (q k v, head, feature); returns `(N, T, D)`
/// # Constraints
/// - C1: a float operand of rank 3 · C2: the last axis is a multiple of 3·`heads`
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Number of heads, H.
    pub heads: usize,
    /// Factor of the products of queries and keys, commonly 1/√K.
    pub scale: f64,
}

/// Gradient of [`Attention`]: `dv = Pᵀ ct`, `dS = P ⊙ (ct vᵀ − Σ P ⊙ ct vᵀ)`, `dq = dS k · scale`, `dk = dSᵀ q · scale`.
///
/// # Shapes
/// - `qkv`: `(N, T, 3·D)`, `ct`: `(N, T, D)`; returns `(N, T, 3·D)`
/// # Constraints
/// - C1: a float operand of rank 3 · C2: the last axis is a multiple of 3·`heads` · C3: `ct` is `(N, T, D)`
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionGrad {
    /// Number of heads, H.
    pub heads: usize,
    /// As in the attention.
    pub scale: f64,
}

/// Type of the attention of `qkv`.
fn infer(qkv: &Type, heads: usize) -> Result<Type, Refusal> {
    if !qkv.dtype.is_float() || qkv.shape.rank() != 3 {
        return refuse("C1: a float operand of rank 3");
    }
    let dims = &qkv.shape.0;
    if heads == 0 || !dims[2].is_multiple_of(3 * heads) {
        return refuse(format!("C2: a last axis of a multiple of 3·{heads}"));
    }
    Ok(Type { dtype: qkv.dtype, shape: Shape::from([dims[0], dims[1], dims[2] / 3]) })
}

/// Queries, keys and values (T, K) of one head of one sample.
fn head(qkv: &Array, heads: usize, (n, h): (usize, usize)) -> [Array2<f64>; 3] {
    let (t, d) = (qkv.shape()[1], qkv.shape()[2] / 3);
    let k = d / heads;
    [0, 1, 2].map(|part| Array2::from_shape_fn((t, k), |(i, j)| qkv[[n, i, part * d + h * k + j]]))
}

/// `softmax(q kᵀ · scale)` (T, T).
fn weights(q: &Array2<f64>, k: &Array2<f64>, scale: f64) -> Array2<f64> {
    let mut weights = q.dot(&k.t()) * scale;
    for mut row in weights.axis_iter_mut(Axis(0)) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        row.mapv_inplace(|v| (v - max).exp());
        let sum = row.sum();
        row.mapv_inplace(|v| v / sum);
    }
    weights
}

/// The matrix as it goes into a product of this type.
fn rounded(dtype: DType, x: &Array2<f64>) -> Array2<f64> {
    let values = operand(dtype, x.clone().into_dyn());
    Array2::from_shape_vec(x.dim(), values.iter().copied().collect()).unwrap_or_else(|_| x.clone())
}

/// All heads of all samples.
fn each_head(samples: usize, heads: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..samples).flat_map(move |n| (0..heads).map(move |h| (n, h)))
}

/// Nodes for queries, keys and values (N, H, T, K).
fn head_nodes(f: &mut FunctionBody) -> [String; 3] {
    let shape = shape_nodes(f, &[0, 0, 3]);
    let split = f.node("Reshape", &["qkv", &shape]); // (N, T, 3, H, K)
    let parts = f.node_with("Transpose", &[&split], vec![Attribute::ints("perm", vec![2, 0, 3, 1, 4])]);
    [0, 1, 2].map(|part| {
        let index = f.int_scalar(part);
        f.node_with("Gather", &[&parts, &index], vec![Attribute::int("axis", 0)])
    })
}

/// The shape `before`, heads, rest.
fn shape_nodes(f: &mut FunctionBody, before: &[i64]) -> String {
    let (before, heads, rest) = (f.int_list(before), f.int_attribute("heads"), f.int_list(&[-1]));
    f.node_with("Concat", &[&before, &heads, &rest], vec![Attribute::int("axis", 0)])
}

fn turned(f: &mut FunctionBody, x: &str) -> String {
    f.node_with("Transpose", &[x], vec![Attribute::ints("perm", vec![0, 1, 3, 2])])
}

/// Nodes for scaled queries and for the weights (N, H, T, T), which are f32.
fn weight_nodes(f: &mut FunctionBody, q: &str, k: &str) -> (String, String) {
    let scale = f.scalar_attribute("scale");
    let scale = f.narrow(&scale);
    let scaled = f.node("Mul", &[q, &scale]);
    let k = turned(f, k);
    let products = f.node("MatMul", &[&scaled, &k]);
    let products = f.wide(&products);
    (scaled, f.node_with("Softmax", &[&products], vec![Attribute::int("axis", -1)]))
}

fn attributes(heads: usize, scale: f64) -> Vec<Attribute> {
    vec![Attribute::int("heads", heads as i64), Attribute::float("scale", scale)]
}

impl Rules for Attention {
    fn name(&self) -> &'static str {
        "Attention"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        infer(args[0], self.heads)
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(args[0].attention_grad(ct, self.heads, self.scale))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let dtype = emitter.dtype();
        let size = emitter.arg_type(0).shape.0[2] / 3 / self.heads;
        // As one op where TensorRT has a kernel for it: elsewhere it refuses the op, and only the op.
        let one_kernel = (16..=256).contains(&size) && size.is_multiple_of(8);
        let variant = if dtype == DType::F32 || one_kernel { "" } else { "Products" };
        let f = FunctionBody::new("Attention", &["qkv"], &["heads", "scale"]);
        let mut f = f.of(dtype).variant(variant);
        let [q, k, v] = head_nodes(&mut f);
        // (N, H, T, K)
        let mixed = if dtype == DType::F32 || !one_kernel {
            let (_, weights) = weight_nodes(&mut f, &q, &k);
            let weights = f.narrow(&weights);
            f.node("MatMul", &[&weights, &v])
        } else {
            let options = vec![Attribute::float_of("scale", "scale"), Attribute::int("softmax_precision", 1)];
            f.node_with("Attention", &[&q, &k, &v], options)
        };
        let rows = f.node_with("Transpose", &[&mixed], vec![Attribute::ints("perm", vec![0, 2, 1, 3])]);
        let shape = f.int_list(&[0, 0, -1]);
        f.result("Reshape", &[&rows, &shape]);
        emitter.native(f, attributes(self.heads, self.scale));
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let mut answer = Array::zeros(out.shape.dims());
        for (n, h) in each_head(out.shape.0[0], self.heads) {
            let [q, k, v] = head(args[0], self.heads, (n, h));
            let mixed = rounded(out.dtype, &weights(&q, &k, self.scale)).dot(&v);
            for ((i, j), value) in mixed.indexed_iter() {
                answer[[n, i, h * v.ncols() + j]] = *value;
            }
        }
        answer
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        let (samples, t, d) = (out.shape.0[0], out.shape.0[1], out.shape.0[2]);
        let macs = (2 * samples * t * t * d) as u64;
        // Scaled queries, softmax.
        let others = samples * (t * d + 5 * self.heads * t * t);
        Cost { macs, flops: 2 * macs + others as u64, bytes: traffic(args, out) }
    }
}

impl Rules for AttentionGrad {
    fn name(&self) -> &'static str {
        "AttentionGrad"
    }
    fn policy(&self) -> Policy {
        Policy::Compute
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if infer(args[0], self.heads)? != *args[1] {
            return refuse("C3: a cotangent of the attention's type");
        }
        Ok(args[0].clone())
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None, Grad::None]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let f = FunctionBody::new("AttentionGrad", &["qkv", "ct"], &["heads", "scale"]);
        let mut f = f.of(emitter.dtype());
        let [q, k, v] = head_nodes(&mut f);
        let (scaled, weights) = weight_nodes(&mut f, &q, &k);
        let shape = shape_nodes(&mut f, &[0, 0]);
        let ct = f.node("Reshape", &["ct", &shape]); // (N, T, H, K)
        let ct = f.node_with("Transpose", &[&ct], vec![Attribute::ints("perm", vec![0, 2, 1, 3])]);
        let weights_t = f.narrow(&weights);
        let weights_t = turned(&mut f, &weights_t);
        let dv = f.node("MatMul", &[&weights_t, &ct]);
        let v_t = turned(&mut f, &v);
        let dweights = f.node("MatMul", &[&ct, &v_t]);
        let dweights = f.wide(&dweights);
        let weighted = f.node("Mul", &[&weights, &dweights]);
        let last = f.int_list(&[-1]);
        let sum = f.node("ReduceSum", &[&weighted, &last]);
        let centred = f.node("Sub", &[&dweights, &sum]);
        let dproducts = f.node("Mul", &[&weights, &centred]);
        let dproducts = f.narrow(&dproducts);
        let dq = f.node("MatMul", &[&dproducts, &k]);
        let scale = f.scalar_attribute("scale");
        let scale = f.narrow(&scale);
        let dq = f.node("Mul", &[&dq, &scale]);
        let dproducts_t = turned(&mut f, &dproducts);
        let dk = f.node("MatMul", &[&dproducts_t, &scaled]);
        let first = f.int_list(&[0]);
        let parts = [dq, dk, dv].map(|part| f.node("Unsqueeze", &[&part, &first])); // (1, N, H, T, K)
        let all =
            f.node_with("Concat", &parts.each_ref().map(String::as_str), vec![Attribute::int("axis", 0)]);
        let rows = f.node_with("Transpose", &[&all], vec![Attribute::ints("perm", vec![1, 3, 0, 2, 4])]);
        let shape = f.int_list(&[0, 0, -1]);
        f.result("Reshape", &[&rows, &shape]);
        emitter.native(f, attributes(self.heads, self.scale));
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let mut answer = Array::zeros(out.shape.dims());
        let d = out.shape.0[2] / 3;
        for (n, h) in each_head(out.shape.0[0], self.heads) {
            let [q, k, v] = head(args[0], self.heads, (n, h));
            let width = q.ncols();
            let ct = Array2::from_shape_fn(q.dim(), |(i, j)| args[1][[n, i, h * width + j]]);
            let weights = weights(&q, &k, self.scale);
            let dweights = ct.dot(&v.t());
            let sums = (&weights * &dweights).sum_axis(Axis(1)).insert_axis(Axis(1));
            let dproducts = rounded(out.dtype, &(&weights * &(&dweights - &sums) * self.scale));
            let weights = rounded(out.dtype, &weights);
            for (part, grad) in
                [dproducts.dot(&k), dproducts.t().dot(&q), weights.t().dot(&ct)].iter().enumerate()
            {
                for ((i, j), value) in grad.indexed_iter() {
                    answer[[n, i, part * d + h * width + j]] = *value;
                }
            }
        }
        answer
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        let (samples, t, d) = (out.shape.0[0], out.shape.0[1], args[1].shape.0[2]);
        // The four products of the gradient; computing the weights again is the kernel's choice.
        let macs = (4 * samples * t * t * d) as u64;
        let others = samples * (t * d + 4 * self.heads * t * t);
        Cost { macs, flops: 2 * macs + others as u64, bytes: traffic(args, out) }
    }
}
