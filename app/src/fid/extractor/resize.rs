//! Resizing as each known tool does it, to the bit where its arithmetic is known to the bit.
//!
//! A plan holds positions and weights for one size of image, so that a stream of images of one size computes them once.
//! Images come as (H, W, C) on 0..=255 and leave as planes (C, H', W') on the same scale.

use super::Pixels;

/// A way to resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// TensorFlow 1's `ResizeBilinear`: corners of pixels coincide, no antialiasing.
    ///
    /// `top + (bottom − top)·dy` of rows `left + (right − left)·dx` in f32, as in ADM's evaluator and torch-fidelity.
    TensorFlowBilinear,
    /// PyTorch's `interpolate(mode="bilinear", align_corners=False)`: centres of pixels are half a pixel in, no
    /// antialiasing. Values are on 0..=1 meanwhile, as pytorch-fid has them.
    TorchBilinear,
    /// Pillow's bicubic filter (a = −½) on f32 images: it widens when it shrinks, so it is antialiased; sums in f64, along
    /// rows first, each pass rounded to f32; the result is cut to 0..=255, as in clean-fid. (Pillow 13 takes tall images
    /// along columns first: up to two units in the last place apart.)
    PillowBicubic,
}

/// The pixels that one pixel of the answer is made of, along one axis.
#[derive(Clone, Debug)]
struct Taps {
    first: usize,
    /// Of f32 for the bilinear filters.
    weights: Vec<f64>,
}

impl Taps {
    /// The weighted sum in f64, rounded once.
    fn sum<'a>(&self, values: impl Iterator<Item = &'a f32>) -> f32 {
        values.zip(&self.weights).fold(0.0, |sum, (v, w)| sum + f64::from(*v) * w) as f32
    }
}

/// How one axis is resized.
#[derive(Clone, Debug)]
struct Axis {
    taps: Vec<Taps>,
    /// Whether nothing happens.
    same: bool,
}

/// Everything about resizing images of one size.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    filter: Filter,
    from: [usize; 2],
    to: [usize; 2],
    rows: Axis,
    columns: Axis,
}

impl Plan {
    /// The plan from images of `from` rows and columns to `to`.
    pub(super) fn new(filter: Filter, from: [usize; 2], to: [usize; 2]) -> Self {
        let axis = |a: usize| {
            let taps = match filter {
                Filter::TensorFlowBilinear => corners(from[a], to[a]),
                Filter::TorchBilinear => centres(from[a], to[a]),
                Filter::PillowBicubic => bicubic(from[a], to[a]),
            };
            Axis { taps, same: from[a] == to[a] }
        };
        Self { filter, from, to, rows: axis(0), columns: axis(1) }
    }

    /// Whether the plan is for images of that size.
    pub(super) fn fits(&self, from: [usize; 2]) -> bool {
        self.from == from
    }

    /// Resizes image `index` of a batch into planes, and applies `scale` to each value.
    ///
    /// `out` holds `C · H' · W'` values.
    pub(super) fn run(
        &self,
        pixels: Pixels<'_>,
        index: usize,
        channels: usize,
        scale: impl Fn(usize, f32) -> f32,
        out: &mut [f32],
    ) {
        let [height, width] = self.from;
        let len = height * width * channels;
        if let Pixels::U8(all) = pixels
            && self.rows.same
            && self.columns.same
        {
            return self.look_up(&all[index * len..(index + 1) * len], channels, scale, out);
        }
        let mut plane = vec![0.0; height * width];
        for (channel, out) in out.chunks_mut(self.to[0] * self.to[1]).enumerate().take(channels) {
            let at = index * len + channel;
            match pixels {
                Pixels::U8(all) => {
                    let values = all[at..(index + 1) * len].iter().step_by(channels);
                    plane.iter_mut().zip(values).for_each(|(p, v)| *p = f32::from(*v));
                }
                Pixels::F32(all) => {
                    let values = all[at..(index + 1) * len].iter().step_by(channels);
                    plane.iter_mut().zip(values).for_each(|(p, v)| *p = *v);
                }
            }
            match self.filter {
                Filter::TensorFlowBilinear => self.tensorflow(&plane, out),
                Filter::TorchBilinear => {
                    for value in &mut plane {
                        *value /= 255.0;
                    }
                    self.torch(&plane, out);
                }
                Filter::PillowBicubic => self.pillow(&plane, out),
            }
            for value in out {
                *value = scale(channel, *value);
            }
        }
    }

    /// What [`run`](Self::run) does to bytes of an image that has its size already: one look-up each.
    fn look_up(&self, pixels: &[u8], channels: usize, scale: impl Fn(usize, f32) -> f32, out: &mut [f32]) {
        let unit = if self.filter == Filter::TorchBilinear { 255.0 } else { 1.0 };
        for (channel, out) in out.chunks_mut(self.to[0] * self.to[1]).enumerate().take(channels) {
            let table: [f32; 256] = std::array::from_fn(|byte| scale(channel, byte as f32 / unit));
            for (out, pixel) in out.iter_mut().zip(pixels.chunks_exact(channels)) {
                *out = table[usize::from(pixel[channel])];
            }
        }
    }

    fn tensorflow(&self, plane: &[f32], out: &mut [f32]) {
        let [height, width] = self.from;
        let line = |row: usize| &plane[row * width..(row + 1) * width];
        for (rows, out) in self.rows.taps.iter().zip(out.chunks_mut(self.to[1])) {
            let (top, bottom) = (line(rows.first), line((rows.first + 1).min(height - 1)));
            let dy = rows.weights[0] as f32;
            for (taps, out) in self.columns.taps.iter().zip(out) {
                let (left, right) = (taps.first, (taps.first + 1).min(width - 1));
                let dx = taps.weights[0] as f32;
                let above = top[left] + (top[right] - top[left]) * dx;
                let below = bottom[left] + (bottom[right] - bottom[left]) * dx;
                *out = above + (below - above) * dy;
            }
        }
    }

    fn torch(&self, plane: &[f32], out: &mut [f32]) {
        if self.rows.same && self.columns.same {
            out.copy_from_slice(plane);
            return;
        }
        let [height, width] = self.from;
        let line = |row: usize| &plane[row * width..(row + 1) * width];
        for (rows, out) in self.rows.taps.iter().zip(out.chunks_mut(self.to[1])) {
            let (top, bottom) = (line(rows.first), line((rows.first + 1).min(height - 1)));
            let dy = rows.weights[0] as f32;
            for (taps, out) in self.columns.taps.iter().zip(out) {
                let (left, right) = (taps.first, (taps.first + 1).min(width - 1));
                let dx = taps.weights[0] as f32;
                // PyTorch's loops are compiled with fused multiply-adds.
                let above = top[left].mul_add(1.0 - dx, top[right] * dx);
                let below = bottom[left].mul_add(1.0 - dx, bottom[right] * dx);
                *out = above.mul_add(1.0 - dy, below * dy);
            }
        }
    }

    fn pillow(&self, plane: &[f32], out: &mut [f32]) {
        let ([height, width], [_, columns]) = (self.from, self.to);
        let mut buffer = Vec::new();
        let across = if self.columns.same {
            plane
        } else {
            buffer.reserve_exact(height * columns);
            for line in plane.chunks(width) {
                buffer.extend(self.columns.taps.iter().map(|taps| taps.sum(line[taps.first..].iter())));
            }
            &buffer
        };
        if self.rows.same {
            out.copy_from_slice(across);
        } else {
            for (taps, out) in self.rows.taps.iter().zip(out.chunks_mut(columns)) {
                for (x, out) in out.iter_mut().enumerate() {
                    *out = taps.sum(across[taps.first * columns + x..].iter().step_by(columns));
                }
            }
        }
        for value in out {
            *value = value.clamp(0.0, 255.0);
        }
    }
}

/// `source = i · (from / to)` in f32.
fn corners(from: usize, to: usize) -> Vec<Taps> {
    let scale = (from as f64 / to as f64) as f32;
    (0..to)
        .map(|i| {
            let at = i as f32 * scale;
            let first = (at as usize).min(from - 1);
            Taps { first, weights: vec![f64::from(at - first as f32)] }
        })
        .collect()
}

/// `source = max((i + ½) · (from / to) − ½, 0)` in f32.
fn centres(from: usize, to: usize) -> Vec<Taps> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|i| {
            let at = (scale * (i as f32 + 0.5) - 0.5).max(0.0);
            let first = (at as usize).min(from - 1);
            Taps { first, weights: vec![f64::from((at - first as f32).clamp(0.0, 1.0))] }
        })
        .collect()
}

/// Keys' cubic with a = −½, stretched by the factor of shrinking, normalised.
fn bicubic(from: usize, to: usize) -> Vec<Taps> {
    const SUPPORT: f64 = 2.0;
    let cubic = |x: f64| {
        const A: f64 = -0.5;
        let x = x.abs();
        if x < 1.0 {
            ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
        } else if x < 2.0 {
            (((x - 5.0) * x + 8.0) * x - 4.0) * A
        } else {
            0.0
        }
    };
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = SUPPORT * stretch;
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let mut weights: Vec<f64> = (0..end - first)
                .map(|k| cubic((k as f64 + first as f64 - centre + 0.5) * (1.0 / stretch)))
                .collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                for weight in &mut weights {
                    *weight /= sum;
                }
            }
            Taps { first, weights }
        })
        .collect()
}
