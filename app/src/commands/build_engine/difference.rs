//! How far a program's answers are from the reference's, output by output.

use anyhow::{Context, ensure};

/// A gradient smaller than this part of what is usual, the root mean square of all gradients' elements, is measured by
/// that part. What cancels to nothing, such as the gradient of a bias that a softmax does not see or of what stands
/// behind a gate of zero, is rounding errors and no more: their size is that of the terms that cancel, which are as large
/// as the gradients around them, and they are no part of the gradient itself.
const GRADIENT_FLOOR: f64 = 1e-2;
/// Begins the names of gradients.
const GRADIENT: &str = "grad.";

/// Outputs by name.
pub(super) type Outputs = Vec<(String, Vec<f32>)>;

/// The output that is farthest off.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Worst {
    pub(super) output: String,
    /// L2 norm of the difference, over that of the reference.
    pub(super) difference: f64,
}

/// Sums of squares of one output.
struct Squares {
    error: f64,
    size: f64,
    values: usize,
}

/// Compares every output of `got` with that of its name in `want`.
///
/// # Errors
/// An output that is not finite, or that the reference does not have.
pub(super) fn worst(got: &Outputs, want: &Outputs) -> anyhow::Result<Worst> {
    let mut outputs = Vec::new();
    for (name, values) in got {
        let (_, expected) = want
            .iter()
            .find(|(known, _)| known == name)
            .with_context(|| format!("internal: the plain program has no output `{name}`"))?;
        let found = Squares::of(values, expected);
        ensure!(found.error.is_finite(), "`{name}` is not finite");
        outputs.push((name, found));
    }
    let gradients = || outputs.iter().filter(|(name, _)| name.starts_with(GRADIENT)).map(|(_, s)| s);
    let count: usize = gradients().map(|s| s.values).sum();
    // Mean square of an element.
    let usual = gradients().map(|s| s.size).sum::<f64>() / count.max(1) as f64;
    let mut worst = Worst { output: String::new(), difference: 0.0 };
    for (name, found) in &outputs {
        let least = if name.starts_with(GRADIENT) {
            GRADIENT_FLOOR.powi(2) * usual * found.values as f64
        } else {
            0.0
        };
        let difference = found.relative(least);
        if difference >= worst.difference {
            worst = Worst { output: (*name).clone(), difference };
        }
    }
    Ok(worst)
}

impl Squares {
    fn of(got: &[f32], want: &[f32]) -> Self {
        let (error, size) = got.iter().zip(want).fold((0.0, 0.0), |(error, size), (g, w)| {
            (error + (f64::from(*g) - f64::from(*w)).powi(2), size + f64::from(*w).powi(2))
        });
        Self { error, size, values: want.len() }
    }

    /// The relative difference, of a size of `least` or more.
    fn relative(&self, least: f64) -> f64 {
        if self.error == 0.0 {
            0.0
        } else {
            (self.error / self.size.max(least).max(f64::MIN_POSITIVE)).sqrt()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A large gradient, a small one, one that is nothing but rounding errors, and a loss.
    fn reference() -> Outputs {
        let named = |name: &str, value: f32, count| (name.to_owned(), vec![value; count]);
        vec![
            named("loss", 2.0, 1),
            named("grad.large", 1.0, 1000),
            named("grad.small", 0.05, 4),
            named("grad.none", 1e-9, 4),
        ]
    }

    #[test]
    fn a_small_gradient_that_is_wrong_is_seen_and_named() {
        let mut got = reference();
        for value in &mut got[1].1 {
            *value *= 1.0 + 2e-5;
        }
        assert_eq!(worst(&got, &reference()).unwrap().output, "grad.large");
        // A thousandth of it, 2e-6 of all gradients taken together.
        got[2].1.fill(0.05 * 1.001);
        let found = worst(&got, &reference()).unwrap();
        assert!(found.output == "grad.small" && (found.difference - 1e-3).abs() < 1e-5, "{found:?}");
        got[0].1[0] = 2.1;
        assert_eq!(worst(&got, &reference()).unwrap().output, "loss");
    }

    #[test]
    fn rounding_errors_of_a_gradient_that_is_none_are_not_held_against_it() {
        let mut got = reference();
        // All wrong, but by no more than other gradients' last digits.
        got[3].1.fill(-1e-7);
        let found = worst(&got, &reference()).unwrap();
        assert!(found.output == "grad.none" && found.difference < 2e-5, "{found:?}");
        // A value where there should be none.
        got[3].1.fill(1e-3);
        assert!(worst(&got, &reference()).unwrap().difference > 0.05);
        got[3].1[2] = f32::NAN;
        let error = worst(&got, &reference()).unwrap_err().to_string();
        assert_eq!(error, "`grad.none` is not finite");
    }
}
