//! From features to numbers. No images, files or networks here: plain matrices in, plain numbers out.
//!
//! | module | gives |
//! |---|---|
//! | [`moments`] | mean and covariance from sums that merge exactly |
//! | [`frechet`] | the Fréchet distance of two Gaussians: FID, sFID |
//! | [`inception_score`] | the Inception score, its mean and deviation over splits |
//! | [`manifold`] | precision and recall of k-nearest-neighbour manifolds |
//! | [`kernel_distance`] | KID with its spread over subsets |
//! | [`numpy_random`] | permutations as NumPy's legacy generator draws them, for equal subsets |

pub mod frechet;
pub mod inception_score;
pub mod kernel_distance;
pub mod manifold;
pub mod moments;
pub mod numpy_random;

/// Vectors as the rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    values: &'a [f32],
    width: usize,
}

impl<'a> Rows<'a> {
    /// `values` is `(N, width)`, row after row.
    ///
    /// # Errors
    /// `width` is 0, or `values` is no whole number of rows.
    pub fn new(values: &'a [f32], width: usize) -> anyhow::Result<Self> {
        anyhow::ensure!(
            width > 0 && values.len().is_multiple_of(width),
            "internal: {} values are no rows of {width}",
            values.len()
        );
        Ok(Self { values, width })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.values.len() / self.width
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Length of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Row `index`.
    pub fn row(&self, index: usize) -> &'a [f32] {
        &self.values[index * self.width..(index + 1) * self.width]
    }

    /// Rows of a range.
    #[must_use]
    pub fn range(&self, rows: std::ops::Range<usize>) -> Rows<'a> {
        Rows { values: &self.values[rows.start * self.width..rows.end * self.width], width: self.width }
    }

    /// All values, row after row.
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    fn to_f64(self) -> Vec<f64> {
        self.values.iter().map(|&x| f64::from(x)).collect()
    }
}
