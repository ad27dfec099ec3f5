//! Pooling of images: the largest value and the mean below a window.

use ndarray::{ArrayD, IxDyn};

use crate::error::{Refusal, refuse};
use crate::eval::Array;
use crate::onnx::{Attribute, Emitter};
use crate::op::{Cost, Grad, Policy, Rules, Storage, traffic};
use crate::ops::window::{Window, moved, spread, thinned};
use crate::shape::Type;
use crate::value::Value;

fn infer(kernel: [usize; 2], window: &Window, args: &[&Type]) -> Result<Type, Refusal> {
    let &[n, c, h, w] = args[0].shape.dims() else { return refuse("C1: float images of rank 4") };
    if !args[0].dtype.is_float() {
        return refuse("C1: float images of rank 4");
    }
    if window.dilations != [1, 1] {
        return refuse("C2: a dense window");
    }
    let padded = (0..2).any(|a| window.pads[a].iter().any(|&p| p >= kernel[a]));
    match window.positions([h, w], kernel) {
        Some([rows, cols]) if !padded => Ok(Type::new(args[0].dtype, [n, c, rows, cols])),
        _ => refuse("C3: a window that moves, fits the padded image and is larger than the padding"),
    }
}

fn emit(onnx: &str, kernel: [usize; 2], window: &Window, more: Vec<Attribute>, emitter: &mut Emitter<'_>) {
    let ints = |values: [usize; 2]| values.iter().map(|&v| v as i64).collect();
    let [[top, bottom], [left, right]] = window.pads;
    let mut attributes = vec![
        Attribute::ints("kernel_shape", ints(kernel)),
        Attribute::ints("strides", ints(window.strides)),
        Attribute::ints("pads", [top, left, bottom, right].map(|v| v as i64).to_vec()),
    ];
    attributes.extend(more);
    emitter.same(onnx, attributes);
}

/// Every element of the window, row by row.
fn elements([rows, cols]: [usize; 2]) -> impl Iterator<Item = [usize; 2]> {
    (0..rows).flat_map(move |i| (0..cols).map(move |j| [i, j]))
}

/// Folds the pixels below each position into one number.
fn fold(
    kernel: [usize; 2],
    window: &Window,
    x: &Array,
    out: &Type,
    first: f64,
    f: impl Fn(f64, f64) -> f64,
) -> Array {
    let mut answer = ArrayD::from_elem(IxDyn(out.shape.dims()), first);
    let (planes, rows, cols) = ((x.shape()[0], x.shape()[1]), out.shape.0[2], out.shape.0[3]);
    for [i, j] in elements(kernel) {
        for row in window.inside(0, i, x.shape()[2], rows) {
            for col in window.inside(1, j, x.shape()[3], cols) {
                let at = [window.pixel(0, i, row), window.pixel(1, j, col)];
                for (n, c) in (0..planes.0).flat_map(|n| (0..planes.1).map(move |c| (n, c))) {
                    let to = &mut answer[[n, c, row, col].as_slice()];
                    *to = f(*to, x[[n, c, at[0], at[1]].as_slice()]);
                }
            }
        }
    }
    answer
}

fn cost(kernel: [usize; 2], args: &[&Type], out: &Type) -> Cost {
    let flops = (out.shape.numel() * kernel[0] * kernel[1]) as u64;
    Cost { macs: 0, flops, bytes: traffic(args, out) }
}

/// How many pixels of the image, not of its padding, lie below each position.
fn counts(kernel: [usize; 2], window: &Window, image: [usize; 2], positions: [usize; 2]) -> Vec<f64> {
    let along = |axis: usize| -> Vec<f64> {
        let mut count = vec![0.0; positions[axis]];
        for element in 0..kernel[axis] {
            window.inside(axis, element, image[axis], positions[axis]).for_each(|p| count[p] += 1.0);
        }
        count
    };
    let (rows, cols) = (along(0), along(1));
    rows.iter().flat_map(|r| cols.iter().map(move |c| r * c)).collect()
}

/// The largest value below the window.
///
/// Padding never wins. Of equal values the first, row by row, receives the cotangent.
///
/// # Shapes
/// - `x`: `(N, C, H, W)`; returns `(N, C, H', W')`
/// # Constraints
/// - C1: float images of rank 4 · C2: a dense window
/// - C3: a window that moves, fits the padded image and is larger than the padding
/// # Source
/// ONNX MaxPool, opset 12.
#[derive(Clone, Debug, PartialEq)]
pub struct MaxPool {
    /// Rows and columns of the window.
    pub kernel: [usize; 2],
    /// Where it stands.
    pub window: Window,
}

impl Rules for MaxPool {
    fn name(&self) -> &'static str {
        "MaxPool"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        infer(self.kernel, &self.window, args)
    }
    fn vjp<'g>(&self, args: &[Value<'g>], out: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let (x, window, b) = (args[0], &self.window, ct.builder());
        let (dtype, image) = (x.ty().dtype, [x.dim(2), x.dim(3)]);
        let positions = [out.dim(2), out.dim(3)];
        let number = |value: f64| b.constant(dtype, [0; 0], vec![value]);
        let mut sum: Option<Value<'g>> = None;
        let mut taken: Option<Value<'g>> = None;
        for element in elements(self.kernel) {
            // The pixels below this element at every position, 0 where it is padding.
            let shift = |a: usize| window.pads[a][0] as isize - element[a] as isize;
            let length = |a: usize| positions[a] * window.strides[a];
            let below = moved(x, 2, shift(0), length(0)).and_then(|y| moved(y, 3, shift(1), length(1)));
            let Some(below) = below else { continue };
            let below = thinned(below, window.strides);
            let inside = [0, 1].map(|a| window.inside(a, element[a], image[a], positions[a]));
            let mask: Vec<f64> = elements(positions)
                .map(|[r, c]| f64::from(u8::from(inside[0].contains(&r) && inside[1].contains(&c))))
                .collect();
            let mask = b.constant(dtype, [1, 1, positions[0], positions[1]], mask);
            let mut wins = below.less(out).select(number(0.0), mask); // (N, C, H', W')
            if let Some(before) = taken {
                wins = wins * (number(1.0) - before);
            }
            taken = Some(taken.map_or(wins, |before| before + wins));
            let back = moved(spread(ct * wins, window.strides), 2, -shift(0), image[0])
                .and_then(|y| moved(y, 3, -shift(1), image[1]));
            if let Some(back) = back {
                sum = Some(sum.map_or(back, |sum| sum + back));
            }
        }
        vec![sum.map_or(Grad::Zero, Grad::Value)]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emit("MaxPool", self.kernel, &self.window, vec![], emitter);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        fold(self.kernel, &self.window, args[0], out, f64::NEG_INFINITY, f64::max)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        cost(self.kernel, args, out)
    }
}

/// The mean of the values below the window.
///
/// # Shapes
/// - `x`: `(N, C, H, W)`; returns `(N, C, H', W')`
/// # Constraints
/// - C1: float images of rank 4 · C2: a dense window
/// - C3: a window that moves, fits the padded image and is larger than the padding
/// # Source
/// ONNX AveragePool, opset 19.
#[derive(Clone, Debug, PartialEq)]
pub struct AveragePool {
    /// Rows and columns of the window.
    pub kernel: [usize; 2],
    /// Where it stands.
    pub window: Window,
    /// Whether the mean goes over the padding's zeros too (PyTorch's default), or over the image's pixels alone
    /// (TensorFlow).
    pub count_padding: bool,
}

impl AveragePool {
    /// One over the number of values that the mean of each position goes over.
    fn weights(&self, image: [usize; 2], positions: [usize; 2]) -> Vec<f64> {
        let all = (self.kernel[0] * self.kernel[1]) as f64;
        let counts = counts(self.kernel, &self.window, image, positions);
        counts.into_iter().map(|n| if self.count_padding { 1.0 / all } else { 1.0 / n }).collect()
    }
}

impl Rules for AveragePool {
    fn name(&self) -> &'static str {
        "AveragePool"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        infer(self.kernel, &self.window, args)
    }
    /// The cotangents of the positions above a pixel, summed: a mean over a window of the same size, times that size.
    fn vjp<'g>(&self, args: &[Value<'g>], out: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let x = args[0];
        let (image, positions) = ([x.dim(2), x.dim(3)], [out.dim(2), out.dim(3)]);
        let all = (self.kernel[0] * self.kernel[1]) as f64;
        let weights = self.weights(image, positions).into_iter().map(|w| w * all).collect::<Vec<_>>();
        let weights = ct.builder().constant(ct.ty().dtype, [1, 1, positions[0], positions[1]], weights);
        let spread = spread(ct * weights, self.window.strides);
        let shift = |a: usize| (self.kernel[a] - 1) as isize - self.window.pads[a][0] as isize;
        let length = |a: usize| image[a] + self.kernel[a] - 1;
        let padded = moved(spread, 2, shift(0), length(0)).and_then(|y| moved(y, 3, shift(1), length(1)));
        let sum = padded.map(|y| y.average_pool(self.kernel, Window::default(), true));
        vec![sum.map_or(Grad::Zero, Grad::Value)]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let count = Attribute::int("count_include_pad", i64::from(self.count_padding));
        emit("AveragePool", self.kernel, &self.window, vec![count], emitter);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let mut answer = fold(self.kernel, &self.window, args[0], out, 0.0, |sum, v| sum + v);
        let (x, positions) = (args[0].shape(), [out.shape.0[2], out.shape.0[3]]);
        let weights = self.weights([x[2], x[3]], positions);
        answer.iter_mut().zip(weights.iter().cycle()).for_each(|(v, w)| *v *= w);
        answer
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        cost(self.kernel, args, out)
    }
}
