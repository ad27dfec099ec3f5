//! What training changes: parameters, moments, average and gradients, in the host's memory or a GPU's.

mod device;
mod host;

use std::fmt::Debug;
use std::sync::Arc;

use runtime::update::UpdateStep;
use runtime::{Arena, ArenaLayout, SharedArena, UpdateReport};

use crate::error::Result;
use crate::step::StepArenas;

pub(super) use device::DeviceState;
pub(super) use host::HostState;

/// One of the state's arenas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The parameters, f32.
    Parameters,
    /// Their moving average.
    Average,
    /// AdamW's first moments.
    FirstMoments,
    /// AdamW's second moments.
    SecondMoments,
    /// The last run's gradients.
    Gradients,
}

/// AdamW's constants.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OptimizerSettings {
    pub(crate) betas: (f64, f64),
    /// ε of each gradient entry.
    pub(crate) epsilons: Vec<f64>,
    pub(crate) threads: usize,
}

/// The state of a model in training. Every method leaves the same values wherever the memory is.
pub(crate) trait TrainingState: Debug + Send {
    /// Layout of the parameters.
    fn parameters(&self) -> &Arc<ArenaLayout>;

    /// Layout of the gradients and moments.
    fn gradients(&self) -> &Arc<ArenaLayout>;

    /// Takes over the optimizer's constants.
    fn configure(&mut self, settings: &OptimizerSettings) -> Result<()>;

    /// Sets the parameters to what `fill` writes; the average follows them, the moments become zero.
    fn begin(&mut self, fill: &mut dyn FnMut(&mut Arena) -> Result<()>) -> Result<()>;

    /// Adds `scale` times the last run's gradients to their sum, which the first of a step's micro-batches starts.
    fn accumulate(&mut self, micro_batch: usize, scale: f32) -> Result<()>;

    /// Updates by the last run's gradients, or by their sum where there is one. [`report`](Self::report) tells what
    /// happened.
    fn update(&mut self, step: &UpdateStep<'_>, ema_decay: f64) -> Result<()>;

    /// What the last update did; waits for it.
    fn report(&mut self) -> Result<UpdateReport>;

    /// Shows one part.
    fn show(&self, part: Part, see: &mut dyn FnMut(&Arena) -> Result<()>) -> Result<()>;

    /// Takes over one part.
    fn take(&mut self, part: Part, values: &Arena) -> Result<()>;

    /// The average where the host can read it: the state's own arena, or a copy that the next call brings up to date.
    fn average(&mut self) -> Result<SharedArena>;
}

/// The state for a step that reads and writes these arenas.
///
/// # Errors
/// [`TrainError::Runtime`](crate::TrainError::Runtime) when memory runs out.
pub(crate) fn state(
    arenas: &StepArenas,
    accumulates: bool,
    settings: &OptimizerSettings,
) -> Result<Box<dyn TrainingState>> {
    Ok(match arenas {
        StepArenas::Host(arenas) => Box::new(HostState::new(arenas, accumulates, settings)?),
        StepArenas::Device(arenas) => Box::new(DeviceState::new(arenas, accumulates, settings)?),
    })
}
