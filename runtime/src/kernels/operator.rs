//! The native ops as ONNX Runtime sees them: signature, shape rule, call of the kernel on its threads.

use std::cell::RefCell;

use graph_builder::NativeName;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::{
    DynValueTypeMarker, Shape, SymbolicDimensions, TensorElementType, ValueRef, ValueRefMut, ValueType,
};

use super::attention::Attention;
use super::linear::Layer;
use super::modulation::Conditioned;
use super::patch::Patches;
use super::product::{Frozen, Shared, Threads};
use super::signature::{Attributes, Op, Source};
use super::{count, gelu, rows};

/// Elements that one thread takes at a time, about: small enough to stay in its cache, large enough to be worth it.
const GRAIN: usize = 16 * 1024;

/// An op under one of its names.
pub(super) struct NativeOp {
    op: Op,
    name: String,
}

impl NativeOp {
    pub(super) fn new(op: Op, name: NativeName) -> Self {
        Self { op, name: name.to_string() }
    }
}

impl Source for KernelContext<'_> {
    fn float(&self, name: &str) -> Option<f32> {
        self.get(name)
    }
    fn int(&self, name: &str) -> Option<i64> {
        self.get(name)
    }
    fn text(&self, name: &str) -> Option<String> {
        self.get(name)
    }
}

impl Source for ShapeInferenceContext {
    fn float(&self, name: &str) -> Option<f32> {
        self.attr(name).ok()
    }
    fn int(&self, name: &str) -> Option<i64> {
        self.attr(name).ok()
    }
    fn text(&self, name: &str) -> Option<String> {
        self.attr(name).ok()
    }
}

/// An op's inputs in an element type.
pub(crate) fn inputs(op: Op, ty: TensorElementType) -> impl Iterator<Item = OperatorInput> {
    let (fewest, most) = op.inputs();
    (0..most).map(move |i| if i < fewest { OperatorInput::required(ty) } else { OperatorInput::optional(ty) })
}

/// An op's outputs in an element type.
pub(crate) fn outputs(op: Op, ty: TensorElementType) -> impl Iterator<Item = OperatorOutput> {
    (0..op.outputs()).map(move |_| OperatorOutput::required(ty))
}

/// Tells the shapes of an op's outputs; their element type is that of the first input.
pub(crate) fn infer_shape(op: Op, context: &mut ShapeInferenceContext) -> ort::Result<()> {
    // An unknown shape is left unknown.
    let Ok(attributes) = Attributes::read(op, context) else { return Ok(()) };
    let inputs = context.inputs();
    let Some(ValueType::Tensor { ty, .. }) = inputs.first() else { return Ok(()) };
    let shapes: Option<Vec<&[i64]>> = inputs
        .iter()
        .map(|ty| ty.tensor_shape().map(|s| &**s).filter(|s| s.iter().all(|&d| d > 0)))
        .collect();
    let Some(shapes) = shapes.filter(|s| s.len() >= op.inputs().0) else { return Ok(()) };
    for (i, shape) in op.shapes(&attributes, &shapes).unwrap_or_default().into_iter().enumerate() {
        let output = ValueType::Tensor {
            ty: *ty,
            dimension_symbols: SymbolicDimensions::empty(shape.len()),
            shape: Shape::new(shape),
        };
        context.set_output(i, &output)?;
    }
    Ok(())
}

/// The refusal of operands that break an op's contract.
pub(crate) fn unfit(op: Op, shapes: &[&[i64]]) -> ort::Error {
    let shapes: Vec<String> = shapes.iter().map(|s| format!("{s:?}")).collect();
    ort::Error::new(format!("{} cannot take inputs of shapes {}", op.name(), shapes.join(", ")))
}

impl Operator for NativeOp {
    type Kernel<'attr> = NativeKernel;

    fn name(&self) -> &str {
        &self.name
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        inputs(self.op, TensorElementType::Float32)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        outputs(self.op, TensorElementType::Float32)
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        infer_shape(self.op, context)
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<NativeKernel> {
        let attributes = Attributes::read(self.op, context).map_err(ort::Error::new)?;
        let frozen = self.op.weight().and_then(|index| {
            let weight = context.constant_input::<DynValueTypeMarker>(index).ok()?;
            weight.try_extract_tensor::<f32>().ok().map(|(_, values)| Frozen::new(values))
        });
        Ok(NativeKernel { op: self.op, attributes, _frozen: frozen })
    }
}

pub(super) struct NativeKernel {
    op: Op,
    attributes: Attributes,
    /// Keeps the packed form of a weight that is an initializer; it lives as long as the session, and so does this.
    _frozen: Option<Frozen>,
}

/// ONNX Runtime's own threads; a refusal of theirs is kept for the end of the call.
struct OrtThreads<'a> {
    context: &'a ComputeContext,
    refusal: RefCell<Option<ort::Error>>,
}

// SAFETY: `each` is called by the thread that runs the kernel only.
unsafe impl Sync for OrtThreads<'_> {}

impl Threads for OrtThreads<'_> {
    fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        if count == 1 {
            task(0);
        } else if count > 1 {
            let task = Ptr(task);
            // As many batches as tasks: threads take one after the other.
            if let Err(error) = self.context.par_for(count, count, move |i| task.call(i)) {
                *self.refusal.borrow_mut() = Some(error);
            }
        }
    }
}

/// A task that outlives the call that it is given to.
#[derive(Clone, Copy)]
struct Ptr<'a>(&'a (dyn Fn(usize) + Sync));

impl Ptr<'_> {
    fn call(self, i: usize) {
        (self.0)(i);
    }
}

impl Kernel for NativeKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let op = self.op;
        let (fewest, most) = op.inputs();
        let mut values: Vec<ValueRef<'_>> = Vec::with_capacity(most);
        for i in 0..most.min(context.num_inputs()?) {
            match context.input(i)? {
                Some(value) => values.push(value),
                None if i >= fewest => break,
                None => return Err(ort::Error::new(format!("{} got no input {i}", op.name()))),
            }
        }
        let inputs: Vec<(&[i64], &[f32])> = values
            .iter()
            .map(|v| v.try_extract_tensor::<f32>().map(|(shape, data)| (&**shape, data)))
            .collect::<ort::Result<_>>()?;
        let shapes: Vec<&[i64]> = inputs.iter().map(|(shape, _)| *shape).collect();
        let answers = op.shapes(&self.attributes, &shapes).ok_or_else(|| unfit(op, &shapes))?;
        let mut outputs: Vec<ValueRefMut<'_>> = answers
            .iter()
            .enumerate()
            .map(|(i, shape)| {
                let missing = || ort::Error::new(format!("{} has no output {i}", op.name()));
                context.output(i, shape.clone())?.ok_or_else(missing)
            })
            .collect::<ort::Result<_>>()?;
        let mut out: Vec<&mut [f32]> = outputs
            .iter_mut()
            .map(|v| v.try_extract_tensor_mut::<f32>().map(|(_, data)| data))
            .collect::<ort::Result<_>>()?;
        count(op);
        let threads = OrtThreads { context, refusal: RefCell::new(None) };
        self.run(&threads, &inputs, &answers, &mut out);
        threads.refusal.into_inner().map_or(Ok(()), Err)
    }
}

/// Elements of a shape.
fn numel(shape: &[i64]) -> usize {
    shape.iter().product::<i64>() as usize
}

impl NativeKernel {
    /// Calls the kernel; shapes were checked by [`Op::shapes`].
    fn run(
        &self,
        threads: &dyn Threads,
        inputs: &[(&[i64], &[f32])],
        answers: &[Vec<i64>],
        out: &mut [&mut [f32]],
    ) {
        let (op, a) = (self.op, &self.attributes);
        let x = |i: usize| inputs.get(i).map_or(&[][..], |(_, data)| *data);
        let dim = |i: usize, axis: usize| inputs[i].0[axis] as usize;
        let last = |i: usize| inputs[i].0.last().map_or(1, |&d| d as usize);
        let layer = |outputs: usize, inputs: usize, numel: usize| Layer {
            rows: numel / outputs.max(1),
            inputs,
            outputs,
            activation: a.activation,
        };
        let conditioned = |i: usize| Conditioned { samples: dim(i, 0), tokens: dim(i, 1), width: dim(i, 2) };
        match op {
            Op::Linear => {
                layer(dim(1, 0), dim(1, 1), numel(&answers[0])).forward(threads, x(0), x(1), x(2), out[0]);
            }
            Op::LinearGateResidual => {
                let layer = layer(dim(3, 0), dim(3, 1), numel(&answers[0]));
                layer.forward_gated(threads, (x(2), x(3), x(4)), (x(0), x(1), dim(0, 1)), out[0]);
            }
            Op::LinearGradInput => {
                let layer = layer(dim(1, 0), dim(1, 1), numel(inputs[0].0));
                layer.grad_input(threads, x(0), x(1), x(2), out[0]);
            }
            Op::LinearGradWeight => {
                let [dw, db] = out else { return };
                layer(last(0), last(1), numel(inputs[0].0)).grad_weight(threads, x(0), x(1), dw, db);
            }
            Op::Attention | Op::AttentionGrad => {
                let size = dim(0, 2) / 3 / a.heads;
                let (samples, tokens) = (dim(0, 0), dim(0, 1));
                let op = Attention { samples, tokens, heads: a.heads, size, scale: a.scale };
                if self.op == Op::Attention {
                    op.forward(threads, x(0), out[0]);
                } else {
                    op.backward(threads, x(0), x(1), out[0]);
                }
            }
            Op::LayerNormModulate => {
                conditioned(0).layer_norm_modulate(threads, [x(0), x(1), x(2)], a.epsilon, out[0]);
            }
            Op::LayerNormModulateGrad => {
                let [dx, dshift, dscale] = out else { return };
                let inputs = [x(0), x(1), x(2), x(3)];
                conditioned(0).layer_norm_modulate_grad(threads, inputs, a.epsilon, dx, [dshift, dscale]);
            }
            Op::GateResidual => conditioned(0).gate_residual(threads, [x(0), x(1), x(2)], out[0]),
            Op::GateResidualGrad => {
                let [dy, dgate] = out else { return };
                conditioned(1).gate_residual_grad(threads, [x(0), x(1), x(2)], dy, dgate);
            }
            Op::Patchify | Op::Unpatchify => {
                let image = if op == Op::Patchify { inputs[0].0 } else { &answers[0] };
                let &[samples, channels, height, width] = image else { return };
                let patches = Patches {
                    samples: samples as usize,
                    channels: channels as usize,
                    height: height as usize,
                    width: width as usize,
                    patch: a.patch,
                    channels_last: a.channels_last,
                };
                if op == Op::Patchify {
                    patches.take(threads, x(0), out[0]);
                } else {
                    patches.put_back(threads, x(0), out[0]);
                }
            }
            Op::GeluGrad => in_rows(threads, 1, out[0], |at, out| {
                gelu::gelu_grad(&x(0)[at..][..out.len()], &x(1)[at..][..out.len()], out);
            }),
            Op::SoftmaxGrad => in_rows(threads, last(0), out[0], |at, out| {
                rows::softmax_grad(&x(0)[at..][..out.len()], &x(1)[at..][..out.len()], out, last(0));
            }),
            Op::LayerNormGrad => in_rows(threads, last(0), out[0], |at, out| {
                let (x, ct) = (&x(0)[at..][..out.len()], &x(1)[at..][..out.len()]);
                rows::layer_norm_grad(x, ct, out, last(0), a.epsilon);
            }),
            Op::After => out[0].copy_from_slice(x(0)),
        }
    }
}

/// Calls `part(first element, elements)` for pieces of whole rows of `width`.
fn in_rows(threads: &dyn Threads, width: usize, out: &mut [f32], part: impl Fn(usize, &mut [f32]) + Sync) {
    if out.is_empty() {
        return;
    }
    let piece = (GRAIN / width).max(1) * width;
    let (total, target) = (out.len(), Shared::new(out));
    threads.each(total.div_ceil(piece), &|index| {
        let start = index * piece;
        // SAFETY: pieces do not overlap and lie inside `out`.
        let out = unsafe { std::slice::from_raw_parts_mut(target.at().add(start), piece.min(total - start)) };
        part(start, out);
    });
}
