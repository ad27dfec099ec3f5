//! Pictures of Gaussian noise: what a model makes that has learnt nothing.

use std::ops::Range;

use train_engine::random::{Purpose, Stream};

use super::fingerprint::Fingerprint;
use super::{Picture, Pictures, Source, Values};
use crate::Usage;
use crate::render::pixels;

/// What names noise as an input, before `N,H,W,C`.
pub const NOISE: &str = "noise:";
/// Largest picture, in values.
const MAX_VALUES: u64 = 1 << 26;

/// Noise of mean 0 and deviation 1, cut to the range of pixels.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    count: u64,
    size: [usize; 3],
}

impl Noise {
    /// Reads `N,H,W,C`.
    ///
    /// # Errors
    /// Other than four numbers from 1, more than 3 channels.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let numbers: Option<Vec<u64>> = text.split(',').map(|x| x.trim().parse().ok()).collect();
        let bad = || Usage(format!("`{NOISE}{text}`: expected N,H,W,C, such as {NOISE}1000,28,28,1"));
        let [count, h, w, c] = numbers.and_then(|n| n.try_into().ok()).ok_or_else(bad)?;
        let values = h.saturating_mul(w).saturating_mul(c);
        if count == 0 || values == 0 || values > MAX_VALUES || (c != 1 && c != 3) {
            return Err(bad().into());
        }
        Ok(Self { count, size: [h, w, c].map(|d| d as usize) })
    }
}

impl Source for Noise {
    fn count(&self) -> u64 {
        self.count
    }

    fn pictures(&mut self, range: Range<u64>) -> Pictures<'_> {
        let [height, width, channels] = self.size;
        super::one_by_one(range, move |index| {
            let mut values = vec![0.0; height * width * channels];
            Stream::new(0, Purpose::SampleInit, 0, index).fill_normal(&mut values);
            let values = Values::U8(values.into_iter().map(pixels::byte).collect());
            Ok(Picture { name: format!("{NOISE}{index}"), height, width, channels, values })
        })
    }

    fn fingerprint(&mut self, _range: Range<u64>, _fingerprint: &mut Fingerprint) -> anyhow::Result<()> {
        // The input's words say all of it.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_wide_and_the_same_each_time() {
        let mut noise = Noise::parse("9,20,10,1").unwrap();
        let values = |noise: &mut Noise, range| -> Vec<Values> {
            noise.pictures(range).map(|p| p.unwrap().values).collect()
        };
        let all = values(&mut noise, 0..9);
        assert_eq!(values(&mut noise, 4..6), all[4..6]);
        let Values::U8(first) = &all[0] else { panic!("bytes") };
        let ends = first.iter().filter(|b| **b == 0 || **b == 255).count();
        assert!((40..90).contains(&ends), "a third of 200 lies outside of the range: {ends}");
        for bad in ["", "1,2,3", "0,1,1,1", "1,1,1,2", "1,99999999,99999999,3", "a,1,1,1"] {
            assert!(Noise::parse(bad).is_err(), "{bad}");
        }
    }
}
