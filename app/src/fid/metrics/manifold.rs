//! Precision and recall: how many samples lie on the manifold of the reference, and the other way round.
//!
//! A set's manifold is the union of balls, one around each vector, that reach to its k-th nearest neighbour. Whether a vector
//! is inside is decided on `Σ(aᵢ − bᵢ)²` in `f64`. Matrix products find the pairs for which that has to be computed: all
//! others are clear by a bound on the products' rounding error, so the counts are exact.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Rows;

/// Rows of one product.
const PANEL: usize = 512;
/// Candidates kept for each neighbourhood beside its `k`.
const SPARE: usize = 8;
/// Roundings of a distance beside those of its product.
const ROUNDINGS: f64 = 16.0;

/// Counts of the samples and of the reference vectors that lie on the other set's manifold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlap {
    /// Samples.
    pub samples: usize,
    /// Samples inside a ball of the reference.
    pub samples_inside: usize,
    /// Reference vectors.
    pub reference: usize,
    /// Reference vectors inside a ball of the samples.
    pub reference_inside: usize,
    /// Neighbours that a ball reaches to.
    pub neighbours: usize,
}

impl Overlap {
    /// Part of the samples on the manifold of the reference.
    pub fn precision(&self) -> f64 {
        self.samples_inside as f64 / self.samples as f64
    }

    /// Part of the reference on the manifold of the samples.
    pub fn recall(&self) -> f64 {
        self.reference_inside as f64 / self.reference as f64
    }
}

/// Counts with balls that reach to the `k`-th neighbour, the vector itself not counted.
///
/// # Errors
/// Vectors of different lengths, a set of not more than `k` vectors.
/// # Source
/// Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", NeurIPS 2019.
pub fn overlap(samples: Rows<'_>, reference: Rows<'_>, k: usize) -> anyhow::Result<Overlap> {
    ensure!(
        samples.width() == reference.width(),
        "features of {} and of {} values cannot be compared",
        samples.width(),
        reference.width()
    );
    let least = samples.len().min(reference.len());
    ensure!(k > 0 && least > k, "{k} neighbours need more than {k} images in both sets, got {least}");
    let (s, r) = (Set::new(samples), Set::new(reference));
    let bound = s.error_with(&r);
    let (sample_radii, reference_radii) = (s.radii(k), r.radii(k));
    let flags = |n: usize| -> Vec<AtomicBool> { (0..n).map(|_| AtomicBool::new(false)).collect() };
    let (sample_in, reference_in) = (flags(samples.len()), flags(reference.len()));
    let panels: Vec<_> = s.panels().flat_map(|a| r.panels().map(move |b| (a.clone(), b))).collect();
    panels.into_par_iter().for_each(|(a, b)| {
        let products = s.products(&r, &a, &b);
        for (j, column) in b.zip(products.col_iter()) {
            for (i, product) in a.clone().zip(column.iter()) {
                let about = s.norms[i] + r.norms[j] - 2.0 * product;
                for (flag, radius) in
                    [(&sample_in[i], reference_radii[j]), (&reference_in[j], sample_radii[i])]
                {
                    let beyond = f64::from(about) - radius;
                    let near = beyond <= bound;
                    // Flags only ever rise, so a stale one costs time, never a count.
                    if near
                        && !flag.load(Ordering::Relaxed)
                        && (beyond < -bound || exact(s.rows.row(i), r.rows.row(j)) <= radius)
                    {
                        flag.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
    });
    let count = |flags: &[AtomicBool]| flags.iter().filter(|f| f.load(Ordering::Relaxed)).count();
    Ok(Overlap {
        samples: samples.len(),
        samples_inside: count(&sample_in),
        reference: reference.len(),
        reference_inside: count(&reference_in),
        neighbours: k,
    })
}

/// The squared distance that decides; the same for (a, b) and (b, a).
fn exact(a: &[f32], b: &[f32]) -> f64 {
    let difference = |(x, y): (&f32, &f32)| (f64::from(*x) - f64::from(*y)).powi(2);
    a.iter().zip(b).map(difference).sum()
}

/// Vectors with their squared norms.
struct Set<'a> {
    rows: Rows<'a>,
    norms: Vec<f32>,
    largest: f32,
}

impl<'a> Set<'a> {
    fn new(rows: Rows<'a>) -> Self {
        let norm = |i| rows.row(i).iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() as f32;
        let norms: Vec<f32> = (0..rows.len()).into_par_iter().map(norm).collect();
        let largest = norms.iter().copied().fold(0.0, f32::max);
        Self { rows, norms, largest }
    }

    fn panels(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let n = self.rows.len();
        (0..n.div_ceil(PANEL)).map(move |p| p * PANEL..((p + 1) * PANEL).min(n))
    }

    /// How far `‖a‖² + ‖b‖² − 2·a·b` in `f32` is from the squared distance, at most: each of a product's `D` terms is
    /// rounded by half an `ε`, whatever the order of the sum, and `2·|a|·|b|` is at most `‖a‖² + ‖b‖²`.
    fn error_with(&self, other: &Self) -> f64 {
        let scale = f64::from(self.largest) + f64::from(other.largest);
        f64::from(f32::EPSILON) * (self.rows.width() as f64 / 2.0 + ROUNDINGS) * scale
    }

    /// Inner products of two panels.
    fn products(&self, other: &Self, a: &std::ops::Range<usize>, b: &std::ops::Range<usize>) -> Mat<f32> {
        let width = self.rows.width();
        let [left, right] = [(self, a), (other, b)].map(|(set, range)| {
            MatRef::from_row_major_slice(set.rows.range(range.clone()).values(), range.len(), width)
        });
        let mut products = Mat::zeros(a.len(), b.len());
        matmul(products.as_mut(), Accum::Replace, left, right.transpose(), 1.0, Par::Seq);
        products
    }

    /// Squared distance of each vector to its `k`-th neighbour.
    fn radii(&self, k: usize) -> Vec<f64> {
        let panels: Vec<_> = self.panels().collect();
        let nearest: Vec<Mutex<Vec<Nearest>>> =
            panels.iter().map(|p| Mutex::new(vec![Nearest::new(k + SPARE); p.len()])).collect();
        let pairs: Vec<_> = (0..panels.len()).flat_map(|a| (a..panels.len()).map(move |b| (a, b))).collect();
        pairs.into_par_iter().for_each(|(p, q)| {
            let (a, b) = (&panels[p], &panels[q]);
            let products = self.products(self, a, b);
            let about = |i: usize, j: usize| {
                self.norms[i] + self.norms[j] - 2.0 * products[(i - a.start, j - b.start)]
            };
            // A poisoned lock belongs to a thread that panicked, and the panic is passed on.
            let Ok(mut rows) = nearest[p].lock() else { return };
            for i in a.clone() {
                let list = &mut rows[i - a.start];
                b.clone().filter(|j| *j != i).for_each(|j| list.offer(about(i, j), j));
            }
            drop(rows);
            if p != q {
                let Ok(mut rows) = nearest[q].lock() else { return };
                for j in b.clone() {
                    let list = &mut rows[j - b.start];
                    a.clone().for_each(|i| list.offer(about(i, j), i));
                }
            }
        });
        let error = self.error_with(self);
        let lists: Vec<Nearest> =
            nearest.into_iter().flat_map(|m| m.into_inner().unwrap_or_default()).collect();
        lists.par_iter().enumerate().map(|(i, list)| self.radius(i, list, k, error)).collect()
    }

    fn radius(&self, i: usize, list: &Nearest, k: usize, error: f64) -> f64 {
        let here = self.rows.row(i);
        let mut found: Vec<f64> =
            list.entries.iter().map(|(_, j)| exact(here, self.rows.row(*j as usize))).collect();
        found.sort_by(f64::total_cmp);
        let complete = list.entries.len() + 1 == self.rows.len();
        let border = list.entries.last().map_or(0.0, |(about, _)| f64::from(*about) - error);
        // No distance is below 0, so a radius of 0, as equal vectors have, is right whatever the others are.
        if complete || found.get(k - 1).is_some_and(|radius| *radius <= border.max(0.0)) {
            return found[k - 1];
        }
        // The list may have missed one: all others are looked at.
        let others = (0..self.rows.len()).filter(|j| *j != i);
        let mut all: Vec<f64> = others.map(|j| exact(here, self.rows.row(j))).collect();
        *all.select_nth_unstable_by(k - 1, f64::total_cmp).1
    }
}

/// The smallest approximate distances so far, in order.
#[derive(Clone)]
struct Nearest {
    entries: Vec<(f32, u32)>,
    size: usize,
}

impl Nearest {
    fn new(size: usize) -> Self {
        Self { entries: Vec::with_capacity(size + 1), size }
    }

    fn offer(&mut self, about: f32, index: usize) {
        let entry = (about, index as u32);
        let before = |a: &(f32, u32), b: &(f32, u32)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).is_lt();
        if self.entries.len() == self.size {
            // Nearly all are sent away here.
            if !self.entries.last().is_some_and(|last| before(&entry, last)) {
                return;
            }
            self.entries.pop();
        }
        let place = self.entries.partition_point(|e| before(e, &entry));
        self.entries.insert(place, entry);
    }
}

#[cfg(test)]
mod tests {
    use super::super::numpy_random::Mt19937;
    use super::*;

    fn draws(n: usize, width: usize, seed: u32) -> Vec<f32> {
        let mut random = Mt19937::new(seed);
        (0..n * width).map(|_| random.u32() as f32 / 2f32.powi(32)).collect()
    }

    /// All distances, straight from the definition.
    fn plain(samples: Rows<'_>, reference: Rows<'_>, k: usize) -> (usize, usize) {
        let radius = |set: Rows<'_>, i: usize| {
            let mut all: Vec<f64> = (0..set.len()).map(|j| exact(set.row(i), set.row(j))).collect();
            all.sort_by(f64::total_cmp);
            all[k] // itself is the first
        };
        let inside = |points: Rows<'_>, set: Rows<'_>| {
            let radii: Vec<f64> = (0..set.len()).map(|i| radius(set, i)).collect();
            let holds = |p: &usize| (0..set.len()).any(|i| exact(points.row(*p), set.row(i)) <= radii[i]);
            (0..points.len()).filter(holds).count()
        };
        (inside(samples, reference), inside(reference, samples))
    }

    #[test]
    fn counts_are_those_of_the_definition() {
        // More than one panel each, and a width at which neither set covers the other.
        for (n, m, width) in [(700, 1100, 6), (40, 600, 3), (5, 4, 2)] {
            let (a, b) = (draws(n, width, 1), draws(m, width, 2));
            let (a, b) = (Rows::new(&a, width).unwrap(), Rows::new(&b, width).unwrap());
            let found = overlap(a, b, 3).unwrap();
            assert_eq!((found.samples_inside, found.reference_inside), plain(a, b, 3), "{n} {m}");
            assert!(n < 10 || found.precision() > 0.1 && found.precision() < 1.0, "{found:?}");
        }
    }

    #[test]
    fn repeated_vectors_and_far_origins_do_not_deceive() {
        // Distances of 1e-3 on vectors of norm 1e3: the products alone know nothing.
        let width = 8;
        let far = |seed| -> Vec<f32> {
            let mut values: Vec<f32> = draws(60, width, seed).iter().map(|x| 300.0 + x / 500.0).collect();
            for i in 0..20 {
                values.copy_within(0..width, i * 2 * width);
            }
            values
        };
        let (a, mut b) = (far(3), far(4));
        b[width..5 * width].copy_from_slice(&a[width..5 * width]);
        let (a, b) = (Rows::new(&a, width).unwrap(), Rows::new(&b, width).unwrap());
        let found = overlap(a, b, 3).unwrap();
        assert_eq!((found.samples_inside, found.reference_inside), plain(a, b, 3));
        let own = overlap(a, a, 3).unwrap();
        assert_eq!((own.precision(), own.recall()), (1.0, 1.0));
    }

    #[test]
    fn sets_must_have_neighbours() {
        let values = [0.0; 6];
        let (three, six) = (Rows::new(&values, 2).unwrap(), Rows::new(&values, 1).unwrap());
        assert!(overlap(three, three, 3).unwrap_err().to_string().contains("got 3"));
        assert!(overlap(three, six, 1).unwrap_err().to_string().contains("2 and of 1"));
    }
}
