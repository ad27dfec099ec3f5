//! Gradients of whole models against the numerical derivatives of a loss that is computed without the loss graph.

use models::{DdpmSchedule, Objective, ProgramKind};
use mudit_tests::difference::{derivative, dot, relative};
use mudit_tests::draws::Draws;
use mudit_tests::tolerance::MODEL_DERIVATIVE;
use mudit_tests::{Array, Feeds};

use crate::tiny::{self, BATCH};

/// The pixels of sample `n`, channels `from..to`, of an array (N, C, H, W).
fn pixels(x: &Array, n: usize, channels: std::ops::Range<usize>) -> Vec<f64> {
    let size = x.shape()[2] * x.shape()[3];
    let start = n * x.shape()[1] * size;
    let all: Vec<f64> = x.iter().copied().collect();
    all[start + channels.start * size..start + channels.end * size].to_vec()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

/// The inputs of the model for the noised sample, and the sample itself.
fn noised(objective: Objective, feeds: &Feeds) -> Feeds {
    let s = DdpmSchedule::default();
    let mut x = feeds["x0"].clone();
    for (n, mut sample) in x.axis_iter_mut(ndarray::Axis(0)).enumerate() {
        let t = feeds["t"][[n]];
        let (signal, noise) = match objective {
            Objective::Ddpm => {
                let ab = s.alphas_cumprod[t as usize];
                (ab.sqrt(), (1.0 - ab).sqrt())
            }
            Objective::Flow => (1.0 - t / 1000.0, t / 1000.0),
        };
        let draw = feeds["noise"].index_axis(ndarray::Axis(0), n);
        sample.zip_mut_with(&draw, |x, e| *x = signal * *x + noise * e);
    }
    let mut inputs = feeds.clone();
    inputs.insert("x".to_owned(), x);
    inputs
}

/// Bits per dimension of a pixel: a bin of a Gaussian, or the distance of two Gaussians.
fn bound(t: usize, s: &DdpmSchedule, x0: f64, xt: f64, eps: f64, logit: f64) -> f64 {
    let frac = f64::midpoint(logit, 1.0);
    let (low, high) = (s.posterior_log_variance_clipped[t], s.betas[t].ln());
    let log_variance = frac * high + (1.0 - frac) * low;
    let ab = s.alphas_cumprod[t];
    let x0_hat = (xt - (1.0 - ab).sqrt() * eps) / ab.sqrt();
    let mean_of = |x0: f64| s.posterior_mean_coef1[t] * x0 + s.posterior_mean_coef2[t] * xt;
    let mean = mean_of(x0_hat);
    if t > 0 {
        let distance = mean_of(x0) - mean;
        let kl = (-1.0 + log_variance - low
            + (low - log_variance).exp()
            + distance * distance * (-log_variance).exp())
            / 2.0;
        return kl / 2.0_f64.ln();
    }
    let cdf = |x: f64| {
        let z = (x - mean) / (log_variance / 2.0).exp();
        f64::midpoint(1.0, ((2.0 / std::f64::consts::PI).sqrt() * (z + 0.044_715 * z.powi(3))).tanh())
    };
    let (above, below) = (cdf(x0 + 1.0 / 255.0), cdf(x0 - 1.0 / 255.0));
    let mass = match x0 {
        x if x < -0.999 => above,
        x if x > 0.999 => 1.0 - below,
        _ => above - below,
    };
    -mass.max(1e-12).ln() / 2.0_f64.ln()
}

/// The loss of the model's answer `out`; the bound takes its ε from `held`, which the reference does not differentiate.
fn loss(objective: Objective, feeds: &Feeds, out: &Array, held: &Array) -> f64 {
    let s = DdpmSchedule::default();
    let channels = feeds["x0"].shape()[1];
    let per_sample = (0..BATCH).map(|n| {
        let (x0, noise) = (pixels(&feeds["x0"], n, 0..channels), pixels(&feeds["noise"], n, 0..channels));
        let answer = pixels(out, n, 0..channels);
        if objective == Objective::Flow {
            return mean((0..x0.len()).map(|i| (answer[i] - (noise[i] - x0[i])).powi(2)));
        }
        let t = feeds["t"][[n]] as usize;
        let (xt, eps) = (pixels(&feeds["x"], n, 0..channels), pixels(held, n, 0..channels));
        let logits = pixels(out, n, channels..2 * channels);
        let mse = mean((0..x0.len()).map(|i| (noise[i] - answer[i]).powi(2)));
        let vb = mean((0..x0.len()).map(|i| bound(t, &s, x0[i], xt[i], eps[i], logits[i])));
        mse + feeds["hp.vb_weight"].sum() * vb
    });
    mean(per_sample)
}

#[test]
fn gradients_of_a_whole_model_are_the_numerical_derivatives() {
    for variant in tiny::VARIANTS {
        let objective = tiny::config(variant).objective;
        let train = tiny::graph(variant, ProgramKind::TrainStep);
        let denoise = tiny::graph(variant, ProgramKind::Denoise);
        let feeds = noised(objective, &tiny::feeds(&train, variant));
        let held = denoise.eval(&feeds).unwrap().remove(0);

        let values = train.eval(&feeds).unwrap();
        let outputs: Feeds = train.outputs().iter().map(|(n, _)| n.clone()).zip(values).collect();
        let error = relative(outputs["loss"].sum(), loss(objective, &feeds, &held, &held));
        assert!(error < 1e-12, "{variant}: loss {error:e}");

        let trainable: Vec<_> = train.parameters().iter().filter(|p| p.trainable).collect();
        assert_eq!(trainable.len(), 21, "{variant}: 2 + 4 + 1 + 10 + 4 trainable tensors");
        let mut worst = (0.0, "");
        for p in trainable {
            let gradient = &outputs[&format!("grad.{}", p.name)];
            let direction = Draws::named("direction").uniform(gradient.shape(), -1.0, 1.0);
            let want = derivative(|h| {
                let mut moved = feeds.clone();
                let at = moved.get_mut(&p.name).unwrap();
                *at = &*at + &(&direction * (0.01 * h));
                loss(objective, &feeds, &denoise.eval(&moved).unwrap()[0], &held)
            }) / 0.01;
            let error = relative(dot(gradient, &direction), want);
            assert!(error <= MODEL_DERIVATIVE, "{variant}: {}: relative error {error:e}", p.name);
            if error > worst.0 {
                worst = (error, &p.name);
            }
        }
        println!("worst derivative of {variant}: {:.1e}, {}", worst.0, worst.1);
    }
}
