//! The kernel distance KID: squared maximum mean discrepancy with a cubic kernel, unbiased, over random subsets.

use anyhow::ensure;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Rows;
use super::numpy_random::Mt19937;

/// How subsets are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subsets {
    /// Number of subsets.
    pub count: u32,
    /// Images of each, of both sets.
    pub size: u32,
    /// Seed of NumPy's legacy generator.
    pub seed: u32,
}

impl Subsets {
    /// torch-fidelity's: 100 subsets of 1000 images, seed 2020.
    pub const STANDARD: Self = Self { count: 100, size: 1000, seed: 2020 };

    /// The standard, with smaller subsets where a set is smaller.
    pub fn fitting(n: usize) -> Self {
        Self { size: Self::STANDARD.size.min(n as u32), ..Self::STANDARD }
    }
}

/// Mean and population deviation over the subsets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelDistance {
    /// Mean over subsets; slightly below 0 for equal distributions.
    pub mean: f64,
    /// Deviation over subsets.
    pub std: f64,
    /// Standard error of the mean, as if subsets were independent: `std / √count`.
    pub error: f64,
}

/// The distance of `samples` and `reference` with the kernel `(x·y / D + 1)³`.
///
/// # Errors
/// Features of different lengths, subsets of fewer than 2 images or larger than a set.
/// # Source
/// Bińkowski et al., "Demystifying MMD GANs", ICLR 2018; subsets as torch-fidelity draws them, samples first.
pub fn kernel_distance(
    samples: Rows<'_>,
    reference: Rows<'_>,
    subsets: Subsets,
) -> anyhow::Result<KernelDistance> {
    ensure!(
        samples.width() == reference.width(),
        "features of {} and of {} values cannot be compared",
        samples.width(),
        reference.width()
    );
    let size = subsets.size as usize;
    let least = samples.len().min(reference.len());
    ensure!(
        subsets.count > 0 && (2..=least).contains(&size),
        "KID with subsets of {size} images needs 2 or more, and as many in both sets; the smaller has {least}"
    );
    let mut random = Mt19937::new(subsets.seed);
    let mut draw = |n: usize| random.permutation(n as u32)[..size].to_vec();
    let chosen: Vec<_> = (0..subsets.count).map(|_| (draw(samples.len()), draw(reference.len()))).collect();
    // Collected in order, so that the sum does not depend on threads.
    let values: Vec<f64> = chosen
        .par_iter()
        .map(|(x, y)| discrepancy(&gather(samples, x), &gather(reference, y), samples.width()))
        .collect();
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let std = (values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n).sqrt();
    Ok(KernelDistance { mean, std, error: std / n.sqrt() })
}

fn gather(rows: Rows<'_>, indices: &[u32]) -> Vec<f64> {
    indices.iter().flat_map(|i| rows.row(*i as usize)).map(|x| f64::from(*x)).collect()
}

/// The unbiased estimate for two sets of equal size.
fn discrepancy(x: &[f64], y: &[f64], width: usize) -> f64 {
    let m = x.len() / width;
    let [x, y] = [x, y].map(|v| MatRef::from_row_major_slice(v, m, width));
    let mut products = Mat::zeros(m, m);
    let mut kernel_sum = |a: MatRef<'_, f64>, b: MatRef<'_, f64>, with_diagonal: bool| -> f64 {
        matmul(products.as_mut(), Accum::Replace, a, b.transpose(), 1.0 / width as f64, Par::Seq);
        let kernel = |x: &f64| (x + 1.0).powi(3);
        let all: f64 = products.col_iter().map(|c| c.iter().map(kernel).sum::<f64>()).sum();
        let diagonal: f64 = (0..m).map(|i| kernel(&products[(i, i)])).sum();
        if with_diagonal { all } else { all - diagonal }
    };
    let (within_x, within_y) = (kernel_sum(x, x, false), kernel_sum(y, y, false));
    let between = kernel_sum(x, y, true);
    let n = m as f64;
    (within_x + within_y) / (n * (n - 1.0)) - 2.0 * between / (n * n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_sets_of_two_give_the_sum_by_hand() {
        // Width 1, so k(x, y) = (xy + 1)³. x = {0, 1}, y = {2, 3}.
        let [x, y] = [[0.0, 1.0], [2.0, 3.0]];
        let found = kernel_distance(
            Rows::new(&x, 1).unwrap(),
            Rows::new(&y, 1).unwrap(),
            Subsets { count: 3, size: 2, seed: 1 },
        )
        .unwrap();
        // (2·k(0,1) + 2·k(2,3)) / 2 − 2·(k(0,2) + k(0,3) + k(1,2) + k(1,3)) / 4
        let expected = (1.0 + 343.0) - (1.0 + 1.0 + 27.0 + 64.0) / 2.0;
        assert!((found.mean - expected).abs() < 1e-12 && found.std < 1e-12, "{found:?}");
    }

    #[test]
    fn subsets_must_fit() {
        let rows = Rows::new(&[0.0, 1.0, 2.0], 1).unwrap();
        for size in [0, 1, 4] {
            let error = kernel_distance(rows, rows, Subsets { count: 1, size, seed: 0 }).unwrap_err();
            assert!(error.to_string().contains("smaller has 3"), "{error}");
        }
        assert_eq!(Subsets::fitting(30).size, 30);
        assert_eq!(Subsets::fitting(30_000), Subsets::STANDARD);
    }
}
