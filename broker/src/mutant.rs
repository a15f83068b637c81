//! Deliberate faults of the driver of replicated partitions, one at a time, by which the simulation is tested
//! (`tests/sim/tests/mutants.rs`).
//!
//! Only with the feature `mutants`, which nothing that keeps data turns on: without it `is` is a constant, and every place
//! that asks is compiled as if it did not.

#![cfg_attr(not(feature = "mutants"), allow(dead_code, reason = "without the feature nobody makes one"))]

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// acks=all is answered when the leader's own disk has it.
    AcknowledgesBeforeMajority,
    /// What was replaced counts on.
    KeepsUncommitted,
    /// Raft is told that entries are stored when they are handed to the log.
    ReportsBeforeStored,
    /// Readers get what is in the log, committed or not.
    ServesUncommitted,
    /// A new leader takes the end of its log from when it led before.
    KeepsOffsets,
    /// A replica that begins anew knows no producers.
    ForgetsProducersOfBeginning,
    /// A batch that is known is answered before it is committed.
    AnswersDuplicatesAtOnce,
    /// Whoever waits goes on waiting when the leadership is gone, and is answered as the offset passes by.
    KeepsWaiters,
    /// A new replica takes part with the members that the metadata names.
    JoinsWithoutAsking,
    /// Votes of topics that acknowledge from the kernel's memory are lost with it.
    LeavesVotesToTheKernel,
}

/// All of them.
pub const MUTANTS: [Mutant; 10] = [
    Mutant::AcknowledgesBeforeMajority,
    Mutant::KeepsUncommitted,
    Mutant::ReportsBeforeStored,
    Mutant::ServesUncommitted,
    Mutant::KeepsOffsets,
    Mutant::ForgetsProducersOfBeginning,
    Mutant::AnswersDuplicatesAtOnce,
    Mutant::KeepsWaiters,
    Mutant::JoinsWithoutAsking,
    Mutant::LeavesVotesToTheKernel,
];

#[cfg(feature = "mutants")]
thread_local! {
    static PRESENT: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// From now on, on this thread, the driver has this fault. A simulated cluster is one thread.
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
