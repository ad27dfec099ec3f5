//! What training takes of a GPU's memory, told before any is allocated.

use std::fmt;

use graph_builder::{Graph, Weights};
use models::{Model, ProgramKind, ProgramSpec, Recompute};
use runtime::cuda::Gpu;
use runtime::cuda::kernels::scratch_bytes;
use runtime::{Device, Provider, RuntimeError};

use crate::config::TrainConfig;
use crate::error::{Result, TrainError};

/// Begins the names of what is there for sample pictures.
const PICTURES: &str = "pictures";

/// Bytes of each part of a training run on a GPU.
///
/// What the state takes is exact. Activations are those alive at once in the order of the graph; kernels' own values count
/// with the most that they may be. The libraries' own memory (some hundred megabytes for context and code) comes on top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The CUDA driver's number of the GPU.
    pub gpu: usize,
    /// Bytes that it has.
    pub total: u64,
    /// Bytes that are free before the run.
    pub free: u64,
    /// Images of one run of the program.
    pub images: usize,
    /// Name and bytes of each part that is there whatever the batch is.
    pub state: Vec<(&'static str, u64)>,
    /// Inputs and outputs of the program, and the next run's inputs.
    pub batch: u64,
    /// Values inside the program, at their peak.
    pub activations: u64,
    /// Values inside this project's kernels.
    pub scratch: u64,
}

/// What a run keeps on the GPU for the program that draws its sample pictures. Its kernels hold what those of training do,
/// but for recorded runs, which share nothing.
///
/// # Errors
/// [`TrainError::Model`], [`TrainError::Runtime`] when the program cannot be emitted or run there.
pub(super) fn pictures(graph: &Graph, recorded: bool) -> Result<Vec<(&'static str, u64)>> {
    let inputs: usize = graph.inputs().map(|(_, ty)| ty.bytes()).sum();
    let outputs: usize = graph.outputs().iter().map(|(_, id)| graph.node(*id).ty.bytes()).sum();
    let parameters: usize = graph.parameters().iter().map(|p| p.numel() * p.dtype.bytes()).sum();
    let own = if recorded { scratch(graph)? } else { 0 };
    let inside = graph.activation_peak().bytes + graph.constant_bytes() + own;
    Ok(vec![
        ("pictures: the average once more", parameters as u64),
        ("pictures: their values", (inputs + outputs) as u64 + inside),
    ])
}

fn scratch(graph: &Graph) -> Result<u64> {
    let program = graph.emit(Weights::Inputs).map_err(models::ModelError::from)?;
    Ok(scratch_bytes(&program)? as u64)
}

impl MemoryPlan {
    /// The plan of a run whose program is `graph`, and that keeps `more` there besides; `None` on the CPU.
    ///
    /// # Errors
    /// [`TrainError::Runtime`] when the GPU cannot be asked.
    pub(super) fn before(
        config: &TrainConfig,
        graph: &Graph,
        more: &[(&'static str, u64)],
    ) -> Result<Option<Self>> {
        let Device::Cuda { ordinal } = config.train.provider.device() else { return Ok(None) };
        let (free, total) = Gpu::open(ordinal)?.memory()?;
        Ok(Some(Self::of(config, graph, more, ordinal, (free as u64, total as u64))?))
    }

    fn of(
        config: &TrainConfig,
        graph: &Graph,
        more: &[(&'static str, u64)],
        gpu: usize,
        (free, total): (u64, u64),
    ) -> Result<Self> {
        let train = &config.train;
        let (all, trainable) = graph.parameter_counts();
        let f32s = |n: usize| (n * size_of::<f32>()) as u64;
        let narrow = all * train.precision.dtype().bytes();
        let gradients = graph.parameters().iter().filter(|p| p.trainable);
        let gradients: usize = gradients.map(|p| p.numel() * p.dtype.bytes()).sum();
        let mut state = vec![
            ("parameters, f32", f32s(all)),
            ("AdamW's two moments, f32", f32s(2 * trainable)),
            ("moving average, f32", f32s(all)),
            ("gradients", gradients as u64),
        ];
        if train.precision.dtype().bytes() < size_of::<f32>() {
            state.insert(1, ("parameters in the compute type", narrow as u64));
        }
        if train.accumulate > 1 {
            state.push(("sum of gradients, f32", f32s(trainable)));
        }
        state.push(("constants", graph.constant_bytes()));
        state.extend(more);
        let inputs: usize = graph.inputs().map(|(_, ty)| ty.bytes()).sum();
        let outputs = graph.outputs().iter().filter(|(name, _)| !name.starts_with("grad."));
        let outputs: usize = outputs.map(|(_, id)| graph.node(*id).ty.bytes()).sum();
        Ok(Self {
            gpu,
            total,
            free,
            images: train.batch_size / train.accumulate,
            state,
            batch: (2 * inputs + outputs) as u64,
            activations: graph.activation_peak().bytes,
            // TensorRT runs function bodies.
            scratch: if matches!(train.provider, Provider::Cuda(_)) { scratch(graph)? } else { 0 },
        })
    }

    /// Bytes that do not depend on the batch.
    pub fn state_bytes(&self) -> u64 {
        self.state.iter().map(|(_, bytes)| bytes).sum()
    }

    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.state_bytes() + self.batch + self.activations + self.scratch
    }

    /// Refuses a run that does not fit: its state and batch alone, or the whole by more than the plan may err.
    pub(super) fn check(&self) -> Result<()> {
        /// Part of the activations that ONNX Runtime may spare by another order of the nodes.
        const MARGIN: u64 = 10;
        let sure = self.bytes() - self.activations / MARGIN;
        if sure <= self.free {
            return Ok(());
        }
        Err(TrainError::Runtime(RuntimeError::GpuOutOfMemory {
            ordinal: self.gpu,
            bytes: self.bytes() as usize,
            what: "the memory that training takes by the plan".to_owned(),
            free: self.free as usize,
            total: self.total as usize,
            advice: String::new(),
        }))
    }

    /// An error of memory that ran out, with what would fit in place of general advice; any other as it is.
    pub(super) fn advise(&self, error: TrainError, config: &TrainConfig, model: &Model) -> TrainError {
        let TrainError::Runtime(RuntimeError::GpuOutOfMemory { ordinal, bytes, what, .. }) = error else {
            return error;
        };
        let (free, total) = (self.free as usize, self.total as usize);
        let advice = self.advice(config, model);
        TrainError::Runtime(RuntimeError::GpuOutOfMemory { ordinal, bytes, what, free, total, advice })
    }

    /// What would fit by the plan.
    fn advice(&self, config: &TrainConfig, model: &Model) -> String {
        let train = &config.train;
        let fits = |recompute| self.largest(config, model, recompute).ok().flatten();
        let batch = train.batch_size;
        let settings = |images: usize| {
            let accumulate = (1..=batch).find(|a| batch.is_multiple_of(*a) && batch / a <= images);
            let whole = format!("`train.batch_size = {images}`");
            accumulate.filter(|a| *a > train.accumulate && images < batch).map_or(whole.clone(), |a| {
                format!("{whole}, or `train.accumulate = {a}` for batches of {batch}")
            })
        };
        match (fits(train.recompute), fits(Recompute::Blocks).filter(|_| train.recompute == Recompute::None))
        {
            (Some(images), more) if images < self.images => {
                let more = more.filter(|more| *more > images).map_or(String::new(), |more| {
                    format!("; with `train.recompute = \"blocks\"` {} do", more.min(batch))
                });
                format!("by the plan {images} images at once fit: {}{more}", settings(images))
            }
            (Some(_), _) => format!(
                "the plan comes to {} bytes without what the libraries take: other programs hold the rest, or the margin \
                 is too small; use a smaller `train.batch_size` or more `train.accumulate`",
                self.bytes()
            ),
            (None, Some(images)) => format!(
                "by the plan {images} images at once fit with `train.recompute = \"blocks\"`: {}",
                settings(images.min(self.images))
            ),
            (None, None) => format!(
                "by the plan not even one image fits, for the state alone takes {} bytes; use a smaller model or a larger \
                 GPU",
                self.state_bytes()
            ),
        }
    }

    /// Most images at once that fit by the plan, up to the configured number; `None` when not even one does.
    fn largest(&self, config: &TrainConfig, model: &Model, recompute: Recompute) -> Result<Option<usize>> {
        let train = &config.train;
        let plan = |images: usize| -> Result<Self> {
            let spec = ProgramSpec::new(ProgramKind::TrainStep, images);
            let graph = model.compiled(&spec.recomputing(recompute).in_precision(train.precision))?;
            let mut config = config.clone();
            config.train.batch_size = images * train.accumulate;
            let more: Vec<_> =
                self.state.iter().filter(|(name, _)| name.starts_with(PICTURES)).copied().collect();
            Self::of(&config, &graph, &more, self.gpu, (self.free, self.total))
        };
        let one = plan(1)?.bytes();
        if one > self.free {
            return Ok(None);
        }
        // Near enough a straight line; the answer is checked.
        let slope = plan(2)?.bytes().saturating_sub(one).max(1);
        let line = (1 + (self.free - one) / slope).min(self.images as u64) as usize;
        for images in [line, line * 9 / 10, line / 2] {
            if images > 1 && plan(images)?.bytes() <= self.free {
                return Ok(Some(images));
            }
        }
        Ok(Some(1))
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, name: &str, bytes: u64| {
            writeln!(f, "  {name:<34}{:>12.1} MB", bytes as f64 / 1e6)
        };
        let free = self.free as f64 / 1e6;
        writeln!(f, "memory of GPU {}, of which {free:.1} MB are free:", self.gpu)?;
        for (name, bytes) in &self.state {
            row(f, name, *bytes)?;
        }
        row(f, &format!("batch of {}, two inputs deep", self.images), self.batch)?;
        row(f, "activations at their peak", self.activations)?;
        row(f, "values inside kernels", self.scratch)?;
        write!(f, "  {:<34}{:>12.1} MB", "together", self.bytes() as f64 / 1e6)?;
        if self.bytes() > self.free {
            write!(f, ": more than is free")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small model's plan with so many bytes free.
    fn plan(batch: usize, free: u64) -> (MemoryPlan, TrainConfig, Model) {
        let mut config = TrainConfig::default();
        config.train.provider = "cuda".parse().unwrap();
        (config.train.batch_size, config.train.precision) = (batch, graph_builder::Precision::Bf16);
        let mut model = Model::preset("DiT-S/8").unwrap();
        model.network = model.network.resized(32, 16);
        let spec = ProgramSpec::new(ProgramKind::TrainStep, batch).in_precision(config.train.precision);
        let graph = model.compiled(&spec).unwrap();
        (MemoryPlan::of(&config, &graph, &[], 0, (free, free)).unwrap(), config, model)
    }

    #[test]
    fn the_state_is_what_the_arenas_take() {
        let (plan, _, _) = plan(4, 1 << 30);
        let bytes = |name: &str| plan.state.iter().find(|(n, _)| n.contains(name)).unwrap().1;
        assert_eq!(bytes("parameters, f32"), 2 * bytes("compute type"));
        assert_eq!(bytes("parameters, f32"), bytes("average"));
        assert!(bytes("moments") > 3 * bytes("gradients"), "most gradients are bf16");
        assert!(plan.activations > 0 && plan.batch > 0);
        assert!(plan.scratch > 0);
        assert_eq!(plan.bytes(), plan.state_bytes() + plan.batch + plan.activations + plan.scratch);
        assert!(plan.to_string().contains("together") && !plan.to_string().contains("more than is free"));
    }

    #[test]
    fn pictures_count_with_parameters_and_values_and_stay_in_the_advice() {
        let (plan, config, model) = plan(20, 1 << 40);
        let step = ProgramSpec::new(ProgramKind::Step, 6).guided(models::Guidance::All);
        let graph = model.compiled(&step).unwrap();
        let more = pictures(&graph, false).unwrap();
        assert_eq!(more[0].1, graph.parameter_counts().0 as u64 * 4);
        assert!(more[1].1 > graph.activation_peak().bytes);
        let train = ProgramSpec::new(ProgramKind::TrainStep, 20).in_precision(config.train.precision);
        let graph = model.compiled(&train).unwrap();
        let with = MemoryPlan::of(&config, &graph, &more, 0, (1 << 40, 1 << 40)).unwrap();
        assert_eq!(with.bytes(), plan.bytes() + more[0].1 + more[1].1);
        let fits =
            |free| MemoryPlan { free, ..with.clone() }.largest(&config, &model, Recompute::None).unwrap();
        let all = fits(with.bytes() + 1000);
        assert!(all.is_some_and(|images| (18..=20).contains(&images)), "{all:?}");
        assert!(fits(plan.bytes()) < all, "pictures take their part");
    }

    #[test]
    fn what_fits_is_the_largest_batch_that_does() {
        let (wide, config, model) = plan(64, 1 << 40);
        let (narrow, ..) = plan(20, 1 << 40);
        // Room for twenty images and less than one more.
        let tight = MemoryPlan { free: narrow.bytes() + 1000, ..wide.clone() };
        let images = tight.largest(&config, &model, Recompute::None).unwrap().unwrap();
        assert!((18..=20).contains(&images), "{images}");
        let advice = tight.advice(&config, &model);
        assert!(advice.contains(&format!("`train.batch_size = {images}`")), "{advice}");
        assert!(advice.contains("`train.accumulate = 4` for batches of 64"), "{advice}");
        assert!(advice.contains("recompute"), "{advice}");
        let nothing = MemoryPlan { free: 1000, ..wide };
        assert!(nothing.check().is_err());
        assert!(nothing.advice(&config, &model).contains("not even one image fits"));
    }
}
