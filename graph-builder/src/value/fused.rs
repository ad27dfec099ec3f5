//! Fused ops of the domain `mudit` and their gradients, as methods. The gradients have no derivative of their own.

use crate::ops::activation::{Activation, GeluGrad};
use crate::ops::attention::{Attention, AttentionGrad};
use crate::ops::linear::{Linear, LinearGateResidual, LinearGradInput, LinearGradWeight};
use crate::ops::modulation::{GateResidual, GateResidualGrad, LayerNormModulate, LayerNormModulateGrad};
use crate::ops::nn::{LayerNormGrad, SoftmaxGrad};
use crate::ops::patch::{PatchOrder, Patchify, Unpatchify};
use crate::ops::several::After;
use crate::value::Value;

impl Value<'_> {
    /// `self Wᵀ + b` with `weight` (out, in) and `bias` (out).
    #[track_caller]
    pub fn linear(self, weight: Self, bias: Self) -> Self {
        self.activated_linear(Activation::None, weight, bias)
    }

    /// `act(self) Wᵀ + b` as one op; the passes find `gelu` before [`Value::linear`] too.
    #[track_caller]
    pub fn activated_linear(self, activation: Activation, weight: Self, bias: Self) -> Self {
        self.builder.push(Linear { activation }.into(), &[self, weight, bias])
    }

    /// `self + gate · (act(a) Wᵀ + b)` as one op; the passes make it where nothing else needs the branch.
    #[track_caller]
    pub fn linear_gate_residual(
        self,
        gate: Self,
        activation: Activation,
        [a, weight, bias]: [Self; 3],
    ) -> Self {
        self.builder.push(LinearGateResidual { activation }.into(), &[self, gate, a, weight, bias])
    }

    /// `LN(self) · (1 + scale) + shift` with `shift`, `scale` (N, 1, D).
    #[track_caller]
    pub fn layer_norm_modulate(self, shift: Self, scale: Self, epsilon: f64) -> Self {
        self.builder.push(LayerNormModulate { epsilon }.into(), &[self, shift, scale])
    }

    /// `self + gate · y` with `gate` (N, 1, D).
    #[track_caller]
    pub fn gate_residual(self, gate: Self, y: Self) -> Self {
        self.builder.push(GateResidual.into(), &[self, gate, y])
    }

    /// Multi-head self-attention of `self` (N, T, 3·D), whose features are ordered (q k v, head, feature).
    #[track_caller]
    pub fn attention(self, heads: usize, scale: f64) -> Self {
        self.unary(Attention { heads, scale })
    }

    /// Square patches as rows: (N, C, H, W) → (N, H/P·W/P, C·P·P), row by row.
    #[track_caller]
    pub fn patchify(self, patch: usize, order: PatchOrder) -> Self {
        self.unary(Patchify { patch, order })
    }

    /// The inverse of [`Value::patchify`]: (N, T, C·P·P) → (N, C, `height`, `width`).
    #[track_caller]
    pub fn unpatchify(self, patch: usize, order: PatchOrder, height: usize, width: usize) -> Self {
        self.unary(Unpatchify { patch, order, height, width })
    }

    /// `self`, but computed after `token`.
    #[track_caller]
    pub fn after(self, token: Self) -> Self {
        self.binary(After, token)
    }

    /// Derivative of [`Value::gelu`] at `self`, times the cotangent `ct`.
    #[track_caller]
    pub fn gelu_grad(self, ct: Self) -> Self {
        self.binary(GeluGrad, ct)
    }

    /// The operand's cotangent of a softmax whose answer is `self`.
    #[track_caller]
    pub fn softmax_grad(self, ct: Self) -> Self {
        self.binary(SoftmaxGrad, ct)
    }

    /// The operand's cotangent of [`Value::layer_norm`] at `self`.
    #[track_caller]
    pub fn layer_norm_grad(self, ct: Self, epsilon: f64) -> Self {
        self.binary(LayerNormGrad { epsilon }, ct)
    }

    /// The operand's cotangent of [`Value::linear`] whose answer's cotangent is `self`; with `before`, that of
    /// `gelu` of `before` in front of it.
    #[track_caller]
    pub fn linear_grad_input(self, weight: Self, before: Option<Self>) -> Self {
        let activation = if before.is_some() { Activation::Gelu } else { Activation::None };
        let operands: Vec<Self> = [self, weight].into_iter().chain(before).collect();
        self.builder.push(LinearGradInput { activation }.into(), &operands)
    }

    /// The cotangents of weight and bias ([`Value::results`]) of [`Value::activated_linear`] of `x`, whose
    /// answer's cotangent is `self`.
    #[track_caller]
    pub fn linear_grad_weight(self, activation: Activation, x: Self) -> Self {
        self.binary(LinearGradWeight { activation }, x)
    }

    /// The cotangents of `self`, shift and scale ([`Value::results`]) of [`Value::layer_norm_modulate`]; `residual`
    /// is added to the first.
    #[track_caller]
    pub fn layer_norm_modulate_grad(
        self,
        scale: Self,
        ct: Self,
        residual: Option<Self>,
        epsilon: f64,
    ) -> Self {
        let operands: Vec<Self> = [self, scale, ct].into_iter().chain(residual).collect();
        self.builder.push(LayerNormModulateGrad { epsilon }.into(), &operands)
    }

    /// The cotangents of `y` and of the gate `self` ([`Value::results`]) of [`Value::gate_residual`].
    #[track_caller]
    pub fn gate_residual_grad(self, y: Self, ct: Self) -> Self {
        self.builder.push(GateResidualGrad.into(), &[self, y, ct])
    }

    /// The cotangent of `self`, the operand of [`Value::attention`].
    #[track_caller]
    pub fn attention_grad(self, ct: Self, heads: usize, scale: f64) -> Self {
        self.binary(AttentionGrad { heads, scale }, ct)
    }
}
