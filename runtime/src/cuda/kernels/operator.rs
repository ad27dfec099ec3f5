//! The `mudit` ops on ONNX Runtime's CUDA provider: shapes and attributes of the CPU's, in three element types.

use std::sync::Arc;

use graph_builder::{DType, NativeName};
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{DynTensorValueType, TensorElementType, ValueRef, ValueRefMut};

use super::gpu_queue::GpuQueue;
use super::native::{NativeOp, Place};
use super::queue::Address;
use super::scratch::Pool;
use crate::cuda::Gpu;
use crate::error::Result;
use crate::kernels::{Attributes, DOMAIN, Op, count, operator};
use crate::provider::CudaOptions;

const PROVIDER: &str = "CUDAExecutionProvider";

/// The domain with all kernels for one session on `gpu`.
pub(crate) fn domain(gpu: &Arc<Gpu>, options: &CudaOptions) -> ort::Result<OperatorDomain> {
    // A recorded run writes to its memory whenever it is started, also between two launches of another thread's queue: it
    // must have memory of its own.
    let pool = options.cuda_graph.then(Arc::default);
    let shared = Shared { gpu: gpu.clone(), tf32: options.tf32, pool };
    let named = |op: Op| {
        let types = [DType::F32, DType::Bf16, DType::F16];
        types.into_iter().flat_map(move |dtype| NativeName::of(op.name(), dtype)).map(move |name| (op, name))
    };
    Op::ALL.into_iter().flat_map(named).try_fold(OperatorDomain::new(DOMAIN)?, |domain, (op, name)| {
        domain.add(CudaOperator { op, dtype: name.dtype, name: name.to_string(), shared: shared.clone() })
    })
}

/// What the kernels of a session have in common.
#[derive(Clone)]
struct Shared {
    gpu: Arc<Gpu>,
    tf32: bool,
    /// Memory; the GPU's where there is none.
    pool: Option<Arc<Pool>>,
}

impl Shared {
    fn queue(&self) -> Result<GpuQueue> {
        let queue = match &self.pool {
            Some(pool) => GpuQueue::lending(&self.gpu, pool),
            None => GpuQueue::new(&self.gpu)?,
        };
        Ok(queue.with_tf32(self.tf32))
    }
}

/// An op of one element type, under one of its names.
struct CudaOperator {
    op: Op,
    dtype: DType,
    name: String,
    shared: Shared,
}

impl CudaOperator {
    fn element(&self) -> TensorElementType {
        match self.dtype {
            DType::Bf16 => TensorElementType::Bfloat16,
            DType::F16 => TensorElementType::Float16,
            _ => TensorElementType::Float32,
        }
    }
}

impl Operator for CudaOperator {
    type Kernel<'attr> = CudaKernel;

    fn name(&self) -> &str {
        &self.name
    }

    fn execution_provider_type(&self) -> Option<&str> {
        Some(PROVIDER)
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let mut inputs: Vec<_> = operator::inputs(self.op, self.element()).collect();
        if self.op == Op::After {
            // A token may be of any type: it is not read.
            inputs.truncate(1);
            inputs.push(OperatorInput::variadic(1));
        }
        inputs
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        operator::outputs(self.op, self.element())
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        operator::infer_shape(self.op, context)
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<CudaKernel> {
        let attributes = Attributes::read(self.op, context).map_err(ort::Error::new)?;
        let op = NativeOp::of(self.op, self.dtype, attributes);
        op.prepare(&self.shared.gpu).map_err(|e| ort::Error::new(e.to_string()))?;
        Ok(CudaKernel { op, kind: self.op, shared: self.shared.clone() })
    }
}

struct CudaKernel {
    op: NativeOp,
    kind: Op,
    shared: Shared,
}

impl Kernel for CudaKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        // The session was given this stream; on another one the scratch memory would be used twice at once.
        let expected = self.shared.gpu.stream().cu_stream().cast();
        if context.stream()?.is_none_or(|stream| stream.as_ptr() != expected) {
            return Err(ort::Error::new(format!(
                "{} runs on another stream than its GPU's",
                self.kind.name()
            )));
        }
        let (fewest, most) = self.kind.inputs();
        let mut values: Vec<ValueRef<'_, DynTensorValueType>> = Vec::with_capacity(most);
        for i in 0..most.min(context.num_inputs()?) {
            match context.input(i)? {
                Some(value) => values.push(value.downcast()?),
                None if i >= fewest => break,
                None => return Err(ort::Error::new(format!("{} got no input {i}", self.kind.name()))),
            }
        }
        let inputs: Vec<Place> = values
            .iter()
            .map(|v| Place { shape: v.shape().to_vec(), at: Address(v.data_ptr() as u64) })
            .collect();
        let shapes: Vec<&[i64]> = inputs.iter().map(|p| &*p.shape).collect();
        let answers = self.op.shapes(&shapes).ok_or_else(|| operator::unfit(self.kind, &shapes))?;
        let mut outputs = Vec::with_capacity(answers.len());
        for (i, shape) in answers.into_iter().enumerate() {
            let missing = || ort::Error::new(format!("{} has no output {i}", self.kind.name()));
            let value: ValueRefMut<'_> = context.output(i, shape)?.ok_or_else(missing)?;
            outputs.push(Address(value.downcast::<DynTensorValueType>()?.data_ptr() as u64));
        }
        count(self.kind);
        let enqueued = self.shared.queue().and_then(|queue| self.op.enqueue(&queue, &inputs, &outputs));
        enqueued.map_err(|e| ort::Error::new(e.to_string()))
    }
}
