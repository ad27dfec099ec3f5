//! The Fréchet distance of two Gaussians, without complex numbers and without a matrix square root.
//!
//! `d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½`. With `Σ = F·Fᵀ`, the last trace is the sum of the singular values of
//! `A = F₁ᵀF₂`: real and not negative whatever the rank. They are the roots of the eigenvalues of the symmetric `AᵀA`, unless
//! the rounding errors under the roots could be seen in the distance; then they are computed from `A` itself.

use anyhow::{anyhow, ensure};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt_pivoting::factor as pivoted;
use faer::{Mat, Side, Spec};

use super::moments::{Gaussian, ROUNDING};

/// Slack in given statistics, relative to their largest entry: asymmetry, and what is left by the factors.
const SLACK: f64 = 1e-4;
/// Largest relative error of the distance that the shorter way may be suspected of.
const TOLERANCE: f64 = 1e-6;

/// The distance, a squared length as all tools report it. Never negative, never NaN.
///
/// # Errors
/// Gaussians of different dimensions, values that are not finite, a matrix that is no covariance.
/// # Source
/// Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.
pub fn distance(a: &Gaussian, b: &Gaussian) -> anyhow::Result<f64> {
    ensure!(
        a.mean.len() == b.mean.len(),
        "features of {} and of {} values cannot be compared",
        a.mean.len(),
        b.mean.len()
    );
    let means: f64 = a.mean.iter().zip(&b.mean).map(|(x, y)| (x - y) * (x - y)).sum();
    let (left, right) = (factor(a)?, factor(b)?);
    let apart = means + a.spread() + b.spread();
    ensure!(apart.is_finite(), "the Fréchet distance overflows: the statistics are too large");
    Ok((apart - 2.0 * sum_of_singular_values(&(left.transpose() * &right), apart)?).max(0.0))
}

/// `F` (D, rank) with `F·Fᵀ` the covariance: Cholesky's factor with pivots, so that a zero is seen as one.
fn factor(of: &Gaussian) -> anyhow::Result<Mat<f64>> {
    let (matrix, n) = (&of.covariance, of.mean.len());
    ensure!(
        matrix.shape() == (n, n),
        "a covariance of {n} features has shape ({n}, {n}), got {:?}",
        matrix.shape()
    );
    let finite = of.mean.iter().all(|x| x.is_finite()) && matrix.is_all_finite();
    ensure!(finite, "the mean or the covariance holds values that are not finite");
    let largest = matrix.norm_max();
    let asymmetry = (matrix - matrix.transpose()).norm_max();
    ensure!(asymmetry <= SLACK * largest, "the covariance is not symmetric: entries differ by {asymmetry:e}");
    if (0..n).all(|i| matrix[(i, i)] == 0.0) && largest == 0.0 {
        return Ok(Mat::zeros(n, 0));
    }
    let no_covariance = || anyhow!("the matrix is no covariance: it has negative eigenvalues");
    ensure!((0..n).all(|i| matrix[(i, i)] >= 0.0) && of.spread() > 0.0, no_covariance());
    let mut lower = matrix.clone();
    let (mut order, mut inverse) = (vec![0usize; n], vec![0usize; n]);
    let par = faer::get_global_parallelism();
    let mut memory =
        MemBuffer::new(pivoted::cholesky_in_place_scratch::<usize, f64>(n, par, Spec::default()));
    let stack = MemStack::new(&mut memory);
    if let Ok((info, _)) =
        pivoted::cholesky_in_place(lower.as_mut(), &mut order, &mut inverse, par, stack, Spec::default())
    {
        let factor =
            Mat::from_fn(n, info.rank, |i, j| if j <= inverse[i] { lower[(inverse[i], j)] } else { 0.0 });
        // A matrix with negative eigenvalues leaves a rest, which a vector without symmetries shows.
        let probe = Mat::from_fn(n, 1, |i, _| 1.0 + (i as f64 * 0.618).fract());
        let rest = matrix * &probe - &factor * (factor.transpose() * &probe);
        if rest.norm_max() <= SLACK * of.spread() {
            return Ok(factor);
        }
    }
    nearest_factor(of)?.ok_or_else(no_covariance)
}

/// The factor of the nearest covariance, if what is negative is the rounding of the sums that the matrix is from: so it is
/// where nearly nothing varies.
fn nearest_factor(of: &Gaussian) -> anyhow::Result<Option<Mat<f64>>> {
    let eigen = of
        .covariance
        .self_adjoint_eigen(Side::Lower)
        .map_err(|e| anyhow!("internal: the eigenvalues did not converge: {e:?}"))?;
    let (vectors, values) = (eigen.U(), eigen.S().column_vector());
    let rounding = ROUNDING * (0..of.mean.len()).map(|i| of.square(i)).sum::<f64>();
    if values.iter().any(|v| *v < -rounding) {
        return Ok(None);
    }
    let root = |i: usize, j: usize| vectors[(i, j)] * values[j].max(0.0).sqrt();
    Ok(Some(Mat::from_fn(vectors.nrows(), vectors.ncols(), root)))
}

/// Of a matrix whose sum counts in a distance of `apart` less twice the sum.
fn sum_of_singular_values(matrix: &Mat<f64>, apart: f64) -> anyhow::Result<f64> {
    let failed = |e| anyhow!("internal: the eigenvalues did not converge: {e:?}");
    if matrix.nrows() == 0 || matrix.ncols() == 0 {
        return Ok(0.0);
    }
    let square = if matrix.nrows() < matrix.ncols() {
        matrix * matrix.transpose()
    } else {
        matrix.transpose() * matrix
    };
    let values = square.self_adjoint_eigenvalues(Side::Lower).map_err(failed)?;
    // Each eigenvalue is off by a rounding unit of the largest, at random; measured errors are far smaller.
    let noise = f64::EPSILON * values.iter().copied().fold(0.0, f64::max);
    let roots: Vec<f64> = values.iter().map(|v| v.max(0.0).sqrt()).collect();
    let sum: f64 = roots.iter().sum();
    let error = roots.iter().map(|r| (noise / (2.0 * r)).min(noise.sqrt()).powi(2)).sum::<f64>().sqrt();
    if 2.0 * error <= TOLERANCE * (apart - 2.0 * sum) {
        return Ok(sum);
    }
    let values = matrix.singular_values().map_err(|e| anyhow!("internal: no singular values: {e:?}"))?;
    Ok(values.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::super::Rows;
    use super::super::moments::Moments;
    use super::super::numpy_random::Mt19937;
    use super::*;

    fn gaussian(mean: &[f64], covariance: Mat<f64>) -> Gaussian {
        Gaussian { mean: mean.to_vec(), covariance }
    }

    fn diagonal(values: &[f64]) -> Mat<f64> {
        let n = values.len();
        Mat::from_fn(n, n, |i, j| if i == j { values[i] } else { 0.0 })
    }

    /// A rotation by a Householder reflection.
    fn rotated(values: &[f64], seed: u32) -> Mat<f64> {
        let (n, mut random) = (values.len(), Mt19937::new(seed));
        let v: Vec<f64> = (0..n).map(|_| f64::from(random.u32()) / 2f64.powi(32) - 0.5).collect();
        let norm: f64 = v.iter().map(|x| x * x).sum();
        let q = Mat::from_fn(n, n, |i, j| f64::from(u8::from(i == j)) - 2.0 * v[i] * v[j] / norm);
        &q * diagonal(values) * q.transpose()
    }

    #[test]
    fn commuting_covariances_have_a_closed_form() {
        let (a, b) = ([4.0, 1.0, 0.25, 9.0], [1.0, 1.0, 4.0, 1e-6]);
        let expected: f64 =
            a.iter().zip(b).map(|(x, y): (&f64, f64)| (x.sqrt() - y.sqrt()).powi(2)).sum::<f64>() + 0.09;
        let (mean, moved) = ([1.0; 4], [1.0, 1.3, 1.0, 1.0]);
        let found = distance(&gaussian(&mean, rotated(&a, 1)), &gaussian(&moved, rotated(&b, 1))).unwrap();
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }

    #[test]
    fn rank_deficient_covariances_keep_all_digits() {
        // 3 of 60 directions vary; the others are the rounding of a rotation.
        let mut values = [0.0; 60];
        values[..3].copy_from_slice(&[1.0, 2.0, 3.0]);
        let same = gaussian(&[0.0; 60], rotated(&values, 3));
        assert!(distance(&same, &same).unwrap() < 1e-13);
        let scaled = gaussian(&[0.0; 60], rotated(&values.map(|v| 4.0 * v), 3));
        let found = distance(&same, &scaled).unwrap();
        assert!((found - 6.0).abs() < 1e-13, "{found}");
        let nothing = gaussian(&[0.0; 60], Mat::zeros(60, 60));
        assert!((distance(&same, &nothing).unwrap() - 6.0).abs() < 1e-13);
        assert!(distance(&nothing, &nothing).unwrap() == 0.0);
    }

    #[test]
    fn sets_in_which_nearly_nothing_varies_have_a_distance() {
        // Moments of vectors around a mean of 1 that differ by so much; and one that differs in one row alone.
        let width = 40;
        let set = |n: usize, step: f32, alone: bool| {
            let mut random = Mt19937::new(9);
            let mut values = vec![1.0f32; n * width];
            for x in values.iter_mut().take(if alone { width } else { n * width }) {
                *x += step * (random.u32() as f32 / 2f32.powi(32) - 0.5);
            }
            let mut moments = Moments::new(width);
            for rows in values.chunks(250 * width) {
                moments.add_block(Rows::new(rows, width).unwrap()).unwrap();
            }
            moments.gaussian().unwrap()
        };
        let wide = gaussian(&vec![0.0; width], rotated(&vec![2.0; width], 5));
        for (step, alone) in [
            (0.0, false),
            (1e-6, false),
            (1e-6, true),
            (1e-5, true),
            (1e-4, true),
            (1e-3, false),
            (1e-3, true),
        ] {
            let narrow = set(600, step, alone);
            // ‖Δμ‖² + tr Σ + tr Σ', less at most twice the root of the two traces' product.
            let most = width as f64 * 3.0;
            for found in [distance(&narrow, &wide), distance(&wide, &narrow)].map(Result::unwrap) {
                let room = 3.0 * (width as f64) * f64::from(step) + 1e-4;
                assert!((found - most).abs() <= room, "{step} {alone}: {found} of {most}");
            }
            assert!(distance(&narrow, &narrow).unwrap() < 1e-9, "{step} {alone}");
        }
    }

    #[test]
    fn what_is_no_gaussian_is_refused() {
        let good = gaussian(&[0.0; 2], diagonal(&[1.0, 1.0]));
        let mut lopsided = diagonal(&[1.0, 1.0]);
        lopsided[(0, 1)] = 0.1;
        for (bad, part) in [
            (gaussian(&[0.0; 3], diagonal(&[1.0; 3])), "2 and of 3"),
            (gaussian(&[0.0; 2], diagonal(&[1.0; 3])), "(2, 2)"),
            (gaussian(&[0.0, f64::NAN], diagonal(&[1.0; 2])), "not finite"),
            (gaussian(&[0.0; 2], diagonal(&[1.0, f64::INFINITY])), "not finite"),
            (gaussian(&[0.0; 2], diagonal(&[1.0, -0.1])), "eigenvalues"),
            (gaussian(&[0.0; 2], Mat::from_fn(2, 2, |i, j| f64::from(u8::from(i != j)))), "eigenvalues"),
            (gaussian(&[0.0; 2], Mat::from_fn(2, 2, |i, j| if i == j { 1.0 } else { 2.0 })), "eigenvalues"),
            (gaussian(&[0.0; 2], lopsided), "not symmetric"),
            (gaussian(&[1e200, 0.0], diagonal(&[1.0; 2])), "overflows"),
        ] {
            let error = distance(&good, &bad).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
