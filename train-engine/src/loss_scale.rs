//! Dynamic loss scaling: the factor that keeps small cotangents of a training step in f16 from becoming zero.
//!
//! The step's gradients come out multiplied by the factor, and the update divides by it before it takes their norm. A
//! factor that is too large makes some gradient infinite: that step is left out and the factor halved. After many steps
//! without one it is doubled.

use serde::{Deserialize, Serialize};

use crate::error::{Result, TrainError};

/// The factor of the first step.
pub const FIRST: f64 = 65_536.0;
/// Good steps in a row after which the factor is doubled.
pub const GROWTH_INTERVAL: u64 = 2_000;
/// The smallest factor: a gradient that overflows f16 without any is no matter of scaling.
pub const FLOOR: f64 = 1.0;
/// The largest factor: beyond it f32 has no room left for the scaled loss of a diverging run.
const CEILING: f64 = 1_099_511_627_776.0; // 2^40

/// The factor, and what it depends on. Always a power of two, so that dividing by it is exact.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    scale: f64,
    good_steps: u64,
    skipped: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        Self::starting_at(FIRST)
    }
}

impl LossScale {
    /// A factor that begins elsewhere than at [`FIRST`]; brought to a power of two between [`FLOOR`] and 2⁴⁰.
    pub fn starting_at(scale: f64) -> Self {
        let scale = scale.clamp(FLOOR, CEILING).log2().round().exp2();
        Self { scale, good_steps: 0, skipped: 0 }
    }

    /// The factor for the next step.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// What the gradients of the next step are multiplied by in its update: one over the factor.
    pub fn gradient_scale(&self) -> f64 {
        1.0 / self.scale
    }

    /// Steps left out so far.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Takes note of step `step` (counted from 1): whether all its gradients were finite.
    ///
    /// # Errors
    /// [`TrainError::LossScale`] when they were not though the factor is at its floor.
    pub fn record(&mut self, step: u64, finite: bool) -> Result<()> {
        if finite {
            self.good_steps += 1;
            if self.good_steps == GROWTH_INTERVAL {
                self.scale = (self.scale * 2.0).min(CEILING);
                self.good_steps = 0;
            }
            return Ok(());
        }
        if self.scale <= FLOOR {
            return Err(TrainError::LossScale { step, skipped: self.skipped });
        }
        self.scale /= 2.0;
        self.good_steps = 0;
        self.skipped += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_on_an_overflow_and_doubles_after_many_good_steps() {
        let mut scale = LossScale::default();
        assert_eq!((scale.scale(), scale.gradient_scale()), (FIRST, 1.0 / FIRST));
        for step in 1..GROWTH_INTERVAL {
            scale.record(step, true).unwrap();
        }
        assert_eq!(scale.scale(), FIRST, "one good step is missing");
        scale.record(GROWTH_INTERVAL, false).unwrap();
        assert_eq!((scale.scale(), scale.skipped()), (FIRST / 2.0, 1));
        for step in 1..=GROWTH_INTERVAL {
            scale.record(GROWTH_INTERVAL + step, true).unwrap();
        }
        assert_eq!(scale.scale(), FIRST, "the count began anew after the overflow");
    }

    #[test]
    fn at_the_floor_an_overflow_is_an_error() {
        let mut scale = LossScale::starting_at(4.0);
        scale.record(7, false).unwrap();
        scale.record(8, false).unwrap();
        let error = scale.record(9, false).unwrap_err().to_string();
        assert!(
            error.starts_with("step 9: a gradient is not finite in f16 though the loss is not scaled"),
            "{error}"
        );
        assert_eq!((scale.scale(), scale.skipped()), (FLOOR, 2), "an error changes nothing");
    }

    #[test]
    fn it_stays_within_its_range_and_a_power_of_two() {
        assert_eq!(LossScale::starting_at(0.0).scale(), FLOOR);
        assert_eq!(LossScale::starting_at(f64::INFINITY).scale(), CEILING);
        assert_eq!(LossScale::starting_at(1000.0).scale(), 1024.0);
        let mut scale = LossScale::starting_at(CEILING);
        (1..=GROWTH_INTERVAL).for_each(|step| scale.record(step, true).unwrap());
        assert_eq!(scale.scale(), CEILING);
    }

    #[test]
    fn it_is_saved_and_read_to_the_bit() {
        let mut scale = LossScale::starting_at(2.0_f64.powi(20));
        scale.record(1, false).unwrap();
        scale.record(2, true).unwrap();
        let text = serde_json::to_string(&scale).unwrap();
        assert_eq!(serde_json::from_str::<LossScale>(&text).unwrap(), scale);
    }
}
