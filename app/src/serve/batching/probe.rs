//! Whether an image depends on what else is in its batch: the same step in every batch size, place and company.

use std::collections::BTreeMap;
use std::sync::Arc;

use models::{SolverPlan, SolverStep};
use serde::Serialize;
use train_engine::random::{Purpose, Stream};

use super::stepper::{Slot, Stepper};

/// Rows that a guided image takes: the batch size whose results the others are compared with has as many or more.
pub const REFERENCE: usize = 2;

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// Whether every batch size in use gives the same bits.
    pub exact: bool,
    /// The batch sizes in use.
    pub buckets: Vec<usize>,
    /// Batch sizes that gave other bits, with the largest difference to the reference.
    pub other_bits: BTreeMap<usize, f32>,
    /// Steps that were compared.
    pub compared: usize,
}

/// What the probe steps: one image without guidance, one with, alone and among others.
struct Subject {
    label: i64,
    guidance: f32,
}

/// Compares each of `buckets` with the reference.
///
/// `reference` is a batch size of [`REFERENCE`] rows or more, `values` the size of an image, `null` the null class of a model that can be guided. With `deterministic`, batch
/// sizes that give other bits are not in use; otherwise all are.
///
/// # Errors
/// A step fails.
pub fn probe(
    stepper: &mut dyn Stepper,
    model: usize,
    reference: usize,
    buckets: &[usize],
    values: usize,
    guided: bool,
    deterministic: bool,
) -> anyhow::Result<Verdict> {
    let mut subjects = vec![Subject { label: 0, guidance: 1.0 }];
    if guided {
        subjects.push(Subject { label: 0, guidance: 3.0 });
    }
    let mut other_bits: BTreeMap<usize, f32> = BTreeMap::new();
    let mut compared = 0;
    for subject in &subjects {
        let mut want = vec![subject.slot(values)];
        stepper.step(model, reference, &mut want)?;
        let want = bits(&want[0].x);
        for &bucket in buckets {
            for (place, mut batch) in batches(subject, bucket, values) {
                stepper.step(model, bucket, &mut batch)?;
                compared += 1;
                if bits(&batch[place].x) != want {
                    let apart = |(a, b): (&u32, &f32)| (f32::from_bits(*a) - b).abs();
                    let worst = want.iter().zip(&batch[place].x).map(apart).fold(0.0, f32::max);
                    let known = other_bits.entry(bucket).or_default();
                    *known = known.max(worst);
                }
            }
        }
    }
    let kept = |b: &usize| !deterministic || !other_bits.contains_key(b);
    let buckets: Vec<usize> = buckets.iter().copied().filter(kept).collect();
    let exact = !buckets.is_empty() && buckets.iter().all(|b| !other_bits.contains_key(b));
    Ok(Verdict { exact, buckets, other_bits, compared })
}

/// Batches that hold the subject: alone, first, in the middle and last among others; with its place.
fn batches(subject: &Subject, bucket: usize, values: usize) -> Vec<(usize, Vec<Slot>)> {
    let rows = if subject.guidance == 1.0 { 1 } else { 2 };
    if bucket < rows {
        return Vec::new();
    }
    let room = bucket - rows;
    let mut places = vec![0, room / 2, room];
    places.dedup();
    let among = |before: usize| {
        let neighbour = |i: usize| Subject { label: 0, guidance: 1.0 }.with_seed(values, 100 + i as u64);
        let mut batch: Vec<Slot> = (0..before).map(neighbour).collect();
        batch.push(subject.slot(values));
        batch.extend((before..room).map(neighbour));
        (before, batch)
    };
    std::iter::once((0, vec![subject.slot(values)])).chain(places.into_iter().map(among)).collect()
}

impl Subject {
    fn slot(&self, values: usize) -> Slot {
        self.with_seed(values, 1)
    }

    /// A step that uses every term: sample, answer, history and noise.
    fn with_seed(&self, values: usize, seed: u64) -> Slot {
        let mut history = vec![0.0; values];
        Stream::new(seed, Purpose::SampleNoise, 1, 1).fill_normal(&mut history);
        let coef = [1.0, -0.5, 0.9, -0.4, 0.3, 1.0, -0.5, 0.2, 0.0];
        let step = SolverStep { t: 500.0, coef };
        let plan = SolverPlan { steps: vec![step], needs_history: true, needs_noise: true };
        Slot { seed, guidance: self.guidance, plan: Arc::new(plan), history, ..Slot::still(self.label) }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
