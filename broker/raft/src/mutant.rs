//! Deliberate faults of this boundary, one at a time, by which the simulation is tested (`tests/sim/tests/mutants.rs`).
//!
//! Only with the feature `mutants`, which nothing that keeps data turns on: without it `is` is a constant, and every place
//! that asks is compiled as if it did not.

#![cfg_attr(not(feature = "mutants"), allow(dead_code, reason = "without the feature nobody makes one"))]

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// Messages leave before what they speak of is on the disk.
    SendsEarly,
    /// A vote is given and not stored.
    ForgetsVote,
    /// A new term is not stored.
    ForgetsTerm,
    /// Leads before an entry of its own term is committed.
    ServesEarly,
    /// Entries count as stored when they are handed out.
    CountsUnstored,
    /// A leader confirms reads without asking anybody.
    ConfirmsAlone,
    /// After a restart everything found on the disk counts as committed, whoever else votes.
    CommitsAllAtStart,
    /// Entries that replace others have the terms of those, as far as memory knows.
    KeepsReplacedTerms,
}

#[cfg(feature = "mutants")]
pub const MUTANTS: [Mutant; 8] = [
    Mutant::SendsEarly,
    Mutant::ForgetsVote,
    Mutant::ForgetsTerm,
    Mutant::ServesEarly,
    Mutant::CountsUnstored,
    Mutant::ConfirmsAlone,
    Mutant::CommitsAllAtStart,
    Mutant::KeepsReplacedTerms,
];

#[cfg(feature = "mutants")]
thread_local! {
    static PRESENT: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// From now on, on this thread, every group has this fault.
#[cfg(feature = "mutants")]
pub fn become_mutant(mutant: Option<Mutant>) {
    PRESENT.set(mutant);
}

#[cfg(feature = "mutants")]
pub(crate) fn is(mutant: Mutant) -> bool {
    PRESENT.get() == Some(mutant)
}

#[cfg(not(feature = "mutants"))]
pub(crate) const fn is(_: Mutant) -> bool {
    false
}
