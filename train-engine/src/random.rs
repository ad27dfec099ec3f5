//! Counter-based randomness: each draw is a pure function of what it is for.
//!
//! A [`Stream`] is keyed by the run's seed, a [`Purpose`], a step and a sample, so a resumed run, another number of
//! threads or another order of work draws the same numbers. Nothing here holds state that would have to be saved.

mod normal;

use runtime::cuda::kernels::NormalStream;

/// What a stream of draws is for. The numbers are part of the checkpoint contract: never change or reuse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// Initial values of a parameter; `sample` is the parameter's index.
    Init = 1,
    /// Order of the images of an epoch; `step` is the epoch.
    Shuffle = 2,
    /// Horizontal flip of an image.
    Flip = 3,
    /// Replacement of a label by the null class.
    LabelDrop = 4,
    /// Time of the diffusion.
    Timestep = 5,
    /// Noise added to a training image.
    Noise = 6,
    /// Draw from a latent's posterior.
    VaeDraw = 7,
    /// Where a sampled image starts; `sample` is the image.
    SampleInit = 8,
    /// Noise a stochastic sampler adds; `step` is the sampling step.
    SampleNoise = 9,
    /// Class labels drawn for samples.
    SampleLabel = 10,
    /// Draws of validation passes.
    Validation = 11,
    /// Settings of a random search; `step` is the draw, `sample` the setting.
    Sweep = 12,
}

/// Philox4x32 with 10 rounds: four random words for a counter and a key.
///
/// # Source
/// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const ROUNDS: u32 = 10;
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
    }
    counter
}

/// The draws of one purpose at one step for one sample.
///
/// The 128-bit counter holds the purpose (8 bits), the step (40), the sample (48) and the block (32 bits, of four words
/// each), so streams never overlap.
///
/// ```
/// use train_engine::random::{Purpose, Stream};
/// let mut noise = [0.0; 4];
/// Stream::new(7, Purpose::Noise, 100, 3).fill_normal(&mut noise);
/// let mut again = [0.0; 4];
/// Stream::new(7, Purpose::Noise, 100, 3).fill_normal(&mut again);
/// assert_eq!(noise, again);
/// ```
#[derive(Debug, Clone)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    /// Words of `block` already given out.
    used: usize,
    /// The second half of a Box–Muller pair.
    spare: Option<f32>,
}

impl Stream {
    /// First step that is out of range.
    pub const MAX_STEP: u64 = 1 << 40;
    /// First sample that is out of range.
    pub const MAX_SAMPLE: u64 = 1 << 48;

    /// The stream of one purpose; `step` is below 2⁴⁰ and `sample` below 2⁴⁸.
    pub fn new(seed: u64, purpose: Purpose, step: u64, sample: u64) -> Self {
        debug_assert!(step < Self::MAX_STEP && sample < Self::MAX_SAMPLE, "step {step}, sample {sample}");
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [
                0,
                sample as u32,
                step as u32,
                u32::from(purpose as u8) << 24
                    | ((step >> 32) as u32 & 0xFF) << 16
                    | (sample >> 32) as u32 & 0xFFFF,
            ],
            block: [0; 4],
            used: 4,
            spare: None,
        }
    }

    /// The stream from its beginning, for a GPU to take its normal draws.
    pub fn on_device(&self) -> NormalStream {
        NormalStream::new(self.key, [self.counter[1], self.counter[2], self.counter[3]])
    }

    /// A uniform 32-bit word.
    pub fn u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        let word = self.block[self.used];
        self.used += 1;
        word
    }

    /// A uniform 64-bit word, low half drawn first.
    pub fn u64(&mut self) -> u64 {
        let low = u64::from(self.u32());
        low | u64::from(self.u32()) << 32
    }

    /// Uniform in [0, 1), a multiple of 2⁻²⁴.
    pub fn uniform(&mut self) -> f32 {
        (self.u32() >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Uniform in [0, 1), a multiple of 2⁻⁵³.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// True with probability `p`: never for 0, always for 1.
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform_f64() < p
    }

    /// Standard normal (Box–Muller in f64, rounded once), |z| ≤ 6.7; the same bits on every machine, and on a GPU.
    pub fn normal(&mut self) -> f32 {
        if let Some(z) = self.spare.take() {
            return z;
        }
        let [z, spare] = normal::pair(self.u32(), self.u32());
        self.spare = Some(spare);
        z
    }

    /// Fills `out` with what successive [`normal`](Self::normal) calls would give.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        for z in out {
            *z = self.normal();
        }
    }

    /// Uniform in 0..n without bias; 0 for n = 0.
    ///
    /// # Source
    /// Lemire, "Fast random integer generation in an interval", 2019.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let mut product = u128::from(self.u64()) * u128::from(n);
        if (product as u64) < n {
            let threshold = n.wrapping_neg() % n;
            while (product as u64) < threshold {
                product = u128::from(self.u64()) * u128::from(n);
            }
        }
        (product >> 64) as u64
    }
}

/// The order of 0..n in an epoch: Fisher–Yates with the epoch's [`Purpose::Shuffle`] stream.
pub fn permutation(seed: u64, epoch: u64, n: usize) -> Vec<usize> {
    let mut stream = Stream::new(seed, Purpose::Shuffle, epoch, 0);
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        let other = stream.below(last as u64 + 1) as usize;
        order.swap(last, other);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox4x32(pi, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn each_part_of_the_key_changes_the_stream() {
        let first = |seed, purpose, step, sample| Stream::new(seed, purpose, step, sample).u64();
        let base = first(1, Purpose::Noise, 2, 3);
        let others = [
            first(1 + (1 << 32), Purpose::Noise, 2, 3),
            first(2, Purpose::Noise, 2, 3),
            first(1, Purpose::Flip, 2, 3),
            first(1, Purpose::Noise, 3, 3),
            first(1, Purpose::Noise, 2 + (1 << 32), 3),
            first(1, Purpose::Noise, 2, 4),
            first(1, Purpose::Noise, 2, 3 + (1 << 32)),
        ];
        assert!(others.iter().all(|&other| other != base));
        let mut unique = others.to_vec();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), others.len());
    }

    #[test]
    fn the_counter_layout_is_fixed() {
        // Purpose 6 in the top byte, step bits 32..40 below it, sample bits 32..48 below that.
        let mut stream = Stream::new(0x0123_4567_89ab_cdef, Purpose::Noise, 0x12_0000_0005, 0x3456_0000_0007);
        let expected = philox4x32([0, 7, 5, 0x0612_3456], [0x89ab_cdef, 0x0123_4567]);
        assert_eq!([stream.u32(), stream.u32(), stream.u32(), stream.u32()], expected);
        assert_eq!(stream.u32(), philox4x32([1, 7, 5, 0x0612_3456], [0x89ab_cdef, 0x0123_4567])[0]);
    }

    #[test]
    fn uniform_and_normal_have_their_moments() {
        let mut stream = Stream::new(11, Purpose::Noise, 0, 0);
        let n = 100_000;
        let uniform: Vec<f64> = (0..n).map(|_| f64::from(stream.uniform())).collect();
        assert!(uniform.iter().all(|u| (0.0..1.0).contains(u)));
        assert!((uniform.iter().sum::<f64>() / n as f64 - 0.5).abs() < 0.005);
        let normal: Vec<f64> = (0..n).map(|_| f64::from(stream.normal())).collect();
        let moment = |k: i32| normal.iter().map(|z| z.powi(k)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 0.015, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!(moment(3).abs() < 0.05, "skew {}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.15, "kurtosis {}", moment(4));
    }

    #[test]
    fn a_filled_slice_is_the_sequence_of_single_draws() {
        let mut one = Stream::new(1, Purpose::Noise, 1, 1);
        let mut many = one.clone();
        let mut out = [0.0; 7];
        many.fill_normal(&mut out);
        assert!(out.iter().all(|&z| z == one.normal()));
        assert_eq!(one.normal(), many.normal());
    }

    #[test]
    fn below_is_uniform_and_handles_the_borders() {
        let mut stream = Stream::new(5, Purpose::Timestep, 0, 0);
        let mut counts = [0u32; 6];
        for _ in 0..60_000 {
            counts[stream.below(6) as usize] += 1;
        }
        assert!(counts.iter().all(|&count| (9_600..10_400).contains(&count)), "{counts:?}");
        assert_eq!((stream.below(1), stream.below(0)), (0, 0));
        assert!((0..100).all(|_| stream.below(u64::MAX) < u64::MAX));
    }

    #[test]
    fn chance_keeps_its_ends() {
        let mut stream = Stream::new(5, Purpose::LabelDrop, 0, 0);
        assert!((0..1000).all(|_| !stream.chance(0.0)));
        assert!((0..1000).all(|_| stream.chance(1.0)));
        let hits = (0..10_000).filter(|_| stream.chance(0.1)).count();
        assert!((880..1120).contains(&hits), "{hits}");
    }

    #[test]
    fn a_permutation_is_one_and_depends_on_seed_and_epoch() {
        let order = permutation(3, 0, 1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_eq!(order, permutation(3, 0, 1000));
        assert_ne!(order, permutation(3, 1, 1000));
        assert_ne!(order, permutation(4, 0, 1000));
        assert_eq!(permutation(3, 0, 0), Vec::<usize>::new());
    }
}
