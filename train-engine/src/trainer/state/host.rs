//! Training state in the host's memory.

use std::sync::Arc;

use runtime::update::{UpdateState, UpdateStep};
use runtime::{AdamW, Arena, ArenaLayout, SharedArena, UpdateReport};

use super::{OptimizerSettings, Part, TrainingState};
use crate::error::{Result, TrainError};
use crate::step::{HostArenas, read_lock, write_lock};

/// Arenas of the host, updated by [`AdamW`].
#[derive(Debug)]
pub(crate) struct HostState {
    arenas: HostArenas,
    average: SharedArena,
    moments: [Arena; 2],
    /// Sum of the gradients of earlier micro-batches.
    sum: Option<Arena>,
    layouts: [Arc<ArenaLayout>; 2],
    optimizer: AdamW,
    report: Option<UpdateReport>,
}

impl HostState {
    pub(crate) fn new(arenas: &HostArenas, accumulates: bool, settings: &OptimizerSettings) -> Result<Self> {
        let arenas = arenas.clone();
        let parameters = read_lock(&arenas.parameters)?;
        let layouts = [parameters.layout().clone(), read_lock(&arenas.gradients)?.layout().clone()];
        let average = parameters.duplicate()?.into_shared();
        drop(parameters);
        let zeros = || Arena::zeros(layouts[1].clone());
        let (moments, sum) = ([zeros()?, zeros()?], accumulates.then(zeros).transpose()?);
        let optimizer = optimizer(&layouts, settings)?;
        Ok(Self { arenas, average, moments, sum, layouts, optimizer, report: None })
    }
}

fn optimizer([parameters, gradients]: &[Arc<ArenaLayout>; 2], settings: &OptimizerSettings) -> Result<AdamW> {
    // One ε for all comes first; each entry's own replaces it.
    let constants = (settings.betas.0, settings.betas.1, 0.0);
    let optimizer = AdamW::new(parameters, gradients, constants, settings.threads)?;
    Ok(optimizer.with_epsilons(settings.epsilons.clone())?)
}

impl TrainingState for HostState {
    fn parameters(&self) -> &Arc<ArenaLayout> {
        &self.layouts[0]
    }

    fn gradients(&self) -> &Arc<ArenaLayout> {
        &self.layouts[1]
    }

    fn configure(&mut self, settings: &OptimizerSettings) -> Result<()> {
        self.optimizer = optimizer(&self.layouts, settings)?;
        Ok(())
    }

    fn begin(&mut self, fill: &mut dyn FnMut(&mut Arena) -> Result<()>) -> Result<()> {
        let mut parameters = write_lock(&self.arenas.parameters)?;
        fill(&mut parameters)?;
        write_lock(&self.average)?.copy_from(&parameters)?;
        self.moments.iter_mut().for_each(|moment| moment.fill(0.0));
        Ok(())
    }

    fn accumulate(&mut self, micro_batch: usize, scale: f32) -> Result<()> {
        let Some(sum) = &mut self.sum else { return Ok(()) };
        if micro_batch == 0 {
            sum.fill(0.0);
        }
        Ok(sum.add_scaled(&*read_lock(&self.arenas.gradients)?, scale)?)
    }

    fn update(&mut self, step: &UpdateStep<'_>, ema_decay: f64) -> Result<()> {
        let gradients = read_lock(&self.arenas.gradients)?;
        let [first_moments, second_moments] = &mut self.moments;
        let mut parameters = write_lock(&self.arenas.parameters)?;
        let mut average = write_lock(&self.average)?;
        let state = UpdateState {
            parameters: &mut parameters,
            gradients: self.sum.as_ref().unwrap_or(&gradients),
            first_moments,
            second_moments,
            ema: Some((&mut average, ema_decay)),
        };
        self.report = Some(self.optimizer.step(state, step)?);
        Ok(())
    }

    fn report(&mut self) -> Result<UpdateReport> {
        self.report.take().ok_or_else(|| TrainError::Internal("a report without an update".into()))
    }

    fn show(&self, part: Part, see: &mut dyn FnMut(&Arena) -> Result<()>) -> Result<()> {
        match part {
            Part::Parameters => see(&*read_lock(&self.arenas.parameters)?),
            Part::Average => see(&*read_lock(&self.average)?),
            Part::Gradients => see(&*read_lock(&self.arenas.gradients)?),
            Part::FirstMoments => see(&self.moments[0]),
            Part::SecondMoments => see(&self.moments[1]),
        }
    }

    fn take(&mut self, part: Part, values: &Arena) -> Result<()> {
        match part {
            Part::Parameters => write_lock(&self.arenas.parameters)?.copy_from(values)?,
            Part::Average => write_lock(&self.average)?.copy_from(values)?,
            Part::Gradients => write_lock(&self.arenas.gradients)?.copy_from(values)?,
            Part::FirstMoments => self.moments[0].copy_from(values)?,
            Part::SecondMoments => self.moments[1].copy_from(values)?,
        }
        Ok(())
    }

    fn average(&mut self) -> Result<SharedArena> {
        Ok(self.average.clone())
    }
}
