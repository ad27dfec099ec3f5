//! Names of fused ops in a model: one for each function body.
//!
//! ONNX tells functions of one name apart by a field `overload`, which ONNX Runtime knows since 1.27 and which most other
//! readers of the format ignore: they would take the first body for all. So every body has a name of its own.

use std::fmt;

use crate::shape::DType;

/// The fused ops, and the words for the ways in which each is used beside the plain one.
pub const NATIVE_OPS: [(&str, &[&str]); 16] = [
    ("After", &[]),
    ("Attention", &["Products"]),
    ("AttentionGrad", &[]),
    ("GateResidual", &[]),
    ("GateResidualGrad", &[]),
    ("GeluGrad", &[]),
    ("LayerNormGrad", &[]),
    ("LayerNormModulate", &[]),
    ("LayerNormModulateGrad", &["Residual"]),
    ("Linear", &["Gelu"]),
    ("LinearGateResidual", &["Gelu"]),
    ("LinearGradInput", &["Gelu"]),
    ("LinearGradWeight", &["Gelu"]),
    ("Patchify", &["ChannelsLast"]),
    ("SoftmaxGrad", &[]),
    ("Unpatchify", &["ChannelsLast"]),
];

/// Types that a body may be written in, and how its name ends then.
const TYPES: [(DType, &str); 3] = [(DType::F32, ""), (DType::Bf16, "Bf16"), (DType::F16, "F16")];

/// The name of a function body, and of the ops of the domain `mudit` that it is for: the op, the way in which it is used,
/// the type of its operands. `LinearGelu`, `AttentionBf16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NativeName {
    /// The op.
    pub op: &'static str,
    /// The way in which it is used; empty for the plain one.
    pub variant: &'static str,
    /// Type of the operands: f32, bf16 or f16.
    pub dtype: DType,
}

impl NativeName {
    /// All names of an op for operands of a type; none when there is no such op.
    pub fn of(op: &str, dtype: DType) -> impl Iterator<Item = Self> {
        let row = NATIVE_OPS.into_iter().find(|(name, _)| *name == op);
        row.into_iter().flat_map(move |(op, variants)| {
            let all = std::iter::once("").chain(variants.iter().copied());
            all.map(move |variant| Self { op, variant, dtype })
        })
    }

    /// Reads a name; `None` when no body has it.
    pub fn parse(name: &str) -> Option<Self> {
        let ops = NATIVE_OPS.into_iter().filter(|(op, _)| name.starts_with(op));
        let names = ops.flat_map(|(op, _)| TYPES.into_iter().flat_map(move |(dtype, _)| Self::of(op, dtype)));
        names.into_iter().find(|known| known.to_string() == name)
    }
}

impl fmt::Display for NativeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ending = TYPES.iter().find(|(dtype, _)| *dtype == self.dtype).map_or("", |(_, ending)| ending);
        write!(f, "{}{}{ending}", self.op, self.variant)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_is_of_one_body_and_is_read_back() {
        let mut all = BTreeSet::new();
        for (op, _) in NATIVE_OPS {
            for name in TYPES.into_iter().flat_map(|(dtype, _)| NativeName::of(op, dtype)) {
                assert!(all.insert(name.to_string()), "{name} stands for two");
                assert_eq!(NativeName::parse(&name.to_string()), Some(name));
            }
        }
        assert!(
            ["LinearGelu", "LinearGateResidualGeluBf16", "AttentionProductsF16"]
                .iter()
                .all(|n| all.contains(*n))
        );
        for wrong in ["", "Gelu", "LinearRelu", "LinearF32", "linear"] {
            assert_eq!(NativeName::parse(wrong), None, "{wrong}");
        }
    }
}
