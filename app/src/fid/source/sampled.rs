//! A model's samples as a source: made when they are asked for, the image of a number always the same.

use std::ops::Range;

use anyhow::ensure;
use models::{Latent, Model};
use train_engine::random::{Purpose, Stream};

use super::fingerprint::Fingerprint;
use super::{Picture, Pictures, Source, Values};
use crate::fid::plan::BLOCK;
use crate::render::pixels;
use crate::sampler::{NoiseSource, Sampler};

/// Which class each image has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Classes {
    /// Drawn for (seed, image), all classes alike: the published protocol.
    Random,
    /// These in turn.
    Cycle(Vec<i64>),
}

/// Samples by number.
#[derive(Debug)]
pub struct Sampled {
    sampler: Sampler,
    latent: Latent,
    class_count: usize,
    classes: Classes,
    seed: u64,
    count: u64,
    batch: usize,
}

impl Sampled {
    /// `count` images of `seed`; `batch` is the sampler's.
    ///
    /// # Errors
    /// A model of latents.
    pub fn new(
        sampler: Sampler,
        model: &Model,
        classes: Classes,
        seed: u64,
        count: u64,
        batch: usize,
    ) -> anyhow::Result<Self> {
        let channels = model.latent().channels;
        ensure!(
            channels == 1 || channels == 3,
            "the model makes {channels} channels: these are latents, and FID needs decoded images; give files of them"
        );
        let class_count = model.conditioning().class_count();
        Ok(Self { sampler, latent: model.latent(), class_count, classes, seed, count, batch })
    }

    fn label(&self, index: u64) -> i64 {
        match &self.classes {
            Classes::Random => {
                let mut stream = Stream::new(self.seed, Purpose::SampleLabel, 0, index);
                // The high half of a product: no class is favoured by more than 2⁻³² of its share.
                ((u64::from(stream.u32()) * self.class_count as u64) >> 32) as i64
            }
            Classes::Cycle(classes) => classes[(index % classes.len() as u64) as usize],
        }
    }

    fn make(&mut self, range: Range<u64>) -> anyhow::Result<Vec<Picture>> {
        let labels: Vec<i64> = range.clone().map(|i| self.label(i)).collect();
        // Far apart, so that the sets of two seeds have no image in common.
        let seed = self.seed.wrapping_mul(1 << 32);
        let source = NoiseSource::Seeded { seed, first: range.start };
        let values = self.sampler.run(&labels, source, None, &mut |_| {})?;
        let latent = self.latent;
        let len = latent.values();
        let mut pictures = Vec::with_capacity(labels.len());
        for (index, image) in range.zip(values.chunks_exact(len)) {
            let name = format!("sample {index} of seed {}", self.seed);
            ensure!(image.iter().all(|v| v.is_finite()), "`{name}` is not finite");
            let bytes = pixels::channels_last(image, latent.batch(1))?;
            let values = Values::U8(bytes);
            let Latent { channels, height, width } = latent;
            pictures.push(Picture { name, height, width, channels, values });
        }
        Ok(pictures)
    }
}

impl Source for Sampled {
    fn count(&self) -> u64 {
        self.count
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        let mut next = range.start;
        let mut made = Vec::new().into_iter();
        Box::new(std::iter::from_fn(move || {
            if made.len() == 0 {
                if next >= range.end {
                    return None;
                }
                // Batches end with blocks, so that shards and resumed runs make the same ones.
                let block = (next / BLOCK + 1) * BLOCK;
                let batch = next..(next + self.batch as u64).min(block).min(range.end);
                next = batch.end;
                match self.make(batch) {
                    Ok(pictures) => made = pictures.into_iter(),
                    Err(error) => {
                        next = range.end;
                        return Some(Err(error));
                    }
                }
            }
            made.next().map(Ok)
        }))
    }

    fn fingerprint(&mut self, _range: Range<u64>, _fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        // The recipe says all of it, with the hash of the weights.
        Ok(())
    }
}
