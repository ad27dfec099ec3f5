//! Numerical derivatives in f64, and distances.

use graph_builder::Graph;

use crate::{Array, Feeds};

/// Step of [`derivative`]: with five points the formula is then off by about 1e-12, rounding by about 1e-13.
pub const STEP: f64 = 1e-3;

/// The derivative of `f` at 0, from the central differences of steps h and 2h.
pub fn derivative(f: impl Fn(f64) -> f64) -> f64 {
    let h = STEP;
    (8.0 * (f(h) - f(-h)) - (f(2.0 * h) - f(-2.0 * h))) / (12.0 * h)
}

/// The derivative of a graph's first output, a scalar, when the feed `name` moves along `direction`.
pub fn along(graph: &Graph, feeds: &Feeds, name: &str, direction: &Array) -> f64 {
    derivative(|h| {
        let mut moved = feeds.clone();
        let at = moved.get_mut(name).unwrap();
        *at = &*at + &(direction * h);
        graph.eval(&moved).unwrap()[0].sum()
    })
}

/// `Σ a·b`.
pub fn dot(a: &Array, b: &Array) -> f64 {
    assert_eq!(a.shape(), b.shape());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `|got − want| / |want|`; infinite where `want` is 0 or anything is no number.
pub fn relative(got: f64, want: f64) -> f64 {
    let error = (got - want).abs() / want.abs();
    if error.is_finite() { error } else { f64::INFINITY }
}

/// `‖got − want‖ / ‖want‖` in the Euclidean norm; 0 when both are 0, infinite when `got` is no number.
pub fn relative_l2(got: &Array, want: &Array) -> f64 {
    assert_eq!(got.shape(), want.shape());
    let error = (got - want).iter().map(|v| v * v).sum::<f64>().sqrt();
    let size = want.iter().map(|v| v * v).sum::<f64>().sqrt();
    match error {
        0.0 => 0.0,
        e if e.is_finite() => e / size,
        _ => f64::INFINITY,
    }
}
