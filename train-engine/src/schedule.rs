//! Numbers that change with the step: the learning-rate factor and the EMA decay.

use std::f64::consts::PI;

use crate::config::{Schedule, TrainSection};

/// What the learning rate is multiplied with at update `step` (counted from 0).
///
/// Warm-up is `(step + 1) / warmup_steps`; afterwards, with `p = (step − warmup) / (end − warmup)` in [0, 1], the
/// [end of the decay](TrainSection::decay_end) and the final fraction `f`: constant 1 · linear `1 − (1 − f)·p` · cosine `f + (1 − f)·(1 + cos πp)/2`.
pub fn learning_rate_factor(train: &TrainSection, step: u64) -> f64 {
    if step < train.warmup_steps {
        return (step + 1) as f64 / train.warmup_steps as f64;
    }
    let span = train.decay_end().unwrap_or(train.steps).saturating_sub(train.warmup_steps).max(1);
    let progress = ((step - train.warmup_steps) as f64 / span as f64).min(1.0);
    let last = train.final_fraction;
    match train.schedule {
        Schedule::Constant => 1.0,
        Schedule::Linear => 1.0 - (1.0 - last) * progress,
        Schedule::Cosine => last + (1.0 - last) * 0.5 * (1.0 + (PI * progress).cos()),
    }
}

/// The EMA's decay after update `step` (counted from 0): `ema ← decay·ema + (1 − decay)·w`.
///
/// With `ema_warmup` it is `min(ema_decay, (1 + k) / (10 + k))`, so that a short run's average is not its initial values.
pub fn ema_decay(train: &TrainSection, step: u64) -> f64 {
    if train.ema_warmup {
        let k = step as f64;
        train.ema_decay.min((1.0 + k) / (10.0 + k))
    } else {
        train.ema_decay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(schedule: Schedule) -> TrainSection {
        TrainSection {
            schedule,
            steps: 110,
            warmup_steps: 10,
            final_fraction: 0.1,
            ..TrainSection::default()
        }
    }

    #[test]
    fn warm_up_rises_to_one_and_is_the_same_for_all() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            let train = train(schedule);
            assert_eq!(learning_rate_factor(&train, 0), 0.1);
            assert_eq!(learning_rate_factor(&train, 9), 1.0);
            assert_eq!(learning_rate_factor(&train, 10), 1.0);
        }
    }

    #[test]
    fn decay_has_its_middle_and_its_end() {
        let at = |schedule, step| learning_rate_factor(&train(schedule), step);
        assert_eq!(at(Schedule::Constant, 500), 1.0);
        assert!((at(Schedule::Linear, 60) - 0.55).abs() < 1e-12);
        assert!((at(Schedule::Cosine, 60) - 0.55).abs() < 1e-12);
        assert!(at(Schedule::Cosine, 35) > at(Schedule::Linear, 35));
        for schedule in [Schedule::Linear, Schedule::Cosine] {
            assert!((at(schedule, 110) - 0.1).abs() < 1e-12);
            assert_eq!(at(schedule, 110), at(schedule, 1_000));
        }
    }

    #[test]
    fn a_decay_can_be_shorter_or_longer_than_the_run() {
        for schedule in [Schedule::Linear, Schedule::Cosine] {
            let whole = train(schedule);
            let longer = TrainSection { steps: 500, decay_steps: Some(110), ..whole.clone() };
            let shorter = TrainSection { steps: 40, decay_steps: Some(110), ..whole.clone() };
            for step in [0, 9, 10, 37, 109, 110, 499] {
                let factor = learning_rate_factor(&whole, step);
                assert_eq!(learning_rate_factor(&longer, step), factor);
                assert_eq!(learning_rate_factor(&shorter, step), factor);
            }
        }
    }

    #[test]
    fn a_run_that_is_all_warm_up_does_not_divide_by_zero() {
        let train = TrainSection { steps: 5, warmup_steps: 5, ..train(Schedule::Linear) };
        assert_eq!(learning_rate_factor(&train, 4), 1.0);
        assert!(learning_rate_factor(&train, 5).is_finite());
    }

    #[test]
    fn ema_warm_up_is_bounded_by_the_decay() {
        let warm = TrainSection { ema_decay: 0.99, ema_warmup: true, ..TrainSection::default() };
        assert_eq!(ema_decay(&warm, 0), 0.1);
        assert_eq!(ema_decay(&warm, 10), 0.55);
        assert_eq!(ema_decay(&warm, 1_000_000), 0.99);
        assert_eq!(ema_decay(&TrainSection { ema_warmup: false, ..warm }, 0), 0.99);
    }
}
