//! Every coefficient table against the textbook update it stands for, on a model whose output anyone can compute.

use super::{Solver, SolverKind, SolverPlan, coefficient};
use crate::{
    objective::Objective::{self, Ddpm, Flow},
    schedule::{DdpmSchedule, Spacing},
};

/// Three pixels: a plain one, a large one and one beyond the range of the data.
type Sample = [f64; 3];
const START: Sample = [0.7, -1.9, 3.1];

fn map2(x: Sample, y: Sample, f: impl Fn(f64, f64) -> f64) -> Sample {
    std::array::from_fn(|i| f(x[i], y[i]))
}

/// Output and variance logits. The timestep passes through `f32`, as on its way to a real model.
fn toy(x: Sample, t: f64) -> (Sample, Sample) {
    let t = f64::from(t as f32);
    (x.map(|x| 0.3 * x.sin() + t / 1000.0), x.map(|x| x.cos() - 0.2))
}

/// A fixed draw for the k-th executed step.
fn draw(k: usize) -> Sample {
    std::array::from_fn(|i| (1.7 * k as f64 + 2.3 * i as f64 + 0.4).sin() * 1.5)
}

/// What the `step` program computes, call by call: the trajectory and the last `x0_hat`.
fn execute(plan: &SolverPlan, model: impl Fn(Sample, f64) -> (Sample, Sample)) -> (Vec<Sample>, Sample) {
    let (mut x, mut history, mut x0) = (START, [0.0; 3], [0.0; 3]);
    let mut trajectory = Vec::new();
    for (k, step) in plan.steps.iter().enumerate() {
        let (e, v) = model(x, f64::from(step.t));
        let (c, z) = (step.coef, draw(k));
        x0 = map2(x, e, |x, e| c[coefficient::X0_X] * x + c[coefficient::X0_OUT] * e);
        let next = std::array::from_fn(|i| {
            c[coefficient::NEXT_X] * x[i]
                + c[coefficient::NEXT_OUT] * e[i]
                + c[coefficient::NEXT_HISTORY] * history[i]
                + c[coefficient::NOISE] * (c[coefficient::NOISE_LOGIT] * v[i]).exp() * z[i]
        });
        history = map2(x, e, |x, e| c[coefficient::HISTORY_X] * x + c[coefficient::HISTORY_OUT] * e);
        x = next;
        trajectory.push(x);
    }
    (trajectory, x0)
}

fn agree(got: &[Sample], want: &[Sample], case: &str) {
    assert_eq!(got.len(), want.len(), "{case}: number of steps");
    for (k, (g, w)) in got.iter().flatten().zip(want.iter().flatten()).enumerate() {
        assert!((g - w).abs() <= 1e-10 * w.abs().max(1e-3), "{case}: value {k} is {g}, want {w}");
    }
}

fn plan(solver: &Solver, objective: Objective, learn_sigma: bool) -> SolverPlan {
    solver.plan(objective, learn_sigma).unwrap()
}

fn spaced(kind: SolverKind, spec: &str) -> Solver {
    Solver::new(kind, spec.parse::<Spacing>().unwrap())
}

/// Ancestral sampling as it is written: predict the data, take the posterior mean, interpolate the log-variance.
fn textbook_ddpm(spec: &str, learn_sigma: bool) -> Vec<Sample> {
    let s = DdpmSchedule::default().respaced(&spec.parse().unwrap()).unwrap();
    let mut x = START;
    let mut out = Vec::new();
    for (k, i) in (0..s.len()).rev().enumerate() {
        let (e, v) = toy(x, s.timesteps[i] as f64);
        let (z, old) = (draw(k), x);
        x = std::array::from_fn(|p| {
            let x0 = s.sqrt_recip_alphas_cumprod[i] * old[p] - s.sqrt_recipm1_alphas_cumprod[i] * e[p];
            let mean = s.posterior_mean_coef1[i] * x0 + s.posterior_mean_coef2[i] * old[p];
            let frac = if learn_sigma { f64::midpoint(v[p], 1.0) } else { 0.0 };
            let log_variance = frac * s.log_betas[i] + (1.0 - frac) * s.posterior_log_variance_clipped[i];
            mean + if i == 0 { 0.0 } else { (0.5 * log_variance).exp() * z[p] }
        });
        out.push(x);
    }
    out
}

/// DDIM as it is written: ε derived again from the predicted data.
fn textbook_ddim(spec: &str, eta: f64) -> Vec<Sample> {
    let s = DdpmSchedule::default().respaced(&spec.parse().unwrap()).unwrap();
    let mut x = START;
    let mut out = Vec::new();
    for (k, i) in (0..s.len()).rev().enumerate() {
        let (e, _) = toy(x, s.timesteps[i] as f64);
        let (ab, prev) = (s.alphas_cumprod[i], s.alphas_cumprod_prev[i]);
        let (z, old) = (draw(k), x);
        x = std::array::from_fn(|p| {
            let x0 = (1.0 / ab).sqrt() * old[p] - (1.0 / ab - 1.0).sqrt() * e[p];
            let eps = ((1.0 / ab).sqrt() * old[p] - x0) / (1.0 / ab - 1.0).sqrt();
            let sigma = eta * ((1.0 - prev) / (1.0 - ab)).sqrt() * (1.0 - ab / prev).sqrt();
            let mean = x0 * prev.sqrt() + (1.0 - prev - sigma * sigma).sqrt() * eps;
            mean + if i == 0 { 0.0 } else { sigma * z[p] }
        });
        out.push(x);
    }
    out
}

/// `ln α` at a continuous time in `[1/1000, 1]`, linear between the nodes `k/1000`.
fn log_alpha(schedule: &DdpmSchedule, time: f64) -> f64 {
    let node = |k: usize| ((k + 1) as f64 / 1000.0, 0.5 * schedule.alphas_cumprod[k].ln());
    let k = (0..999).rev().find(|k| node(*k).0 <= time + 1e-15).unwrap_or(0);
    let ((t0, a0), (t1, a1)) = (node(k), node(k + 1));
    a0 + (a1 - a0) * (time - t0) / (t1 - t0)
}

/// DPM-Solver++(2M) as it is written, with the predictions kept in a list.
fn textbook_dpm(steps: usize) -> Vec<Sample> {
    let schedule = DdpmSchedule::default();
    let alpha = |t: f64| log_alpha(&schedule, t).exp();
    let sigma = |t: f64| (1.0 - alpha(t).powi(2)).sqrt();
    let lambda = |t: f64| alpha(t).ln() - sigma(t).ln();
    let times: Vec<f64> = (0..=steps).map(|k| 1.0 + (0.001 - 1.0) * k as f64 / steps as f64).collect();
    let mut x = START;
    let (mut predictions, mut out) = (Vec::<Sample>::new(), Vec::new());
    for k in 0..steps {
        let (s, t) = (times[k], times[k + 1]);
        let (e, _) = toy(x, (s - 0.001) * 1000.0);
        let d0 = map2(x, e, |x, e| (x - sigma(s) * e) / alpha(s));
        let h = lambda(t) - lambda(s);
        let mut d1 = [0.0; 3];
        if k > 0 && !(steps < 10 && k == steps - 1) {
            let r0 = (lambda(s) - lambda(times[k - 1])) / h;
            d1 = map2(d0, predictions[k - 1], |d0, before| (d0 - before) / r0);
        }
        let decay = alpha(t) * (-h).exp_m1();
        x = std::array::from_fn(|p| sigma(t) / sigma(s) * x[p] - decay * d0[p] - 0.5 * decay * d1[p]);
        predictions.push(d0);
        out.push(x);
    }
    out
}

fn shifted(steps: usize, k: f64) -> Vec<f64> {
    (0..=steps).map(|i| 1.0 - i as f64 / steps as f64).map(|s| k * s / (1.0 + (k - 1.0) * s)).collect()
}

#[test]
fn ddpm_is_the_textbook_update() {
    for spec in ["10", "250", "ddim50", "3,5"] {
        for learn_sigma in [true, false] {
            let plan = plan(&spaced(SolverKind::Ddpm, spec), Ddpm, learn_sigma);
            assert!(plan.needs_noise && !plan.needs_history);
            agree(&execute(&plan, toy).0, &textbook_ddpm(spec, learn_sigma), spec);
        }
    }
}

#[test]
fn ddim_is_the_textbook_update() {
    for spec in ["10", "50", "ddim10", "ddim100"] {
        for eta in [0.0, 0.5, 1.0] {
            let plan = plan(&Solver { eta, ..spaced(SolverKind::Ddim, spec) }, Ddpm, true);
            assert_eq!((plan.needs_noise, plan.needs_history), (eta > 0.0, false));
            agree(&execute(&plan, toy).0, &textbook_ddim(spec, eta), &format!("{spec} eta {eta}"));
        }
    }
}

#[test]
fn ddim_at_eta_one_is_ddpm_of_small_variance() {
    let ddim = plan(&Solver { eta: 1.0, ..spaced(SolverKind::Ddim, "20") }, Ddpm, false);
    let ddpm = plan(&spaced(SolverKind::Ddpm, "20"), Ddpm, false);
    agree(&execute(&ddim, toy).0, &execute(&ddpm, toy).0, "eta 1");
}

#[test]
fn dpm_solver_is_the_textbook_update() {
    for steps in [1, 2, 5, 9, 10, 20, 333] {
        let plan = plan(&Solver::new(SolverKind::DpmSolverPp2M, steps), Ddpm, true);
        assert!(!plan.needs_noise);
        assert_eq!(plan.needs_history, steps > 2, "two steps are both of first order");
        agree(&execute(&plan, toy).0, &textbook_dpm(steps), &format!("{steps} steps"));
    }
}

#[test]
fn dpm_solver_visits_the_published_times() {
    let plan = plan(&Solver::new(SolverKind::DpmSolverPp2M, 20), Ddpm, true);
    for (k, step) in plan.steps.iter().enumerate() {
        assert!((f64::from(step.t) - (999.0 - 49.95 * k as f64)).abs() < 1e-4, "step {k} at {}", step.t);
    }
    let schedule = DdpmSchedule::default();
    let lambda = |i: usize| {
        let ab = schedule.alphas_cumprod[i];
        0.5 * (ab.ln() - (1.0 - ab).ln())
    };
    assert!((lambda(999) + 5.0588).abs() < 5e-5 && (lambda(0) - 4.6051).abs() < 1e-4);
}

#[test]
fn flow_euler_is_the_textbook_update() {
    for (steps, shift) in [(1, 1.0), (7, 1.0), (28, 3.0), (1000, 0.5)] {
        let plan = plan(&Solver { shift, ..Solver::new(SolverKind::Euler, steps) }, Flow, false);
        assert!(!plan.needs_noise && !plan.needs_history);
        let grid = shifted(steps, shift);
        let mut x = START;
        let want: Vec<Sample> = (0..steps)
            .map(|i| {
                let (v, _) = toy(x, 1000.0 * grid[i]);
                x = map2(x, v, |x, v| x + (grid[i + 1] - grid[i]) * v);
                x
            })
            .collect();
        agree(&execute(&plan, toy).0, &want, &format!("{steps} steps, shift {shift}"));
    }
}

#[test]
fn flow_heun_is_the_textbook_update() {
    for (steps, shift) in [(1, 1.0), (2, 1.0), (10, 1.0), (28, 3.0)] {
        let plan = plan(&Solver { shift, ..Solver::new(SolverKind::Heun, steps) }, Flow, true);
        assert_eq!(plan.steps.len(), 2 * steps - 1);
        assert_eq!((plan.needs_noise, plan.needs_history), (false, steps > 1));
        let grid = shifted(steps, shift);
        let (mut x, mut want) = (START, Vec::new());
        for i in 0..steps {
            let dt = grid[i + 1] - grid[i];
            let (slope, _) = toy(x, 1000.0 * grid[i]);
            let ahead = map2(x, slope, |x, v| x + dt * v);
            want.push(ahead);
            if i + 1 < steps {
                let (next_slope, _) = toy(ahead, 1000.0 * grid[i + 1]);
                x = std::array::from_fn(|p| x[p] + dt * (0.5 * slope[p] + 0.5 * next_slope[p]));
                want.push(x);
            }
        }
        agree(&execute(&plan, toy).0, &want, &format!("{steps} steps, shift {shift}"));
    }
}

#[test]
fn flow_sde_is_the_textbook_update() {
    let steps = 25;
    let plan = plan(&Solver::new(SolverKind::Sde, steps), Flow, false);
    assert!(plan.needs_noise && !plan.needs_history);
    let mut grid: Vec<f64> = (0..steps).map(|i| 1.0 - 0.96 * i as f64 / (steps - 1) as f64).collect();
    grid.push(0.0);
    let (mut x, mut want) = (START, Vec::new());
    for k in 0..steps {
        let (s, dt) = (grid[k], grid[k + 1] - grid[k]);
        let (v, _) = toy(x, 1000.0 * s);
        let z = draw(k);
        x = std::array::from_fn(|p| {
            let score = ((1.0 - s) / -1.0 * v[p] - x[p]) / s;
            let drift = v[p] - 0.5 * (2.0 * s) * score;
            x[p] + drift * dt + if k + 1 == steps { 0.0 } else { (2.0 * s).sqrt() * dt.abs().sqrt() * z[p] }
        });
        want.push(x);
    }
    agree(&execute(&plan, toy).0, &want, "sde");
}

#[test]
fn a_perfect_model_of_one_point_ends_there() {
    const POINT: Sample = [0.25, -0.5, 1.5];
    let schedule = DdpmSchedule::default();
    let noise_of = |x: Sample, t: f64| {
        let alpha = log_alpha(&schedule, (t + 1.0) / 1000.0).exp();
        (map2(x, POINT, |x, x0| (x - alpha * x0) / (1.0 - alpha * alpha).sqrt()), [0.0; 3])
    };
    let velocity_of = |x: Sample, t: f64| (map2(x, POINT, |x, x0| (x - x0) / (t / 1000.0)), [0.0; 3]);
    for kind in [SolverKind::Ddpm, SolverKind::Ddim] {
        let (trajectory, x0) = execute(&plan(&spaced(kind, "10"), Ddpm, true), noise_of);
        agree(&[trajectory[9], x0], &[POINT, POINT], kind.name());
    }
    for kind in [SolverKind::Euler, SolverKind::Heun] {
        let plan = plan(&Solver { shift: 2.0, ..Solver::new(kind, 10) }, Flow, false);
        let (trajectory, x0) = execute(&plan, velocity_of);
        let end = trajectory[plan.steps.len() - 1];
        // The time reaches the model in f32, so the velocity is off by 1e-7.
        for (got, want) in end.iter().chain(&x0).zip(POINT.iter().chain(&POINT)) {
            assert!((got - want).abs() < 1e-5, "{kind}: {got}, want {want}");
        }
    }
    let (trajectory, x0) = execute(&plan(&Solver::new(SolverKind::DpmSolverPp2M, 15), Ddpm, true), noise_of);
    let (alpha, sigma) = (schedule.sqrt_alphas_cumprod[0], schedule.sqrt_one_minus_alphas_cumprod[0]);
    let start_noise = noise_of(START, 999.0).0;
    for i in 0..3 {
        assert!((x0[i] - POINT[i]).abs() < 1e-4, "x0_hat {} is not {}", x0[i], POINT[i]);
        // The sample returned is the cleanest noisy one: α·x0 + σ·e.
        let want = alpha * POINT[i] + sigma * start_noise[i];
        assert!((trajectory[14][i] - want).abs() < 1e-4, "end {} is not {want}", trajectory[14][i]);
    }
}

#[test]
fn the_row_is_the_coefficients_in_f32() {
    let plan = plan(&spaced(SolverKind::Ddpm, "10"), Ddpm, true);
    let step = &plan.steps[0];
    assert_eq!(step.t, 999.0);
    assert_eq!(step.row()[coefficient::X0_X], step.coef[coefficient::X0_X] as f32);
    assert!(plan.steps[9].row()[coefficient::NOISE] == 0.0, "the last step adds no noise");
    for kind in SolverKind::ALL {
        let steps = plan_of(kind).steps;
        assert!(steps.iter().all(|s| s.row().iter().all(|c| c.is_finite())), "{kind}");
    }
}

fn plan_of(kind: SolverKind) -> SolverPlan {
    plan(&Solver::new(kind, 1000), kind.objective(), true)
}

#[test]
fn names_round_trip_and_typos_are_named() {
    for kind in SolverKind::ALL {
        assert_eq!(kind.to_string().parse::<SolverKind>().unwrap(), kind);
    }
    let message = "dpm++2".parse::<SolverKind>().unwrap_err().to_string();
    assert_eq!(message, "unknown solver \"dpm++2\"; did you mean \"dpm++2m\"?");
    assert!("runge-kutta".parse::<SolverKind>().unwrap_err().to_string().contains("ddpm, ddim, dpm++2m"));
}

#[test]
fn wrong_requests_are_refused() {
    let refused = |solver: &Solver, objective| solver.plan(objective, true).unwrap_err().to_string();
    let new = Solver::new;
    for (solver, objective, want) in [
        (new(SolverKind::Ddpm, 10), Flow, "flow objective; use euler, heun, sde"),
        (new(SolverKind::Euler, 10), Ddpm, "ddpm objective; use ddpm, ddim, dpm++2m"),
        (new(SolverKind::Ddim, 0), Ddpm, "at least 2 steps"),
        (new(SolverKind::Ddim, 1001), Ddpm, "1001 were asked for"),
        (new(SolverKind::Euler, 0), Flow, "euler takes 1 to 1000 steps"),
        (new(SolverKind::Heun, 1001), Flow, "heun takes 1 to 1000 steps"),
        (new(SolverKind::Sde, 1), Flow, "sde takes 2 to 1000 steps"),
        (new(SolverKind::DpmSolverPp2M, usize::MAX), Ddpm, "1 to 1000 steps"),
        (spaced(SolverKind::Euler, "ddim10"), Flow, "write the plain count \"10\""),
        (spaced(SolverKind::DpmSolverPp2M, "10,20"), Ddpm, "takes one count"),
        (spaced(SolverKind::Ddim, "ddim300"), Ddpm, "no integer stride"),
        (Solver { eta: 1.5, ..new(SolverKind::Ddim, 10) }, Ddpm, "eta must be within 0..=1, got 1.5"),
        (Solver { eta: f64::NAN, ..new(SolverKind::Ddim, 10) }, Ddpm, "got NaN"),
        (Solver { eta: 0.5, ..new(SolverKind::Ddpm, 10) }, Ddpm, "only ddim has it"),
        (Solver { shift: 0.0, ..new(SolverKind::Euler, 10) }, Flow, "shift must be positive"),
        (Solver { shift: 3.0, ..new(SolverKind::Ddim, 10) }, Ddpm, "only euler and heun have it"),
    ] {
        let message = refused(&solver, objective);
        assert!(message.contains(want), "\"{message}\" lacks \"{want}\"");
    }
}

#[test]
fn the_shift_moves_the_grid_as_published() {
    let plan = plan(&Solver { shift: 3.0, ..Solver::new(SolverKind::Euler, 1000) }, Flow, false);
    assert_eq!(plan.steps[0].t, 1000.0);
    assert!((f64::from(plan.steps[999].t) - 2.994_01).abs() < 1e-5);
    for shift in [1e-300, 1e300] {
        let grid = super::flow::grid(4, shift);
        assert!(grid.iter().all(|s| (0.0..=1.0).contains(s)) && grid[0] == 1.0 && grid[4] == 0.0);
    }
}
