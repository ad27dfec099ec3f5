//! Noise in place of images, where only sizes matter.

use super::{Dataset, check_read};
use crate::error::Result;
use crate::random::{Purpose, Stream};

/// Images of independent standard normal values, each always the same, with labels in turn.
#[derive(Debug, Clone)]
pub struct GaussianImages {
    len: usize,
    channels: usize,
    side: usize,
    class_names: Vec<String>,
}

impl GaussianImages {
    /// `len` images (C, side, side) of `classes` classes.
    pub fn new(len: usize, channels: usize, side: usize, classes: usize) -> Self {
        Self { len, channels, side, class_names: (0..classes).map(|c| c.to_string()).collect() }
    }
}

impl Dataset for GaussianImages {
    fn len(&self) -> usize {
        self.len
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn height(&self) -> usize {
        self.side
    }

    fn width(&self) -> usize {
        self.side
    }

    fn num_classes(&self) -> usize {
        self.class_names.len()
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn label(&self, index: usize) -> i64 {
        (index % self.class_names.len().max(1)) as i64
    }

    fn read(&self, index: usize, _: bool, _: &mut Stream, out: &mut [f32]) -> Result<i64> {
        check_read(self, index, out)?;
        Stream::new(0, Purpose::Validation, 0, index as u64).fill_normal(out);
        Ok(self.label(index))
    }
}
