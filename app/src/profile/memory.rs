//! The memory that a program needs, told from its graph before anything runs.

use graph_builder::{DType, Graph, Parameter};
use models::ProgramKind;
use serde::Serialize;

/// What a process holds before it has loaded a program: itself and ONNX Runtime's library.
const PROCESS_BYTES: u64 = 64 << 20;

/// Predicted memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Prediction {
    /// The parameters, and their f32 masters where a training step computes in another type.
    pub parameters: u64,
    /// Gradients of the trainable ones; 0 for programs that do not train.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// The moving average.
    pub ema: u64,
    /// Inputs and outputs beside parameters and gradients, and constants.
    pub inputs_and_outputs: u64,
    /// Intermediate values at their peak.
    pub activations: u64,
    /// The program and ONNX Runtime's library.
    pub process: u64,
}

impl Prediction {
    /// For a run of `graph`, a program of this kind after all passes; training with AdamW and a moving average.
    pub fn new(graph: &Graph, kind: ProgramKind) -> Self {
        let (all, trainable) = graph.parameter_counts();
        let f32s = |n: usize| (n * size_of::<f32>()) as u64;
        let training = |bytes: u64| if kind == ProgramKind::TrainStep { bytes } else { 0 };
        let given = graph.inputs().map(|(_, ty)| ty.bytes());
        let bytes = |p: &Parameter| (p.numel() * p.dtype.bytes()) as u64;
        let parameters = graph.parameters();
        let narrow = parameters.iter().any(|p| p.dtype != DType::F32);
        let masters = if narrow { training(f32s(all)) } else { 0 };
        let results = graph.outputs().iter().filter(|(name, _)| !name.starts_with("grad."));
        let taken = results.map(|(_, id)| graph.node(*id).ty.bytes());
        Self {
            parameters: parameters.iter().map(bytes).sum::<u64>() + masters,
            gradients: training(parameters.iter().filter(|p| p.trainable).map(bytes).sum()),
            optimizer: training(f32s(2 * trainable)),
            ema: training(f32s(all)),
            inputs_and_outputs: given.chain(taken).sum::<usize>() as u64 + graph.constant_bytes(),
            activations: graph.activation_peak().bytes,
            process: PROCESS_BYTES,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Name and bytes of each part.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("moving average", self.ema),
            ("inputs, outputs, constants", self.inputs_and_outputs),
            ("activations", self.activations),
            ("process", self.process),
        ]
    }

    /// One line for people.
    pub fn words(&self) -> String {
        let parts = self.parts().into_iter().filter(|(_, bytes)| *bytes > 0);
        let parts: Vec<String> = parts.map(|(name, bytes)| format!("{name} {}", megabytes(bytes))).collect();
        format!("peak memory {} MB predicted: {}", megabytes(self.total()), parts.join(", "))
    }
}

/// 10⁶ bytes, without decimals from ten on.
pub fn megabytes(bytes: u64) -> String {
    let mb = bytes as f64 / 1e6;
    if mb >= 10.0 { format!("{mb:.0}") } else { format!("{mb:.1}") }
}
