//! The parameter update in one sweep over arenas: gradient norm, clip, AdamW, moving average.

use graph_builder::Shape;
use rayon::prelude::*;

use crate::arena::{Arena, ArenaLayout};
use crate::error::{Result, RuntimeError};
use crate::kernels::adamw::{self, Coefficients, Stretch};

/// Elements of one unit of work. Sums are formed within blocks and then over blocks in order, so a result does not
/// depend on which thread did what.
const BLOCK: usize = 16 * 1024;
/// Below this many elements one thread is faster than several.
const SMALL: usize = 8 * BLOCK;

/// The AdamW update of all parameters that have a gradient.
///
/// For each gradient entry, in this order and in PyTorch's order of operations, `t` counting from 1:
///
/// - `g ← s g` with the gradient scale `s`, 1 unless the loss was scaled
/// - `g ← g · min(1, clip / (‖g‖ + 1e-6))`, the norm taken over all entries together
/// - `m ← m + (1 − β₁)(g − m)`, `v ← β₂ v + (1 − β₂) g²`
/// - `p ← p (1 − lr · wd) − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)`
/// - `ema ← d · ema + (1 − d) p`
///
/// Arrays are f32, scalars are computed in f64. Parameters without a gradient are left alone, in the average too.
#[derive(Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    /// ε of each gradient entry.
    epsilons: Vec<f64>,
    /// For each gradient entry its index in the parameter layout.
    targets: Vec<usize>,
    parameters: ArenaLayout,
    gradients: ArenaLayout,
    /// `None` for one thread.
    pool: Option<rayon::ThreadPool>,
}

/// The arenas of an update.
pub struct UpdateState<'a> {
    /// All parameters.
    pub parameters: &'a mut Arena,
    /// Gradients of the trainable ones.
    pub gradients: &'a Arena,
    /// First moments, laid out as the gradients.
    pub first_moments: &'a mut Arena,
    /// Second moments, laid out as the gradients.
    pub second_moments: &'a mut Arena,
    /// Moving average of the parameters, laid out as they are, with its decay.
    pub ema: Option<(&'a mut Arena, f64)>,
}

/// What may change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct UpdateStep<'a> {
    /// Number of this step, from 1.
    pub step: u64,
    /// Learning rate of each gradient entry, in layout order.
    pub lr: &'a [f64],
    /// Decoupled weight decay of each gradient entry, in layout order.
    pub weight_decay: &'a [f64],
    /// Largest norm of all gradients together.
    pub clip: Option<f64>,
    /// What the gradients are multiplied by before anything else: one over the factor on a scaled loss, else 1.
    pub gradient_scale: f64,
}

/// What an update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateReport {
    /// Norm of all gradients together, without the loss's factor, before the clip.
    pub grad_norm: f64,
    /// Factor that the clip scaled the gradients by.
    pub clip_scale: f64,
    /// Whether the norm was finite. If not, nothing was updated.
    pub finite: bool,
}

impl AdamW {
    /// Prepares updates of `parameters` by `gradients`, each of which names a parameter and has its shape.
    ///
    /// `threads` is the number of threads of an update; 0 is one per core.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownName`], [`RuntimeError::WrongShape`], [`RuntimeError::InvalidValue`] for a constant
    /// outside its range, [`RuntimeError::Ort`] when threads cannot be started.
    pub fn new(
        parameters: &ArenaLayout,
        gradients: &ArenaLayout,
        (beta1, beta2, epsilon): (f64, f64, f64),
        threads: usize,
    ) -> Result<Self> {
        for (what, value) in [("beta1", beta1), ("beta2", beta2)] {
            in_range(what, value, "0 <= beta < 1", (0.0..1.0).contains(&value))?;
        }
        in_range("epsilon", epsilon, "a number >= 0", epsilon >= 0.0 && epsilon.is_finite())?;
        let mut targets = Vec::with_capacity(gradients.entries().len());
        for (name, gradient) in gradients.entries() {
            let expected = parameters.entry(name)?.shape.clone();
            if expected != gradient.shape {
                let (place, name, got) = ("the gradients".into(), name.clone(), gradient.shape.clone());
                return Err(RuntimeError::WrongShape { place, name, expected, got });
            }
            // `entry` has just found the name.
            targets.extend(parameters.entries().get_index_of(name));
        }
        let pool = if threads == 1 || gradients.numel() < SMALL {
            None
        } else {
            let builder =
                rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("update-{i}"));
            Some(builder.build().map_err(|e| RuntimeError::ort("start the update's threads", &e))?)
        };
        let (parameters, gradients) = (parameters.clone(), gradients.clone());
        let epsilons = vec![epsilon; targets.len()];
        Ok(Self { beta1, beta2, epsilons, targets, parameters, gradients, pool })
    }

    /// The same update with an ε of its own for each gradient entry, in layout order.
    ///
    /// # Errors
    /// [`RuntimeError::WrongLength`], [`RuntimeError::InvalidValue`] for one that is negative or not a number.
    pub fn with_epsilons(self, epsilons: Vec<f64>) -> Result<Self> {
        let (expected, got) = (self.targets.len(), epsilons.len());
        if got != expected {
            return Err(RuntimeError::WrongLength { what: "epsilon".to_owned(), expected, got });
        }
        for &value in &epsilons {
            in_range("epsilon", value, "a number >= 0", value >= 0.0 && value.is_finite())?;
        }
        Ok(Self { epsilons, ..self })
    }

    /// Norm of all gradients together, in f64; the same bits for any number of threads.
    ///
    /// # Errors
    /// [`RuntimeError::LayoutMismatch`].
    pub fn grad_norm(&self, gradients: &Arena) -> Result<f64> {
        same_layout(&self.gradients, gradients)?;
        let blocks: Vec<&[f32]> = gradients.iter().flat_map(|(_, _, view)| view.chunks(BLOCK)).collect();
        let sums: Vec<f64> = match &self.pool {
            Some(pool) => pool.install(|| blocks.par_iter().map(|b| adamw::sum_of_squares(b)).collect()),
            None => blocks.iter().map(|b| adamw::sum_of_squares(b)).collect(),
        };
        Ok(sums.iter().sum::<f64>().sqrt())
    }

    /// Does one update.
    ///
    /// # Errors
    /// [`RuntimeError::LayoutMismatch`], [`RuntimeError::WrongLength`] (one rate and decay for each gradient entry),
    /// [`RuntimeError::InvalidValue`] (a rate, decay, clip or scale that is negative or not a number; step 0). Nothing is
    /// updated then.
    pub fn step(&self, state: UpdateState<'_>, step: &UpdateStep<'_>) -> Result<UpdateReport> {
        self.check(&state, step)?;
        let grad_norm = self.grad_norm(state.gradients)? * step.gradient_scale;
        let clip_scale = step.clip.map_or(1.0, |clip| (clip / (grad_norm + 1e-6)).min(1.0));
        if !grad_norm.is_finite() {
            return Ok(UpdateReport { grad_norm, clip_scale: 1.0, finite: false });
        }
        let mut work = self.work(state, step, clip_scale * step.gradient_scale);
        let run =
            |(stretch, coefficients): &mut (Stretch<'_>, Coefficients)| adamw::step(stretch, coefficients);
        match &self.pool {
            Some(pool) => pool.install(|| work.par_iter_mut().for_each(run)),
            None => work.iter_mut().for_each(run),
        }
        Ok(UpdateReport { grad_norm, clip_scale, finite: true })
    }

    /// The update cut into blocks; their results do not depend on each other.
    fn work<'a>(
        &self,
        state: UpdateState<'a>,
        step: &UpdateStep<'_>,
        gradient_factor: f64,
    ) -> Vec<(Stretch<'a>, Coefficients)> {
        let t = step.step as f64;
        let (correction1, correction2) = (1.0 - self.beta1.powf(t), (1.0 - self.beta2.powf(t)).sqrt());
        let mut parameters: Vec<_> = state.parameters.views_mut().into_iter().map(Some).collect();
        let (ema, decay) = state.ema.map_or((None, 0.0), |(arena, decay)| (Some(arena), decay));
        let mut averages: Vec<_> = ema.into_iter().flat_map(Arena::views_mut).map(Some).collect();
        let first = state.first_moments.views_mut();
        let second = state.second_moments.views_mut();
        let mut work = Vec::with_capacity(self.gradients.len() / BLOCK + self.targets.len());
        let entries = self.targets.iter().zip(state.gradients.iter()).zip(first).zip(second).enumerate();
        for (i, (((&target, (_, _, gradient)), first), second)) in entries {
            let (lr, weight_decay) = (step.lr[i], step.weight_decay[i]);
            let coefficients = Coefficients {
                gradient: gradient_factor as f32,
                decay: (1.0 - lr * weight_decay) as f32,
                one_minus_beta1: (1.0 - self.beta1) as f32,
                beta2: self.beta2 as f32,
                one_minus_beta2: (1.0 - self.beta2) as f32,
                correction2: correction2 as f32,
                epsilon: self.epsilons[i] as f32,
                step: (lr / correction1) as f32,
                ema: (decay as f32, (1.0 - decay) as f32),
            };
            // Gradient names are unique, so each parameter is taken once.
            let Some(parameter) = parameters[target].take() else { continue };
            let mut average = averages.get_mut(target).and_then(Option::take).map(|a| a.chunks_mut(BLOCK));
            let blocks = parameter
                .chunks_mut(BLOCK)
                .zip(gradient.chunks(BLOCK))
                .zip(first.chunks_mut(BLOCK))
                .zip(second.chunks_mut(BLOCK));
            for (((parameter, gradient), first), second) in blocks {
                let average = average.as_mut().and_then(Iterator::next);
                work.push((Stretch { parameter, gradient, first, second, average }, coefficients));
            }
        }
        work
    }

    fn check(&self, state: &UpdateState<'_>, step: &UpdateStep<'_>) -> Result<()> {
        same_layout(&self.parameters, state.parameters)?;
        for arena in [state.gradients, &*state.first_moments, &*state.second_moments] {
            same_layout(&self.gradients, arena)?;
        }
        if let Some((arena, decay)) = &state.ema {
            same_layout(&self.parameters, arena)?;
            in_range("ema decay", *decay, "0 <= decay <= 1", (0.0..=1.0).contains(decay))?;
        }
        step.check(self.targets.len())
    }
}

impl UpdateStep<'_> {
    /// Refuses values outside their range; `entries` is the number of gradient entries.
    pub(crate) fn check(&self, entries: usize) -> Result<()> {
        for (what, values) in [("lr", self.lr), ("weight_decay", self.weight_decay)] {
            if values.len() != entries {
                let (expected, got) = (entries, values.len());
                return Err(RuntimeError::WrongLength { what: what.to_owned(), expected, got });
            }
            for &value in values {
                in_range(what, value, "a number >= 0", value >= 0.0 && value.is_finite())?;
            }
        }
        if let Some(clip) = self.clip {
            in_range("clip", clip, "a number > 0", clip > 0.0)?;
        }
        let scale = self.gradient_scale;
        in_range("gradient scale", scale, "a finite number > 0", scale > 0.0 && scale.is_finite())?;
        in_range("step", self.step as f64, "1 or more", self.step > 0)
    }
}

fn in_range(what: &str, got: f64, expected: &str, holds: bool) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(RuntimeError::InvalidValue {
        what: what.to_owned(),
        expected: expected.to_owned(),
        got: got.to_string(),
    })
}

fn same_layout(expected: &ArenaLayout, arena: &Arena) -> Result<()> {
    if expected == &**arena.layout() {
        return Ok(());
    }
    let (left, right) = (expected.entries().len(), arena.layout().entries().len());
    Err(RuntimeError::LayoutMismatch { action: "update parameters", left, right })
}

/// The layout of the gradients and moments of some parameters: the entries for which `trainable` holds, in order.
///
/// # Errors
/// None in practice: a part of a valid layout is valid.
pub fn trainable_layout(
    parameters: &ArenaLayout,
    trainable: impl Fn(&str, &Shape) -> bool,
) -> Result<ArenaLayout> {
    let entries = parameters.entries().iter().filter(|(name, e)| trainable(name, &e.shape));
    ArenaLayout::new(entries.map(|(name, e)| (name.clone(), e.shape.clone())))
}

#[cfg(test)]
mod tests;
