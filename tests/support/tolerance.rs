//! How far two computations of the same thing may be apart. All are relative.

/// A gradient rule against the numerical derivative, both in f64.
pub const DERIVATIVE: f64 = 1e-8;
/// The gradient of a whole model against the numerical derivative, both in f64: third derivatives are larger there.
pub const MODEL_DERIVATIVE: f64 = 1e-6;
/// Two graphs of one meaning, both in f64.
pub const REWRITE: f64 = 1e-9;
/// One op in f32 against f64: a few roundings.
pub const OP: f64 = 1e-6;
/// An op in f32 that cancels or sums a long row.
pub const LONG_OP: f64 = 1e-5;
/// A normalisation in f32 of values two hundred deviations from zero: each has lost two digits before it starts.
pub const FAR_OP: f64 = 3e-5;
/// A whole model in f32 against a reference in f32, as the design promises it.
pub const MODEL: f64 = 1e-4;
/// What this code reaches of [`MODEL`], so that a loss of accuracy is seen before it matters.
pub const MODEL_REACHED: f64 = 5e-5;
