//! One loop body compiled for several instruction sets, chosen at run time.
//!
//! The bodies are plain Rust without fused multiply-adds and with a fixed number of accumulators, so every
//! instruction set, every machine and every number of threads gives the same bits.

/// Accumulators of a reduction: a fixed number, so that the order of additions does not depend on the machine, and
/// enough that additions need not wait for each other.
pub(crate) const LANES: usize = 64;

/// Declares a function whose body is compiled for AVX-512, AVX2 and the baseline.
macro_rules! multiversion {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                {
                    // SAFETY: the processor has the instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has the instructions.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Sums of `f(i)` over a row in f32, `N` sums at a time, in an order that depends on the row's length only.
#[inline(always)]
pub(crate) fn sums<const N: usize>(len: usize, f: impl Fn(usize) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0.0_f32; LANES]; N];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for lane in 0..LANES {
            let terms = f(start + lane);
            for (lanes, term) in lanes.iter_mut().zip(terms) {
                lanes[lane] += term;
            }
        }
    }
    for i in whole..len {
        for (lanes, term) in lanes.iter_mut().zip(f(i)) {
            lanes[i - whole] += term;
        }
    }
    lanes.map(|mut lanes| {
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    })
}

/// Sum of `f(i)` over a row, as [`sums`].
#[inline(always)]
pub(crate) fn sum(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    sums(len, |i| [f(i)])[0]
}

/// `e^x` to about one unit in the last place, without a library call, so that loops over it vectorise.
///
/// `x` is split as `n ln 2 + r` with `|r| ≤ ½ ln 2`; `e^r` is a polynomial of degree 6, `2^n` is set in the exponent
/// bits. Arguments are clamped to ±87, where the result is still a normal number; a NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and subtracting 1.5 · 2²³ rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first is 0.693359375, which has so few bits that its products with n are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Written so that a comparison is one instruction, and a NaN passes.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 87.0 { 87.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let exp_r = (p * (r * r) + r) + 1.0;
    // The low bits of `rounded` are the integer n; a NaN gives some number there, and `exp_r` is NaN anyway.
    exp_r * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for i in -870_000..=870_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let ulp = f64::from(exact as f32).abs() * f64::from(f32::EPSILON) / 2.0;
            worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
        }
        // `ulp` above is the smallest spacing in the number's binade, so this bounds the error from above.
        assert!(worst < 4.0, "{worst} half units");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 1e-37 && exp(1e30) > 1e37 && exp(1e30).is_finite());
    }

    #[test]
    fn sum_adds_every_element_once() {
        for len in [0, 1, 63, 64, 65, 300] {
            assert_eq!(sum(len, |i| (i + 1) as f32), (len * (len + 1) / 2) as f32);
        }
    }
}
