//! As `mutants.rs`, for the world of whole shards: every deliberate fault of the real driver must be found, and some of Raft's
//! boundary and of the store.
//!
//! With the feature `mutants` only: `cargo test -p flumen-sim --features mutants --test shard_mutants`. `MUTANT=<name>` tries one.

use flumen_broker::mutant::{MUTANTS, become_mutant};
use flumen_sim::{Settings, shards};

/// What a fault may take to be found.
const SEEDS_MAX: u64 = 2_000;
const WORDS_MAX: usize = 200;

fn failure(seed: u64) -> Option<String> {
    shards::run(Settings { seed, mutant: None }).failure
}

/// The first seed that finds the fault which `become_it` gives or takes. One that fails without it finds something else, and
/// the run of shards without faults is there for that.
fn caught(become_it: impl Fn(bool)) -> Option<(u64, String)> {
    (0..SEEDS_MAX).find_map(|seed| {
        become_it(true);
        let found = failure(seed);
        become_it(false);
        let what = found.filter(|_| failure(seed).is_none())?;
        Some((seed, what.chars().take(WORDS_MAX).collect()))
    })
}

#[test]
fn every_mutant_is_caught() {
    let wanted = std::env::var("MUTANT").ok();
    let is_wanted = |name: &String| wanted.as_ref().is_none_or(|wanted| wanted == name);
    let mut outcomes = Vec::new();
    for mutant in MUTANTS {
        let name = format!("{mutant:?}");
        if is_wanted(&name) {
            outcomes.push((name, caught(|has| become_mutant(has.then_some(mutant)))));
        }
    }
    let of_raft = [flumen_raft::mutant::Mutant::ServesEarly, flumen_raft::mutant::Mutant::ForgetsVote];
    for mutant in of_raft {
        let name = format!("raft {mutant:?}");
        if is_wanted(&name) {
            let become_mutant = flumen_raft::mutant::become_mutant;
            outcomes.push((name, caught(|has| become_mutant(has.then_some(mutant)))));
        }
    }
    let of_storage =
        [flumen_storage::mutant::Mutant::AcknowledgesEarly, flumen_storage::mutant::Mutant::ForgetsProducers];
    for mutant in of_storage {
        let name = format!("storage {mutant:?}");
        if is_wanted(&name) {
            let become_mutant = flumen_storage::mutant::become_mutant;
            outcomes.push((name, caught(|has| become_mutant(has.then_some(mutant)))));
        }
    }
    let mut missed = Vec::new();
    for (name, outcome) in outcomes {
        match outcome {
            Some((seed, what)) => println!("{name}: caught by seed {seed}: {what}"),
            None => missed.push(name),
        }
    }
    assert!(missed.is_empty(), "not caught within {SEEDS_MAX} seeds: {missed:?}");
}
