//! Repeatable random values, rounded to f32 so that every interpreter gets the same ones.

use ndarray::{ArrayD, IxDyn};

use crate::Array;

/// A stream of pseudo-random numbers (SplitMix64); the same seed gives the same stream everywhere.
#[derive(Clone, Debug)]
pub struct Draws(u64);

impl Draws {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The stream of a name.
    pub fn named(name: &str) -> Self {
        Self(
            name.bytes()
                .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)),
        )
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number of `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// A number of `low..high`.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        let unit = (self.bits() >> 11) as f64 / (1_u64 << 53) as f64;
        f64::from((low + (high - low) * unit) as f32)
    }

    /// An array of draws, row-major.
    pub fn array(&mut self, shape: &[usize], mut draw: impl FnMut(&mut Self) -> f64) -> Array {
        let values = (0..shape.iter().product()).map(|_| draw(self)).collect();
        ArrayD::from_shape_vec(IxDyn(shape), values).unwrap()
    }

    /// An array of numbers of `low..high`.
    pub fn uniform(&mut self, shape: &[usize], low: f64, high: f64) -> Array {
        self.array(shape, |d| d.between(low, high))
    }
}
