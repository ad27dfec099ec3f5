//! The `mudit` ops on ONNX Runtime's CUDA provider: names, shapes and attributes of the CPU's, in three element types.

use std::sync::Arc;

use graph_builder::DType;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{DynTensorValueType, TensorElementType, ValueRef, ValueRefMut};

use super::gpu_queue::GpuQueue;
use super::native::{NativeOp, Place};
use super::queue::Address;
use crate::cuda::Gpu;
use crate::kernels::{Attributes, DOMAIN, Op, count, operator};

const PROVIDER: &str = "CUDAExecutionProvider";

/// The domain with all kernels for sessions on `gpu`.
pub(crate) fn domain(gpu: &Arc<Gpu>, tf32: bool) -> ort::Result<OperatorDomain> {
    let all =
        Op::ALL.into_iter().flat_map(|op| [DType::F32, DType::Bf16, DType::F16].map(|dtype| (op, dtype)));
    all.fold(OperatorDomain::new(DOMAIN), |domain, (op, dtype)| {
        domain?.add(CudaOperator { op, dtype, gpu: gpu.clone(), tf32 })
    })
}

/// An op of one element type.
struct CudaOperator {
    op: Op,
    dtype: DType,
    gpu: Arc<Gpu>,
    tf32: bool,
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
        self.op.name()
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
        op.prepare(&self.gpu).map_err(|e| ort::Error::new(e.to_string()))?;
        Ok(CudaKernel { op, kind: self.op, gpu: self.gpu.clone(), tf32: self.tf32 })
    }
}

struct CudaKernel {
    op: NativeOp,
    kind: Op,
    gpu: Arc<Gpu>,
    tf32: bool,
}

impl Kernel for CudaKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        // The session was given this stream; on another one the scratch memory would be used twice at once.
        let expected = self.gpu.stream().cu_stream().cast();
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
        let enqueue = || {
            let queue = GpuQueue::new(&self.gpu)?.with_tf32(self.tf32);
            self.op.enqueue(&queue, &inputs, &outputs)
        };
        enqueue().map_err(|e| ort::Error::new(e.to_string()))
    }
}
