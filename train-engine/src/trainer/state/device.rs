//! Training state in a GPU's memory: it leaves it for checkpoints, previews and evidence alone.

use std::sync::Arc;

use graph_builder::DType;
use runtime::cuda::{DeviceAdamW, DeviceArena, DeviceUpdate, GradientGroup};
use runtime::update::UpdateStep;
use runtime::{Arena, ArenaLayout, SharedArena, UpdateReport};

use super::{OptimizerSettings, Part, TrainingState};
use crate::error::Result;
use crate::step::{DeviceArenas, write_lock};

/// What belongs to the gradients of one element type.
#[derive(Debug)]
struct Group {
    gradients: Arc<DeviceArena>,
    moments: [DeviceArena; 2],
    /// Sum of the gradients of earlier micro-batches.
    sum: Option<DeviceArena>,
}

/// Arenas of a GPU, updated by [`DeviceAdamW`].
#[derive(Debug)]
pub(crate) struct DeviceState {
    arenas: DeviceArenas,
    average: DeviceArena,
    groups: Vec<Group>,
    optimizer: DeviceAdamW,
    /// The host's copy of the average.
    preview: Option<SharedArena>,
}

impl DeviceState {
    pub(crate) fn new(
        arenas: &DeviceArenas,
        accumulates: bool,
        settings: &OptimizerSettings,
    ) -> Result<Self> {
        let arenas = arenas.clone();
        let zeros = |layout: &Arc<ArenaLayout>, what: &str| {
            DeviceArena::zeros(&arenas.gpu, layout.clone(), DType::F32, what)
        };
        let average = zeros(arenas.masters.layout(), "the moving average")?;
        let mut groups = Vec::with_capacity(arenas.gradients.len());
        for gradients in &arenas.gradients {
            let layout = gradients.layout();
            let moments = [zeros(layout, "the first moments")?, zeros(layout, "the second moments")?];
            let sum = accumulates.then(|| zeros(layout, "the sum of gradients")).transpose()?;
            groups.push(Group { gradients: gradients.clone(), moments, sum });
        }
        let optimizer = optimizer(&arenas, settings)?;
        Ok(Self { arenas, average, groups, optimizer, preview: None })
    }

    /// Brings the copy in the compute type up to the parameters.
    fn take_parameters(&self, values: &Arena) -> Result<()> {
        self.arenas.masters.upload(values)?;
        Ok(self.arenas.copy.as_ref().map_or(Ok(()), |copy| copy.upload(values))?)
    }

    /// The arenas that a part lies in.
    fn arenas_of(&self, part: Part) -> Vec<&DeviceArena> {
        match part {
            Part::Parameters => vec![&self.arenas.masters],
            Part::Average => vec![&self.average],
            Part::FirstMoments => self.groups.iter().map(|g| &g.moments[0]).collect(),
            Part::SecondMoments => self.groups.iter().map(|g| &g.moments[1]).collect(),
            Part::Gradients => self.groups.iter().map(|g| &*g.gradients).collect(),
        }
    }

    fn layout_of(&self, part: Part) -> &Arc<ArenaLayout> {
        match part {
            Part::Parameters | Part::Average => self.arenas.masters.layout(),
            Part::FirstMoments | Part::SecondMoments | Part::Gradients => &self.arenas.gradient_layout,
        }
    }

    fn download(&self, part: Part) -> Result<Arena> {
        let mut whole = Arena::zeros(self.layout_of(part).clone())?;
        match self.arenas_of(part)[..] {
            [arena] if arena.layout() == whole.layout() => arena.download(&mut whole)?,
            ref arenas => {
                for arena in arenas {
                    let mut group = Arena::zeros(arena.layout().clone())?;
                    arena.download(&mut group)?;
                    for (name, _, values) in group.iter() {
                        whole.view_mut(name)?.copy_from_slice(values);
                    }
                }
            }
        }
        Ok(whole)
    }
}

fn optimizer(arenas: &DeviceArenas, settings: &OptimizerSettings) -> Result<DeviceAdamW> {
    let groups: Vec<_> = arenas.gradients.iter().map(|g| g.layout().clone()).collect();
    let (parameters, gradients) = (arenas.masters.layout(), &arenas.gradient_layout);
    let (betas, epsilons) = (settings.betas, &settings.epsilons);
    Ok(DeviceAdamW::new(&arenas.gpu, parameters, gradients, &groups, betas, epsilons)?)
}

impl TrainingState for DeviceState {
    fn parameters(&self) -> &Arc<ArenaLayout> {
        self.arenas.masters.layout()
    }

    fn gradients(&self) -> &Arc<ArenaLayout> {
        &self.arenas.gradient_layout
    }

    fn configure(&mut self, settings: &OptimizerSettings) -> Result<()> {
        self.optimizer = optimizer(&self.arenas, settings)?;
        Ok(())
    }

    fn begin(&mut self, fill: &mut dyn FnMut(&mut Arena) -> Result<()>) -> Result<()> {
        let mut values = Arena::zeros(self.arenas.masters.layout().clone())?;
        fill(&mut values)?;
        self.take_parameters(&values)?;
        self.average.copy_from(&self.arenas.masters)?;
        for moment in self.groups.iter().flat_map(|g| &g.moments) {
            moment.memory().clear()?;
        }
        Ok(())
    }

    fn accumulate(&mut self, micro_batch: usize, scale: f32) -> Result<()> {
        for group in &self.groups {
            if let Some(sum) = &group.sum {
                sum.accumulate(&group.gradients, scale, micro_batch == 0)?;
            }
        }
        Ok(())
    }

    fn update(&mut self, step: &UpdateStep<'_>, ema_decay: f64) -> Result<()> {
        let groups: Vec<GradientGroup<'_>> = self
            .groups
            .iter()
            .map(|group| GradientGroup {
                gradients: group.sum.as_ref().unwrap_or(&group.gradients),
                first_moments: &group.moments[0],
                second_moments: &group.moments[1],
            })
            .collect();
        let state = DeviceUpdate {
            parameters: &self.arenas.masters,
            groups: &groups,
            ema: Some((&self.average, ema_decay)),
            copy: self.arenas.copy.as_deref(),
        };
        Ok(self.optimizer.enqueue(&state, step)?)
    }

    fn report(&mut self) -> Result<UpdateReport> {
        Ok(self.optimizer.report()?)
    }

    fn show(&self, part: Part, see: &mut dyn FnMut(&Arena) -> Result<()>) -> Result<()> {
        see(&self.download(part)?)
    }

    fn take(&mut self, part: Part, values: &Arena) -> Result<()> {
        if part == Part::Parameters {
            return self.take_parameters(values);
        }
        for arena in self.arenas_of(part) {
            if arena.layout() == values.layout() {
                arena.upload(values)?;
                continue;
            }
            let mut group = Arena::zeros(arena.layout().clone())?;
            let names: Vec<String> = group.layout().entries().keys().cloned().collect();
            for name in names {
                group.view_mut(&name)?.copy_from_slice(values.view(&name)?);
            }
            arena.upload(&group)?;
        }
        Ok(())
    }

    fn average(&mut self) -> Result<SharedArena> {
        let values = self.download(Part::Average)?;
        match &self.preview {
            Some(preview) => write_lock(preview)?.copy_from(&values)?,
            None => self.preview = Some(values.into_shared()),
        }
        self.preview.clone().ok_or_else(|| crate::TrainError::Internal("no preview".into()))
    }
}
