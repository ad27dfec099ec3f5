//! A training data set as images: its values go back to the bytes that they came from.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::ensure;
use train_engine::data::{Dataset, IdxImages, fashion_mnist};
use train_engine::random::{Purpose, Stream};

use super::fingerprint::Fingerprint;
use super::{Picture, Pictures, Source, Values};
use crate::Usage;

/// What names Fashion-MNIST as an input, before `train` or `test`.
pub const FASHION: &str = "fashion-mnist:";

/// The images of a data set, labels left out.
pub struct Labelled {
    set: Arc<dyn Dataset>,
    name: String,
}

impl Labelled {
    /// `set`, called `name` in messages.
    ///
    /// # Errors
    /// The set's images have neither 1 nor 3 channels, as latents have.
    pub fn new(set: Arc<dyn Dataset>, name: &str) -> anyhow::Result<Self> {
        let channels = set.channels();
        ensure!(channels == 1 || channels == 3, "`{name}` has {channels} channels: latents are no images");
        Ok(Self { set, name: name.to_owned() })
    }

    /// Fashion-MNIST's images: `train` or `test`, perhaps with a directory, as in `test@DIR`.
    ///
    /// # Errors
    /// Another part; files that are nowhere to be found or no idx files.
    pub fn fashion_mnist(name: &str, offline: bool, progress: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let full = format!("{FASHION}{name}");
        let (part, directory) = name.split_once('@').map_or((name, None), |(p, d)| (p, Some(Path::new(d))));
        if part != "train" && part != "test" {
            return Err(Usage(format!("`{full}`: the parts are `train` and `test`")).into());
        }
        let files = fashion_mnist::locate(directory, offline, progress)?;
        let set = if part == "train" {
            IdxImages::open(&files.train_images, &files.train_labels)?
        } else {
            IdxImages::open(&files.test_images, &files.test_labels)?
        };
        Self::new(Arc::new(set), &full)
    }
}

impl Source for Labelled {
    fn count(&self) -> u64 {
        self.set.len() as u64
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        super::one_by_one(range, |index| {
            let (set, name) = (&self.set, format!("{}: image {index}", self.name));
            let (height, width, channels) = (set.height(), set.width(), set.channels());
            let mut values = vec![0.0; set.image_len()];
            // Images of bytes draw nothing.
            let mut draw = Stream::new(0, Purpose::VaeDraw, 0, index);
            set.read(index as usize, false, &mut draw, &mut values)?;
            let byte = |x: f32| ((x + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
            let plane = height * width;
            let pixels = (0..plane).flat_map(|p| (0..channels).map(move |c| c * plane + p));
            let pixels = pixels.map(|at| byte(values[at])).collect();
            Ok(Picture { name, height, width, channels, values: Values::U8(pixels) })
        })
    }

    fn fingerprint(&mut self, range: Range<u64>, fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        // The set does not tell its files, and its pixels are quickly read.
        fingerprint.unknown();
        for picture in self.pictures(if fingerprint.wants_contents() { range } else { 0..0 }) {
            if let Values::U8(bytes) = picture?.values {
                fingerprint.content(&bytes);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte value once, in two channels' worth of planes.
    struct Bytes;

    impl Dataset for Bytes {
        fn len(&self) -> usize {
            1
        }
        fn channels(&self) -> usize {
            3
        }
        fn height(&self) -> usize {
            16
        }
        fn width(&self) -> usize {
            16
        }
        fn num_classes(&self) -> usize {
            1
        }
        fn class_names(&self) -> &[String] {
            &[]
        }
        fn label(&self, _: usize) -> i64 {
            0
        }
        fn read(&self, _: usize, _: bool, _: &mut Stream, out: &mut [f32]) -> train_engine::Result<i64> {
            for (i, x) in out.iter_mut().enumerate() {
                *x = (i % 256) as f32 / 127.5 - 1.0;
            }
            Ok(0)
        }
    }

    #[test]
    fn values_go_back_to_their_bytes() {
        let mut source = Labelled::new(Arc::new(Bytes), "bytes").unwrap();
        let picture = source.pictures(0..1).next().unwrap().unwrap();
        let expected: Vec<u8> = (0..=255).flat_map(|b| [b; 3]).collect();
        assert_eq!(picture.values, Values::U8(expected));
    }
}
