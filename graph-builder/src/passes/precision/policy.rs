//! Which type each op computes in: the one table.

/// How an op meets a program of mixed precision. Only float operands are meant; integers and truth values stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// A leaf: inputs stay f32; a constant and a parameter take the type that they are used in.
    Leaf,
    /// In the compute type: operands are rounded to it. Sums inside are f32.
    Compute,
    /// In f32: operands of the compute type are widened.
    F32,
    /// In the widest type of the operands. Numbers (constants of one value) and parameters do not count.
    Widest,
    /// In the type of the first operand; the others stay as they are.
    First,
}

/// The policies, by variant of [`crate::Op`], with the reason. Each op stands in it once.
///
/// Where PyTorch's autocast knows the op, its choice is the same but for three: layer norm and attention's softmax give
/// the compute type (their statistics are f32 inside the op, as in PyTorch's kernels on bf16 tensors), a table's rows
/// have the type of the table, and sines are f32, for the angles of the time embedding go to 1000.
pub const POLICIES: &[(Policy, &[&str])] = &[
    (Policy::Leaf, &["Input", "Parameter", "Constant"]),
    // Products, where the time goes and which have f32 sums; and the fused ops around them, f32 inside.
    (Policy::Compute, &["MatMul"]),
    (Policy::Compute, &["Linear", "LinearGradInput", "LinearGradWeight", "LinearGateResidual"]),
    (Policy::Compute, &["Attention", "AttentionGrad"]),
    (Policy::Compute, &["LayerNorm", "LayerNormGrad", "LayerNormModulate", "LayerNormModulateGrad"]),
    (Policy::Compute, &["GateResidual", "GateResidualGrad"]),
    // Range and cancellation: loss terms, solver steps, the time embedding.
    (Policy::F32, &["Exp", "Log", "Sqrt", "Sin", "Cos"]),
    // Comparisons decide; the larger of two is where a loss is cut off.
    (Policy::F32, &["Less", "Equal", "Maximum"]),
    // Sums of many terms outside a fused op.
    (Policy::F32, &["Sum", "Mean", "Softmax", "SoftmaxGrad"]),
    // Images are f32, tokens are in the compute type: the model's answer is widened before guidance, solver and loss.
    (Policy::F32, &["Patchify", "Unpatchify"]),
    // What CUDA does not have in bf16, and no transformer needs.
    (Policy::F32, &["Conv", "ConvTranspose", "MaxPool", "AveragePool", "Pad"]),
    // A conversion reads what its author gave it.
    (Policy::F32, &["Cast"]),
    // The arithmetic between: one rounding of an f32 result.
    (Policy::Widest, &["Neg", "Add", "Sub", "Mul", "Div", "Select"]),
    (Policy::Widest, &["Tanh", "Sigmoid", "Gelu", "GeluGrad", "Relu", "StopGradient"]),
    // Moves without arithmetic.
    (Policy::Widest, &["Reshape", "Transpose", "Broadcast", "Slice", "Concat", "Split", "Part", "Gather"]),
    // Ordered after its second operand, whose value it does not read.
    (Policy::First, &["After"]),
];

/// The policy of an op by the name of its variant; f32 for a name that is none.
pub fn policy(variant: &str) -> Policy {
    let row = POLICIES.iter().find(|(_, ops)| ops.contains(&variant));
    row.map_or(Policy::F32, |(policy, _)| *policy)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::Op;

    #[test]
    fn every_op_has_one_policy() {
        let named: Vec<&str> = POLICIES.iter().flat_map(|(_, ops)| ops.iter().copied()).collect();
        let once: BTreeSet<&str> = named.iter().copied().collect();
        assert_eq!(once.len(), named.len(), "an op stands in the table twice");
        assert_eq!(once, Op::NAMES.iter().copied().collect(), "rows without an op, or ops without a row");
    }
}
