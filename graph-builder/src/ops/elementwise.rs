//! Elementwise ops: one operand, two broadcasting operands, conversion and choice.

use ndarray::Zip;

use crate::error::{Refusal, refuse};
use crate::eval::{Array, expand};
use crate::onnx::{Attribute, Emitter};
use crate::op::{Cost, Grad, Policy, Rules, Storage};
use crate::shape::{DType, Type};
use crate::value::Value;

/// √(2/π), the slope inside the tanh approximation of GELU.
pub(crate) const GELU_SLOPE: f64 = 0.797_884_560_802_865_4;
/// Weight of the cubic term inside the tanh approximation of GELU.
pub(crate) const GELU_CUBIC: f64 = 0.044_715;

/// GELU, tanh approximation.
pub(crate) fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (GELU_SLOPE * (x + GELU_CUBIC * x * x * x)).tanh())
}

fn float_operand(args: &[&Type]) -> Result<Type, Refusal> {
    if args[0].dtype.is_float() { Ok(args[0].clone()) } else { refuse("C1: a float operand") }
}

/// Type of a binary op: C1 one dtype, C2 shapes that broadcast.
fn broadcast_operands(a: &Type, b: &Type) -> Result<Type, Refusal> {
    if a.dtype != b.dtype {
        return refuse("C1: two operands of one dtype");
    }
    match a.shape.broadcast(&b.shape) {
        Some(shape) => Ok(Type { dtype: a.dtype, shape }),
        None => refuse("C2: shapes that broadcast"),
    }
}

fn zip(a: &Array, b: &Array, out: &Type, f: impl Fn(f64, f64) -> f64) -> Array {
    Zip::from(&expand(a, &out.shape)).and(&expand(b, &out.shape)).map_collect(|&a, &b| f(a, b))
}

/// One float operand: formula, derivative from (operand, answer, cotangent), operations an element.
macro_rules! unary {
    ($(#[$doc:meta])* $name:ident, $onnx:literal, $policy:ident, $storage:ident, $flops:literal, $f:expr, $vjp:expr, $attributes:expr) => {
        $(#[$doc])*
        ///
        /// # Constraints
        /// - C1: a float operand
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name;

        impl Rules for $name {
            fn name(&self) -> &'static str {
                $onnx
            }
            fn policy(&self) -> Policy {
                Policy::$policy
            }
            fn storage(&self) -> Storage {
                Storage::$storage
            }
            fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
                float_operand(args)
            }
            fn vjp<'g>(&self, args: &[Value<'g>], out: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
                let rule: fn(Value<'g>, Value<'g>, Value<'g>) -> Grad<'g> = $vjp;
                vec![rule(args[0], out, ct)]
            }
            fn emit(&self, emitter: &mut Emitter<'_>) {
                emitter.same(Self::ONNX, $attributes);
            }
            fn eval(&self, args: &[&Array], _: &Type) -> Array {
                let f: fn(f64) -> f64 = $f;
                args[0].mapv(f)
            }
            fn cost(&self, args: &[&Type], out: &Type) -> Cost {
                Cost::elementwise($flops, args, out)
            }
        }
        impl $name {
            const ONNX: &'static str = $onnx;
        }
    };
}

unary!(/// `−x`.
    Neg, "Neg", Widest, InPlace, 1, |x| -x, |_, _, ct| Grad::Value(-ct), vec![]);
unary!(/// `eˣ`.
    Exp, "Exp", F32, InPlace, 1, f64::exp, |_, out, ct| Grad::Value(ct * out), vec![]);
unary!(/// Natural logarithm of a positive number.
    Log, "Log", F32, InPlace, 1, f64::ln, |x, _, ct| Grad::Value(ct / x), vec![]);
unary!(/// Square root.
    Sqrt, "Sqrt", F32, InPlace, 1, f64::sqrt, |_, out, ct| Grad::Value(ct / (out * 2.0)), vec![]);
unary!(/// Sine; radians.
    Sin, "Sin", F32, InPlace, 1, f64::sin, |x, _, ct| Grad::Value(ct * x.cos()), vec![]);
unary!(/// Cosine; radians.
    Cos, "Cos", F32, InPlace, 1, f64::cos, |x, _, ct| Grad::Value(-(ct * x.sin())), vec![]);
unary!(/// Hyperbolic tangent.
    Tanh, "Tanh", Widest, InPlace, 1, f64::tanh, |_, out, ct| Grad::Value(ct * (1.0 - out * out)), vec![]);
unary!(/// Logistic function `1 / (1 + e⁻ˣ)`.
    Sigmoid, "Sigmoid", Widest, InPlace, 1, |x| 1.0 / (1.0 + (-x).exp()), |_, out, ct| Grad::Value(ct * (out * (1.0 - out))), vec![]);
unary!(/// GELU, tanh approximation: `½x(1 + tanh(√(2/π)(x + 0.044715x³)))`.
    ///
    /// # Source
    /// ONNX Gelu, opset 20.
    Gelu, "Gelu", Widest, Own, 8, gelu,
    |x, _, ct| Grad::Value(x.gelu_grad(ct)),
    vec![Attribute::text("approximate", "tanh")]);
unary!(/// `max(x, 0)`; its slope at 0 is 0.
    Relu, "Relu", Widest, InPlace, 1, |x| x.max(0.0),
    |x, _, ct| {
        let zero = x.builder().constant(x.ty().dtype, [0; 0], vec![0.0]);
        Grad::Value(zero.less(x).select(ct, zero))
    },
    vec![]);
unary!(/// Identity whose gradient is zero.
    StopGradient, "Identity", Widest, View, 0, |x| x, |_, _, _| Grad::Zero, vec![]);

/// Two broadcasting operands of one dtype: formula, the two derivatives from (operands, answer, cotangent).
macro_rules! binary {
    ($(#[$doc:meta])* $name:ident, $onnx:literal, $policy:ident, $storage:ident, $f:expr, $vjp:expr) => {
        $(#[$doc])*
        ///
        /// # Constraints
        /// - C1: two operands of one dtype · C2: shapes that broadcast
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name;

        impl Rules for $name {
            fn name(&self) -> &'static str {
                $onnx
            }
            fn policy(&self) -> Policy {
                Policy::$policy
            }
            fn storage(&self) -> Storage {
                Storage::$storage
            }
            fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
                broadcast_operands(args[0], args[1])
            }
            fn vjp<'g>(&self, args: &[Value<'g>], out: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
                let rule: fn(Value<'g>, Value<'g>, Value<'g>, Value<'g>) -> [Value<'g>; 2] = $vjp;
                rule(args[0], args[1], out, ct).map(Grad::Value).to_vec()
            }
            fn emit(&self, emitter: &mut Emitter<'_>) {
                emitter.same($onnx, vec![]);
            }
            fn eval(&self, args: &[&Array], out: &Type) -> Array {
                let f: fn(f64, f64) -> f64 = $f;
                zip(args[0], args[1], out, f)
            }
            fn cost(&self, args: &[&Type], out: &Type) -> Cost {
                Cost::elementwise(1, args, out)
            }
        }
    };
}

binary!(/// `a + b`.
    Add, "Add", Widest, InPlace, |a, b| a + b, |_, _, _, ct| [ct, ct]);
binary!(/// `a − b`.
    Sub, "Sub", Widest, InPlace, |a, b| a - b, |_, _, _, ct| [ct, -ct]);
binary!(/// `a · b`.
    Mul, "Mul", Widest, InPlace, |a, b| a * b, |a, b, _, ct| [ct * b, ct * a]);
binary!(/// `a / b`.
    Div, "Div", Widest, InPlace, |a, b| a / b, |_, b, out, ct| [ct / b, -(ct * out / b)]);
binary!(/// The larger of the two; where they are equal the cotangent goes to `a`.
Maximum, "Max", F32, Own, f64::max, |a, b, _, ct| {
    let b_won = a.less(b).select(ct, ct.builder().scalar(0.0));
    [ct - b_won, b_won]
});

/// A comparison: a truth value, flat everywhere.
macro_rules! comparison {
    ($(#[$doc:meta])* $name:ident, $onnx:literal, $f:expr) => {
        $(#[$doc])*
        ///
        /// # Constraints
        /// - C1: two operands of one dtype · C2: shapes that broadcast
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name;

        impl Rules for $name {
            fn name(&self) -> &'static str {
                $onnx
            }
            fn policy(&self) -> Policy {
                Policy::F32
            }
            fn storage(&self) -> Storage {
                Storage::Own
            }
            fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
                let ty = broadcast_operands(args[0], args[1])?;
                Ok(Type { dtype: DType::Bool, ..ty })
            }
            fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
                vec![Grad::Zero, Grad::Zero]
            }
            fn emit(&self, emitter: &mut Emitter<'_>) {
                emitter.same($onnx, vec![]);
            }
            fn eval(&self, args: &[&Array], out: &Type) -> Array {
                let f: fn(f64, f64) -> bool = $f;
                zip(args[0], args[1], out, |a, b| f64::from(u8::from(f(a, b))))
            }
            fn cost(&self, args: &[&Type], out: &Type) -> Cost {
                Cost::elementwise(1, args, out)
            }
        }
    };
}

comparison!(/// `a < b`.
    Less, "Less", |a, b| a < b);
comparison!(/// `a = b`.
    Equal, "Equal", |a, b| a == b);

/// Conversion to another element type.
///
/// Floats are truncated towards zero on their way to integers; anything but zero is true.
#[derive(Clone, Debug, PartialEq)]
pub struct Cast {
    /// Element type of the answer.
    pub to: DType,
}

impl Rules for Cast {
    fn name(&self) -> &'static str {
        "Cast"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        Ok(Type { dtype: self.to, shape: args[0].shape.clone() })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let from = args[0].ty().dtype;
        vec![if from.is_float() && self.to.is_float() { Grad::Value(ct.cast(from)) } else { Grad::Zero }]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emitter.same("Cast", vec![Attribute::int("to", crate::onnx::tensor_type(self.to))]);
    }
    fn eval(&self, args: &[&Array], _: &Type) -> Array {
        args[0].mapv(|x| match self.to {
            DType::I64 => x.trunc(),
            DType::Bool => f64::from(u8::from(x != 0.0)),
            DType::F32 | DType::F16 | DType::Bf16 => x,
        })
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(0, args, out)
    }
}

/// `a` where the condition holds, elsewhere `b`.
///
/// # Constraints
/// - C1: the first operand is a truth value · C2: `a` and `b` have one dtype · C3: the three shapes broadcast
#[derive(Clone, Debug, PartialEq)]
pub struct Select;

impl Rules for Select {
    fn name(&self) -> &'static str {
        "Where"
    }
    fn policy(&self) -> Policy {
        Policy::Widest
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        if args[0].dtype != DType::Bool {
            return refuse("C1: a truth value as condition");
        }
        if args[1].dtype != args[2].dtype {
            return refuse("C2: two choices of one dtype");
        }
        match args[1].shape.broadcast(&args[2].shape).and_then(|s| s.broadcast(&args[0].shape)) {
            Some(shape) => Ok(Type { dtype: args[1].dtype, shape }),
            None => refuse("C3: shapes that broadcast"),
        }
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let zero = ct.builder().scalar(0.0);
        vec![Grad::Zero, Grad::Value(args[0].select(ct, zero)), Grad::Value(args[0].select(zero, ct))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emitter.same("Where", vec![]);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        Zip::from(&expand(args[0], &out.shape))
            .and(&expand(args[1], &out.shape))
            .and(&expand(args[2], &out.shape))
            .map_collect(|&c, &a, &b| if c == 0.0 { b } else { a })
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(0, args, out)
    }
}
