//! A simulation that never fails proves nothing: every deliberate fault of the boundary and of the shell must be found.
//!
//! With the feature `mutants` only, in a build of its own: `cargo test -p flumen-sim --features mutants --test mutants`.
//! `MUTANT=<name>` tries one.

use flumen_raft::mutant::{MUTANTS, become_mutant};
use flumen_sim::{DRIVER_MUTANTS, DriverMutant, Settings, run};

/// What a fault may take to be found.
const SEEDS_MAX: u64 = 10_000;

fn caught(mutant: Option<DriverMutant>) -> Option<(u64, String)> {
    (0..SEEDS_MAX).find_map(|seed| {
        let outcome = std::panic::catch_unwind(|| run(Settings { seed, mutant }).failure);
        match outcome {
            Ok(failure) => failure.map(|what| (seed, what)),
            Err(panic) => {
                let what = panic.downcast_ref::<String>().cloned();
                Some((seed, format!("panic: {}", what.unwrap_or_else(|| "of the boundary".to_owned()))))
            }
        }
    })
}

#[test]
fn every_mutant_is_caught() {
    let wanted = std::env::var("MUTANT").ok();
    let is_wanted = |name: &String| wanted.as_ref().is_none_or(|wanted| wanted == name);
    // The panics of mutants are what is looked for.
    std::panic::set_hook(Box::new(|_| {}));
    let mut outcomes = Vec::new();
    for mutant in MUTANTS {
        let name = format!("{mutant:?}");
        if is_wanted(&name) {
            become_mutant(Some(mutant));
            outcomes.push((name, caught(None)));
            become_mutant(None);
        }
    }
    for mutant in DRIVER_MUTANTS {
        let name = format!("{mutant:?}");
        if is_wanted(&name) {
            outcomes.push((name, caught(Some(mutant))));
        }
    }
    let _ = std::panic::take_hook();
    let mut missed = Vec::new();
    for (name, outcome) in outcomes {
        match outcome {
            Some((seed, what)) => println!("{name}: caught by seed {seed}: {what}"),
            None => missed.push(name),
        }
    }
    assert!(missed.is_empty(), "not caught within {SEEDS_MAX} seeds: {missed:?}");
}
