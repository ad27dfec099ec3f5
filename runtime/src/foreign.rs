//! Models that somebody else made: their signature is found out, axes may be open, and they are run by copy.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use graph_builder::{DType, Shape};
use ort::value::{Outlet, Tensor, TensorElementType, ValueType};

use crate::cuda::Gpu;
use crate::error::{Result, RuntimeError, nearest};
use crate::library::Runtime;
use crate::placement::refuse_none;
use crate::session::{SessionOptions, builder, load_error};

/// An input or output of a foreign model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Element type; `None` for one that programs of this crate do not have, and for what is no tensor.
    pub dtype: Option<DType>,
    /// Axis sizes; `None` for an axis that is open.
    pub dims: Vec<Option<usize>>,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> =
            self.dims.iter().map(|d| d.map_or_else(|| "?".to_owned(), |d| d.to_string())).collect();
        let dtype = self.dtype.map_or_else(|| "other".to_owned(), |d| d.to_string());
        write!(f, "`{}` {dtype}({})", self.name, dims.join(", "))
    }
}

/// A loaded model of unknown origin.
pub struct ForeignModel {
    name: String,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    inner: ort::session::Session,
    gpu: Option<Arc<Gpu>>,
    runtime: Arc<Runtime>,
}

impl fmt::Debug for ForeignModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForeignModel").field("name", &self.name).finish_non_exhaustive()
    }
}

impl ForeignModel {
    /// Loads a model file; its external data must lie in the file's directory.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] when there is no such file, [`RuntimeError::Load`] with ONNX Runtime's words.
    pub fn load(runtime: &Arc<Runtime>, path: &Path, options: &SessionOptions) -> Result<Self> {
        std::fs::metadata(path).map_err(|e| RuntimeError::io("read", path, e))?;
        let name = path.display().to_string();
        // Its tensors move from run to run, so a recorded run would read the first one's.
        let provider = options.provider.clone().without_cuda_graph().cached_by(path)?;
        let options = SessionOptions { provider, ..options.clone() };
        let (mut builder, gpu) = builder(runtime, &options, &name)?;
        let turns = (runtime.loading(), gpu.as_ref().map(|gpu| gpu.turn()));
        let inner = builder.commit_from_file(path).map_err(|e| load_error(&name, &runtime.in_full(&e)))?;
        refuse_none(&name, &options.provider, &inner, runtime)?;
        drop(turns);
        let ports = |outlets: &[Outlet]| outlets.iter().map(port).collect();
        let (inputs, outputs) = (ports(inner.inputs()), ports(inner.outputs()));
        Ok(Self { name, inputs, outputs, inner, gpu, runtime: runtime.clone() })
    }

    /// Inputs in order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// Outputs in order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// Runs the model on one f32 tensor; gives shape and values of an f32 output.
    ///
    /// # Errors
    /// [`RuntimeError::Run`] with ONNX Runtime's words, [`RuntimeError::UnknownName`], [`RuntimeError::WrongType`].
    pub fn run(
        &mut self,
        input: &str,
        shape: &[usize],
        values: Vec<f32>,
        output: &str,
    ) -> Result<(Shape, Vec<f32>)> {
        let runtime = &self.runtime;
        let failed =
            |e: ort::Error| RuntimeError::Run { program: self.name.clone(), reason: runtime.in_full(&e) };
        let _turn = self.gpu.as_ref().map(|gpu| gpu.turn());
        let tensor = Tensor::from_array((shape.to_vec(), values)).map_err(failed)?;
        let outputs = self.inner.run(ort::inputs![input => tensor]).map_err(failed)?;
        let found = outputs.get(output).ok_or_else(|| RuntimeError::UnknownName {
            kind: "output",
            place: format!("program `{}`", self.name),
            name: output.to_owned(),
            nearest: nearest(output, self.outputs.iter().map(|p| p.name.as_str())),
        })?;
        let (shape, values) = found.try_extract_tensor::<f32>().map_err(|e| RuntimeError::WrongType {
            place: format!("program `{}`", self.name),
            name: output.to_owned(),
            expected: "f32".to_owned(),
            got: e.to_string(),
        })?;
        let dims = shape.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect();
        Ok((Shape(dims), values.to_vec()))
    }
}

fn port(outlet: &Outlet) -> Port {
    let name = outlet.name().to_owned();
    let ValueType::Tensor { ty, shape, .. } = outlet.dtype() else {
        return Port { name, dtype: None, dims: Vec::new() };
    };
    let dtype = match ty {
        TensorElementType::Float32 => Some(DType::F32),
        TensorElementType::Float16 => Some(DType::F16),
        TensorElementType::Bfloat16 => Some(DType::Bf16),
        TensorElementType::Int64 => Some(DType::I64),
        TensorElementType::Bool => Some(DType::Bool),
        _ => None,
    };
    Port { name, dtype, dims: shape.iter().map(|&d| usize::try_from(d).ok()).collect() }
}
