//! Convolution of images and its transpose. Each is the other's gradient, so both can be differentiated again.

use ndarray::{ArrayD, IxDyn};

use crate::error::{Refusal, refuse};
use crate::eval::Array;
use crate::onnx::{Attribute, Emitter};
use crate::op::{Cost, Grad, Policy, Rules, Storage, traffic};
use crate::ops::window::{Window, moved};
use crate::shape::{Shape, Type};
use crate::value::Value;

/// Convolution (as neural networks mean it, without a flip) of images with a bank of filters.
///
/// `y[n, o, h, w] = bias[o] + Σ_{c, i, j} x[n, c, h·s + i·d − p, w·s + j·d − p] · weight[o, c, i, j]`
///
/// # Shapes
/// - `x`: `(N, C, H, W)`, `weight`: `(O, C, I, J)`, `bias`: `(O)`, if there is one; returns `(N, O, H', W')`
/// # Constraints
/// - C1: float operands of one dtype · C2: images and filters of rank 4, a bias of one number a filter
/// - C3: images and filters have as many channels · C4: a window that moves and fits the padded image
/// # Source
/// ONNX Conv, opset 11, one group.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv {
    /// Where the filters stand.
    pub window: Window,
}

/// The two image axes of a shape.
fn image(shape: &Shape) -> [usize; 2] {
    [shape.0[2], shape.0[3]]
}

fn attributes(window: &Window) -> Vec<Attribute> {
    let ints = |values: [usize; 2]| values.iter().map(|&v| v as i64).collect();
    let [[top, bottom], [left, right]] = window.pads;
    vec![
        Attribute::ints("strides", ints(window.strides)),
        Attribute::ints("pads", [top, left, bottom, right].map(|v| v as i64).to_vec()),
        Attribute::ints("dilations", ints(window.dilations)),
    ]
}

/// C1 and C2 of images, filters and perhaps a bias; gives the sizes of the filters.
fn operands(args: &[&Type], filters_axis: usize) -> Result<[usize; 4], Refusal> {
    if args.iter().any(|a| a.dtype != args[0].dtype || !a.dtype.is_float()) {
        return refuse("C1: float operands of one dtype");
    }
    let (x, weight) = (&args[0].shape, &args[1].shape);
    let (&[_, _, _, _], &[o, c, i, j]) = (x.dims(), weight.dims()) else {
        return refuse("C2: images and filters of rank 4");
    };
    let sizes = [o, c, i, j];
    if args.get(2).is_some_and(|bias| bias.shape.dims() != [sizes[filters_axis]]) {
        return refuse(format!("C2: a bias of {} numbers", sizes[filters_axis]));
    }
    Ok(sizes)
}

/// Visits every product `y[n, o, ·] += x[n, c, ·] · weight[o, c, i, j]` of a convolution, a run along a row at a time:
/// (first element of `y`, of `x`, the step in `x`, number of elements, element of the weight).
fn each_run(
    window: &Window,
    x: &[usize],
    y: &[usize],
    kernel: [usize; 2],
    mut run: impl FnMut(usize, usize, usize, usize, usize),
) {
    let (c, h, w) = (x[1], x[2], x[3]);
    let (n, o, rows, cols) = (y[0], y[1], y[2], y[3]);
    let [ki, kj] = kernel;
    for (n, o, c_) in (0..n).flat_map(|n| (0..o).flat_map(move |o| (0..c).map(move |c| (n, o, c)))) {
        for (i, j) in (0..ki).flat_map(|i| (0..kj).map(move |j| (i, j))) {
            let across = window.inside(1, j, w, cols);
            if across.is_empty() {
                continue;
            }
            let element = ((o * c + c_) * ki + i) * kj + j;
            for row in window.inside(0, i, h, rows) {
                let to = ((n * y[1] + o) * rows + row) * cols + across.start;
                let line = ((n * c + c_) * h + window.pixel(0, i, row)) * w;
                run(to, line + window.pixel(1, j, across.start), window.strides[1], across.len(), element);
            }
        }
    }
}

fn flat(x: &Array) -> Vec<f64> {
    x.iter().copied().collect()
}

fn shaped(shape: &Shape, values: Vec<f64>) -> Array {
    let mut answer = ArrayD::zeros(IxDyn(shape.dims()));
    answer.iter_mut().zip(values).for_each(|(o, v)| *o = v);
    answer
}

/// Cotangent of the filters of `y = conv(x, weight)`: again a convolution, of the images' channels with the cotangent as
/// filters; strides and dilations change places.
fn filter_cotangent<'g>(x: Value<'g>, ct: Value<'g>, weight: &Shape, window: &Window) -> Value<'g> {
    let mut used = x;
    for axis in 0..2 {
        let covered = window.covered(axis, weight.0[2 + axis], ct.dim(2 + axis));
        match moved(used, 2 + axis, window.pads[axis][0] as isize, covered) {
            Some(part) => used = part,
            None => return ct.builder().constant(x.ty().dtype, weight.clone(), vec![0.0]),
        }
    }
    let turned = Window { strides: window.dilations, dilations: window.strides, ..Window::default() };
    let swap = [1, 0, 2, 3];
    used.transpose(&swap).conv(ct.transpose(&swap), None, turned).transpose(&swap)
}

impl Rules for Conv {
    fn name(&self) -> &'static str {
        "Conv"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let [o, c, i, j] = operands(args, 0)?;
        let x = &args[0].shape;
        if x.0[1] != c {
            return refuse(format!("C3: images of {c} channels"));
        }
        let Some([h, w]) = self.window.positions(image(x), [i, j]) else {
            return refuse("C4: a window that moves and fits the padded image");
        };
        Ok(Type::new(args[0].dtype, [x.0[0], o, h, w]))
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let (x, weight) = (args[0], args[1]);
        let dx = ct.conv_transpose(weight, image(&x.shape()), self.window);
        let dw = filter_cotangent(x, ct, &weight.shape(), &self.window);
        let mut answer = vec![Grad::Value(dx), Grad::Value(dw)];
        if let Some(bias) = args.get(2) {
            answer.push(Grad::Value(ct.sum(&[0, 2, 3]).reshape(bias.shape())));
        }
        answer
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        emitter.same("Conv", attributes(&self.window));
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let (x, weight) = (flat(args[0]), flat(args[1]));
        let plane = out.shape.0[2] * out.shape.0[3];
        let bias = |at: usize| args.get(2).map_or(0.0, |b| b[[at / plane % out.shape.0[1]].as_slice()]);
        let mut y: Vec<f64> = (0..out.shape.numel()).map(bias).collect();
        let kernel = [args[1].shape()[2], args[1].shape()[3]];
        each_run(&self.window, args[0].shape(), out.shape.dims(), kernel, |to, from, step, n, k| {
            let (w, line) = (weight[k], x[from..].iter().step_by(step));
            y[to..to + n].iter_mut().zip(line).for_each(|(y, x)| *y += w * x);
        });
        shaped(&out.shape, y)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        let filter: usize = args[1].shape.0[1..].iter().product();
        let macs = (out.shape.numel() * filter) as u64;
        let bias = if args.len() > 2 { out.shape.numel() as u64 } else { 0 };
        Cost { macs, flops: 2 * macs + bias, bytes: traffic(args, out) }
    }
}

/// Transpose of a convolution: the cotangent of its images, given the cotangent of its answer.
///
/// # Shapes
/// - `x`: `(N, O, H', W')`, `weight`: `(O, C, I, J)`; returns `(N, C, H, W)`, images of the given size
/// # Constraints
/// - C1: float operands of one dtype · C2: images and filters of rank 4
/// - C3: as many images' channels as filters · C4: the convolution of images of that size has the size of `x`
/// # Source
/// ONNX ConvTranspose, opset 11, one group.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvTranspose {
    /// Where the filters of the convolution stand.
    pub window: Window,
    /// Rows and columns of the answer.
    pub size: [usize; 2],
}

impl Rules for ConvTranspose {
    fn name(&self) -> &'static str {
        "ConvTranspose"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let [o, c, i, j] = operands(args, 1)?;
        let x = &args[0].shape;
        if x.0[1] != o {
            return refuse(format!("C3: images of {o} channels"));
        }
        if self.window.positions(self.size, [i, j]) != Some(image(x)) {
            return refuse(format!("C4: a size whose convolution is of {} by {}", x.0[2], x.0[3]));
        }
        Ok(Type::new(args[0].dtype, [x.0[0], c, self.size[0], self.size[1]]))
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        let (x, weight) = (args[0], args[1]);
        let dw = filter_cotangent(ct, x, &weight.shape(), &self.window);
        vec![Grad::Value(ct.conv(weight, None, self.window)), Grad::Value(dw)]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let (x, weight) = (&emitter.arg_type(0).shape, &emitter.arg_type(1).shape);
        // Rows and columns that no position covers.
        let left_over = |axis: usize| {
            let covered = self.window.covered(axis, weight.0[2 + axis], x.0[2 + axis]);
            (self.size[axis] + self.window.pads[axis][0] + self.window.pads[axis][1] - covered) as i64
        };
        let mut all = attributes(&self.window);
        all.push(Attribute::ints("output_padding", vec![left_over(0), left_over(1)]));
        emitter.same("ConvTranspose", all);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let (ct, weight) = (flat(args[0]), flat(args[1]));
        let mut x = vec![0.0; out.shape.numel()];
        let kernel = [args[1].shape()[2], args[1].shape()[3]];
        each_run(&self.window, out.shape.dims(), args[0].shape(), kernel, |from, to, step, n, k| {
            let w = weight[k];
            let line = x[to..].iter_mut().step_by(step);
            line.zip(&ct[from..from + n]).for_each(|(x, ct)| *x += w * ct);
        });
        shaped(&out.shape, x)
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        let filter: usize = args[1].shape.0[1..].iter().product();
        let macs = (args[0].shape.numel() * filter) as u64;
        Cost { macs, flops: 2 * macs, bytes: traffic(args, out) }
    }
}
