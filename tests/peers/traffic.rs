//! Work that only moves memory: the parameter update as training runs it, and plain copies to measure it by.

use std::sync::Arc;

use graph_builder::{DType, Precision};
use models::{Model, ProgramKind, ProgramSpec};
use mudit::execution::Execution;
use runtime::cuda::{DeviceAdamW, DeviceArena, DeviceUpdate, Gpu, GradientGroup};
use runtime::update::{UpdateState, UpdateStep};
use runtime::{AdamW, Arena, ArenaLayout, Device};
use train_engine::step::{gradient_layouts, parameter_layout};

use crate::{Result, Work};

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;
const DECAY: f64 = 0.9999;
const RATE: f64 = 1e-6;
/// Every gradient.
const GRADIENT: f32 = 1e-3;

/// The arenas of a training step's parameters, and of its gradients by element type.
struct Layouts {
    parameters: Arc<ArenaLayout>,
    gradients: Arc<ArenaLayout>,
    groups: Vec<(DType, Arc<ArenaLayout>)>,
}

impl Layouts {
    fn of(model: &str, precision: Precision) -> Result<Self> {
        let dit = Model::resolve(model)?;
        let graph = dit.program(&ProgramSpec::new(ProgramKind::TrainStep, 1).in_precision(precision))?;
        let parameters = parameter_layout(graph.parameters())?;
        let graph = graph.optimised()?.in_precision(precision)?;
        let (gradients, groups) = gradient_layouts(&parameters, &graph)?;
        Ok(Self { parameters, gradients, groups })
    }

    /// Bytes that one update reads and writes: gradients twice, for their norm comes first; parameters, average and both
    /// moments there and back; the rounded copy, of an element's `copy` bytes.
    fn bytes(&self, copy: usize) -> f64 {
        let each = |(dtype, layout): &(DType, Arc<ArenaLayout>)| {
            layout.len() as f64 * (2 * dtype.bytes() + 2 * 4 * size_of::<f32>() + copy) as f64
        };
        self.groups.iter().map(each).sum()
    }
}

/// Updates with clip and moving average. Gives the work and its bytes.
pub(crate) fn update(model: &str, execution: &Execution) -> Result<(Work, f64)> {
    let layouts = Layouts::of(model, execution.precision)?;
    let count = layouts.gradients.entries().len();
    let (lr, weight_decay) = (vec![RATE; count], vec![0.0; count]);
    let mut step = 0;
    if !execution.provider.is_gpu() {
        let zeros = |layout: &Arc<ArenaLayout>| Arena::zeros(layout.clone());
        let (mut parameters, mut average) = (zeros(&layouts.parameters)?, zeros(&layouts.parameters)?);
        let (mut first, mut second) = (zeros(&layouts.gradients)?, zeros(&layouts.gradients)?);
        let mut gradients = zeros(&layouts.gradients)?;
        gradients.fill(GRADIENT);
        let constants = (BETAS.0, BETAS.1, EPSILON);
        let adamw = AdamW::new(&layouts.parameters, &layouts.gradients, constants, execution.threads)?;
        let bytes = layouts.bytes(0);
        let work = move || {
            step += 1;
            let state = UpdateState {
                parameters: &mut parameters,
                gradients: &gradients,
                first_moments: &mut first,
                second_moments: &mut second,
                ema: Some((&mut average, DECAY)),
            };
            finite(adamw.step(state, &clipped(step, &lr, &weight_decay))?.finite)
        };
        return Ok((Box::new(work), bytes));
    }
    let gpu = Gpu::open(ordinal(execution))?;
    let arena =
        |layout: &Arc<ArenaLayout>, dtype| DeviceArena::zeros(&gpu, layout.clone(), dtype, "an arena");
    let (parameters, average) =
        (arena(&layouts.parameters, DType::F32)?, arena(&layouts.parameters, DType::F32)?);
    let dtype = execution.precision.dtype();
    let copy = (dtype != DType::F32).then(|| arena(&layouts.parameters, dtype)).transpose()?;
    let mut arenas = Vec::new();
    for (dtype, layout) in &layouts.groups {
        let gradients = arena(layout, *dtype)?;
        let mut values = Arena::zeros(layout.clone())?;
        values.fill(GRADIENT);
        gradients.upload(&values)?;
        arenas.push([gradients, arena(layout, DType::F32)?, arena(layout, DType::F32)?]);
    }
    let groups: Vec<_> = layouts.groups.iter().map(|(_, layout)| layout.clone()).collect();
    let epsilons = vec![EPSILON; count];
    let mut adamw =
        DeviceAdamW::new(&gpu, &layouts.parameters, &layouts.gradients, &groups, BETAS, &epsilons)?;
    let bytes = layouts.bytes(copy.as_ref().map_or(0, |_| dtype.bytes()));
    let work = move || {
        step += 1;
        let groups: Vec<GradientGroup<'_>> = arenas
            .iter()
            .map(|[gradients, first_moments, second_moments]| GradientGroup {
                gradients,
                first_moments,
                second_moments,
            })
            .collect();
        let state = DeviceUpdate {
            parameters: &parameters,
            groups: &groups,
            ema: Some((&average, DECAY)),
            copy: copy.as_ref(),
        };
        adamw.enqueue(&state, &clipped(step, &lr, &weight_decay))?;
        finite(adamw.report()?.finite)
    };
    Ok((Box::new(work), bytes))
}

/// Copies of an arena of the model's parameters. Gives the work and the bytes that it reads and writes.
pub(crate) fn copy(model: &str, execution: &Execution) -> Result<(Work, f64)> {
    let layout = Layouts::of(model, Precision::F32)?.parameters;
    let bytes = (2 * layout.len() * size_of::<f32>()) as f64;
    if !execution.provider.is_gpu() {
        let (from, mut to) = (Arena::zeros(layout.clone())?, Arena::zeros(layout)?);
        return Ok((Box::new(move || Ok(to.copy_from(&from)?)), bytes));
    }
    let gpu = Gpu::open(ordinal(execution))?;
    let zeros = || DeviceArena::zeros(&gpu, layout.clone(), DType::F32, "an arena to copy");
    let (from, to) = (zeros()?, zeros()?);
    let work = move || {
        to.copy_from(&from)?;
        Ok(to.gpu().synchronize()?)
    };
    Ok((Box::new(work), bytes))
}

fn clipped<'a>(step: u64, lr: &'a [f64], weight_decay: &'a [f64]) -> UpdateStep<'a> {
    UpdateStep { step, lr, weight_decay, clip: Some(1.0), gradient_scale: 1.0 }
}

fn finite(finite: bool) -> Result<()> {
    if finite { Ok(()) } else { Err("the gradients are not finite".into()) }
}

fn ordinal(execution: &Execution) -> usize {
    match execution.provider.device() {
        Device::Cuda { ordinal } => ordinal,
        _ => 0,
    }
}
