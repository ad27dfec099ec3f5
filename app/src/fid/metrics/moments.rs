//! Mean and covariance of features, from sums that merge to the last bit.
//!
//! Sums of floating-point numbers depend on their order; sums of integers do not. Each block of images contributes
//! `Σx` and `Σx·xᵀ`, computed in `f64` in one fixed way and then put on a fixed grid of 2⁻⁶⁴ as 128-bit integers. From there on
//! everything is exact: any grouping of the same blocks over shards, in any order, gives the same integers.

use std::io::{Read, Write};
use std::ops::Range;

use anyhow::{Context, ensure};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;

use super::Rows;

/// Side of the tiles that the upper triangle of `Σx·xᵀ` is cut into; part of the result's last bits.
const TILE: usize = 256;
/// Steps of the grid in 1.
const GRID: f64 = 18_446_744_073_709_551_616.0; // 2⁶⁴
/// Largest magnitude of one block's sum: 2²⁰ such blocks still fit into 128 bits.
const LARGEST: f64 = 8_796_093_022_208.0; // 2⁴³
/// Most features whose covariance is kept: its sums take 1 GB then.
pub const WIDEST: usize = 8192;
/// Rounding of sums of squares, relative to them: a block's 250 terms, each rounded by half an `ε`, in `Σx²` and twice in `(Σx)²`.
pub const ROUNDING: f64 = 1e-13;

/// A set varies nearly nothing when its variances are so small beside its mean …
const NEARLY: f64 = 1e-8;
/// … or beside the other set's variances.
const BESIDE: f64 = 1e-3;

/// Count, sum and sum of outer products of feature vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moments {
    width: usize,
    count: u64,
    sums: Vec<i128>,
    /// Tiles of the upper triangle, row by row.
    products: Vec<Vec<i128>>,
}

/// A mean and a covariance.
#[derive(Clone, Debug, PartialEq)]
pub struct Gaussian {
    /// Mean vector (D).
    pub mean: Vec<f64>,
    /// Covariance (D, D).
    pub covariance: Mat<f64>,
}

impl Gaussian {
    /// Of a mean (D) and a covariance (D, D), row after row.
    ///
    /// # Errors
    /// Another number of values.
    pub fn new(mean: Vec<f64>, covariance: &[f64]) -> anyhow::Result<Self> {
        let n = mean.len();
        ensure!(
            covariance.len() == n * n,
            "a covariance of {n} features has {} values, got {}",
            n * n,
            covariance.len()
        );
        Ok(Self { mean, covariance: Mat::from_fn(n, n, |i, j| covariance[i * n + j]) }.settled())
    }

    /// Mean square of a feature, whose sum is what a variance is rounded by.
    pub fn square(&self, feature: usize) -> f64 {
        self.mean[feature] * self.mean[feature] + self.covariance[(feature, feature)].abs()
    }

    /// Sum of the variances.
    pub fn spread(&self) -> f64 {
        (0..self.covariance.nrows()).map(|i| self.covariance[(i, i)]).sum()
    }

    /// Whether nearly nothing varies, beside the mean or beside the other set: what a collapsed generator makes.
    pub fn is_nearly_constant(&self, beside: Option<&Self>) -> bool {
        let (own, length) = (self.spread(), self.mean.iter().map(|m| m * m).sum::<f64>());
        own <= NEARLY * length || beside.is_some_and(|other| own <= BESIDE * other.spread())
    }

    /// A feature whose variance is below the rounding of its sums does not vary: its row and column become 0.
    fn settled(mut self) -> Self {
        let n = self.mean.len().min(self.covariance.nrows());
        for i in 0..n {
            if self.covariance[(i, i)].abs() <= ROUNDING * self.square(i) {
                self.covariance.row_mut(i).fill(0.0);
                self.covariance.col_mut(i).fill(0.0);
            }
        }
        self
    }
}

impl Moments {
    /// Of no vectors of length `width`.
    pub fn new(width: usize) -> Self {
        let products = tiles(width).map(|(i, j)| vec![0; i.len() * j.len()]).collect();
        Self { width, count: 0, sums: vec![0; width], products }
    }

    /// Number of vectors.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Length of a vector.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Adds one block of vectors. Which vectors share a block must not depend on shards or batches.
    ///
    /// # Errors
    /// Vectors of another length, values that are not finite or above some 10⁵.
    pub fn add_block(&mut self, rows: Rows<'_>) -> anyhow::Result<()> {
        ensure!(
            rows.width() == self.width,
            "internal: features have {} values, expected {}",
            rows.width(),
            self.width
        );
        let values = rows.to_f64();
        let mut sums = vec![0.0; self.width];
        for row in values.chunks_exact(self.width) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        let matrix = MatRef::from_row_major_slice(&values, rows.len(), self.width);
        let places: Vec<_> = tiles(self.width).collect();
        self.products.par_iter_mut().zip(places).try_for_each(|(tile, (i, j))| {
            let mut product = Mat::zeros(i.len(), j.len());
            let (left, right) = (matrix.subcols(i.start, i.len()), matrix.subcols(j.start, j.len()));
            // One thread a tile: how a product is cut by threads would change its last bits.
            matmul(product.as_mut(), Accum::Replace, left.transpose(), right, 1.0, Par::Seq);
            let columns = product.col_iter().flat_map(|c| c.iter().copied().collect::<Vec<_>>());
            tile.iter_mut().zip(columns).try_for_each(|(sum, x)| add(sum, on_grid(x)?))
        })?;
        self.sums.iter_mut().zip(sums).try_for_each(|(sum, x)| add(sum, on_grid(x)?))?;
        self.count += rows.len() as u64;
        Ok(())
    }

    /// Adds the vectors of other blocks; exact, so the order of merges is of no matter.
    ///
    /// # Errors
    /// Vectors of another length, sums beyond 128 bits.
    pub fn merge(&mut self, other: &Self) -> anyhow::Result<()> {
        ensure!(
            self.width == other.width,
            "cannot merge moments of {} and of {} features",
            self.width,
            other.width
        );
        self.sums.iter_mut().zip(&other.sums).try_for_each(|(a, b)| add(a, *b))?;
        for (ours, theirs) in self.products.iter_mut().zip(&other.products) {
            ours.iter_mut().zip(theirs).try_for_each(|(a, b)| add(a, *b))?;
        }
        self.count += other.count;
        Ok(())
    }

    /// Mean and covariance, the latter divided by `N - 1`.
    ///
    /// # Errors
    /// Fewer than 2 vectors.
    pub fn gaussian(&self) -> anyhow::Result<Gaussian> {
        ensure!(self.count >= 2, "a covariance needs 2 images or more, got {}", self.count);
        let n = self.count as f64;
        let sums: Vec<f64> = self.sums.iter().map(|s| *s as f64 / GRID).collect();
        let mean: Vec<f64> = sums.iter().map(|s| s / n).collect();
        let mut covariance = Mat::zeros(self.width, self.width);
        for (tile, (rows, columns)) in self.products.iter().zip(tiles(self.width)) {
            for (j, column) in columns.zip(tile.chunks_exact(rows.len())) {
                for (i, product) in rows.clone().zip(column) {
                    if i <= j {
                        let value = (*product as f64 / GRID - sums[i] * mean[j]) / (n - 1.0);
                        covariance[(i, j)] = value;
                        covariance[(j, i)] = value;
                    }
                }
            }
        }
        Ok(Gaussian { mean, covariance }.settled())
    }

    /// Writes the sums as they are.
    ///
    /// # Errors
    /// The writer's.
    pub fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
        to.write_all(&(self.width as u64).to_le_bytes())?;
        to.write_all(&self.count.to_le_bytes())?;
        for part in std::iter::once(&self.sums).chain(&self.products) {
            let bytes: Vec<u8> = part.iter().flat_map(|x| x.to_le_bytes()).collect();
            to.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Reads what [`write`](Self::write) wrote; `width` is what it must be.
    ///
    /// # Errors
    /// Another width, too few bytes.
    pub fn read(from: &mut impl Read, width: usize) -> anyhow::Result<Self> {
        let mut number = || -> anyhow::Result<u64> {
            let mut bytes = [0; 8];
            from.read_exact(&mut bytes).context("reading moments")?;
            Ok(u64::from_le_bytes(bytes))
        };
        let found = number()?;
        ensure!(found == width as u64, "moments of {found} features, expected {width}");
        let mut moments = Self { count: number()?, ..Self::new(width) };
        for part in std::iter::once(&mut moments.sums).chain(&mut moments.products) {
            let mut bytes = vec![0; part.len() * size_of::<i128>()];
            from.read_exact(&mut bytes).context("reading moments")?;
            let (words, _) = bytes.as_chunks();
            part.iter_mut().zip(words).for_each(|(x, word)| *x = i128::from_le_bytes(*word));
        }
        Ok(moments)
    }
}

/// The tiles of the upper triangle as ranges of rows and columns.
fn tiles(width: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let cut = move |k: usize| k * TILE..((k + 1) * TILE).min(width);
    let side = width.div_ceil(TILE);
    (0..side).flat_map(move |i| (i..side).map(move |j| (cut(i), cut(j))))
}

fn on_grid(x: f64) -> anyhow::Result<i128> {
    ensure!(x.abs() <= LARGEST, "features are too large for exact sums: a block's sum is {x:e}");
    Ok((x * GRID) as i128)
}

fn add(sum: &mut i128, x: i128) -> anyhow::Result<()> {
    *sum = sum.checked_add(x).context("the sums of features are beyond 128 bits")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::numpy_random::Mt19937;
    use super::*;

    fn draws(n: usize, width: usize, shift: f32) -> Vec<f32> {
        let mut random = Mt19937::new(7);
        (0..n * width).map(|_| random.u32() as f32 / 2f32.powi(32) + shift).collect()
    }

    fn of_blocks(values: &[f32], width: usize, block: usize) -> Moments {
        let mut moments = Moments::new(width);
        for rows in values.chunks(block * width) {
            moments.add_block(Rows::new(rows, width).unwrap()).unwrap();
        }
        moments
    }

    #[test]
    fn any_grouping_of_blocks_gives_the_same_bits() {
        let (width, block) = (300, 20); // two tiles and a rest
        let values = draws(130, width, 0.3);
        let whole = of_blocks(&values, width, block);
        let blocks: Vec<Moments> = values.chunks(block * width).map(|b| of_blocks(b, width, block)).collect();
        let mut backwards = Moments::new(width);
        blocks.iter().rev().for_each(|b| backwards.merge(b).unwrap());
        assert!(backwards == whole);
        let (mut left, mut right) = (Moments::new(width), Moments::new(width));
        for (i, b) in blocks.iter().enumerate() {
            if i % 3 == 0 { left.merge(b).unwrap() } else { right.merge(b).unwrap() }
        }
        right.merge(&left).unwrap();
        assert!(right == whole && whole.count() == 130);
    }

    #[test]
    fn mean_and_covariance_are_those_of_the_formula() {
        // A mean far above the deviation costs digits in careless formulas.
        let (n, width) = (90, 5);
        let values = draws(n, width, 100.0);
        let Gaussian { mean, covariance } = of_blocks(&values, width, 16).gaussian().unwrap();
        let at = |k: usize, i: usize| f64::from(values[k * width + i]);
        for i in 0..width {
            let m: f64 = (0..n).map(|k| at(k, i)).sum::<f64>() / n as f64;
            assert!((mean[i] - m).abs() < 1e-12, "{} {m}", mean[i]);
            for j in 0..width {
                let c: f64 = (0..n).map(|k| (at(k, i) - m) * (at(k, j) - mean[j])).sum::<f64>();
                let c = c / (n - 1) as f64;
                assert!((covariance[(i, j)] - c).abs() < 1e-11, "{} {c}", covariance[(i, j)]);
            }
        }
    }

    #[test]
    fn a_feature_that_does_not_vary_has_no_variance() {
        // Equal rows, of which one feature is 0; and one feature that varies beside constant ones.
        let (n, width) = (1000, 7);
        let row: Vec<f32> = (0..width).map(|i| i as f32 * 0.377).collect();
        let mut values = row.repeat(n);
        let constant = of_blocks(&values, width, 250).gaussian().unwrap();
        assert!(constant.covariance.norm_max() == 0.0 && constant.is_nearly_constant(None));
        for (k, x) in values.iter_mut().skip(3).step_by(width).enumerate() {
            *x += (k % 5) as f32;
        }
        let one = of_blocks(&values, width, 250).gaussian().unwrap();
        assert!((one.covariance[(3, 3)] - 2000.0 / 999.0).abs() < 1e-6, "{}", one.covariance[(3, 3)]);
        assert_eq!(one.spread(), one.covariance[(3, 3)]);
        assert!(!one.is_nearly_constant(None) && constant.is_nearly_constant(Some(&one)));
        // What another tool wrote of equal vectors is judged alike.
        let given = Gaussian::new(vec![1.0, 2.0], &[-3e-15, 1e-16, 1e-16, 4.0]).unwrap();
        assert_eq!((given.covariance[(0, 0)], given.covariance[(0, 1)], given.spread()), (0.0, 0.0, 4.0));
    }

    #[test]
    fn written_and_read_they_are_equal() {
        let moments = of_blocks(&draws(40, 270, -0.5), 270, 25);
        let mut bytes = Vec::new();
        moments.write(&mut bytes).unwrap();
        assert!(Moments::read(&mut bytes.as_slice(), 270).unwrap() == moments);
        let error = Moments::read(&mut bytes.as_slice(), 271).unwrap_err().to_string();
        assert!(error.contains("270") && error.contains("271"), "{error}");
        assert!(Moments::read(&mut &bytes[..bytes.len() - 1], 270).is_err());
    }

    #[test]
    fn what_cannot_be_summed_exactly_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, 1e10] {
            let error =
                Moments::new(2).add_block(Rows::new(&[0.0, bad], 2).unwrap()).unwrap_err().to_string();
            assert!(error.contains("too large"), "{error}");
        }
        assert!(Moments::new(2).gaussian().unwrap_err().to_string().contains("2 images"));
    }
}
