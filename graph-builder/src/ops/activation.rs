//! Activations that linear layers apply on the way in, and the gradient of GELU.

use ndarray::Zip;

use crate::error::Refusal;
use crate::eval::Array;
use crate::onnx::{Attribute, Emitter, FunctionBody};
use crate::op::{Cost, Grad, Policy, Rules, Storage};
use crate::ops::elementwise::{GELU_CUBIC, GELU_SLOPE, gelu};
use crate::ops::nn::twins;
use crate::shape::Type;
use crate::value::Value;

/// What a linear layer applies to its operand first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// GELU, tanh approximation.
    Gelu,
}

impl Activation {
    /// The attribute of the emitted op.
    pub(crate) fn attribute(self) -> Attribute {
        let name = match self {
            Self::None => "none",
            Self::Gelu => "gelu",
        };
        Attribute::text("activation", name)
    }

    /// What the name of the function body that applies it says of it; bodies cannot branch on an attribute.
    pub(crate) fn variant(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Gelu => "Gelu",
        }
    }

    /// The node that applies it to `x` in a function body, in f32, rounded to the body's type.
    pub(crate) fn node(self, f: &mut FunctionBody, x: &str) -> String {
        match self {
            Self::None => x.to_owned(),
            Self::Gelu => {
                let x = f.wide(x);
                let y = f.node_with("Gelu", &[&x], vec![Attribute::text("approximate", "tanh")]);
                f.narrow(&y)
            }
        }
    }

    /// Its value.
    pub(crate) fn eval(self, x: &Array) -> Array {
        match self {
            Self::None => x.clone(),
            Self::Gelu => x.mapv(gelu),
        }
    }

    /// Operations an element.
    pub(crate) fn flops(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Gelu => 8,
        }
    }
}

/// Operations an element of [`GeluGrad`].
pub(crate) const GELU_GRAD_FLOPS: u64 = 16;

/// Gradient of tanh-GELU: `ct · (½(1 + τ) + ½x(1 − τ²)·√(2/π)(1 + 3·0.044715x²))`, `τ = tanh(√(2/π)(x + 0.044715x³))`.
///
/// # Shapes
/// - `x`, `ct`: one shape; returns that shape
/// # Constraints
/// - C1: two float operands of one dtype and shape
#[derive(Clone, Debug, PartialEq)]
pub struct GeluGrad;

/// Nodes for GELU's slope at `x`.
pub(crate) fn gelu_slope_nodes(f: &mut FunctionBody, x: &str) -> String {
    let (half, one) = (f.scalar(0.5), f.scalar(1.0));
    let (slope, cubic, cubic3) =
        (f.scalar(GELU_SLOPE), f.scalar(GELU_SLOPE * GELU_CUBIC), f.scalar(3.0 * GELU_SLOPE * GELU_CUBIC));
    let square = f.node("Mul", &[x, x]);
    let bent = f.node("Mul", &[&square, &cubic]);
    let bent = f.node("Add", &[&bent, &slope]);
    let inner = f.node("Mul", &[x, &bent]);
    let tanh = f.node("Tanh", &[&inner]);
    let tanh1 = f.node("Add", &[&tanh, &one]);
    let left = f.node("Mul", &[&tanh1, &half]);
    let tanh2 = f.node("Mul", &[&tanh, &tanh]);
    let sech2 = f.node("Sub", &[&one, &tanh2]);
    let slope_in = f.node("Mul", &[&square, &cubic3]);
    let slope_in = f.node("Add", &[&slope_in, &slope]);
    let right = f.node("Mul", &[&sech2, &slope_in]);
    let right = f.node("Mul", &[&right, x]);
    let right = f.node("Mul", &[&right, &half]);
    f.node("Add", &[&left, &right])
}

/// `ct` times GELU's slope at `x`.
pub(crate) fn gelu_grad(x: &Array, ct: &Array) -> Array {
    Zip::from(x).and(ct).map_collect(|&x, &ct| {
        let tanh = (GELU_SLOPE * (x + GELU_CUBIC * x * x * x)).tanh();
        let inner = GELU_SLOPE * (1.0 + 3.0 * GELU_CUBIC * x * x);
        ct * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner)
    })
}

impl Rules for GeluGrad {
    fn name(&self) -> &'static str {
        "GeluGrad"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        twins(args)
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::None, Grad::None]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let mut f = FunctionBody::new("GeluGrad", &["x", "ct"], &[]).of(emitter.dtype());
        let [x, ct] = ["x", "ct"].map(|v| f.wide(v));
        let slope = gelu_slope_nodes(&mut f, &x);
        f.rounded_result("Mul", &[&slope, &ct]);
        emitter.native(f, vec![]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        gelu_grad(args[0], args[1])
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(GELU_GRAD_FLOPS, args, out)
    }
}
