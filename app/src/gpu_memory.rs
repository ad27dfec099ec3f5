//! What sampling takes of a GPU's memory, told before any is allocated.

use std::fmt;

use graph_builder::{Graph, Weights};
use models::Model;
use runtime::cuda::Gpu;
use runtime::cuda::kernels::scratch_bytes;
use runtime::{CudaOptions, Provider, RuntimeError};

use crate::sampler::Settings;

/// Part of the values that ONNX Runtime may spare by another order of the nodes.
const MARGIN: u64 = 10;

/// Bytes that a sampler takes. Values inside the program are those alive at once in the order of the graph; the libraries'
/// own memory (some hundred megabytes for context and code) comes on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SamplingPlan {
    gpu: usize,
    free: u64,
    total: u64,
    images: usize,
    /// The model's parameters, which are there already.
    parameters: u64,
    values: u64,
}

impl SamplingPlan {
    /// The plan of a sampler whose parameters are on the GPU; none on the CPU, and for TensorRT, which plans by itself.
    ///
    /// # Errors
    /// A program that cannot be built or run there; a GPU that cannot be asked.
    pub(crate) fn before(settings: &Settings, model: &Model) -> anyhow::Result<Option<Self>> {
        let Provider::Cuda(CudaOptions { ordinal, .. }) = settings.execution.provider else {
            return Ok(None);
        };
        let (free, total) = Gpu::open(ordinal)?.memory()?;
        Ok(Some(Self::of(settings, model, ordinal, (free as u64, total as u64))?))
    }

    fn of(settings: &Settings, model: &Model, gpu: usize, (free, total): (u64, u64)) -> anyhow::Result<Self> {
        let graph: Graph =
            settings.program(model)?.optimised()?.in_precision(settings.execution.precision)?;
        let inputs: usize = graph.inputs().map(|(_, ty)| ty.bytes()).sum();
        let outputs: usize = graph.outputs().iter().map(|(_, id)| graph.node(*id).ty.bytes()).sum();
        let parameters: usize = graph.parameters().iter().map(|p| p.numel() * p.dtype.bytes()).sum();
        let kernels = scratch_bytes(&graph.emit(Weights::Inputs)?)?;
        let values =
            (inputs + outputs + kernels) as u64 + graph.activation_peak().bytes + graph.constant_bytes();
        Ok(Self { gpu, free, total, images: settings.batch, parameters: parameters as u64, values })
    }

    /// Refuses a batch that does not fit, by more than the plan may err, with one that does.
    ///
    /// # Errors
    /// [`RuntimeError::GpuOutOfMemory`].
    pub(crate) fn check(&self, settings: &Settings, model: &Model) -> anyhow::Result<()> {
        if self.values - self.values / MARGIN <= self.free {
            return Ok(());
        }
        let mut images = self.images;
        let advice = loop {
            images /= 2;
            if images == 0 {
                break "not even one image fits: use a smaller precision or a larger GPU".to_owned();
            }
            let smaller = Settings { batch: images, ..settings.clone() };
            if Self::of(&smaller, model, self.gpu, (self.free, self.total))?.values <= self.free {
                break format!("{images} images at once fit: use `--batch {images}`");
            }
        };
        Err(RuntimeError::GpuOutOfMemory {
            ordinal: self.gpu,
            bytes: self.values as usize,
            what: format!("sampling {} images at once", self.images),
            free: self.free as usize,
            total: self.total as usize,
            advice,
        }
        .into())
    }
}

impl fmt::Display for SamplingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
        write!(
            f,
            "sampling takes {:.2} GiB of the {:.2} GiB that are free on GPU {}: values of {} images at once; the \
             parameters are there, {:.2} GiB",
            gib(self.values),
            gib(self.free),
            self.gpu,
            self.images,
            gib(self.parameters)
        )
    }
}

#[cfg(test)]
mod tests {
    use models::{Guidance, Model, Solver, SolverKind};

    use super::*;
    use crate::execution::Execution;

    #[test]
    fn a_batch_that_does_not_fit_is_refused_with_one_that_does() {
        let model = Model::resolve("DiT-S/8@16x16x4:10").unwrap();
        let execution = Execution { provider: "cuda".parse().unwrap(), ..Execution::default() };
        let guided = Guidance::All;
        let of = |batch: usize| {
            let (solver, execution) = (Solver::new(SolverKind::Ddim, 10), execution.clone());
            let settings = Settings { solver, guidance: 3.0, guided, batch, execution };
            let plan = SamplingPlan::of(&settings, &model, 0, (1 << 40, 1 << 40)).unwrap();
            (settings, plan)
        };
        let (settings, whole) = of(2048);
        whole.check(&settings, &model).unwrap();
        assert!(whole.to_string().contains("2048 images at once"), "{whole}");
        let free = of(128).1.values;
        assert!(2 * free < whole.values, "{free} of {}", whole.values);
        let refusal = SamplingPlan { free, ..whole }.check(&settings, &model).unwrap_err().to_string();
        assert!(refusal.contains("128 images at once fit: use `--batch 128`"), "{refusal}");
        let none = SamplingPlan { free: 1000, ..whole };
        assert!(none.check(&settings, &model).unwrap_err().to_string().contains("not even one image"));
    }
}
