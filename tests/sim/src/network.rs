//! The network between brokers: who reaches whom, how late, and what arrives.

use std::collections::{BTreeMap, BTreeSet};

use crate::rng::Rng;

/// Microseconds.
pub(crate) type Time = u64;

#[derive(Default)]
pub(crate) struct Network {
    /// Directed: what the first says does not reach the second.
    cut: BTreeSet<(u64, u64)>,
    pub loss_permille: u64,
    pub duplicate_permille: u64,
    pub flip_permille: u64,
    /// Out of ten thousand frames, some are very late.
    pub late_permille: u64,
    pub counts: BTreeMap<&'static str, u64>,
}

impl Network {
    pub fn count(&mut self, fault: &'static str) {
        *self.counts.entry(fault).or_insert(0) += 1;
    }

    pub fn heal(&mut self) {
        self.cut.clear();
        (self.loss_permille, self.duplicate_permille, self.flip_permille, self.late_permille) = (0, 0, 0, 0);
    }

    pub fn split(&mut self, rng: &mut Rng, nodes: &[u64]) {
        self.cut.clear();
        match rng.below(4) {
            0 => {
                self.count("isolate one");
                let one = rng.pick(nodes);
                self.cut_between(&[one], nodes, true);
            }
            1 => {
                self.count("split in two");
                let (a, b): (Vec<u64>, Vec<u64>) = nodes.iter().copied().partition(|_| rng.below(2) == 0);
                self.cut_between(&a, &b, true);
            }
            2 => {
                self.count("one way");
                let one = rng.pick(nodes);
                if rng.below(2) == 0 {
                    self.cut_between(&[one], nodes, false);
                } else {
                    self.cut_between(nodes, &[one], false);
                }
            }
            _ => {
                self.count("partial");
                for _ in 0..=rng.below(2) {
                    let (a, b) = (rng.pick(nodes), rng.pick(nodes));
                    self.cut_between(&[a], &[b], true);
                }
            }
        }
    }

    fn cut_between(&mut self, a: &[u64], b: &[u64], both: bool) {
        for (x, y) in a.iter().flat_map(|x| b.iter().map(move |y| (*x, *y))).filter(|(x, y)| x != y) {
            self.cut.insert((x, y));
            if both {
                self.cut.insert((y, x));
            }
        }
    }

    pub fn reaches(&self, from: u64, to: u64) -> bool {
        !self.cut.contains(&(from, to))
    }

    /// When copies of a frame arrive; none when it is lost.
    pub fn arrivals(&mut self, rng: &mut Rng, from: u64, to: u64) -> Vec<Time> {
        if !self.reaches(from, to) {
            return Vec::new();
        }
        if rng.permille(self.loss_permille) {
            self.count("loss");
            return Vec::new();
        }
        let mut delays = vec![rng.between(100, 2_000)];
        if rng.permille(self.late_permille) {
            self.count("delay");
            delays[0] += rng.between(5_000, 300_000);
        }
        if rng.permille(self.duplicate_permille) {
            self.count("duplicate");
            delays.push(rng.between(100, 50_000));
        }
        delays
    }
}
