//! Which images a step trains on: a pure function of seed and step.

use crate::error::{Result, TrainError};
use crate::random::{Purpose, Stream, permutation};

/// The order of images over a whole run.
///
/// Each epoch is a permutation of its own, cut into whole batches; what is left over sits the epoch out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlan {
    seed: u64,
    images: usize,
    batch_size: usize,
}

/// Where a step stands in the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Batches of this pass that are complete.
    pub batch: u64,
}

impl BatchPlan {
    /// The plan for a data set of `images` images.
    ///
    /// # Errors
    /// [`TrainError::DatasetTooSmall`] when they do not make one batch.
    pub fn new(seed: u64, images: usize, batch_size: usize) -> Result<Self> {
        if batch_size == 0 || images < batch_size {
            return Err(TrainError::DatasetTooSmall { images, batch_size });
        }
        Ok(Self { seed, images, batch_size })
    }

    /// Images of a step.
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// Whole batches of an epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        (self.images / self.batch_size) as u64
    }

    /// Where step `step` (counted from 0) takes its batch.
    pub fn position(&self, step: u64) -> Position {
        let batches = self.batches_per_epoch();
        Position { epoch: step / batches, batch: step % batches }
    }

    /// The images of a step, in the order of the batch. Costs a whole epoch's shuffle each time;
    /// [`Loader`](super::Loader) shuffles once an epoch.
    pub fn indices(&self, step: u64) -> Vec<usize> {
        Cursor::new(*self).indices(step).to_vec()
    }

    /// Whether image `row` of a step's batch is mirrored: one half of them are.
    pub fn is_flipped(&self, step: u64, row: usize) -> bool {
        Stream::new(self.seed, Purpose::Flip, step, row as u64).u32() & 1 == 1
    }

    /// The stream of posterior draws for image `row` of a step's batch.
    pub fn draw(&self, step: u64, row: usize) -> Stream {
        Stream::new(self.seed, Purpose::VaeDraw, step, row as u64)
    }
}

/// Walks a plan and keeps the order of the epoch it is in.
#[derive(Debug)]
pub(super) struct Cursor {
    plan: BatchPlan,
    epoch: u64,
    order: Vec<usize>,
}

impl Cursor {
    pub(super) fn new(plan: BatchPlan) -> Self {
        Self { plan, epoch: 0, order: Vec::new() }
    }

    pub(super) fn indices(&mut self, step: u64) -> &[usize] {
        let Position { epoch, batch } = self.plan.position(step);
        if self.order.is_empty() || epoch != self.epoch {
            self.order = permutation(self.plan.seed, epoch, self.plan.images);
            self.epoch = epoch;
        }
        let start = batch as usize * self.plan.batch_size;
        &self.order[start..start + self.plan.batch_size]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_visits_each_image_at_most_once_and_drops_the_rest() {
        let plan = BatchPlan::new(1, 10, 3).unwrap();
        assert_eq!(plan.batches_per_epoch(), 3);
        for epoch in 0..3 {
            let mut seen: Vec<usize> = (0..3).flat_map(|batch| plan.indices(epoch * 3 + batch)).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 9);
        }
        assert_ne!(plan.indices(0), plan.indices(3));
        assert_eq!(plan.position(7), Position { epoch: 2, batch: 1 });
    }

    #[test]
    fn a_cursor_agrees_with_the_plan_from_any_start() {
        let plan = BatchPlan::new(5, 20, 6).unwrap();
        for start in [0, 2, 4] {
            let mut cursor = Cursor::new(plan);
            for step in start..start + 8 {
                assert_eq!(cursor.indices(step), plan.indices(step));
            }
        }
    }

    #[test]
    fn too_few_images_are_refused() {
        let error = BatchPlan::new(0, 7, 8).unwrap_err().to_string();
        assert!(error.contains("7 images, fewer than one batch of 8"), "{error}");
        assert!(BatchPlan::new(0, 8, 8).is_ok());
    }

    #[test]
    fn half_of_the_images_are_flipped() {
        let plan = BatchPlan::new(3, 100, 100).unwrap();
        let flips = (0..100).flat_map(|step| (0..100).map(move |row| (step, row)));
        let count = flips.filter(|&(step, row)| plan.is_flipped(step, row)).count();
        assert!((4_800..5_200).contains(&count), "{count}");
    }
}
