//! Crash tests that never fail prove nothing: every deliberate fault of the store must be found.
//!
//! With the feature `mutants` only, in a build of its own: `cargo test -p flumen-crash-test --features mutants --test
//! mutants`. `MUTANT=<name>` tries one.

use std::sync::atomic::{AtomicUsize, Ordering};

use flumen_crash_test::{Life, RECEIVES_FROM, REPLICATED_FROM};
use flumen_storage::mutant::{MUTANTS, Mutant, become_mutant};

const CRASHES: u64 = 8;

/// What a fault may take to be found.
const SEEDS_MAX: u64 = 3_000;

const THREADS: usize = 2;

#[test]
fn every_mutant_is_caught() {
    let wanted = std::env::var("MUTANT").ok();
    let next = AtomicUsize::new(0);
    // The panics of mutants are what is looked for.
    std::panic::set_hook(Box::new(|_| {}));
    let missed: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    let mut missed = Vec::new();
                    while let Some(mutant) = MUTANTS.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let name = format!("{mutant:?}");
                        if wanted.as_ref().is_some_and(|wanted| *wanted != name) {
                            continue;
                        }
                        become_mutant(Some(*mutant));
                        // Those of what is received show nowhere else.
                        let receives = matches!(mutant, Mutant::ReceivesWithoutSync);
                        let from = if receives { RECEIVES_FROM } else { REPLICATED_FROM };
                        let seeds = from..from + SEEDS_MAX;
                        let caught = seeds.into_iter().find_map(|seed| Life::run(seed, CRASHES, false).err());
                        become_mutant(None);
                        match caught {
                            Some(failure) => println!(
                                "{name}: caught by seed {}: {}",
                                failure.seed,
                                failure.reason.lines().next().unwrap_or_default()
                            ),
                            None => missed.push(name),
                        }
                    }
                    missed
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|_| vec!["a thread".to_owned()]))
            .collect()
    });
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not caught within {SEEDS_MAX} seeds: {missed:?}");
}
