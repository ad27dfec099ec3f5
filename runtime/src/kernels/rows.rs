//! Kernels that work row by row over the last axis, and the gated residual.

use super::simd::{multiversion, sum, sums};

multiversion! {
    /// `dx = y ⊙ (ct − Σ ct⊙y)` for each row of `width` elements: the cotangent before a softmax with answer `y`.
    pub(crate) fn softmax_grad(y: &[f32], ct: &[f32], dx: &mut [f32], width: usize) {
        for ((y, ct), dx) in y.chunks_exact(width).zip(ct.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let dot = sum(width, |i| ct[i] * y[i]);
            for ((dx, y), ct) in dx.iter_mut().zip(y).zip(ct) {
                *dx = y * (ct - dot);
            }
        }
    }
}

/// Mean and 1/√(variance + ε) of a row; the variance is the biased one.
#[inline(always)]
fn moments(x: &[f32], epsilon: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x.len(), |i| x[i]) / n;
    let variance = sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

multiversion! {
    /// `dx = r (ct − mean(ct) − x̂ · mean(ct⊙x̂))` for each row of `width` elements, with `x̂ = r (x − mean(x))` and
    /// `r = 1/√(var(x) + ε)`: the cotangent before a layer norm without affine part.
    pub(crate) fn layer_norm_grad(x: &[f32], ct: &[f32], dx: &mut [f32], width: usize, epsilon: f32) {
        for ((x, ct), dx) in x.chunks_exact(width).zip(ct.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let (mean, r) = moments(x, epsilon);
            let n = width as f32;
            let ct_mean = sum(width, |i| ct[i]) / n;
            let projection = sum(width, |i| ct[i] * ((x[i] - mean) * r)) / n;
            for ((dx, x), ct) in dx.iter_mut().zip(x).zip(ct) {
                *dx = r * ((ct - ct_mean) - ((x - mean) * r) * projection);
            }
        }
    }
}

multiversion! {
    /// `y = LN(x) ⊙ (1 + scale) + shift` for each row of `shift.len()` elements; the rows share `shift` and `scale`.
    pub(crate) fn layer_norm_modulate(x: &[f32], shift: &[f32], scale: &[f32], y: &mut [f32], epsilon: f32) {
        let width = shift.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let (mean, r) = moments(x, epsilon);
            for (((y, x), scale), shift) in y.iter_mut().zip(x).zip(scale).zip(shift) {
                *y = ((x - mean) * r) * (1.0 + scale) + shift;
            }
        }
    }
}

multiversion! {
    /// `out = x + gate ⊙ y` for each row of `gate.len()` elements; the rows share `gate`.
    pub(crate) fn gate_residual(x: &[f32], gate: &[f32], y: &[f32], out: &mut [f32]) {
        let width = gate.len();
        for ((x, y), out) in x.chunks_exact(width).zip(y.chunks_exact(width)).zip(out.chunks_exact_mut(width)) {
            for (((out, x), y), gate) in out.iter_mut().zip(x).zip(y).zip(gate) {
                *out = x + gate * y;
            }
        }
    }
}

multiversion! {
    /// Gradient of `LN(x) ⊙ (1 + scale) + shift` for rows that share `scale`: `dx` (plus `residual`, where it is not
    /// empty), and the rows' share of `dshift` and `dscale`, which are overwritten.
    pub(crate) fn layer_norm_modulate_grad(
        x: &[f32],
        scale: &[f32],
        ct: &[f32],
        residual: &[f32],
        epsilon: f32,
        dx: &mut [f32],
        dshift: &mut [f32],
        dscale: &mut [f32],
    ) {
        let width = scale.len();
        let n = width as f32;
        dshift.fill(0.0);
        dscale.fill(0.0);
        let rows = x.chunks_exact(width).zip(ct.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for (index, ((x, ct), dx)) in rows.enumerate() {
            let (mean, r) = moments(x, epsilon);
            // dx holds the normalised row until its own turn.
            for (hat, x) in dx.iter_mut().zip(x) {
                *hat = (x - mean) * r;
            }
            let terms = |i: usize| {
                let inner = ct[i] * (1.0 + scale[i]);
                [inner, inner * dx[i]]
            };
            let [ct_mean, projection] = sums(width, terms).map(|sum| sum / n);
            for ((((hat, ct), scale), dshift), dscale) in
                dx.iter_mut().zip(ct).zip(scale).zip(&mut *dshift).zip(&mut *dscale)
            {
                *dshift += ct;
                *dscale += ct * *hat;
                *hat = r * ((ct * (1.0 + scale) - ct_mean) - *hat * projection);
            }
            if !residual.is_empty() {
                for (dx, residual) in dx.iter_mut().zip(&residual[index * width..]) {
                    *dx += residual;
                }
            }
        }
    }
}

multiversion! {
    /// Gradient of `x + gate ⊙ y` for rows that share `gate`: `dy = gate ⊙ ct`, and the rows' share of `dgate`, which
    /// is overwritten.
    pub(crate) fn gate_residual_grad(gate: &[f32], y: &[f32], ct: &[f32], dy: &mut [f32], dgate: &mut [f32]) {
        let width = gate.len();
        dgate.fill(0.0);
        for ((y, ct), dy) in y.chunks_exact(width).zip(ct.chunks_exact(width)).zip(dy.chunks_exact_mut(width)) {
            for ((((dy, gate), y), ct), dgate) in dy.iter_mut().zip(gate).zip(y).zip(ct).zip(&mut *dgate) {
                *dy = gate * ct;
                *dgate += ct * y;
            }
        }
    }
}

multiversion! {
    /// `total += part`, elementwise.
    pub(crate) fn add(total: &mut [f32], part: &[f32]) {
        for (total, part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values without a pattern that a wrong index could hide in.
    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&v| f64::from(v)).collect()
    }

    fn close(got: &[f32], exact: &[f64]) {
        let norm = exact.iter().map(|e| e * e).sum::<f64>().sqrt();
        let error = got.iter().zip(exact).map(|(g, e)| (f64::from(*g) - e).powi(2)).sum::<f64>().sqrt();
        assert!(error <= 1e-6 * norm, "relative error {}", error / norm);
    }

    fn normalised(x: &[f64], epsilon: f64) -> (Vec<f64>, f64) {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let r = 1.0 / (variance + epsilon).sqrt();
        (x.iter().map(|v| (v - mean) * r).collect(), r)
    }

    const WIDTHS: [usize; 5] = [1, 5, 16, 96, 389];

    #[test]
    fn softmax_grad_agrees_with_the_formula_in_f64() {
        for width in WIDTHS {
            let y: Vec<f32> = noise(3 * width, 1).iter().map(|v| (v + 1.0) / width as f32).collect();
            let ct = noise(3 * width, 2);
            let mut dx = vec![0.0; 3 * width];
            softmax_grad(&y, &ct, &mut dx, width);
            let exact: Vec<f64> = wide(&y)
                .chunks(width)
                .zip(wide(&ct).chunks(width))
                .flat_map(|(y, ct)| {
                    let dot: f64 = y.iter().zip(ct).map(|(a, b)| a * b).sum();
                    y.iter().zip(ct).map(|(y, ct)| y * (ct - dot)).collect::<Vec<_>>()
                })
                .collect();
            close(&dx, &exact);
        }
    }

    #[test]
    fn layer_norm_grad_agrees_with_the_formula_in_f64() {
        for width in &WIDTHS[1..] {
            // An offset as large as the spread: the two-pass variance must not suffer from it.
            let x: Vec<f32> = noise(3 * width, 3).iter().map(|v| v + 2.0).collect();
            let ct = noise(3 * width, 4);
            let mut dx = vec![0.0; 3 * width];
            layer_norm_grad(&x, &ct, &mut dx, *width, 1e-6);
            let exact: Vec<f64> = wide(&x)
                .chunks(*width)
                .zip(wide(&ct).chunks(*width))
                .flat_map(|(x, ct)| {
                    let (hat, r) = normalised(x, 1e-6);
                    let n = x.len() as f64;
                    let mean = ct.iter().sum::<f64>() / n;
                    let projection = ct.iter().zip(&hat).map(|(a, b)| a * b).sum::<f64>() / n;
                    ct.iter().zip(hat).map(|(ct, h)| r * (ct - mean - h * projection)).collect::<Vec<_>>()
                })
                .collect();
            close(&dx, &exact);
        }
    }

    #[test]
    fn layer_norm_modulate_agrees_with_the_formula_in_f64() {
        for width in &WIDTHS[1..] {
            let (x, shift, scale) = (noise(4 * width, 5), noise(*width, 6), noise(*width, 7));
            let mut y = vec![0.0; 4 * width];
            layer_norm_modulate(&x, &shift, &scale, &mut y, 1e-6);
            let exact: Vec<f64> = wide(&x)
                .chunks(*width)
                .flat_map(|x| {
                    let (hat, _) = normalised(x, 1e-6);
                    let modulation = wide(&scale).into_iter().zip(wide(&shift));
                    hat.iter().zip(modulation).map(|(h, (a, b))| h * (1.0 + a) + b).collect::<Vec<_>>()
                })
                .collect();
            close(&y, &exact);
        }
    }

    #[test]
    fn gate_residual_agrees_with_the_formula_in_f64() {
        for width in WIDTHS {
            let (x, gate, y) = (noise(3 * width, 8), noise(width, 9), noise(3 * width, 10));
            let mut out = vec![0.0; 3 * width];
            gate_residual(&x, &gate, &y, &mut out);
            let exact: Vec<f64> = (0..3 * width)
                .map(|i| f64::from(x[i]) + f64::from(gate[i % width]) * f64::from(y[i]))
                .collect();
            close(&out, &exact);
        }
    }
}
