//! What a batch draws: noise, times, and labels that are left out.

use std::ops::Range;

use models::{Model, Objective, TRAINING_STEPS};

use crate::config::{TimeSampling, TrainConfig};
use crate::data::Batch;
use crate::random::{Purpose, Stream};

/// The streams of the noise of some rows of a batch.
pub(super) fn noise(config: &TrainConfig, batch: &Batch, rows: Range<usize>) -> impl Iterator<Item = Stream> {
    let (seed, step) = (config.train.seed, batch.step);
    rows.map(move |row| Stream::new(seed, Purpose::Noise, step, row as u64))
}

/// Draws the noise of some rows of a batch on the host.
pub(super) fn fill_noise(config: &TrainConfig, batch: &Batch, rows: Range<usize>, out: &mut [f32]) {
    let image = out.len() / rows.len().max(1);
    for (mut stream, out) in noise(config, batch, rows).zip(out.chunks_mut(image.max(1))) {
        stream.fill_normal(out);
    }
}

/// Times and labels of some rows of a batch.
pub(super) fn draw(
    config: &TrainConfig,
    model: &Model,
    batch: &Batch,
    rows: Range<usize>,
) -> (Vec<f32>, Vec<i64>) {
    let (train, objective) = (&config.train, &config.objective);
    let null_class = model.conditioning().null_class();
    let drop = train.label_drop.unwrap_or(model.network.dropout());
    let stream = |purpose, row: usize| Stream::new(train.seed, purpose, batch.step, row as u64);
    let mut t = Vec::with_capacity(rows.len());
    let mut y = Vec::with_capacity(rows.len());
    for row in rows {
        let mut draw = stream(Purpose::Timestep, row);
        t.push(match (model.objective, objective.time) {
            (Objective::Ddpm, _) => draw.below(TRAINING_STEPS as u64) as f32,
            (Objective::Flow, TimeSampling::Uniform) => TRAINING_STEPS as f32 * draw.uniform(),
            (Objective::Flow, TimeSampling::LogitNormal) => {
                let logit = objective.time_mean + objective.time_std * f64::from(draw.normal());
                (TRAINING_STEPS as f64 / (1.0 + (-logit).exp())) as f32
            }
        });
        let null = null_class.filter(|_| stream(Purpose::LabelDrop, row).chance(drop));
        y.push(null.map_or(batch.y[row], |null| null as i64));
    }
    (t, y)
}
