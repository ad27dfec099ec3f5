//! Steps whose draws and parameters are given, to compare with another trainer.

use std::sync::Arc;

use models::{LOSS_SCALE, Model};
use runtime::{Arena, Runtime, SessionOptions, UpdateReport};

use super::{Part, Trainer, refuse_precision};
use crate::config::TrainConfig;
use crate::error::Result;
use crate::step::{CompiledStep, StepInputs, StepLoss};

impl Trainer {
    /// A trainer that begins with these parameters: the average follows them, the moments are zero. Its session is loaded
    /// as `options` say.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`TrainError::Runtime`](crate::TrainError::Runtime) for parameters of another model.
    pub fn from_parameters(
        runtime: &Arc<Runtime>,
        config: &TrainConfig,
        model: &Model,
        parameters: &Arena,
        options: &SessionOptions,
    ) -> Result<Self> {
        refuse_precision(config)?;
        let train = &config.train;
        let micro = train.batch_size / train.accumulate;
        let (recompute, precision) = (train.recompute, train.precision);
        let step =
            CompiledStep::compile_in(runtime, model, micro, recompute, precision, options, &mut |_| Ok(()))?;
        let mut trainer = Self::on(step, config, model)?;
        trainer.state.begin(&mut |values| Ok(values.copy_from(parameters)?))?;
        Ok(trainer)
    }

    /// One optimizer step (counted from 0) on one batch of the program's size, with the noise, times and labels given. In
    /// f16 a step whose gradients overflow is run again with a smaller factor on the loss.
    ///
    /// # Errors
    /// [`TrainError::Runtime`](crate::TrainError::Runtime);
    /// [`TrainError::LossScale`](crate::TrainError::LossScale) for gradients that overflow without any factor.
    pub fn step_given(&mut self, step: u64, inputs: &StepInputs<'_>) -> Result<(StepLoss, UpdateReport)> {
        self.fed = None;
        let binding = self.step.binding();
        binding.set_input("x0", inputs.x0)?;
        binding.set_input("noise", inputs.noise)?;
        binding.set_input("t", inputs.t)?;
        binding.set_input("y", inputs.y)?;
        loop {
            if let Some(scale) = &self.loss_scale {
                self.step.set_hyperparameter(LOSS_SCALE, scale.scale())?;
            }
            self.losses.clear();
            self.step.binding().enqueue()?;
            self.state.accumulate(0, 1.0)?;
            // No step is left out: what is run again is the same one.
            self.update(step + self.loss_scale.map_or(0, |scale| scale.skipped()))?;
            let (loss, report) = self.complete()?;
            let again = self.loss_scale.is_some() && loss.loss.is_finite() && !report.finite;
            if !again {
                return Ok((loss, report));
            }
            self.goes_on(step + 1, &loss, &report)?;
        }
    }

    /// A copy of the parameters.
    ///
    /// # Errors
    /// [`TrainError::Runtime`](crate::TrainError::Runtime).
    pub fn parameters(&self) -> Result<Arena> {
        self.copy(Part::Parameters)
    }

    /// A copy of the last step's gradients, as they were before the clip and without the factor on the loss.
    ///
    /// # Errors
    /// [`TrainError::Runtime`](crate::TrainError::Runtime).
    pub fn gradients(&self) -> Result<Arena> {
        let mut gradients = self.copy(Part::Gradients)?;
        if let Some(scale) = &self.loss_scale {
            let factor = scale.gradient_scale() as f32;
            gradients.views_mut().into_iter().flatten().for_each(|value| *value *= factor);
        }
        Ok(gradients)
    }

    fn copy(&self, part: Part) -> Result<Arena> {
        let mut copy = None;
        self.state.show(part, &mut |values| {
            copy = Some(values.duplicate()?);
            Ok(())
        })?;
        copy.ok_or_else(|| crate::TrainError::Internal("a part was not shown".into()))
    }
}
