//! The kernel against the definition in f64.

use super::*;
use crate::kernels::product::isa::tests::{available, with};
use crate::kernels::product::tests::{Alone, Crowd, noise};

/// `softmax(q kᵀ · scale) v` and its gradient for one head, by the definition.
fn exact(op: Attention, qkv: &[f32], ct: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (t, d, k) = (op.tokens, op.width(), op.size);
    let at = |n: usize, token: usize, part: usize, feature: usize| ((n * t + token) * 3 + part) * d + feature;
    let mut out = vec![0.0; op.samples * t * d];
    let mut grad = vec![0.0; op.samples * t * 3 * d];
    for n in 0..op.samples {
        for head in 0..op.heads {
            let x = |token: usize, part: usize, i: usize| f64::from(qkv[at(n, token, part, head * k + i)]);
            let c = |token: usize, i: usize| f64::from(ct[(n * t + token) * d + head * k + i]);
            for q in 0..t {
                let scores: Vec<f64> = (0..t)
                    .map(|key| (0..k).map(|i| x(q, 0, i) * x(key, 1, i)).sum::<f64>() * f64::from(op.scale))
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let w: Vec<f64> = scores.iter().map(|s| (s - max).exp() / sum).collect();
                let dw: Vec<f64> = (0..t).map(|key| (0..k).map(|i| c(q, i) * x(key, 2, i)).sum()).collect();
                let dot: f64 = w.iter().zip(&dw).map(|(a, b)| a * b).sum();
                for key in 0..t {
                    let ds = w[key] * (dw[key] - dot) * f64::from(op.scale);
                    for i in 0..k {
                        out[(n * t + q) * d + head * k + i] += w[key] * x(key, 2, i);
                        grad[at(n, q, 0, head * k + i)] += ds * x(key, 1, i);
                        grad[at(n, key, 1, head * k + i)] += ds * x(q, 0, i);
                        grad[at(n, key, 2, head * k + i)] += w[key] * c(q, i);
                    }
                }
            }
        }
    }
    (out, grad)
}

fn close(got: &[f32], want: &[f64], what: &str) {
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let error = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
    assert!(error <= 2e-6 * norm, "{what}: relative error {}", error / norm);
}

#[test]
fn forward_and_backward_agree_with_the_definition_for_any_shape() {
    // Tokens and head sizes that fill registers, leave remainders, or are smaller than one.
    for (samples, tokens, heads, size) in
        [(1, 1, 1, 1), (2, 4, 3, 12), (1, 16, 2, 64), (2, 49, 2, 72), (1, 70, 1, 36), (1, 130, 2, 20)]
    {
        let scale = 1.7 / (size as f32).sqrt();
        let op = Attention { samples, tokens, heads, size, scale };
        let d = op.width();
        let qkv: Vec<f32> = noise(samples * tokens * 3 * d, 1).iter().map(|v| 3.0 * v).collect();
        let ct = noise(samples * tokens * d, 2);
        let (want, want_grad) = exact(op, &qkv, &ct);
        let (mut out, mut grad) = (vec![f32::NAN; want.len()], vec![f32::NAN; want_grad.len()]);
        op.forward(&Alone, &qkv, &mut out);
        op.backward(&Alone, &qkv, &ct, &mut grad);
        let what = format!("{samples} × {tokens} tokens × {heads} heads of {size}");
        close(&out, &want, &what);
        close(&grad, &want_grad, &what);
        for name in available() {
            let (mut out, mut grad) = (vec![f32::NAN; want.len()], vec![f32::NAN; want_grad.len()]);
            with(name, || {
                op.forward(&Alone, &qkv, &mut out);
                op.backward(&Alone, &qkv, &ct, &mut grad);
            });
            close(&out, &want, &format!("{what}, {name}"));
            close(&grad, &want_grad, &format!("{what}, {name}"));
        }
        let (mut out_2, mut grad_2) = (vec![f32::NAN; want.len()], vec![f32::NAN; want_grad.len()]);
        op.forward(&Crowd, &qkv, &mut out_2);
        op.backward(&Crowd, &qkv, &ct, &mut grad_2);
        assert_eq!(out, out_2, "{what}, on threads");
        assert_eq!(grad, grad_2, "{what}, on threads");
    }
}

#[test]
fn a_samples_answer_does_not_depend_on_the_others() {
    let op = Attention { samples: 3, tokens: 20, heads: 2, size: 24, scale: 0.2 };
    let (row, one) = (20 * 3 * op.width(), Attention { samples: 1, ..op });
    let qkv = noise(3 * row, 3);
    let (mut all, mut alone) = (vec![0.0; 3 * 20 * op.width()], vec![0.0; 20 * op.width()]);
    op.forward(&Alone, &qkv, &mut all);
    one.forward(&Alone, &qkv[row..2 * row], &mut alone);
    assert_eq!(all[alone.len()..2 * alone.len()], alone);
}

#[test]
fn large_scores_stay_finite() {
    let op = Attention { samples: 1, tokens: 17, heads: 1, size: 8, scale: 100.0 };
    let (qkv, ct) = (noise(17 * 24, 4), noise(17 * 8, 5));
    let (mut out, mut grad) = (vec![f32::NAN; 17 * 8], vec![f32::NAN; 17 * 24]);
    op.forward(&Alone, &qkv, &mut out);
    op.backward(&Alone, &qkv, &ct, &mut grad);
    assert!(out.iter().chain(&grad).all(|v| v.is_finite()));
}
