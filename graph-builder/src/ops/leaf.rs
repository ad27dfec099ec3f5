//! Nodes without operands: inputs, parameters, constants.

use std::fmt;
use std::sync::Arc;

use ndarray::{ArrayD, IxDyn};

use crate::error::{Refusal, refuse};
use crate::eval::{Array, filled};
use crate::onnx::Emitter;
use crate::op::{Cost, Grad, Policy, Rules, Storage};
use crate::shape::Type;
use crate::value::Value;

/// A value that the caller feeds at every run.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// Stable name.
    pub name: String,
    /// Declared type.
    pub ty: Type,
}

/// A declared parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterRef {
    /// Position in [`crate::Graph::parameters`].
    pub index: usize,
    /// Full name, as in the published checkpoint.
    pub name: String,
    /// Declared type.
    pub ty: Type,
}

/// Values known when the graph is built.
///
/// # Constraints
/// - C1: one value (it fills the shape) or as many values as the shape has elements
#[derive(Clone, PartialEq)]
pub struct Constant {
    /// Type of the whole constant.
    pub ty: Type,
    /// Row-major values, or one for all.
    pub data: Arc<[f64]>,
}

impl Constant {
    /// The value when all elements are equal to it.
    pub fn splat(&self) -> Option<f64> {
        let first = *self.data.first()?;
        self.data.iter().all(|v| v.to_bits() == first.to_bits()).then_some(first)
    }

    /// Row-major values, one an element.
    pub(crate) fn values(&self) -> Vec<f64> {
        if self.data.len() == 1 { vec![self.data[0]; self.ty.shape.numel()] } else { self.data.to_vec() }
    }
}

impl fmt::Debug for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.data.len() <= 4 {
            return write!(f, "Constant {{ {:?} }}", self.data);
        }
        // FNV-1a over the bits: equal text means equal values, for reviews and for common subexpressions.
        let hash = self
            .data
            .iter()
            .flat_map(|v| v.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        write!(f, "Constant {{ {} values, {hash:016x} }}", self.data.len())
    }
}

impl Rules for Input {
    fn name(&self) -> &'static str {
        "Input"
    }
    fn policy(&self) -> Policy {
        Policy::Leaf
    }
    fn storage(&self) -> Storage {
        Storage::Leaf
    }
    fn infer(&self, _: &[&Type]) -> Result<Type, Refusal> {
        Ok(self.ty.clone())
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        Vec::new()
    }
    fn emit(&self, _: &mut Emitter<'_>) {}
    fn eval(&self, _: &[&Array], out: &Type) -> Array {
        ArrayD::zeros(IxDyn(out.shape.dims())) // replaced by the caller's value
    }
    fn cost(&self, _: &[&Type], _: &Type) -> Cost {
        Cost::default()
    }
}

impl Rules for ParameterRef {
    fn name(&self) -> &'static str {
        "Parameter"
    }
    fn policy(&self) -> Policy {
        Policy::Leaf
    }
    fn storage(&self) -> Storage {
        Storage::Leaf
    }
    fn infer(&self, _: &[&Type]) -> Result<Type, Refusal> {
        Ok(self.ty.clone())
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        Vec::new()
    }
    fn emit(&self, _: &mut Emitter<'_>) {}
    fn eval(&self, _: &[&Array], out: &Type) -> Array {
        ArrayD::zeros(IxDyn(out.shape.dims())) // replaced by the caller's value
    }
    fn cost(&self, _: &[&Type], _: &Type) -> Cost {
        Cost::default()
    }
}

impl Rules for Constant {
    fn name(&self) -> &'static str {
        "Constant"
    }
    fn policy(&self) -> Policy {
        Policy::Leaf
    }
    fn storage(&self) -> Storage {
        Storage::Leaf
    }
    fn infer(&self, _: &[&Type]) -> Result<Type, Refusal> {
        let (n, numel) = (self.data.len(), self.ty.shape.numel());
        if n == 1 || n == numel {
            Ok(self.ty.clone())
        } else {
            refuse(format!("C1: 1 or {numel} values, not {n}"))
        }
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, _: Value<'g>) -> Vec<Grad<'g>> {
        Vec::new()
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emitter.constant(self);
    }
    fn eval(&self, _: &[&Array], out: &Type) -> Array {
        filled(&out.shape, self.values())
    }
    fn cost(&self, _: &[&Type], _: &Type) -> Cost {
        Cost::default()
    }
}
