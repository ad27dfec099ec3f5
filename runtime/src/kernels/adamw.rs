//! The inner loops of the parameter update.

use super::simd::multiversion;

/// Everything the update of one entry needs beside its arrays. Scalars are computed in f64 and rounded once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Coefficients {
    /// Scale of the gradient: the clip's, over the factor on the loss.
    pub(crate) gradient: f32,
    /// `1 − lr · weight decay`
    pub(crate) decay: f32,
    /// `1 − β₁`
    pub(crate) one_minus_beta1: f32,
    /// `β₂`
    pub(crate) beta2: f32,
    /// `1 − β₂`
    pub(crate) one_minus_beta2: f32,
    /// `√(1 − β₂ᵗ)`
    pub(crate) correction2: f32,
    /// `ε`
    pub(crate) epsilon: f32,
    /// `lr / (1 − β₁ᵗ)`
    pub(crate) step: f32,
    /// Decay of the average, and one minus it.
    pub(crate) ema: (f32, f32),
}

/// One stretch of one entry.
pub(crate) struct Stretch<'a> {
    pub(crate) parameter: &'a mut [f32],
    pub(crate) gradient: &'a [f32],
    pub(crate) first: &'a mut [f32],
    pub(crate) second: &'a mut [f32],
    pub(crate) average: Option<&'a mut [f32]>,
}

multiversion! {
    /// One AdamW step, in the order of operations of PyTorch's single-tensor implementation.
    pub(crate) fn step(s: &mut Stretch<'_>, c: &Coefficients) {
        let arrays = s.parameter.iter_mut().zip(s.gradient).zip(s.first.iter_mut()).zip(s.second.iter_mut());
        for (((p, g), m), v) in arrays {
            let g = *g * c.gradient;
            *m += c.one_minus_beta1 * (g - *m);
            *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
            let denominator = v.sqrt() / c.correction2 + c.epsilon;
            *p = *p * c.decay - (c.step * *m) / denominator;
        }
        if let Some(average) = s.average.as_mut() {
            let (keep, take) = c.ema;
            for (average, p) in average.iter_mut().zip(s.parameter.iter()) {
                *average = *average * keep + take * *p;
            }
        }
    }
}

multiversion! {
    /// Sum of squares in f64, in an order that depends on the length only.
    pub(crate) fn sum_of_squares(values: &[f32]) -> f64 {
        const LANES: usize = 8;
        let mut lanes = [0.0_f64; LANES];
        let chunks = values.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(x) * f64::from(x);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(x) * f64::from(x);
        }
        lanes.iter().sum()
    }
}
