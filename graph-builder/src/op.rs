//! The closed set of ops, the trait that holds an op's five rules, and the only dispatch.

use std::fmt;

use crate::error::Refusal;
use crate::eval::Array;
use crate::onnx::Emitter;
use crate::ops::activation::GeluGrad;
use crate::ops::attention::{Attention, AttentionGrad};
use crate::ops::conv::{Conv, ConvTranspose};
use crate::ops::elementwise::{
    Add, Cast, Cos, Div, Equal, Exp, Gelu, Less, Log, Maximum, Mul, Neg, Relu, Select, Sigmoid, Sin, Sqrt,
    StopGradient, Sub, Tanh,
};
use crate::ops::index::Gather;
use crate::ops::layout::{Broadcast, Concat, Pad, Reshape, Slice, Transpose};
use crate::ops::leaf::{Constant, Input, ParameterRef};
use crate::ops::linalg::MatMul;
use crate::ops::linear::{Linear, LinearGateResidual, LinearGradInput, LinearGradWeight};
use crate::ops::modulation::{GateResidual, GateResidualGrad, LayerNormModulate, LayerNormModulateGrad};
use crate::ops::nn::{LayerNorm, LayerNormGrad, Softmax, SoftmaxGrad};
use crate::ops::patch::{Patchify, Unpatchify};
use crate::ops::pool::{AveragePool, MaxPool};
use crate::ops::reduce::{Mean, Sum};
use crate::ops::several::{After, Part, Split};
use crate::shape::{Shape, Type};
use crate::value::Value;

/// Work of one op.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Multiply-adds of matrix products (the unit of the DiT paper's "Gflops").
    pub macs: u64,
    /// All floating-point operations: two a multiply-add, one an elementwise result.
    pub flops: u64,
    /// Bytes read and written if every operand and the answer pass through memory once.
    pub bytes: u64,
}

impl Cost {
    /// Cost of an op that does `per_element` operations for each element of its answer.
    pub(crate) fn elementwise(per_element: u64, args: &[&Type], out: &Type) -> Self {
        Self { macs: 0, flops: per_element * out.shape.numel() as u64, bytes: traffic(args, out) }
    }
}

/// Bytes of all operands and the answer.
pub(crate) fn traffic(args: &[&Type], out: &Type) -> u64 {
    (args.iter().map(|t| t.bytes()).sum::<usize>() + out.bytes()) as u64
}

/// What a gradient rule says of one operand.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Grad<'g> {
    /// The operand's cotangent, of the operand's shape or of a shape it broadcasts to.
    Value(Value<'g>),
    /// The op is flat in this operand, or the operand is an index or a condition.
    Zero,
    /// No rule exists; asking for it is an error.
    None,
}

/// How an op meets a program of mixed precision. Only float operands are meant; integers and truth values stay.
///
/// Where PyTorch's autocast knows an op, its choice is the same but for three: layer norm and attention's softmax give
/// the compute type (their statistics are f32 inside the op, as in PyTorch's kernels on bf16 tensors), a table's rows
/// have the type of the table, and sines are f32, for the angles of the time embedding go to 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// A leaf: inputs stay f32; a constant and a parameter take the type that they are used in.
    Leaf,
    /// In the compute type: operands are rounded to it. Sums inside are f32. Products, where the time goes, and the fused
    /// ops around them.
    Compute,
    /// In f32: operands of the compute type are widened. Where range or cancellation matter (exponentials, sines), what
    /// decides (comparisons), sums of many terms outside a fused op, images, conversions that an author asked for.
    F32,
    /// In the widest type of the operands. Numbers (constants of one value) and parameters do not count. Arithmetic with
    /// one rounding of an f32 result, and moves without arithmetic.
    Widest,
    /// In the type of the first operand; the others stay as they are.
    First,
}

/// Where an op's answer lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In memory of the caller's or the model's.
    Leaf,
    /// In its first operand's memory.
    View,
    /// In the memory of an operand of its size that nobody needs any more, else in its own: ONNX Runtime runs the op in
    /// place.
    InPlace,
    /// In its own memory.
    Own,
}

/// The rules of an op, and its name. They have no defaults, so that every omission is a decision.
pub(crate) trait Rules {
    /// ONNX's name where ONNX has the op.
    fn name(&self) -> &'static str;

    /// The type it computes in, in mixed precision.
    fn policy(&self) -> Policy;

    /// Where its answer lies.
    fn storage(&self) -> Storage;

    /// Type of the answer, or the constraint (C1, C2, …) that the operands break.
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal>;

    /// Shapes of the results of an op that has several: its answer then has rank 1 and holds their elements, one
    /// result after the other, and only [`Part`] takes them out.
    fn results(&self, _args: &[&Type], out: &Type) -> Vec<Shape> {
        vec![out.shape.clone()]
    }

    /// Vector-Jacobian product: builds graph, is handed the answer, ignores broadcasting and accumulation.
    fn vjp<'g>(&self, args: &[Value<'g>], out: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>>;

    /// Writes ONNX nodes; `emitter` knows the operand and answer names of the current node.
    fn emit(&self, emitter: &mut Emitter<'_>);

    /// Reference value in f64; slow and plain. Shapes were checked by `infer`.
    fn eval(&self, args: &[&Array], out: &Type) -> Array;

    /// Operations and bytes.
    fn cost(&self, args: &[&Type], out: &Type) -> Cost;
}

macro_rules! ops {
    ($($name:ident($ty:ty)),+ $(,)?) => {
        /// An operation with its attributes; operands live in the node.
        #[derive(Clone, PartialEq)]
        #[allow(missing_docs, reason = "each variant is documented on its struct")]
        pub enum Op { $($name($ty)),+ }

        impl Op {
            pub(crate) fn rules(&self) -> &dyn Rules {
                match self { $(Self::$name(op) => op),+ }
            }

            /// Variant names; the proofs check that each has a row.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),+];

            /// Name of the variant.
            pub fn variant(&self) -> &'static str {
                match self { $(Self::$name(_) => stringify!($name)),+ }
            }
        }

        impl fmt::Debug for Op {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self { $(Self::$name(op) => fmt::Debug::fmt(op, f)),+ }
            }
        }

        $(impl From<$ty> for Op { fn from(op: $ty) -> Self { Self::$name(op) } })+
    };
}

ops! {
    Input(Input), Parameter(ParameterRef), Constant(Constant),
    Neg(Neg), Exp(Exp), Log(Log), Sqrt(Sqrt), Sin(Sin), Cos(Cos), Tanh(Tanh), Sigmoid(Sigmoid), Gelu(Gelu), Relu(Relu),
    Cast(Cast), StopGradient(StopGradient),
    Add(Add), Sub(Sub), Mul(Mul), Div(Div), Maximum(Maximum), Less(Less), Equal(Equal), Select(Select),
    Sum(Sum), Mean(Mean),
    Reshape(Reshape), Transpose(Transpose), Broadcast(Broadcast), Slice(Slice), Concat(Concat), Pad(Pad),
    MatMul(MatMul),
    Conv(Conv), ConvTranspose(ConvTranspose), MaxPool(MaxPool), AveragePool(AveragePool),
    Gather(Gather),
    Softmax(Softmax), LayerNorm(LayerNorm),
    GeluGrad(GeluGrad), SoftmaxGrad(SoftmaxGrad), LayerNormGrad(LayerNormGrad),
    LayerNormModulate(LayerNormModulate), LayerNormModulateGrad(LayerNormModulateGrad),
    GateResidual(GateResidual), GateResidualGrad(GateResidualGrad),
    Linear(Linear), LinearGradInput(LinearGradInput), LinearGradWeight(LinearGradWeight),
    LinearGateResidual(LinearGateResidual),
    Attention(Attention), AttentionGrad(AttentionGrad),
    Patchify(Patchify), Unpatchify(Unpatchify),
    Part(Part), Split(Split), After(After),
}

impl Op {
    /// Name of the op, ONNX's where there is one.
    pub fn name(&self) -> &'static str {
        self.rules().name()
    }

    /// The type it computes in, in mixed precision.
    pub fn policy(&self) -> Policy {
        self.rules().policy()
    }

    /// The attributes in the text form, such as `{axes: [1]}`; empty when there are none.
    pub(crate) fn attributes(&self) -> String {
        let text = format!("{self:?}");
        text.find(['{', '(']).map(|i| text[i..].replace(" }", "}").replace("{ ", "{")).unwrap_or_default()
    }
}

impl std::ops::Add for Cost {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            macs: self.macs + other.macs,
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}
