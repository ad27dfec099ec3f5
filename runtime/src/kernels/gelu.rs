//! Derivative of the tanh form of GELU.

use super::simd::{exp, multiversion};

/// √(2/π)
const C: f32 = 0.797_884_6;
const K: f32 = 0.044_715;

multiversion! {
    /// GELU in place: `x / (1 + e^(−2u))` with `u` the argument of tanh.
    pub(crate) fn apply(values: &mut [f32]) {
        for x in values {
            let u = C * *x * (1.0 + K * (*x * *x));
            *x /= 1.0 + exp(-2.0 * u);
        }
    }
}

/// `sums ⊙ gelu'(x)` in place.
#[inline(always)]
pub(crate) fn apply_grad(x: &[f32], sums: &mut [f32]) {
    for (&x, sum) in x.iter().zip(sums) {
        *sum *= slope(x);
    }
}

/// Derivative of GELU. With `u` the argument of tanh and `s = 1 / (1 + e^(−2u))` it is `s + 2 x s (1−s) u'`, where
/// `1−s = e^(−2u) s`: no difference of nearly equal numbers.
#[inline(always)]
fn slope(x: f32) -> f32 {
    // Outside ±20 the derivative is 0 or 1 to the last bit of f32.
    let x = x.clamp(-20.0, 20.0);
    let square = x * x;
    let u = C * x * (1.0 + K * square);
    let e = exp(-2.0 * u);
    let s = 1.0 / (1.0 + e);
    s + 2.0 * x * s * (e * s) * (C * (1.0 + 3.0 * K * square))
}

multiversion! {
    /// `dx = ct · d/dx [½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))]`, elementwise.
    pub(crate) fn gelu_grad(x: &[f32], ct: &[f32], dx: &mut [f32]) {
        for ((&x, &ct), dx) in x.iter().zip(ct).zip(dx) {
            *dx = ct * slope(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_formula_in_f64() {
        let x: Vec<f32> = (-4000..4000).map(|i| i as f32 * 3.1e-3).chain([-1e20, 1e20, -30.0, 0.0]).collect();
        let ct: Vec<f32> = (0..x.len()).map(|i| (i as f32 * 0.7).sin() + 1.5).collect();
        let mut dx = vec![0.0; x.len()];
        gelu_grad(&x, &ct, &mut dx);
        for ((&x, &ct), &dx) in x.iter().zip(&ct).zip(&dx) {
            let v = f64::from(x).clamp(-1e5, 1e5);
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let t = (c * (v + 0.044_715 * v * v * v)).tanh();
            let slope = c * (1.0 + 3.0 * 0.044_715 * v * v);
            let exact = f64::from(ct) * (0.5 * (1.0 + t) + 0.5 * v * (1.0 - t * t) * slope);
            assert!((f64::from(dx) - exact).abs() < 1e-6, "x {x}: {dx} instead of {exact}");
        }
        gelu_grad(&[f32::NAN], &[1.0], &mut dx[..1]);
        assert!(dx[0].is_nan());
    }
}
