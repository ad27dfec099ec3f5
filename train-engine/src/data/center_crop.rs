//! The image pipeline of guided diffusion and DiT: halve, scale so that the short side fits, crop the middle.
//!
//! The filters work on bytes with 22-bit fixed-point weights, the horizontal pass first, each pass rounded to bytes:
//! the arithmetic of Pillow 9 to 11, which the published statistics were made with, so pixels agree to the bit. (Pillow
//! 13 picks the order of the passes by their cost, which moves some pixels by one.)

use image::RgbImage;

const CHANNELS: usize = 3;
/// Bits after the point in a weight: 8 of the pixel and 2 of head room leave 22 of 32.
const PRECISION: u32 = 22;

/// A resampling filter.
#[derive(Clone, Copy)]
enum Filter {
    Box,
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        match self {
            Self::Box if x > -0.5 && x <= 0.5 => 1.0,
            Self::Box => 0.0,
            Self::Bicubic => match x.abs() {
                x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
                _ => 0.0,
            },
        }
    }
}

/// The middle `size` by `size` square of an image whose short side is scaled to `size`.
///
/// Sides are halved by box averaging while the short one is at least `2·size`; then bicubic with anti-aliasing.
///
/// # Source
/// openai/guided-diffusion `image_datasets.py`, `center_crop_arr`; facebookresearch/DiT `train.py`.
pub(super) fn center_crop(image: RgbImage, size: usize) -> Vec<u8> {
    let mut plane =
        Plane { width: image.width() as usize, height: image.height() as usize, pixels: image.into_raw() };
    while plane.short_side() >= 2 * size {
        let (width, height) = (plane.width / 2, plane.height / 2);
        plane = plane.resize(width, height, Filter::Box);
    }
    let scale = size as f64 / plane.short_side() as f64;
    let side = |length: usize| ((length as f64 * scale).round_ties_even() as usize).max(size);
    let (width, height) = (side(plane.width), side(plane.height));
    plane = plane.resize(width, height, Filter::Bicubic);
    let (left, top) = ((plane.width - size) / 2, (plane.height - size) / 2);
    let rows = plane.pixels.chunks_exact(plane.width * CHANNELS).skip(top).take(size);
    rows.flat_map(|row| &row[left * CHANNELS..(left + size) * CHANNELS]).copied().collect()
}

struct Plane {
    width: usize,
    height: usize,
    /// `(H, W, 3)`.
    pixels: Vec<u8>,
}

/// The weights of one output position: those of `first`, `first + 1`, …
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

impl Plane {
    fn short_side(&self) -> usize {
        self.width.min(self.height)
    }

    fn resize(self, width: usize, height: usize, filter: Filter) -> Self {
        self.resize_rows(width, filter).resize_columns(height, filter)
    }

    fn resize_rows(self, width: usize, filter: Filter) -> Self {
        if width == self.width {
            return self;
        }
        let taps = taps(self.width, width, filter);
        let mut pixels = Vec::with_capacity(width * self.height * CHANNELS);
        for row in self.pixels.chunks_exact(self.width * CHANNELS) {
            for tap in &taps {
                let source = row[tap.first * CHANNELS..].chunks_exact(CHANNELS);
                let mut sums = [1 << (PRECISION - 1); CHANNELS];
                for (pixel, weight) in source.zip(&tap.weights) {
                    for (sum, &byte) in sums.iter_mut().zip(pixel) {
                        *sum += i32::from(byte) * weight;
                    }
                }
                pixels.extend(sums.map(round));
            }
        }
        Self { width, height: self.height, pixels }
    }

    fn resize_columns(self, height: usize, filter: Filter) -> Self {
        if height == self.height {
            return self;
        }
        let stride = self.width * CHANNELS;
        let mut pixels = Vec::with_capacity(stride * height);
        let mut sums = vec![0; stride];
        for tap in taps(self.height, height, filter) {
            sums.fill(1 << (PRECISION - 1));
            let source = self.pixels[tap.first * stride..].chunks_exact(stride);
            for (row, weight) in source.zip(&tap.weights) {
                for (sum, &byte) in sums.iter_mut().zip(row) {
                    *sum += i32::from(byte) * weight;
                }
            }
            pixels.extend(sums.iter().map(|&sum| round(sum)));
        }
        Self { width: self.width, height, pixels }
    }
}

fn round(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Normalised weights for resampling `from` positions to `to`; a shrinking filter is widened by the ratio.
fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let position = |at: usize| {
        let center = (at as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let weights: Vec<f64> =
            (first..end).map(|x| filter.weight((x as f64 - center + 0.5) * (1.0 / stretch))).collect();
        let normalise = 1.0 / weights.iter().sum::<f64>();
        let fixed = |weight: f64| (weight * normalise * f64::from(1 << PRECISION)).round() as i32;
        Taps { first, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).map(position).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The picture of the expected values below: byte `(7x² + 13y² + 5xy + 50c) mod 256` at column x, row y, channel c.
    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([0, 1, 2].map(|c| ((7 * x * x + 13 * y * y + 5 * x * y + 50 * c) % 256) as u8))
        })
    }

    /// Made with Pillow 11.3.0 by the reference's own steps (`resize` with BOX, `resize` with BICUBIC, crop).
    const EXPECTED: [(u32, u32, usize, &[u8]); 4] = [
        (
            11,
            7,
            4,
            &[
                42, 100, 159, 141, 159, 162, 156, 96, 111, 155, 148, 139, 131, 155, 162, 131, 152, 131, 111,
                124, 141, 142, 115, 111, 123, 110, 118, 123, 102, 167, 146, 133, 112, 114, 178, 84, 124, 115,
                168, 107, 138, 111, 141, 95, 153, 151, 152, 148,
            ],
        ),
        (
            9,
            23,
            4,
            &[
                189, 111, 97, 121, 128, 135, 113, 99, 149, 168, 154, 140, 72, 122, 172, 156, 121, 129, 110,
                160, 82, 121, 171, 93, 77, 127, 177, 136, 129, 122, 135, 143, 107, 171, 136, 101, 170, 92,
                142, 83, 133, 140, 78, 128, 178, 139, 125, 111,
            ],
        ),
        (
            3,
            5,
            4,
            &[
                4, 54, 104, 9, 59, 109, 24, 74, 124, 39, 89, 139, 20, 70, 120, 28, 78, 128, 47, 97, 149, 64,
                114, 171, 51, 101, 151, 60, 110, 160, 82, 132, 182, 102, 152, 202, 95, 163, 213, 105, 175,
                240, 138, 199, 170, 173, 222, 48,
            ],
        ),
        (
            33,
            40,
            3,
            &[
                128, 124, 133, 139, 127, 122, 137, 124, 127, 126, 131, 128, 127, 129, 117, 127, 131, 119,
                125, 130, 129, 125, 133, 121, 120, 110, 128,
            ],
        ),
    ];

    #[test]
    fn pixels_equal_the_reference_pipeline() {
        for (width, height, size, expected) in EXPECTED {
            assert_eq!(center_crop(picture(width, height), size), expected, "{width}x{height} to {size}");
        }
    }

    #[test]
    fn a_picture_of_the_right_size_is_kept() {
        let picture = picture(5, 5);
        assert_eq!(center_crop(picture.clone(), 5), picture.into_raw());
    }

    #[test]
    fn one_colour_stays_one_colour() {
        let flat = RgbImage::from_pixel(37, 91, image::Rgb([3, 128, 255]));
        assert!(center_crop(flat, 8).chunks_exact(3).all(|pixel| pixel == [3, 128, 255]));
    }
}
