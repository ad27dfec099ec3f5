//! Permutations as NumPy's legacy `RandomState` draws them, so that subsets are the ones other tools evaluate.

/// Words of the generator's state.
const STATE: usize = 624;
/// Distance of the words that are mixed.
const MIDDLE: usize = 397;

/// The Mersenne Twister with 32-bit words.
///
/// # Source
/// Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998); seeded as `init_genrand` of their 2002 code.
#[derive(Clone, Debug)]
pub struct Mt19937 {
    state: [u32; STATE],
    next: usize,
}

impl Mt19937 {
    /// As `RandomState(seed)`.
    pub fn new(seed: u32) -> Self {
        let mut state = [seed; STATE];
        for i in 1..STATE {
            let last = state[i - 1];
            state[i] = (last ^ (last >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, next: STATE }
    }

    /// A uniform word.
    pub fn u32(&mut self) -> u32 {
        if self.next == STATE {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9D2C_5680;
        word ^= (word << 15) & 0xEFC6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        for i in 0..STATE {
            let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE] & 0x7FFF_FFFF);
            let odd = if mixed & 1 == 1 { 0x9908_B0DF } else { 0 };
            self.state[i] = self.state[(i + MIDDLE) % STATE] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// A uniform number from 0 to `max`, itself included: masked words, those above `max` thrown away.
    fn up_to(&mut self, max: u32) -> u32 {
        if max == 0 {
            return 0;
        }
        let mask = u32::MAX >> max.leading_zeros();
        loop {
            let value = self.u32() & mask;
            if value <= max {
                return value;
            }
        }
    }

    /// As `permutation(n)`; its first `k` numbers are `choice(n, k, replace=False)`.
    pub fn permutation(&mut self, n: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n).collect();
        for i in (1..n).rev() {
            let other = self.up_to(i);
            order.swap(i as usize, other as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_published_generator() {
        // The 10,000th word of seed 5489, as the C++ standard requires of mt19937.
        let mut random = Mt19937::new(5489);
        let last = (0..10_000).map(|_| random.u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn permutations_are_numpys() {
        // numpy.random.RandomState(2020).permutation(10), twice, and .permutation(1)
        let mut random = Mt19937::new(2020);
        assert_eq!(random.permutation(10), NUMPY[0]);
        assert_eq!(random.permutation(10), NUMPY[1]);
        assert_eq!(random.permutation(1), [0]);
    }

    const NUMPY: [[u32; 10]; 2] = [[2, 4, 9, 1, 5, 7, 6, 3, 8, 0], [5, 7, 6, 4, 3, 1, 2, 8, 9, 0]];
}
