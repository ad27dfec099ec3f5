//! Published anchors of the linear schedule and of its respacings.

use super::{DdpmSchedule, Spacing};

fn close(got: f64, want: f64, digits: f64) {
    assert!((got - want).abs() <= want.abs() * digits, "got {got}, want {want}");
}

fn steps(spec: &str, total: usize) -> Vec<usize> {
    spec.parse::<Spacing>().unwrap().timesteps(total).unwrap()
}

fn reason(spec: &str) -> String {
    spec.parse::<Spacing>().and_then(|s| s.timesteps(1000)).unwrap_err().to_string()
}

#[test]
fn the_full_schedule_has_the_published_values() {
    let s = DdpmSchedule::default();
    assert_eq!((s.len(), s.timesteps[0], s.timesteps[999]), (1000, 0, 999));
    for (i, want, digits) in [
        (0, 0.9999, 1e-12),
        (1, 0.999_780_092_07, 1e-11),
        (100, 0.895_141_59, 1e-8),
        (250, 0.521_423_03, 1e-8),
        (500, 0.077_796_658_37, 1e-9),
        (750, 0.003_300_158_37, 1e-8),
        (999, 4.035_829_765_4e-5, 1e-10),
    ] {
        close(s.alphas_cumprod[i], want, digits);
    }
    close(s.posterior_variance[1], 5.453_187_7e-5, 1e-7);
    close(s.posterior_log_variance_clipped[1], -9.816_725_1, 1e-8);
    assert_eq!(s.posterior_variance[0], 0.0);
    assert_eq!(s.posterior_log_variance_clipped[0], s.posterior_log_variance_clipped[1]);
    close(s.log_betas[0], -9.210_340_4, 1e-8);
    close(s.log_betas[999], -3.912_023_0, 1e-8);
}

#[test]
fn the_tables_satisfy_the_posterior_identities() {
    for spec in ["1000", "250", "ddim50", "7,11,13"] {
        let s = DdpmSchedule::default().respaced(&spec.parse().unwrap()).unwrap();
        for i in 0..s.len() {
            // x_t = √ᾱ x_0 without noise has the posterior mean √ᾱ_prev x_0.
            let mean = s.posterior_mean_coef1[i] + s.posterior_mean_coef2[i] * s.sqrt_alphas_cumprod[i];
            close(mean, s.alphas_cumprod_prev[i].sqrt(), 1e-11);
            let (signal, noise) = (s.sqrt_alphas_cumprod[i], s.sqrt_one_minus_alphas_cumprod[i]);
            close(signal * signal + noise * noise, 1.0, 1e-14);
            close(s.sqrt_recip_alphas_cumprod[i] * signal, 1.0, 1e-14);
            close(s.sqrt_recipm1_alphas_cumprod[i] * signal, noise, 1e-11);
            assert!(s.posterior_log_variance_clipped[i] < s.log_betas[i] || i == 0);
        }
    }
}

#[test]
fn a_respaced_schedule_has_the_published_values() {
    let s = DdpmSchedule::default().respaced(&Spacing::even(250)).unwrap();
    assert_eq!(s.timesteps[..4], [0, 4, 8, 12]);
    assert_eq!(s.timesteps[13], 52);
    assert!(s.timesteps.windows(2).any(|w| w == [971, 975]));
    assert_eq!(s.timesteps[248..], [995, 999]);
    for (i, want) in [(0, 1e-4), (1, 5.990_656e-4), (2, 9.176_030e-4), (249, 0.077_519_3)] {
        close(s.betas[i], want, 1e-6);
    }
    close(s.betas.iter().copied().fold(0.0, f64::max), 0.080_725_9, 1e-6);
    close(s.posterior_variance[1], 8.570_253e-5, 1e-6);
    close(s.posterior_log_variance_clipped[1], -9.364_628_2, 1e-8);
    let full = DdpmSchedule::default();
    for (k, &t) in s.timesteps.iter().enumerate() {
        close(s.alphas_cumprod[k], full.alphas_cumprod[t], 1e-12);
    }
}

#[test]
fn even_spacing_rounds_half_to_even() {
    let fifty = steps("50", 1000);
    assert_eq!(
        (fifty.len(), &fifty[..6], &fifty[48..]),
        (50, &[0, 20, 41, 61, 82, 102][..], &[979, 999][..])
    );
    let twenty = steps("20", 1000);
    assert_eq!(
        (twenty.len(), &twenty[..6], &twenty[18..]),
        (20, &[0, 53, 105, 158, 210, 263][..], &[946, 999][..])
    );
    assert_eq!(steps("10", 1000), [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]);
    // Stride 3.5: 3.5 rounds to 4, 10.5 to 10.
    assert_eq!(steps("5", 15), [0, 4, 7, 10, 14]);
}

#[test]
fn integer_stride_and_sections() {
    assert_eq!(steps("ddim10", 1000), (0..1000).step_by(100).collect::<Vec<_>>());
    assert_eq!(steps("ddim50", 1000)[..3], [0, 20, 40]);
    assert_eq!(steps("2,3", 10), [0, 4, 5, 7, 9]);
    // 10 = 4 + 3 + 3: the extra step goes to the first section.
    assert_eq!(steps("2, 2, 1", 10), [0, 3, 4, 6, 7]);
    assert_eq!(steps("1000", 1000), (0..1000).collect::<Vec<_>>());
}

#[test]
fn impossible_spacings_are_refused() {
    assert!(reason("ddim300").contains("no integer stride over 1000 timesteps keeps exactly 300"));
    assert!(reason("0").contains("at least 2 steps"));
    assert!(reason("1").contains("at least 2 steps"));
    assert!(reason("1001").contains("section 0 has 1000 timesteps, 1001 were asked for"));
    assert!(reason("10,501").contains("section 1 has 500"));
    assert!(reason("ten").contains("\"ten\" is no count"));
    assert!(reason("ddim").contains("\"\" is no count"));
    assert!(reason("-3").contains("\"-3\" is no count"));
    assert!(reason("18446744073709551615,2").contains("section 0"));
}

#[test]
fn other_lengths_scale_the_betas() {
    let s = DdpmSchedule::linear(100).unwrap();
    close(s.betas[0], 1e-3, 1e-12);
    close(s.betas[99], 0.2, 1e-12);
    assert!(DdpmSchedule::linear(20).unwrap_err().to_string().contains("at least 21"));
    assert!(DdpmSchedule::linear(0).is_err());
    assert!(DdpmSchedule::linear(21).unwrap().alphas_cumprod.iter().all(|ab| *ab > 0.0));
}

#[test]
fn text_round_trips() {
    for spec in ["250", "ddim50", "10,20,30"] {
        assert_eq!(spec.parse::<Spacing>().unwrap().to_string(), spec);
    }
}
