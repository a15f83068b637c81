//! Which partitions each request touches: drawn once, replayed by every connection from a place of its own.
//!
//! Pure given the seed, any thread.

use clap::ValueEnum;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Keyed {
    /// One partition after the other, as a sticky partitioner spreads them.
    None,
    /// 10,000 equally likely keys.
    Uniform,
    /// 10,000 keys with Zipf exponent 0.99.
    Zipf,
}

const KEYS: usize = 10_000;
const ZIPF_EXPONENT: f64 = 0.99;
/// Requests before the plan repeats; prime, so that connections starting at different places do not fall in step.
const REQUESTS: usize = 8_191;
/// Draws per wanted partition before a request is left smaller: zipf over few partitions may never fill it.
const DRAWS_MAX: usize = 64;

pub struct Plan {
    requests: Vec<Vec<u32>>,
}

impl Plan {
    /// For the partitions with these numbers.
    pub fn new(keyed: Keyed, numbers: &[u32], per_request: usize, seed: u64) -> Self {
        let partitions = numbers.len();
        let per_request = per_request.clamp(1, partitions);
        let mut rng = StdRng::seed_from_u64(seed);
        if keyed == Keyed::None {
            let requests = (0..partitions)
                .map(|r| (0..per_request).map(|i| numbers[(r * per_request + i) % partitions]).collect())
                .collect();
            return Self { requests };
        }
        let key_partition: Vec<u32> = (0..KEYS).map(|_| rng.random_range(0..partitions as u32)).collect();
        let mut cumulative = Vec::with_capacity(KEYS);
        let mut sum = 0.0;
        for rank in 1..=KEYS {
            sum += if keyed == Keyed::Zipf { (rank as f64).powf(-ZIPF_EXPONENT) } else { 1.0 };
            cumulative.push(sum);
        }
        let mut seen = vec![usize::MAX; partitions];
        let requests = (0..REQUESTS)
            .map(|r| {
                let mut chosen = Vec::with_capacity(per_request);
                for _ in 0..per_request * DRAWS_MAX {
                    let x = rng.random_range(0.0..sum);
                    let key = cumulative.partition_point(|c| *c < x).min(KEYS - 1);
                    let p = key_partition[key];
                    if seen[p as usize] != r {
                        seen[p as usize] = r;
                        chosen.push(numbers[p as usize]);
                        if chosen.len() == per_request {
                            break;
                        }
                    }
                }
                chosen
            })
            .collect();
        Self { requests }
    }

    /// The `turn`-th request of a connection.
    pub fn partitions(&self, connection: usize, turn: u64) -> &[u32] {
        let n = self.requests.len() as u64;
        // A large odd stride spreads the connections over the plan.
        let at = (connection as u64 * 2_654_435_761 + turn) % n;
        &self.requests[at as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_partition_gets_its_turn_and_none_twice_in_a_request() {
        let numbers: Vec<u32> = (0..100).collect();
        for keyed in [Keyed::None, Keyed::Uniform, Keyed::Zipf] {
            let plan = Plan::new(keyed, &numbers, 20, 1);
            let mut hit = [0u64; 100];
            for turn in 0..10_000 {
                let mut p = plan.partitions(3, turn).to_vec();
                assert_eq!(p.len(), 20, "{keyed:?}");
                p.iter().for_each(|p| hit[*p as usize] += 1);
                p.sort_unstable();
                p.dedup();
                assert_eq!(p.len(), 20);
            }
            assert!(hit.iter().all(|h| *h > 0), "{keyed:?}");
        }
    }

    #[test]
    fn plans_repeat_by_seed() {
        let a = Plan::new(Keyed::Zipf, &[3, 4, 9, 11, 12, 20], 5, 9);
        let b = Plan::new(Keyed::Zipf, &[3, 4, 9, 11, 12, 20], 5, 9);
        assert_eq!(a.requests, b.requests);
    }

    #[test]
    fn more_partitions_per_request_than_there_are() {
        assert_eq!(Plan::new(Keyed::None, &[8], 20, 1).partitions(7, 5), &[8]);
    }
}
