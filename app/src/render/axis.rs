//! Where the marks of an axis stand and what is written at them.

/// One axis: the numbers at its ends, and whether equal lengths are equal ratios.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    /// An axis that shows `low..=high`; an empty range is widened around its only number.
    ///
    /// A logarithmic axis needs positive ends; without them it is linear.
    pub(super) fn new(low: f64, high: f64, log: bool) -> Self {
        let log = log && low > 0.0;
        let (low, high) = if high > low {
            (low, high)
        } else if log {
            (low / 2.0, low * 2.0)
        } else {
            let around = if low == 0.0 { 1.0 } else { low.abs() / 2.0 };
            (low - around, low + around)
        };
        Self { low, high, log }
    }

    /// Moves both ends outwards by `share` of the length.
    pub(super) fn padded(self, share: f64) -> Self {
        if self.log {
            let ratio = (self.high / self.low).powf(share);
            return Self { low: self.low / ratio, high: self.high * ratio, ..self };
        }
        let pad = (self.high - self.low) * share;
        Self { low: self.low - pad, high: self.high + pad, ..self }
    }

    /// 0 at the low end, 1 at the high end; `None` for what has no place on this axis.
    pub(super) fn place(self, x: f64) -> Option<f64> {
        let at = if self.log {
            (x / self.low).ln() / (self.high / self.low).ln()
        } else {
            (x - self.low) / (self.high - self.low)
        };
        at.is_finite().then_some(at)
    }

    /// Marks inside the axis, about `wanted` of them, each with its words.
    pub(super) fn marks(self, wanted: usize) -> Vec<(f64, String)> {
        let decades = (self.high / self.low).log10();
        if self.log && decades >= 1.0 {
            return log_ticks(self.low, self.high, wanted).into_iter().map(|x| (x, decimal(x))).collect();
        }
        let ticks = linear_ticks(self.low, self.high, wanted);
        let step = ticks.get(1).zip(ticks.first()).map_or(1.0, |(b, a)| b - a);
        ticks.into_iter().map(|x| (x, in_steps_of(step, x))).collect()
    }
}

/// A step may be so much smaller than the one that gives just the wanted number of marks.
const FINEST: f64 = 0.7;

/// Multiples of 1, 2 or 5 times a power of ten that lie in `low..=high`, about `wanted` of them.
fn linear_ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let rough = (high - low) / wanted.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough * FINEST);
    let step = step.unwrap_or(10.0 * power);
    // Counted in whole steps, so that rounding never collects.
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|k| k as f64 * step).collect()
}

/// Powers of ten in `low..=high`, with their twofold and fivefold where there is room, thinned where there is not.
fn log_ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let inside = |x: &f64| *x >= low * (1.0 - 1e-9) && *x <= high * (1.0 + 1e-9);
    let of = |multiples: &[f64], every: usize| -> Vec<f64> {
        let powers = (first..=last).step_by(every);
        powers.flat_map(|p| multiples.iter().map(move |m| m * 10f64.powi(p))).filter(inside).collect()
    };
    let most = wanted.max(2) + 1;
    let choices = [(&[1.0, 2.0, 5.0][..], 1), (&[1.0, 3.0], 1), (&[1.0], 1), (&[1.0], 2), (&[1.0], 5)];
    let fitting = choices.into_iter().map(|(m, every)| of(m, every)).find(|t| t.len() <= most);
    fitting.unwrap_or_else(|| of(&[1.0], 20))
}

/// A mark of a linear axis, with just the decimals that its step needs; thousands and millions by letter.
fn in_steps_of(step: f64, x: f64) -> String {
    let (unit, letter) = match step.abs().max(x.abs()) {
        m if m >= 1e9 || (m > 0.0 && m < 1e-4) => return decimal(x),
        m if m >= 1e6 => (1e6, "M"),
        m if m >= 1e4 => (1e3, "k"),
        _ => (1.0, ""),
    };
    if x == 0.0 {
        return "0".to_owned();
    }
    let decimals = (-(step / unit).abs().log10() - 1e-9).ceil().max(0.0) as usize;
    format!("{:.decimals$}{letter}", x / unit)
}

/// A short decimal for any number: `0.05`, `20`, `1e-6`.
pub(super) fn decimal(x: f64) -> String {
    let size = x.abs();
    if x == 0.0 {
        "0".to_owned()
    } else if (1e-3..1e5).contains(&size) {
        let text = format!("{x:.6}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        // Six decimals of the mantissa, so that 3·10⁻⁵ is not written 3.0000000000000004e-5.
        let text = format!("{x:.6e}");
        let (mantissa, power) = text.split_once('e').unwrap_or((&text, "0"));
        format!("{}e{power}", mantissa.trim_end_matches('0').trim_end_matches('.'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(axis: Axis, wanted: usize) -> Vec<String> {
        axis.marks(wanted).into_iter().map(|(_, w)| w).collect()
    }

    #[test]
    fn marks_are_round_numbers() {
        let table: [(f64, f64, bool, usize, &[&str]); 13] = [
            (0.0, 10.0, false, 5, &["0", "2", "4", "6", "8", "10"]),
            (0.0, 1.0, false, 5, &["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
            (0.13, 0.48, false, 4, &["0.2", "0.3", "0.4"]),
            (0.101, 0.124, false, 5, &["0.105", "0.110", "0.115", "0.120"]),
            (-3.0, 3.0, false, 3, &["-2", "0", "2"]),
            (0.0, 60_000.0, false, 6, &["0", "10k", "20k", "30k", "40k", "50k", "60k"]),
            (0.0, 400_000.0, false, 4, &["0", "100k", "200k", "300k", "400k"]),
            (0.0, 7e6, false, 4, &["0", "2M", "4M", "6M"]),
            (0.0, 4e-5, false, 4, &["0", "1e-5", "2e-5", "3e-5", "4e-5"]),
            (0.001, 1.0, true, 6, &["0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1"]),
            (0.08, 1.2, true, 6, &["0.1", "0.2", "0.5", "1"]),
            (1e-8, 1e2, true, 5, &["1e-8", "1e-6", "1e-4", "0.01", "1", "100"]),
            (0.2, 0.5, true, 3, &["0.2", "0.3", "0.4", "0.5"]), // less than a decade: as a linear axis
        ];
        for (low, high, log, wanted, expected) in table {
            assert_eq!(words(Axis::new(low, high, log), wanted), expected, "{low}..{high} log {log}");
        }
    }

    #[test]
    fn there_are_never_many_more_marks_than_wanted() {
        for exponent in -12..12 {
            for mantissa in [1.0, 1.7, 3.3, 9.9] {
                let high = mantissa * 10f64.powi(exponent);
                for (low, log) in [(0.0, false), (-high, false), (high * 0.9, false), (high * 1e-5, true)] {
                    let marks = Axis::new(low, high, log).marks(6);
                    assert!((2..=9).contains(&marks.len()), "{low}..{high}: {marks:?}");
                    assert!(marks.iter().all(|(x, _)| *x >= low - high * 1e-6 && *x <= high * (1.0 + 1e-6)));
                    let mut texts: Vec<&String> = marks.iter().map(|(_, w)| w).collect();
                    texts.dedup();
                    assert_eq!(texts.len(), marks.len(), "two marks read alike: {marks:?}");
                }
            }
        }
    }

    #[test]
    fn places_follow_the_scale() {
        let log = Axis::new(0.01, 100.0, true);
        assert!((log.place(1.0).unwrap() - 0.5).abs() < 1e-12);
        assert_eq!((log.place(0.0), log.place(-1.0), log.place(f64::NAN)), (None, None, None));
        let linear = Axis::new(2.0, 4.0, false);
        assert_eq!(linear.place(2.5), Some(0.25));
        assert_eq!(linear.padded(0.5), Axis::new(1.0, 5.0, false));
    }

    #[test]
    fn an_empty_or_impossible_range_is_still_an_axis() {
        assert_eq!(Axis::new(3.0, 3.0, false), Axis::new(1.5, 4.5, false));
        assert_eq!(Axis::new(0.0, 0.0, true), Axis::new(-1.0, 1.0, false));
        assert_eq!(Axis::new(-1.0, 1.0, true), Axis::new(-1.0, 1.0, false));
        assert_eq!(Axis::new(2.0, 2.0, true), Axis::new(1.0, 4.0, true));
    }
}
