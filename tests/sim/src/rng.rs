//! Randomness from a seed: the generator of the simulated disk, with what a network asks of it.

use flumen_io::simulated::Random;

pub(crate) struct Rng(Random);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        // Neighbouring seeds begin far from each other.
        Rng(Random::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678))
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0.below(bound)
    }

    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    pub fn permille(&mut self, chance: u64) -> bool {
        self.below(1000) < chance
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
