//! The native ops as ONNX Runtime sees them: signature, shape rule, splitting over threads.

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::{TensorElementType, ValueRef};

use super::{Op, count, gelu, rows};

/// Elements that one thread takes at a time, about: small enough to stay in its cache, large enough to be worth it.
const GRAIN: usize = 16 * 1024;

pub(super) struct NativeOp(pub(super) Op);

impl Operator for NativeOp {
    type Kernel<'attr> = NativeKernel;

    fn name(&self) -> &str {
        self.0.name()
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        (0..self.0.arity()).map(|_| OperatorInput::required(TensorElementType::Float32))
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        // The output is like the first input; an unknown shape is left unknown.
        match context.inputs().first() {
            Some(x) if x.tensor_shape().is_some_and(|s| !s.is_empty() && s.iter().all(|&d| d > 0)) => {
                context.set_output(0, x)
            }
            _ => Ok(()),
        }
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<NativeKernel> {
        let op = self.0;
        let epsilon = match context.get::<f32>("epsilon") {
            Some(epsilon) => epsilon,
            None if op.has_epsilon() => {
                return Err(ort::Error::new(format!("{} needs the attribute `epsilon`", op.name())));
            }
            None => 0.0,
        };
        Ok(NativeKernel { op, epsilon })
    }
}

pub(super) struct NativeKernel {
    op: Op,
    epsilon: f32,
}

impl Kernel for NativeKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let op = self.op;
        let epsilon = self.epsilon;
        let values: Vec<ValueRef<'_>> =
            (0..op.arity()).map(|i| input(context, op, i)).collect::<ort::Result<_>>()?;
        let inputs: Vec<(&[i64], &[f32])> = values
            .iter()
            .map(|v| v.try_extract_tensor::<f32>().map(|(shape, data)| (&**shape, data)))
            .collect::<ort::Result<_>>()?;
        let shape = inputs[0].0;
        let plan = Plan::new(op, &inputs)?;
        let mut output = context
            .output(0, shape.to_vec())?
            .ok_or_else(|| ort::Error::new(format!("{} has no output", op.name())))?;
        let (_, out) = output.try_extract_tensor_mut::<f32>()?;
        count(op);
        plan.run(context, out, |part, out| {
            let whole = |i: usize| &inputs[i].1[part.start..part.start + out.len()];
            let shared = |i: usize| &inputs[i].1[part.sample * plan.width..][..plan.width];
            match op {
                Op::GeluGrad => gelu::gelu_grad(whole(0), whole(1), out),
                Op::SoftmaxGrad => rows::softmax_grad(whole(0), whole(1), out, plan.width),
                Op::LayerNormGrad => rows::layer_norm_grad(whole(0), whole(1), out, plan.width, epsilon),
                Op::LayerNormModulate => {
                    rows::layer_norm_modulate(whole(0), shared(1), shared(2), out, epsilon);
                }
                Op::GateResidual => rows::gate_residual(whole(0), shared(1), whole(2), out),
            }
        })
    }
}

fn input(context: &ComputeContext, op: Op, index: usize) -> ort::Result<ValueRef<'_>> {
    context.input(index)?.ok_or_else(|| ort::Error::new(format!("{} got no input {index}", op.name())))
}

/// How an op's output is cut into parts that threads compute on their own. The cuts depend on shapes only.
struct Plan {
    /// Length of the last axis.
    width: usize,
    /// Elements of one sample: the rows that share a `shift`, `scale` or `gate`.
    sample: usize,
    /// Elements of a part, whole rows.
    part: usize,
    /// Elements of the output.
    total: usize,
}

/// One part of an output.
#[derive(Clone, Copy)]
struct Part {
    /// Its first element.
    start: usize,
    /// Which sample it lies in.
    sample: usize,
}

impl Plan {
    /// Checks the shapes against the op's contract: a kernel must not index outside its inputs.
    fn new(op: Op, inputs: &[(&[i64], &[f32])]) -> ort::Result<Self> {
        let shapes = || inputs.iter().map(|(s, _)| format!("{s:?}")).collect::<Vec<_>>().join(", ");
        let refuse = || ort::Error::new(format!("{} cannot take inputs of shapes {}", op.name(), shapes()));
        let (shape, x) = inputs[0];
        let width = shape.last().map_or(1, |&d| d as usize);
        let alike = |i: usize| inputs[i].0 == shape;
        let sample = match op {
            Op::GeluGrad | Op::SoftmaxGrad | Op::LayerNormGrad => {
                if !alike(1) {
                    return Err(refuse());
                }
                x.len()
            }
            Op::LayerNormModulate | Op::GateResidual => {
                let &[n, t, d] = shape else { return Err(refuse()) };
                let per_sample = |i: usize| inputs[i].0 == [n, 1, d];
                let last = if op == Op::GateResidual { alike(2) } else { per_sample(2) };
                if !per_sample(1) || !last {
                    return Err(refuse());
                }
                (t * d) as usize
            }
        };
        let rows = (GRAIN / width.max(1)).max(1);
        let part = (rows * width).min(sample).max(1);
        Ok(Self { width, sample: sample.max(1), part, total: x.len() })
    }

    /// Computes all parts, on ONNX Runtime's threads when there are several.
    fn run(
        &self,
        context: &ComputeContext,
        out: &mut [f32],
        compute: impl Fn(Part, &mut [f32]) + Send + Sync,
    ) -> ort::Result<()> {
        if self.total == 0 || self.width == 0 {
            return Ok(());
        }
        let per_sample = self.sample.div_ceil(self.part);
        let parts = self.total / self.sample * per_sample;
        let target = Target(out.as_mut_ptr());
        let one = |index: usize| {
            let (sample, within) = (index / per_sample, index % per_sample * self.part);
            let start = sample * self.sample + within;
            let len = self.part.min(self.sample - within);
            // SAFETY: parts of different indices do not overlap, each index is computed once, and all lie inside
            // `out`, which is borrowed for the whole call.
            let out = unsafe { std::slice::from_raw_parts_mut(target.start().add(start), len) };
            compute(Part { start, sample }, out);
        };
        if parts == 1 {
            one(0);
            return Ok(());
        }
        context.par_for(parts, 0, one)
    }
}

/// The output's address, for the threads that write its parts.
struct Target(*mut f32);

// SAFETY: the threads write disjoint parts, see `Plan::run`.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    fn start(&self) -> *mut f32 {
        self.0
    }
}
