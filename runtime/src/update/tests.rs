use std::sync::Arc;

use super::*;

const CONSTANTS: (f64, f64, f64) = (0.9, 0.999, 1e-8);

/// Four entries, one of them frozen, one longer than a block and one not a multiple of any vector.
fn parameter_layout(large: usize) -> Arc<ArenaLayout> {
    let shapes = [("a", vec![large]), ("frozen", vec![7]), ("b", vec![3, 5]), ("c", vec![])];
    let entries = shapes.map(|(name, dims)| (name.to_owned(), Shape(dims)));
    Arc::new(ArenaLayout::new(entries).unwrap())
}

fn gradient_layout(parameters: &ArenaLayout) -> Arc<ArenaLayout> {
    Arc::new(trainable_layout(parameters, |name, _| name != "frozen").unwrap())
}

fn noise(layout: &Arc<ArenaLayout>, seed: f32, scale: f32) -> Arena {
    let mut arena = Arena::zeros(layout.clone()).unwrap();
    for (i, view) in arena.views_mut().into_iter().enumerate() {
        for (j, x) in view.iter_mut().enumerate() {
            *x = ((seed + i as f32 * 1.7 + j as f32 * 0.37).sin() * 12.9898).fract() * scale;
        }
    }
    arena
}

struct Run {
    parameters: Arena,
    first: Arena,
    second: Arena,
    ema: Arena,
    reports: Vec<UpdateReport>,
}

const LR: [f64; 3] = [1e-2, 3e-3, 5e-2];
const DECAY: [f64; 3] = [0.0, 0.1, 0.3];

fn run(large: usize, threads: usize, clip: Option<f64>, steps: u64) -> Run {
    run_scaled(large, threads, clip, steps, 1.0)
}

/// A run whose gradients come multiplied by a factor.
fn run_scaled(large: usize, threads: usize, clip: Option<f64>, steps: u64, factor: f32) -> Run {
    let (pl, gl) = (parameter_layout(large), gradient_layout(&parameter_layout(large)));
    let adamw = AdamW::new(&pl, &gl, CONSTANTS, threads).unwrap();
    let mut run = Run {
        parameters: noise(&pl, 0.3, 1.0),
        first: Arena::zeros(gl.clone()).unwrap(),
        second: Arena::zeros(gl.clone()).unwrap(),
        ema: noise(&pl, 0.3, 1.0),
        reports: Vec::new(),
    };
    for step in 1..=steps {
        let mut gradients = Arena::zeros(gl.clone()).unwrap();
        gradients.add_scaled(&noise(&gl, step as f32, 0.1), factor).unwrap();
        let state = UpdateState {
            parameters: &mut run.parameters,
            gradients: &gradients,
            first_moments: &mut run.first,
            second_moments: &mut run.second,
            ema: Some((&mut run.ema, 0.9)),
        };
        let gradient_scale = 1.0 / f64::from(factor);
        let step = UpdateStep { step, lr: &LR, weight_decay: &DECAY, clip, gradient_scale };
        run.reports.push(adamw.step(state, &step).unwrap());
    }
    run
}

/// The update in f64, one scalar after the other: parameters, then average, for each trainable entry.
fn reference(large: usize, clip: Option<f64>, steps: u64) -> Vec<(String, Vec<f64>, Vec<f64>)> {
    let (pl, gl) = (parameter_layout(large), gradient_layout(&parameter_layout(large)));
    let wide = |v: &[f32]| v.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let start = noise(&pl, 0.3, 1.0);
    let mut answer = Vec::new();
    for (i, name) in gl.entries().keys().enumerate() {
        let mut p = wide(start.view(name).unwrap());
        let mut average = p.clone();
        let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
        for t in 1..=steps {
            let gradients = noise(&gl, t as f32, 0.1);
            let all: f64 = gradients.iter().flat_map(|(_, _, g)| wide(g)).map(|g| g * g).sum();
            let scale = clip.map_or(1.0, |c| (c / (all.sqrt() + 1e-6)).min(1.0));
            let g = wide(gradients.view(name).unwrap());
            let power = i32::try_from(t).unwrap();
            for j in 0..p.len() {
                let g = g[j] * scale;
                m[j] = 0.9 * m[j] + 0.1 * g;
                v[j] = 0.999 * v[j] + 0.001 * g * g;
                p[j] *= 1.0 - LR[i] * DECAY[i];
                let (mh, vh) = (m[j] / (1.0 - 0.9_f64.powi(power)), v[j] / (1.0 - 0.999_f64.powi(power)));
                p[j] -= LR[i] * mh / (vh.sqrt() + 1e-8);
                average[j] = 0.9 * average[j] + 0.1 * p[j];
            }
        }
        answer.push((name.clone(), p, average));
    }
    answer
}

#[test]
fn agrees_with_the_scalar_reference_with_and_without_clip() {
    for clip in [None, Some(0.05), Some(1e9)] {
        let run = run(1000, 1, clip, 3);
        for (name, p, average) in reference(1000, clip, 3) {
            for (arena, exact) in [(&run.parameters, p), (&run.ema, average)] {
                for (got, want) in arena.view(&name).unwrap().iter().zip(exact) {
                    assert!(
                        (f64::from(*got) - want).abs() < 2e-6,
                        "{name}: {got} instead of {want} ({clip:?})"
                    );
                }
            }
        }
        assert_eq!(run.reports[0].clip_scale < 1.0, clip == Some(0.05));
    }
}

#[test]
fn frozen_parameters_and_their_average_stay() {
    let run = run(100, 1, None, 2);
    let before = noise(&parameter_layout(100), 0.3, 1.0);
    assert_eq!(run.parameters.view("frozen").unwrap(), before.view("frozen").unwrap());
    assert_eq!(run.ema.view("frozen").unwrap(), before.view("frozen").unwrap());
    assert_ne!(run.parameters.view("b").unwrap(), before.view("b").unwrap());
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let large = 2 * SMALL + 77;
    let one = run(large, 1, Some(0.5), 2);
    for threads in [2, 3] {
        let many = run(large, threads, Some(0.5), 2);
        assert_eq!(one.reports, many.reports);
        for (x, y) in [
            (&one.parameters, &many.parameters),
            (&one.first, &many.first),
            (&one.second, &many.second),
            (&one.ema, &many.ema),
        ] {
            for ((name, _, x), (_, _, y)) in x.iter().zip(y.iter()) {
                assert!(
                    x.iter().zip(y).all(|(x, y)| x.to_bits() == y.to_bits()),
                    "{name}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    let (pl, gl) = (parameter_layout(100), gradient_layout(&parameter_layout(100)));
    let adamw = AdamW::new(&pl, &gl, CONSTANTS, 1).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut gradients = noise(&gl, 1.0, 1.0);
        gradients.view_mut("b").unwrap()[14] = bad;
        let mut parameters = noise(&pl, 0.0, 1.0);
        let (mut first, mut second) = (Arena::zeros(gl.clone()).unwrap(), Arena::zeros(gl.clone()).unwrap());
        let state = UpdateState {
            parameters: &mut parameters,
            gradients: &gradients,
            first_moments: &mut first,
            second_moments: &mut second,
            ema: None,
        };
        let step =
            UpdateStep { step: 1, lr: &LR, weight_decay: &DECAY, clip: Some(1.0), gradient_scale: 1.0 };
        assert!(!adamw.step(state, &step).unwrap().finite);
        assert!(parameters.iter().eq(noise(&pl, 0.0, 1.0).iter()));
        assert!(first.iter().all(|(_, _, m)| m.iter().all(|&x| x == 0.0)));
    }
}

#[test]
fn bad_settings_are_refused() {
    let (pl, gl) = (parameter_layout(10), gradient_layout(&parameter_layout(10)));
    assert!(AdamW::new(&pl, &gl, (1.0, 0.999, 1e-8), 1).is_err());
    let strange = ArenaLayout::new([("a".to_owned(), [11].into())]).unwrap();
    assert!(matches!(AdamW::new(&pl, &strange, CONSTANTS, 1), Err(RuntimeError::WrongShape { .. })));
    let adamw = AdamW::new(&pl, &gl, CONSTANTS, 1).unwrap();
    let good = UpdateStep { step: 1, lr: &LR, weight_decay: &DECAY, clip: None, gradient_scale: 1.0 };
    for step in [
        UpdateStep { step: 0, ..good },
        UpdateStep { lr: &LR[..2], ..good },
        UpdateStep { weight_decay: &[0.0, f64::NAN, 0.0], ..good },
        UpdateStep { clip: Some(0.0), ..good },
        UpdateStep { gradient_scale: f64::INFINITY, ..good },
    ] {
        let mut arenas = [&pl, &gl, &gl, &gl].map(|l| Arena::zeros(l.clone()).unwrap());
        let [parameters, gradients, first_moments, second_moments] = &mut arenas;
        let state = UpdateState { parameters, gradients, first_moments, second_moments, ema: None };
        assert!(adamw.step(state, &step).is_err(), "{step:?}");
    }
}

#[test]
fn gradients_of_a_scaled_loss_give_the_bits_of_plain_ones() {
    // A power of two changes no digit on its way in and out.
    let (plain, scaled) = (run(1000, 1, Some(0.05), 3), run_scaled(1000, 1, Some(0.05), 3, 65_536.0));
    assert_eq!(plain.reports, scaled.reports, "norm and clip are those of the plain gradients");
    for (x, y) in [(&plain.parameters, &scaled.parameters), (&plain.second, &scaled.second)] {
        for ((name, _, x), (_, _, y)) in x.iter().zip(y.iter()) {
            assert!(x.iter().zip(y).all(|(x, y)| x.to_bits() == y.to_bits()), "{name}");
        }
    }
}
