//! Pairs of normal draws out of sums, products, quotients and roots alone, each of which is rounded the same everywhere:
//! a library's logarithm and sine differ between machines, and a GPU would draw other bits.
//!
//! `random.cu` of the runtime does the same, operation by operation. Results are correct to some 2⁻⁵⁰, far more than the
//! f32 that they are rounded to.

use std::f64::consts::{LN_2, SQRT_2, TAU};

/// 2⁻³².
const STEP: f64 = 1.0 / 4_294_967_296.0;

/// Box–Muller: the pair that two uniform words give.
pub(super) fn pair(first: u32, second: u32) -> [f32; 2] {
    // The radius takes (0, 1], so that its logarithm is finite.
    let radius = (-2.0 * ln(f64::from(first) + 1.0)).sqrt();
    let [sin, cos] = sin_cos(second);
    [(radius * cos) as f32, (radius * sin) as f32]
}

/// A polynomial by its coefficients, the constant one first; in an order that lets a processor overlap its parts.
fn polynomial(c: [f64; 8], z: f64) -> f64 {
    let z2 = z * z;
    let low = (c[0] + c[1] * z) + (c[2] + c[3] * z) * z2;
    let high = (c[4] + c[5] * z) + (c[6] + c[7] * z) * z2;
    low + high * (z2 * z2)
}

/// Natural logarithm of `m / 2³²` for a whole number `m` of 1..=2³².
fn ln(m: f64) -> f64 {
    /// Of the series of artanh; |s| is at most 0.172, so the next term is below 10⁻¹⁵.
    const TERMS: [f64; 8] =
        [1.0 / 3.0, 1.0 / 5.0, 1.0 / 7.0, 1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0, 1.0 / 17.0];
    const FRACTION_BITS: u32 = f64::MANTISSA_DIGITS - 1;
    const ONE: u64 = 1.0_f64.to_bits();
    // m = f · 2^e with f from √½ to √2, without an error.
    let bits = m.to_bits();
    let mut exponent = f64::from((bits >> FRACTION_BITS) as u32 - (ONE >> FRACTION_BITS) as u32);
    let mut f = f64::from_bits(bits & ((1 << FRACTION_BITS) - 1) | ONE);
    if f > SQRT_2 {
        (f, exponent) = (f * 0.5, exponent + 1.0);
    }
    let s = (f - 1.0) / (f + 1.0);
    let z = s * s;
    (exponent - 32.0) * LN_2 + (2.0 * s + 2.0 * s * (z * polynomial(TERMS, z)))
}

/// Sine and cosine of `k / 2³²` of a full turn.
fn sin_cos(k: u32) -> [f64; 2] {
    /// ±1/(2i + 1)! and ±1/(2i)! from i = 1 to 8.
    const SIN: [f64; 8] = [
        -1.0 / 6.0,
        1.0 / 120.0,
        -1.0 / 5_040.0,
        1.0 / 362_880.0,
        -1.0 / 39_916_800.0,
        1.0 / 6_227_020_800.0,
        -1.0 / 1_307_674_368_000.0,
        1.0 / 355_687_428_096_000.0,
    ];
    const COS: [f64; 8] = [
        -1.0 / 2.0,
        1.0 / 24.0,
        -1.0 / 720.0,
        1.0 / 40_320.0,
        -1.0 / 3_628_800.0,
        1.0 / 479_001_600.0,
        -1.0 / 87_178_291_200.0,
        1.0 / 20_922_789_888_000.0,
    ];
    // The nearest quarter turn, and what is left: an eighth of a turn at most, without an error.
    let quarter = k.wrapping_add(1 << 29) >> 30;
    let rest = k.wrapping_sub(quarter << 30).cast_signed();
    let x = f64::from(rest) * (TAU * STEP);
    let z = x * x;
    let sin = x + x * (z * polynomial(SIN, z));
    let cos = 1.0 + z * polynomial(COS, z);
    // No jump: it would be guessed wrong every other time.
    let (odd, sign) = (quarter & 1 == 1, [1.0, -1.0]);
    let (a, b) = if odd { (cos, sin) } else { (sin, cos) };
    [a * sign[(quarter >> 1) as usize & 1], b * sign[((quarter + 1) >> 1) as usize & 1]]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words that cover the borders of every case, and many between.
    fn words() -> impl Iterator<Item = u32> {
        let borders = (0..32).flat_map(|bit| [-2_i64, -1, 0, 1, 2].map(|d| ((1_i64 << bit) + d) as u32));
        let quarters = (0..8_i64).flat_map(|q| [-1_i64, 0, 1].map(|d| ((q << 29) + d) as u32));
        borders.chain(quarters).chain((0..200_000_u32).map(|i| i.wrapping_mul(2_654_435_761)))
    }

    #[test]
    fn logarithm_sine_and_cosine_are_the_librarys_to_the_last_bits() {
        for k in words() {
            let m = f64::from(k) + 1.0;
            let (want, got) = ((m * STEP).ln(), ln(m));
            assert!((got - want).abs() <= 1e-15 * want.abs(), "ln of {m}/2^32: {got} instead of {want}");
            // An eighth of a turn at a time, or the library would be given a rounded angle.
            let (sin, cos) = (f64::from(k) * (TAU * STEP)).sin_cos();
            for (got, want) in sin_cos(k).into_iter().zip([sin, cos]) {
                assert!((got - want).abs() <= 9e-16, "{k}/2^32 of a turn: {got} instead of {want}");
            }
        }
        assert_eq!((ln(4_294_967_296.0), sin_cos(0)), (0.0, [0.0, 1.0]));
        assert_eq!([1_u32, 2, 3].map(|q| sin_cos(q << 30)), [[1.0, -0.0], [-0.0, -1.0], [-1.0, 0.0]]);
    }
}
