//! A program for every batch size, loaded once.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use graph_builder::{NativeCall, NativeKernel, OpenProgram, TensorSpec};

use super::loaded::{Loaded, LoadedFrom};
use super::{Session, SessionOptions, Weights, load_error};
use crate::error::Result;
use crate::library::Runtime;

/// A model with an open batch that ONNX Runtime has loaded: one copy of its weights and, on TensorRT, one engine, used at
/// several batch sizes. It runs through sessions that are views of it, see [`OpenSession::at`].
pub struct OpenSession {
    name: String,
    loaded: Arc<Loaded>,
}

impl fmt::Debug for OpenSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenSession").field("name", &self.name).finish_non_exhaustive()
    }
}

impl OpenSession {
    /// Loads a program from memory. CUDA graphs that are not safe are refused as [`Session::load`] does, for all views.
    ///
    /// # Errors
    /// As [`Session::load`].
    pub fn load(
        runtime: &Arc<Runtime>,
        program: &OpenProgram,
        weights: &Weights,
        options: &SessionOptions,
    ) -> Result<Self> {
        let inlined = options.provider.reads_single_nodes().then(|| program.inlined()).transpose();
        let inlined = inlined.map_err(|e| load_error(&program.name, &e))?;
        let program = inlined.as_ref().unwrap_or(program);
        let from = LoadedFrom {
            name: &program.name,
            bytes: &program.bytes,
            weights_file: program.weights_file.as_deref(),
            native_ops: &program.native_ops,
            unrepeatable: &program.unrepeatable,
        };
        let check = |native: &dyn Fn(&NativeCall<'_>) -> NativeKernel| {
            program.check_cuda(native).map_err(|e| load_error(&program.name, &e))
        };
        let loaded = Loaded::from_memory(runtime, &from, weights, options, &check)?;
        Ok(Self { name: program.name.clone(), loaded: Arc::new(loaded) })
    }

    /// Loads an engine's model file; its external data must lie in the file's directory. `unrepeatable` is what no
    /// recorded run may have.
    ///
    /// # Errors
    /// As [`Session::load_file`].
    pub(crate) fn load_known(
        runtime: &Arc<Runtime>,
        path: &Path,
        options: &SessionOptions,
        unrepeatable: Option<&[String]>,
    ) -> Result<Self> {
        let (name, loaded) = Loaded::from_file(runtime, path, options, unrepeatable)?;
        Ok(Self { name, loaded: Arc::new(loaded) })
    }

    /// Whether it has one recorded run, so that one view of it can be bound, once.
    pub(crate) fn records_once(&self) -> bool {
        self.loaded.records_once
    }

    /// The program at one batch size, which is that of its inputs and outputs. Views share the loaded model, which stays
    /// as long as one of them does.
    ///
    /// # Errors
    /// [`RuntimeError::Signature`](crate::RuntimeError::Signature), [`RuntimeError::UnknownName`](crate::RuntimeError)
    /// when the model is not one for these inputs and outputs.
    pub fn at(&self, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Result<Arc<Session>> {
        view(&self.name, &self.loaded, inputs, outputs)
    }
}

impl Session {
    /// The same model at another batch size: another view where this session is one, see [`OpenSession::at`].
    ///
    /// # Errors
    /// As [`OpenSession::at`]; a model of one batch size is no other one's.
    pub fn at(&self, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Result<Arc<Self>> {
        view(&self.name, &self.loaded, inputs, outputs)
    }
}

fn view(
    name: &str,
    loaded: &Arc<Loaded>,
    inputs: &[TensorSpec],
    outputs: &[TensorSpec],
) -> Result<Arc<Session>> {
    loaded.check(name, inputs, outputs)?;
    Ok(Arc::new(Session {
        name: name.to_owned(),
        inputs: inputs.to_vec(),
        outputs: outputs.to_vec(),
        loaded: loaded.clone(),
    }))
}
