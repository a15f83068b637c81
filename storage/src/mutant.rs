//! Deliberate faults of the store, one at a time, by which the crash tests are tested (`crash-test/tests/mutants.rs`).
//!
//! Only with the feature `mutants`, which nothing that keeps data turns on: without it `is` is a constant, and every place
//! that asks is compiled as if it did not.

#![cfg_attr(not(feature = "mutants"), allow(dead_code, reason = "without the feature nobody makes one"))]

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    SkipsSegmentSync,
    SkipsDirectorySync,
    SkipsNameOfFormerRun,
    SkipsSyncOfRecovery,
    SkipsSyncBeforeRename,
    AcknowledgesEarly,
    IgnoresFailedWrite,
    IgnoresFailedSync,
    RetriesFailedSync,
    ForgetsVote,
    ForgetsLogStart,
    ForgetsEpochs,
    ForgetsDeletion,
    LosesProducerSnapshot,
    TakesForeignSnapshot,
    SnapshotsWithoutSync,
    RetiresWithEntries,
    CutsAtBadChecksum,
    TakesTornCommit,
    KeepsWalId,
    ForgetsPowerLoss,
    CutsInTheWrongPlace,
    KeepsUncountedEnd,
    WritesOverBeforeCutIsSafe,
    RemovesBeforeRecordIsSafe,
    LeavesOsLaneBehind,
    TrustsIndex,
    CompactsWithoutSync,
    DropsNewestOfKey,
    ForgetsProducers,
    CountsBeforeSync,
    AnswersBeforeItCounts,
    ForgetsMembers,
    ForgetsBeginning,
    ReceivesWithoutSync,
}

/// All of them.
pub const MUTANTS: [Mutant; 35] = [
    Mutant::SkipsSegmentSync,
    Mutant::SkipsDirectorySync,
    Mutant::SkipsNameOfFormerRun,
    Mutant::SkipsSyncOfRecovery,
    Mutant::SkipsSyncBeforeRename,
    Mutant::AcknowledgesEarly,
    Mutant::IgnoresFailedWrite,
    Mutant::IgnoresFailedSync,
    Mutant::RetriesFailedSync,
    Mutant::ForgetsVote,
    Mutant::ForgetsLogStart,
    Mutant::ForgetsEpochs,
    Mutant::ForgetsDeletion,
    Mutant::LosesProducerSnapshot,
    Mutant::TakesForeignSnapshot,
    Mutant::SnapshotsWithoutSync,
    Mutant::RetiresWithEntries,
    Mutant::CutsAtBadChecksum,
    Mutant::TakesTornCommit,
    Mutant::KeepsWalId,
    Mutant::ForgetsPowerLoss,
    Mutant::CutsInTheWrongPlace,
    Mutant::KeepsUncountedEnd,
    Mutant::WritesOverBeforeCutIsSafe,
    Mutant::RemovesBeforeRecordIsSafe,
    Mutant::LeavesOsLaneBehind,
    Mutant::TrustsIndex,
    Mutant::CompactsWithoutSync,
    Mutant::DropsNewestOfKey,
    Mutant::ForgetsProducers,
    Mutant::CountsBeforeSync,
    Mutant::AnswersBeforeItCounts,
    Mutant::ForgetsMembers,
    Mutant::ForgetsBeginning,
    Mutant::ReceivesWithoutSync,
];

#[cfg(feature = "mutants")]
thread_local! {
    static PRESENT: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// From now on, on this thread, the store has this fault. A simulated life is one thread.
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
