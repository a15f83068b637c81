//! Runs without an anomaly, in which every kind of fault happened, and which can be repeated.

use std::collections::BTreeMap;

use flumen_sim::{FAULTS, Settings, run};

const SEEDS: u64 = 500;

#[test]
fn five_hundred_runs_find_nothing_and_every_fault_happens() {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut simulated_ms, mut acknowledged) = (0, 0);
    for seed in 0..SEEDS {
        let report = run(Settings { seed, mutant: None });
        assert_eq!(report.failure, None, "repeat with: flumen-sim {seed}");
        for (fault, count) in report.counts {
            *counts.entry(fault).or_default() += count;
        }
        simulated_ms += report.simulated_ms;
        acknowledged += report.acknowledged;
        assert!(report.elections > 0 && report.commits > 0);
    }
    println!("{} s simulated, {acknowledged} acknowledged, {counts:?}", simulated_ms / 1000);
    for fault in FAULTS {
        assert!(counts.contains_key(fault), "{fault} never happened");
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..10 {
        let (a, b) = (run(Settings { seed, mutant: None }), run(Settings { seed, mutant: None }));
        assert_eq!((a.trace, a.history), (b.trace, b.history), "seed {seed}");
    }
    assert_ne!(run(Settings { seed: 1, mutant: None }).trace, run(Settings { seed: 2, mutant: None }).trace);
}
